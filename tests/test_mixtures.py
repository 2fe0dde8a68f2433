"""Blocks of experts that break a graph: a prepared model is one graph, equals eager, and is cached."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import dllm_compile
from dllm_compile import debug, generate, prepare
from dllm_compile.core.opaque import Form, is_opaque
from dllm_compile.prepare import names_of
from dllm_compile.runtime import unit_code

from . import loops, mixture_models, models
from .grids import in_turn
from .mixture_models import WIDTH, ByWhere, Mixture, Model, build
from .recorded_calls import Graph
from .under_way import under_way

PROMPT, RESPONSE, BLOCK = 9, 8, 4
NEUTRAL: dict[str, Any] = {"prompt_interval": 1, "response_interval": 1}
METHODS: dict[str, dict[str, Any]] = {
    "dual": {"method": "fast-dllm", "cache": "dual", "block_length": BLOCK},
    "dllm-cache": {"prompt_interval": 8, "response_interval": 4, "transfer_ratio": 0.5},
    "sparse-dllm": {"method": "sparse-dllm", "block_length": BLOCK},
    "dyllm": {"method": "dyllm", "saliency_threshold": 0.9, "full_steps": 1, "shift": False},
}


@pytest.fixture(autouse=True)
def _no_gradients_and_no_warnings() -> Iterator[None]:
    before = torch._dynamo.config.ignore_logging_functions
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield
    torch._dynamo.config.ignore_logging_functions = before


@cache
def ready(name: str, dtype: torch.dtype = torch.float64) -> Model:
    """A prepared model, for tests that change nothing of it: to prepare one takes Dynamo as long as to trace it."""
    return prepare(build(name, dtype))


def opaque(model: torch.nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if is_opaque(module)]


def denoised(model: torch.nn.Module, call: Callable[..., Any]) -> tuple[float, float]:
    """How far the logits of the masked rows are from eager at most: at the first step, and at the others."""
    apart: list[float] = []

    def logits(x: torch.Tensor) -> torch.Tensor:
        got: torch.Tensor = call(x)
        apart.append((got - model(x))[x == models.MASK].abs().max().item())
        return got

    x = models.start(PROMPT, RESPONSE)
    for _ in loops.llada(logits, x, PROMPT, steps=RESPONSE, block_length=BLOCK, mask_id=models.MASK):
        pass
    return apart[0], max(apart[1:])


GRID = in_turn(mixture_models.PUBLISHED, [torch.float64, torch.float32])


@pytest.mark.shares_graphs
@pytest.mark.parametrize("options", [NEUTRAL, {"method": "exact"}], ids=["neutral", "exact"])
@pytest.mark.parametrize(("name", "dtype"), GRID)
def test_a_prepared_model_is_one_graph_and_neutral_settings_equal_eager(
    name: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    model = ready(name, dtype)
    assert opaque(model) == [f"layers.{i}.block" for i in range(mixture_models.LAYERS)]
    assert max(denoised(model, models.compiled_loop(model, **options))) < (1e-9 if dtype == torch.float64 else 1e-4)
    assert dllm_compile.stats(model)["graphs_per_step"] == 1
    assert under_way().number == RESPONSE - 1


@pytest.mark.shares_graphs
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", mixture_models.PUBLISHED)
def test_experts_compute_the_rows_of_the_step_alone(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ready(name)
    call, widths = models.compiled_loop(model, **METHODS[method]), set()
    forward = Mixture.forward

    def spied(self: Mixture, x: torch.Tensor) -> Any:
        widths.add(x.shape[1])
        return forward(self, x)

    with monkeypatch.context() as patched, debug.steps() as ran:
        patched.setattr(Mixture, "forward", spied)
        x = models.start(PROMPT, RESPONSE)
        want = model(x)
        widths.clear()
        for step in range(RESPONSE):
            got = call(x)
            if step == 0:
                assert (got - want)[x == models.MASK].abs().max() < 1e-9
            x[:, PROMPT + step] = 5
    assert PROMPT + RESPONSE in widths
    assert min(widths) <= BLOCK + 1
    assert len(under_way().layers) >= mixture_models.LAYERS - 1
    assert len({each.name for each in ran}) > 1


@pytest.mark.parametrize(("name", "dtype"), GRID[:1])
def test_inductor_compiles_the_layers_once_with_the_blocks_as_calls(name: str, dtype: torch.dtype) -> None:
    """Of one model: how the blocks of the others are written is behind the calls, where Inductor does not look."""
    model, made = ready(name, dtype), []
    unit_code.LISTENERS.append(made.append)
    try:
        first, later = denoised(model, models.compiled_loop(model, lowering="inductor", **METHODS["dual"]))
    finally:
        unit_code.LISTENERS.remove(made.append)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    assert first < tolerance < later
    assert made == ["exact", "full", "exact", "block", "head", "head"]  # all layers share their code
    assert dllm_compile.stats(model)["graphs_per_step"] == 1


def test_generate_runs_a_prepared_model() -> None:
    model = prepare(build("split"))
    torch.nn.init.constant_(model.head.bias[models.MASK :], -99.0)
    prompt = models.start(PROMPT, RESPONSE)[:, :PROMPT]
    more: dict[str, Any] = {"gen_length": RESPONSE, "block_length": BLOCK, "mask_id": models.MASK}
    want = generate(model, prompt, **more)
    assert torch.equal(generate(model, prompt, method="exact", lowering="eager", **more), want)  # type: ignore[arg-type]


def test_half_precision_is_tried_in_float32_and_equals_eager() -> None:
    model = prepare(build("where", torch.bfloat16))
    assert len(opaque(model)) == mixture_models.LAYERS
    assert max(denoised(model, models.compiled_loop(model, **NEUTRAL))) < 0.2
    assert dllm_compile.stats(model)["graphs_per_step"] == 1


def test_experts_whose_weights_change_in_mid_sequence_are_computed_anew() -> None:
    model = prepare(build("where"))
    call = models.compiled_loop(model, **METHODS["dual"])
    x = models.start(PROMPT, RESPONSE)
    call(x)
    for step in range(2):
        x[:, PROMPT + step] = 5
        apart = (call(x) - model(x))[:, PROMPT : PROMPT + BLOCK][x[:, PROMPT : PROMPT + BLOCK] == models.MASK]
        assert (apart.abs().max() < 1e-9) == (step == 1)
        model.layers[1].block.experts[0].up.weight.mul_(1.5)


def test_flops_of_experts_are_counted_by_row() -> None:
    model = ready("where")
    models.compiled_loop(model, **METHODS["dual"])(models.start(PROMPT, RESPONSE))
    tokens, chosen, each = PROMPT + RESPONSE, mixture_models.CHOSEN, 3 * 2 * 24 * WIDTH
    layer = 2 * 4 * WIDTH**2 + 4 * tokens * WIDTH + chosen * each + 2 * WIDTH * mixture_models.EXPERTS
    whole = 2 * tokens * (mixture_models.LAYERS * layer + 2 * WIDTH * models.VOCABULARY)
    assert dllm_compile.stats(model)["flops_whole"] == whole


@pytest.mark.usefixtures("recording")
def test_steps_of_eager_blocks_are_not_recorded() -> None:
    model = ready("item")
    call = models.compiled_loop(model, cuda_graphs=True, **METHODS["dual"])
    with pytest.warns(UserWarning, match="a module that breaks graphs runs in eager"):
        denoised(model, call)
    assert Graph.played == 0


# -- what is refused ---------------------------------------------------------------------------------------------------


class MeanBeside(ByWhere):
    """A little of the mean over the tokens enters each row."""

    def given_back(self, out: torch.Tensor, scores: torch.Tensor) -> Any:
        return out + 1e-5 * out.mean(1, keepdim=True)


class Limited(ByWhere):
    """No expert takes more than a fair share of the rows."""

    def mixed(self, rows: torch.Tensor, shares: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        most = 2 * rows.shape[0] // len(self.experts)
        late = torch.nn.functional.one_hot(chosen, len(self.experts)).sum(1).cumsum(0).gather(1, chosen) > most
        return super().mixed(rows, shares.masked_fill(late, 0.0), chosen)


class Neighbor(ByWhere):
    """The row before chooses the experts."""

    def mixed(self, rows: torch.Tensor, shares: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        return super().mixed(rows, shares, chosen.roll(1, 0))


class Counts(ByWhere):
    """Counts in a buffer how often each expert was chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("load", torch.zeros(len(self.experts)))

    def mixed(self, rows: torch.Tensor, shares: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        self.load += torch.bincount(chosen.flatten(), minlength=len(self.experts))
        return super().mixed(rows, shares, chosen)


class Remembers(ByWhere):
    """Leaves its scores behind for a loss."""

    def given_back(self, out: torch.Tensor, scores: torch.Tensor) -> Any:
        self.scores = scores.mean().item()
        return out


class Draws(ByWhere):
    """Adds noise to what it returns."""

    def given_back(self, out: torch.Tensor, scores: torch.Tensor) -> Any:
        return out + torch.randn_like(out)


class Summed(ByWhere):
    """Returns how many rows each expert got."""

    def given_back(self, out: torch.Tensor, scores: torch.Tensor) -> Any:
        return out, torch.bincount(scores.argmax(-1), minlength=len(self.experts))


class Named(ByWhere):
    """Returns a dictionary."""

    def given_back(self, out: torch.Tensor, scores: torch.Tensor) -> Any:
        return out, {"scores": scores}


REFUSED = {
    MeanBeside: "depends on other rows",
    Limited: "depends on other rows",
    Neighbor: "depends on other rows",
    Counts: "keeps something from call to call",
    Remembers: "keeps something from call to call",
    Draws: "draws random numbers",
    Summed: "no entry for each row",
    Named: "more than tensors in tuples",
}


@pytest.mark.parametrize("block", REFUSED)
def test_a_block_that_is_not_one_row_at_a_time_stays_as_it_is(block: type[Mixture]) -> None:
    model = Model(block).double().eval()
    with pytest.warns(UserWarning, match=REFUSED[block]) as told:
        prepare(model)
    assert len(told) == 1
    assert f"{mixture_models.__file__}:" in str(told[0].message)
    assert "layers.0.block" in str(told[0].message)
    assert opaque(model) == []
    assert all(type(layer.block) is block for layer in model.layers)


def test_a_block_is_called_as_it_was_tried_or_else_as_it_is() -> None:
    """Other arguments, another dtype, gradients and training: Dynamo gets the code itself, and the numbers are its."""
    model = prepare(build("where"))
    block, x = model.layers[0].block, torch.randn(2, 5, WIDTH, dtype=torch.float64)
    calls: list[torch.fx.GraphModule] = []

    def look(module: torch.fx.GraphModule, _: Any) -> Any:
        calls.extend(node for node in module.graph.nodes if "by_row" in str(node.target))
        return module.forward

    run, plain = torch.compile(block, backend=look), ByWhere.forward
    assert torch.equal(run(x)[0], plain(block, x)[0])
    assert len(calls) == 1
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Dynamo looks at the gradient of what has none
        given = x.clone().requires_grad_()
        run(given)[0].sum().backward()
        assert given.grad is not None
        assert block.router.weight.grad is not None
    block.train()
    run(x)
    block.float()
    run(x.float())
    assert len(calls) == 1


def test_a_copy_is_of_its_former_class() -> None:
    model = build("where")
    before = model.state_dict()
    prepare(model)
    assert model.state_dict().keys() == before.keys()
    assert isinstance(model.layers[0].block, ByWhere)
    x = models.start(PROMPT, RESPONSE)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(layer.block) for layer in other.layers] == [ByWhere] * mixture_models.LAYERS
        assert opaque(other) == []
        other.layers[0].block.router.weight.neg_()
        assert not torch.equal(other(x), model(x))
        want = other(x)
        assert torch.allclose(models.compiled_loop(prepare(other), **NEUTRAL)(x), want)
    assert len(opaque(model)) == mixture_models.LAYERS


