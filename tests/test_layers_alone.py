"""Models that break their graph: only a layer at a time reaches the backend, or the ids are looked up outside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dllm_compile import debug
from dllm_compile.runtime.session import sessions

from .models import MASK, VOCABULARY, compiled_loop, start
from .under_way import UnderWay, under_way

pytestmark = [pytest.mark.usefixtures("no_gradients_no_warnings"), pytest.mark.shares_graphs]

NEUTRAL: dict[str, Any] = {"prompt_interval": 1, "response_interval": 1}
CACHED: dict[str, Any] = {"prompt_interval": 8, "response_interval": 4, "transfer_ratio": 0.5}
EXACT: dict[str, Any] = {"method": "exact"}
PROMPT, RESPONSE = 6, 8
STEPS = 6
WIDTH, HEADS, LAYERS = 24, 4, 3


class Layer(torch.nn.Module):
    """Pre-norm, one projection for queries, keys and values; returns a tuple as layers with a cache do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_a, self.norm_m = torch.nn.LayerNorm(WIDTH), torch.nn.LayerNorm(WIDTH)
        self.qkv = torch.nn.Linear(WIDTH, 3 * WIDTH)
        self.out = torch.nn.Linear(WIDTH, WIDTH)
        self.up = torch.nn.Linear(WIDTH, 2 * WIDTH)
        self.down = torch.nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, None]:
        batch, tokens, width = x.shape

        def heads(t: torch.Tensor) -> torch.Tensor:
            return t.view(batch, tokens, HEADS, width // HEADS).transpose(1, 2)

        q, k, v = self.qkv(self.norm_a(x)).split(width, dim=-1)
        attended = F.scaled_dot_product_attention(heads(q), heads(k), heads(v), attn_mask=bias)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(F.gelu(self.up(self.norm_m(x)))), None


class Model(torch.nn.Module):
    """Embedding, dropout, layers, norm, head."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.drop = torch.nn.Dropout(0.1)
        self.layers = torch.nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.head = torch.nn.Linear(WIDTH, VOCABULARY)

    def bias(self, mask: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
        """What is added to the scores; padding is looked for only where there is any."""
        if mask is None or not 0.0 in mask:  # noqa: E713 (as found in the wild: it breaks the graph)
            return None
        hidden = (1.0 - mask.to(x.dtype)) * torch.finfo(x.dtype).min
        return hidden[:, None, None, :].expand(-1, 1, x.shape[1], -1)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.drop(self.embed(ids))
        bias = self.bias(mask, x)
        for layer in self.layers:
            x = self.between(layer(x, bias)[0])
        logits: torch.Tensor = self.head(self.norm(x))
        return logits

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x


class LoopBroken(Model):
    """Breaks in the layer loop: no compiled graph sees the ids."""

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.drop(self.embed(ids))
        bias = self.bias(mask, x)
        for layer in self.layers:
            torch._dynamo.graph_break()
            x, _ = layer(x, bias)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


FORMS: dict[str, tuple[type[Model], bool]] = {
    "mask-test": (Model, True),
    "mask-test-padded": (Model, True),
    "loop": (LoopBroken, False),
    "loop-masked": (LoopBroken, True),
}


def mask_of(form: str, ids: torch.Tensor) -> torch.Tensor | None:
    """The mask that each form is called with; the padded one hides the first tokens of the last sequence."""
    if not FORMS[form][1]:
        return None
    mask = torch.ones(ids.shape)
    if form != "mask-test":
        mask[-1, :3] = 0
    return mask


def denoise(x: torch.Tensor, seed: int = 0) -> Iterator[torch.Tensor]:
    """The ids of each step: one more token of the response is written, the same place in every sequence."""
    generator = torch.Generator().manual_seed(seed)
    x = x.clone()
    for i in range(STEPS):
        yield x
        x[:, PROMPT + i] = torch.randint(3, MASK, (x.shape[0],), generator=generator)


def run(call: Callable[..., torch.Tensor], form: str, seed: int = 1) -> list[torch.Tensor]:
    """Logits of the masked rows at each step."""
    ids = start(PROMPT, RESPONSE, 2, seed)
    return [call(x, mask_of(form, ids))[x == MASK].clone() for x in denoise(ids, seed)]


def stepping() -> UnderWay:
    running = under_way()
    assert running.number > 0
    return running


def sequences() -> int:
    """Sequences begun by the sessions that are in the middle of one."""
    return sum(s.stats.sequences for s in sessions() if s.batches)


def worst(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("options", [NEUTRAL, EXACT], ids=["neutral", "exact"])
@pytest.mark.parametrize("form", FORMS)
def test_neutral_settings_equal_eager(form: str, options: dict[str, Any]) -> None:
    model = FORMS[form][0]().double().eval()
    call = compiled_loop(model, **options)
    assert worst(run(call, form), run(model, form)) < 1e-9
    assert stepping().number == STEPS - 1
    assert stepping().stats.steps == {"exact" if options is EXACT else "full": STEPS}


@pytest.mark.parametrize("form", FORMS)
def test_every_layer_behind_the_first_has_a_cache_that_is_used(form: str) -> None:
    model = FORMS[form][0]().double().eval()
    call = compiled_loop(model, **CACHED)
    with debug.steps() as ran:
        got = run(call, form)
    want, session = run(model, form), stepping()
    assert len(session.layers) == LAYERS - 1  # the first is computed at every step
    assert session.stats.steps == {"full": 1, "select": 4, "response": 1}
    chosen = [layer for each in ran for layer in each.selected]
    assert chosen.count(1) == chosen.count(2) == 4 == len(chosen) / 2
    assert all(picked.shape == (2, RESPONSE // 2) for each in ran for picked in each.selected.values())
    assert worst(got[:1], want[:1]) < 1e-9
    assert worst(got, want) > 1e-6  # partial steps are approximate, or they were not partial


@pytest.mark.parametrize("options", [NEUTRAL, CACHED], ids=["neutral", "cached"])
@pytest.mark.parametrize("form", FORMS)
def test_a_repeat_gives_the_same_logits(form: str, options: dict[str, Any]) -> None:
    call = compiled_loop(FORMS[form][0]().double().eval(), **options)
    ids = start(PROMPT, RESPONSE)
    for x in denoise(ids):
        once = call(x, mask_of(form, ids))[x == MASK].clone()
        again = call(x, mask_of(form, ids))[x == MASK]
        assert torch.equal(once, again)
    assert stepping().stats.steps["repeat"] == STEPS


@pytest.mark.parametrize("form", FORMS)
def test_a_second_sequence_is_as_if_it_were_the_first(form: str) -> None:
    model = FORMS[form][0]().double().eval()
    call = compiled_loop(model, **CACHED)
    run(call, form, seed=1)
    second = run(call, form, seed=2)
    assert sequences() == 2
    assert stepping().number == STEPS - 1
    torch._dynamo.reset()
    assert worst(second, run(compiled_loop(model, **CACHED), form, seed=2)) < 1e-9


@pytest.mark.parametrize("form", FORMS)
def test_the_same_prompt_again_is_exact(form: str) -> None:
    model = FORMS[form][0]().double().eval()
    call = compiled_loop(model, **CACHED)
    once, again = run(call, form), run(call, form)
    assert worst(once[:1], run(model, form)[:1]) < 1e-9
    assert worst(once, again) < 1e-9
    assert sequences() == 2


@pytest.mark.parametrize("form", FORMS)
def test_another_length_and_batch_start_a_sequence(form: str) -> None:
    model = FORMS[form][0]().double().eval()
    call = compiled_loop(model, **CACHED)
    run(call, form)
    for batch, prompt in ((2, PROMPT + 3), (3, PROMPT)):
        x = start(prompt, RESPONSE, batch)
        assert (call(x, mask_of(form, x)) - model(x, mask_of(form, x)))[x == MASK].abs().max() < 1e-9


@pytest.mark.parametrize("form", FORMS)
def test_a_finished_response_equals_eager(form: str) -> None:
    model = FORMS[form][0]().double().eval()
    call = compiled_loop(model, **CACHED)
    run(call, form)
    x = start(PROMPT, RESPONSE)
    x[:, PROMPT:] = torch.arange(3, 3 + RESPONSE)
    assert (call(x, mask_of(form, x)) - model(x, mask_of(form, x))).abs().max() < 1e-9


@pytest.mark.parametrize("form", FORMS)
def test_interleaved_models_do_not_share_state(form: str) -> None:
    one, two = (FORMS[form][0](seed).double().eval() for seed in (0, 1))
    two.embed.load_state_dict(one.embed.state_dict())  # tuned from the same model, with its embedding frozen
    calls = [(model, compiled_loop(model, **NEUTRAL)) for model in (one, two)]
    ids = start(PROMPT, RESPONSE)
    for x in denoise(ids):
        for model, call in calls:
            got, want = call(x, mask_of(form, ids)), model(x, mask_of(form, ids))
            assert (got - want)[x == MASK].abs().max() < 1e-9


@pytest.mark.parametrize("form", FORMS)
def test_a_repeat_of_one_model_is_no_repeat_of_another(form: str) -> None:
    one, two = (FORMS[form][0](seed).double().eval() for seed in (0, 1))
    call_one, call_two = compiled_loop(one, **NEUTRAL), compiled_loop(two, **NEUTRAL)
    ids = start(PROMPT, RESPONSE)
    for x in denoise(ids):
        for model, call in ((one, call_one), (one, call_one), (two, call_two)):
            got, want = call(x, mask_of(form, ids)), model(x, mask_of(form, ids))
            assert (got - want)[x == MASK].abs().max() < 1e-9


@pytest.mark.parametrize("form", FORMS)
def test_interleaved_models_cache_as_if_they_were_alone(form: str) -> None:
    built = [FORMS[form][0](seed).double().eval() for seed in (0, 1)]
    alone: list[list[torch.Tensor]] = []
    for model in built:
        alone.append(run(compiled_loop(model, **CACHED), form))
        torch._dynamo.reset()
    calls = [compiled_loop(model, **CACHED) for model in built]
    ids = start(PROMPT, RESPONSE)
    for step, x in enumerate(denoise(ids, seed=1)):
        for call, wanted in zip(calls, alone, strict=True):
            assert (call(x, mask_of(form, ids))[x == MASK] - wanted[step]).abs().max() < 1e-9


@pytest.mark.parametrize(
    "options",
    [{"cache": "dual"}, {"cache": "dual", "keep_ratio": 0.5}, {"saliency_threshold": 0.9, "full_steps": 1}],
    ids=["dual", "eviction", "saliency"],
)
@pytest.mark.parametrize("form", FORMS)
def test_layers_that_share_their_weights_compute_every_row(form: str, options: dict[str, Any]) -> None:
    """A layer is known by its weights, so several that have the same could not tell their rows apart."""
    model = FORMS[form][0]().double().eval()
    model.layers = torch.nn.ModuleList([model.layers[0]] * LAYERS)
    call = compiled_loop(model, **options)
    assert worst(run(call, form), run(model, form)) < 1e-9
    assert stepping().number == STEPS - 1


def test_a_batch_that_is_padded_on_the_right_is_cached() -> None:
    """No graph sees the ids, and they do not end in masks: the second call shows which they are."""
    model = LoopBroken().double().eval()
    for options, equal in ((NEUTRAL, True), (CACHED, False)):
        torch._dynamo.reset()
        call, x = compiled_loop(model, **options), start(PROMPT, RESPONSE)
        x[0, -2:] = 7
        x[1, -4:] = 7
        for place in range(PROMPT, PROMPT + RESPONSE - 5):
            got = call(x)
            if equal:
                assert (got - model(x))[x == MASK].abs().max() < 1e-9
            x[:, place] = 5
    assert stepping().stats.steps["select"] >= 1
    assert len(stepping().layers) == LAYERS - 1


class Parts(torch.nn.Module):
    """One layer behind a break. ``condition`` ``[B, WIDTH]`` reaches the layer alone; ``sign`` turns the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()

    def forward(self, ids: torch.Tensor, condition: torch.Tensor | None = None, sign: bool = False) -> torch.Tensor:
        x = self.model.embed(ids)
        torch._dynamo.graph_break()
        x, _ = self.model.layers[0](x if condition is None else x + condition[:, None], None)
        logits: torch.Tensor = self.model.head(self.model.norm(x))
        return -logits if sign else logits


@pytest.mark.parametrize("options", [EXACT, NEUTRAL])
def test_the_same_ids_under_another_condition_of_the_layers(options: dict[str, Any]) -> None:
    model = Parts().double().eval()
    call = compiled_loop(model, **options)
    conditions = torch.randn(2, 2, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for x in denoise(start(PROMPT, RESPONSE)):
        for condition in (*conditions, *conditions.flip(0)):
            got, want = call(x, condition), model(x, condition)
            assert (got - want)[x == MASK].abs().max() < 1e-9


def test_a_repeat_does_not_give_what_a_graph_made_of_earlier_ids() -> None:
    """One graph has the ids, and either of two may follow."""
    model = Parts().double().eval()
    call = compiled_loop(model, **EXACT)
    for step, x in enumerate(denoise(start(PROMPT, RESPONSE))):
        for sign in (True,) if step == 0 else (False, True, False):
            got, want = call(x, sign=sign), model(x, sign=sign)
            assert (got - want)[x == MASK].abs().max() < 1e-9
