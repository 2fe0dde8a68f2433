"""Weights and buffers written in every way there is: no call is answered by the model that was."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch.func import functional_call

import dllm_compile

from . import models
from .callers import (
    EQUAL,
    EXACT,
    FORMS,
    METHODS,
    NEUTRAL,
    TOLERANCE,
    Whole,
    build,
    fill,
    off,
    partial,
    readable,
    start,
    steps,
)
from .grids import in_turn

pytestmark = [pytest.mark.shares_graphs, pytest.mark.usefixtures("no_gradients_no_warnings")]

LOSSY = {name: METHODS[name] for name in ("dllm-cache", "dual", "sparse", "dyllm")}
ALL = {**EQUAL, **LOSSY}
Write = Callable[[Any], None]


def noise(tensor: torch.Tensor) -> torch.Tensor:
    return 0.1 * torch.randn(tensor.shape, dtype=tensor.dtype)


def data_add(model: Any) -> None:
    for weight in model.layers.parameters():
        weight.data.add_(noise(weight))


def data_add_one(model: Any) -> None:
    weight = model.layers[1].up.weight
    weight.data.add_(noise(weight))


def data_add_last_bias(model: Any) -> None:
    weight = model.layers[2].down.bias
    weight.data.add_(noise(weight))


def data_copy(model: Any) -> None:
    weight = model.layers[2].qkv.weight
    weight.data.copy_(weight.data.flip(0))


def data_set(model: Any) -> None:
    weight = model.layers[1].out.weight
    weight.data = weight.data + noise(weight)


def vector(model: Any) -> None:
    flat = torch.nn.utils.parameters_to_vector(model.layers.parameters())
    torch.nn.utils.vector_to_parameters(flat + noise(flat), model.layers.parameters())


def by_numpy(model: Any) -> None:
    view = model.layers[1].down.weight.detach().numpy()
    view += noise(model.layers[1].down.weight).numpy()


def by_storage(model: Any) -> None:
    weight = model.layers[1].qkv.weight
    place = weight.untyped_storage(), weight.storage_offset(), weight.shape, weight.stride()
    weight.new_empty(0).data.set_(*place).copy_(weight + noise(weight))


def replaced(model: Any) -> None:
    for layer in model.layers:
        layer.down.weight = torch.nn.Parameter(layer.down.weight + noise(layer.down.weight))


def loaded(model: Any) -> None:
    model.layers.load_state_dict({name: t + noise(t) for name, t in model.layers.state_dict().items()})


def assigned(model: Any) -> None:
    model.layers.load_state_dict({name: t + noise(t) for name, t in model.layers.state_dict().items()}, assign=True)


def buffer_data(model: Any) -> None:
    model.layers[1].gain.data.mul_(1.1)


def buffer_in_place(model: Any) -> None:
    model.layers[2].gain.mul_(1.1)


def buffer_set(model: Any) -> None:
    model.layers[1].gain = model.layers[1].gain * 1.1


def head(model: Any) -> None:
    model.head.weight.data.add_(noise(model.head.weight))


def embedding(model: Any) -> None:
    model.embed.weight.data.add_(noise(model.embed.weight))


def scale(model: Any) -> None:
    model.scale.data.mul_(1.2)


IN_LAYERS: tuple[Write, ...] = (
    *(data_add, data_add_one, data_add_last_bias, data_copy, data_set, vector, by_numpy, by_storage),
    *(replaced, loaded, assigned, buffer_data, buffer_in_place, buffer_set),
)
AROUND: tuple[Write, ...] = (head, embedding, scale)


def errors(name: str, form: str, writes: tuple[Write, ...], before: int) -> dict[str, list[float]]:
    """For each write behind ``before`` calls of a sequence: the same ids again, then a step on; those that are off."""
    model = build(form)
    call = models.compiled(model, **ALL[name])
    wrong: dict[str, list[float]] = {}
    torch.manual_seed(0)
    for number, write in enumerate(writes):
        for again in (True, False):  # the same ids first, or the next ones at once
            x = start(seed=2 + 2 * number + again)
            for _ in range(before):
                x, shown = fill(call(x), x), x
            x = shown if again else x
            write(model)
            got = [off(call(x), model(x), readable(x))]
            if again and name in EQUAL:
                x = fill(model(x), x)
                got.append(off(call(x), model(x), readable(x)))
            if max(got) > TOLERANCE:
                wrong.setdefault(write.__name__, []).extend(got)
    return wrong


FIRST, MIDDLE = 1, 3  # calls before the write
CASES = [("exact", FIRST), ("neutral", FIRST), ("dual", FIRST), ("exact", MIDDLE), *((name, MIDDLE) for name in LOSSY)]


@pytest.mark.parametrize(("case", "form"), in_turn(CASES, FORMS))
def test_a_write_in_a_layer_is_seen_at_the_next_call(case: tuple[str, int], form: str) -> None:
    name, before = case
    assert not errors(name, form, IN_LAYERS, before)


@pytest.mark.parametrize(
    ("name", "before", "form"),
    [("exact", FIRST, "whole"), ("exact", MIDDLE, "alone"), ("dllm-cache", MIDDLE, "whole"), ("dual", MIDDLE, "whole")],
)
def test_a_write_around_the_layers_is_seen_at_the_next_call(name: str, before: int, form: str) -> None:
    assert not errors(name, form, AROUND, before)


@pytest.mark.parametrize(
    ("name", "form", "collect"), [("exact", "whole", True), ("exact", "alone", False), ("dual", "whole", False)]
)
def test_parameters_replaced_again_and_again(name: str, form: str, collect: bool) -> None:
    model = build(form)
    call = models.compiled(model, **ALL[name])
    x = start()
    wrong = []
    torch.manual_seed(0)
    for turn in range(12):
        got = off(call(x), model(x), readable(x))
        if got > TOLERANCE:
            wrong.append((turn, got))
        for layer in model.layers:
            layer.qkv.weight = torch.nn.Parameter(layer.qkv.weight + noise(layer.qkv.weight))
            layer.up.weight = torch.nn.Parameter(layer.up.weight + noise(layer.up.weight))
        if collect and turn % 3 == 0:
            gc.collect()
    assert not wrong


@pytest.mark.parametrize("name", ["exact", "neutral", "dllm-cache"])
def test_models_that_come_and_go_are_not_mistaken_for_each_other(name: str) -> None:
    x = start()
    wrong = []
    for seed in range(12):
        model = build(seed=seed)
        got = off(models.compiled(model, **ALL[name])(x), model(x), readable(x))
        if got > TOLERANCE:
            wrong.append((seed, got))
        del model
    assert not wrong


# -- two sets of weights ----------------------------------------------------------------------------------------------


def plain_weights(seed: int) -> dict[str, torch.Tensor]:
    """Weights and buffers as plain tensors; the embedding is the same in all sets."""
    weights = {name: tensor.detach().clone() for name, tensor in build(seed=seed).state_dict().items()}
    return {**weights, **{f"embed.{n}": t.detach().clone() for n, t in build().embed.state_dict().items()}}


def of_a_function(model: Whole, options: dict[str, Any]) -> Callable[..., torch.Tensor]:
    def run(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = functional_call(model, weights, (x,))
        return logits

    compiled: Callable[..., torch.Tensor] = models.compiled(run, **options)  # type: ignore[arg-type]
    return compiled


def of_a_module(model: Whole, options: dict[str, Any]) -> Callable[..., torch.Tensor]:
    call: Any = torch.compile(model, backend="dllm", options={"lowering": "eager", "mask_id": models.MASK, **options})

    def run(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = functional_call(call, {f"_orig_mod.{n}": t for n, t in weights.items()}, (x,))
        return logits

    return run


@pytest.mark.parametrize(
    ("name", "way"), [("exact", of_a_function), ("neutral", of_a_module), ("neutral-dual", of_a_function)]
)
def test_two_sets_of_plain_tensors_take_turns(name: str, way: Any) -> None:
    model, sets = build(), [plain_weights(0), plain_weights(7)]
    run = way(model, EQUAL[name])
    xs = [start(), start()]
    for _ in range(6):
        for i in (0, 1, 1):  # a repeat of one set's call is none of the other's
            want = functional_call(model, sets[i], (xs[i],))
            assert off(run(sets[i], xs[i]), want, readable(xs[i])) < TOLERANCE
        xs = [fill(functional_call(model, each, (x,)), x) for each, x in zip(sets, xs, strict=True)]


@pytest.mark.parametrize(
    ("name", "way"),
    [("dllm-cache", of_a_module), ("dual", of_a_function), ("sparse", of_a_module), ("dyllm", of_a_function)],
)
def test_two_sets_of_plain_tensors_cache_as_if_alone(name: str, way: Any) -> None:
    sets = [plain_weights(0), plain_weights(7)]
    alone: list[list[torch.Tensor]] = []
    for weights in sets:
        dllm_compile.reset()
        run, x = way(build(), LOSSY[name]), start()
        alone.append([])
        for _ in range(6):
            alone[-1].append(run(weights, x).clone())
            x = fill(alone[-1][-1], x)
    dllm_compile.reset()
    model = build()
    run, xs = way(model, LOSSY[name]), [start(), start()]
    for turn in range(6):
        for i in (0, 1):
            got = run(sets[i], xs[i]).clone()
            if not turn:
                assert off(got, functional_call(model, sets[i], (xs[i],)), readable(xs[i])) < TOLERANCE
            assert off(got, alone[i][turn], xs[i] == models.MASK) < TOLERANCE
            xs[i] = fill(got, xs[i])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("name", "middle"),
    [("exact", False), ("neutral", True), ("dllm-cache", False), ("dual", True), ("sparse", True), ("dyllm", False)],
)
def test_averaged_weights_swapped_in_and_back(name: str, form: str, middle: bool) -> None:
    model = build(form)
    call = models.compiled(model, **ALL[name])
    own = copy.deepcopy(model.state_dict())
    torch.manual_seed(0)
    average = {key: tensor + noise(tensor) for key, tensor in own.items()}
    x = start()
    for _ in range(2 if middle else 0):
        x = fill(call(x), x)
    assert off(call(x), model(x), readable(x)) < TOLERANCE or middle
    for weights in (average, own, average, own):
        for key, tensor in model.state_dict(keep_vars=True).items():
            tensor.data.copy_(weights[key])
        assert off(call(x), model(x), readable(x)) < TOLERANCE
        if middle:
            x = fill(model(x), x)


# -- libraries --------------------------------------------------------------------------------------------------------


def llama() -> Any:
    return models.build("llama", num_hidden_layers=2)


@pytest.mark.parametrize(("name", "middle"), [("exact", False), ("neutral", True), ("dllm-cache", True)])
def test_rotary_frequencies_written_in_place(name: str, middle: bool) -> None:
    model = llama()
    call = models.compiled(model, **ALL[name])
    x = start()
    for turn in range(3):
        for _ in range(2 if middle else 0):
            x = fill(call(x).logits, x)
        call(x)
        frequencies = model.model.rotary_emb.inv_freq
        frequencies.mul_(1.5) if turn % 2 else frequencies.data.mul_(0.5)
        assert off(call(x).logits, model(x).logits, readable(x)) < TOLERANCE


def adapted() -> Any:
    """A Llama with two adapters of peft, neither of them merged."""
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], bias="none")
    torch.manual_seed(3)
    model = peft.get_peft_model(llama(), config, "one")
    model.add_adapter("two", config)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data.normal_(std=0.3)
    return model.double().eval()


@pytest.mark.parametrize(("name", "middle"), [("exact", False), ("dllm-cache", True), ("dual", True)])
def test_adapters_merged_one_behind_the_other(name: str, middle: bool) -> None:
    model = adapted()
    call = models.compiled(model, **ALL[name])
    x = start()
    for adapter in ("one", "two", "one"):
        model.base_model.merge_adapter([adapter])
        assert off(call(x).logits, model(x).logits, readable(x)) < TOLERANCE
        for _ in range(2 if middle else 0):
            x = fill(call(x).logits, x)
        model.base_model.unmerge_adapter()


@pytest.mark.parametrize("name", ["exact", "dual"])
def test_adapters_written_switched_and_turned_off(name: str) -> None:
    model = adapted()
    call = models.compiled(model, **ALL[name])
    x = start()

    def right() -> bool:
        return off(call(x).logits, model(x).logits, readable(x)) < TOLERANCE

    assert right()
    model.set_adapter("two")
    assert right()
    for key, weight in model.named_parameters():
        if "lora_B.two" in key:
            weight.data.mul_(2)
    assert right()
    with model.disable_adapter():
        assert right()
    assert right()


@pytest.mark.parametrize("name", ["exact", "neutral", *LOSSY])
def test_nothing_written_nothing_dropped(name: str) -> None:
    """Looking for writes makes no write: the same ids are a repeat, and the next ones are a step of the sequence."""
    model = build()
    call = models.compiled(model, **ALL[name])
    x = start()
    for _ in range(4):
        logits = call(x).clone()
        call(x)
        x = fill(logits, x)
    if name in EQUAL:
        assert steps(model)["repeat"] == 4
    else:
        assert partial(model) + steps(model)["repeat"] >= 4


def test_options_of_the_tests_are_what_they_say() -> None:
    """Under ``EQUAL`` readable rows are eager's; under ``LOSSY`` those of partial steps are not."""
    for name, options in {"exact": EXACT, "neutral": NEUTRAL, **LOSSY}.items():
        dllm_compile.reset()
        model = build()
        call = models.compiled(model, **options)
        x, worst = start(), 0.0
        for _ in range(6):
            got = call(x).clone()
            worst = max(worst, off(got, model(x), readable(x)))
            x = fill(got, x)
        assert (worst < TOLERANCE) == (name not in LOSSY)