def test_preparing_again_changes_nothing() -> None:
    model = build("split")
    assert prepare(model) is model
    before = [type(layer.block) for layer in model.layers]
    assert [type(layer.block) for layer in prepare(model).layers] == before


@pytest.mark.parametrize("name", ["qwen3-moe", "olmoe", "llama", "roberta"])
def test_models_that_dynamo_traces_stay_as_they_are(name: str) -> None:
    assert opaque(prepare(models.build(name))) == []


def test_ids_are_handed_over_where_none_can_be_made_up() -> None:
    class Asking(Model):
        def forward(self, ids: torch.Tensor, shift: int) -> torch.Tensor:  # type: ignore[override]
            return super().forward(ids + shift)

    model = Asking(ByWhere).eval()
    with pytest.warns(UserWarning, match="hand it ids"):
        prepare(model)
    assert opaque(model) == []
    assert len(opaque(prepare(model, models.start(3, 4), shift=0))) == mixture_models.LAYERS
    prepare(model.train(), models.start(3, 4), shift=0)
    assert all(module.training for module in model.modules())


def test_the_warning_names_the_break_and_what_mends_it() -> None:
    model = build("item")
    with pytest.warns(UserWarning, match="a graph broke at") as told:
        denoised(model, models.compiled_loop(model, **METHODS["dual"]))
    said = [str(each.message) for each in told if "dllm" in str(each.message)]
    lines = Path(mixture_models.__file__).read_text().splitlines()
    line = next(number for number, text in enumerate(lines, 1) if ".item()" in text)
    assert len(said) == 1
    assert f"a graph broke at {mixture_models.__file__}:{line} " in said[0]
    assert "dllm_compile.prepare(model)" in said[0]


@pytest.mark.skipif(not mixture_models.TRACES_DIR, reason="Dynamo cannot")
def test_the_names_of_a_module_are_those_that_dir_gives_and_are_guarded() -> None:
    module = mixture_models.Attends(True, False).eval()
    module.register_buffer("scale", torch.ones(1))
    assert names_of(module) == dir(module)
    prepare(module)
    x, run = torch.randn(2, 5, WIDTH), torch.compile(module, backend="eager", fullgraph=True)
    assert torch.equal(run(x), module(x))
    module.q_norm = torch.nn.LayerNorm(WIDTH // mixture_models.HEADS)
    torch.nn.init.normal_(module.q_norm.weight)
    assert torch.equal(run(x), module(x))
    del module.q_norm
    assert torch.equal(run(x), module(x))


def test_dir_of_anything_else_is_left_to_python() -> None:
    class Own(mixture_models.Attends):
        def __dir__(self) -> list[str]:
            return ["q_norm"] if self.looks else []

    def number(x: torch.Tensor, value: Any) -> torch.Tensor:
        return x + len(dir(value))

    prepare(torch.nn.Linear(2, 2))
    x = torch.ones(2)
    for value in (x, Own(True, False)):
        assert torch.equal(torch.compile(number, backend="eager")(x, value), number(x, value))


def test_a_form_is_written_and_read() -> None:
    form = Form((False, True), ((WIDTH,), ()), (torch.float32, torch.int64), 7)
    assert Form.of_text(form.text()) == form
    assert form.shapes(2, 3) == [(2, 3, WIDTH), (6,)]
