"""Samplers that read decoded rows, and outputs that are no logits: every row that is read is current."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from . import models
from .callers import EQUAL, FORMS, METHODS, NEUTRAL, PROMPT, TOLERANCE, Whole, build, fill, off, partial, start, steps
from .models import MASK
from .test_layers_alone import WIDTH

pytestmark = pytest.mark.shares_graphs

Call = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def remasking(call: Call, x: torch.Tensor, calls: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """As WINO and Saber do: fill the three surest masks, mask the least sure decoded token again, by its own row."""
    prompt = x != MASK
    for turn in range(calls):
        logits = call(x).clone()
        yield x, logits
        probability = logits.softmax(-1)
        sure, best = probability.max(-1)
        own = probability.gather(-1, x.unsqueeze(-1)).squeeze(-1)
        decoded = (x != MASK) & ~prompt
        x = x.clone()
        for row in range(len(x)):
            masked = (x[row] == MASK).nonzero()[:, 0]
            worst = own[row].masked_fill(~decoded[row], torch.inf).argmin()
            at = masked[sure[row, masked].topk(min(3, len(masked))).indices]
            x[row, at] = best[row, at]
            if decoded[row].any() and turn % 2:
                x[row, worst] = MASK


def everywhere(x: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(x, dtype=torch.bool)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", EQUAL)
def test_every_row_is_current_where_all_are_readable(name: str, form: str) -> None:
    model = build(form)
    call = models.compiled(model, readable="all", **EQUAL[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "dllm: a graph broke at ")
        warnings.filterwarnings("ignore", "dllm: a token outside of the active block")
        for x, logits in remasking(call, start(response=12), 12):
            assert off(logits, model(x), everywhere(x)) < TOLERANCE
            assert off(call(x), model(x), everywhere(x)) < TOLERANCE  # a repeat


@pytest.mark.parametrize("name", ["exact", "neutral"])
def test_a_plain_loop_reads_every_row_where_all_are_readable(name: str) -> None:
    model = build()
    call = models.compiled(model, readable="all", **EQUAL[name])
    x = start()
    for _ in range(8):
        logits = call(x).clone()
        assert off(logits, model(x), everywhere(x)) < TOLERANCE
        x = fill(logits, x)


@pytest.mark.parametrize("name", ["dllm-cache", "dual", "prefix", "sparse", "dyllm", "dkv-cache"])
def test_lossy_methods_run_where_all_rows_are_readable(name: str) -> None:
    """The first call is eager's in all rows; then decoded rows move with the others, and steps are partial.

    A decoded row's logits are of this call if and only if they answer to what was filled since.
    """
    model = build()
    call = models.compiled(model, readable="all", **METHODS[name])
    x, before = start(), None
    stale = 0
    for step in range(6):
        logits = call(x).clone()
        assert logits.isfinite().all()
        if before is None:
            assert off(logits, model(x), everywhere(x)) < TOLERANCE
        elif step % 4:
            stale += int((logits == before).all(-1)[:, PROMPT:].sum())
        before, x = logits, fill(logits, x)
    if name in ("dllm-cache", "dyllm"):
        assert stale == 0
    assert partial(model) > 0


@pytest.mark.parametrize("name", ["exact", "neutral"])
@pytest.mark.parametrize("form", FORMS)
def test_a_loop_that_remasks_is_told_once_and_served_from_then_on(form: str, name: str) -> None:
    model = build(form)
    call = models.compiled(model, **EQUAL[name])
    if form == "alone":  # in doubt, as no graph has its logits: every call that remasks is computed whole
        call = models.in_a_loop(call)
    told = -1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number, (x, logits) in enumerate(remasking(call, start(response=12), 12)):
            said = [str(each.message) for each in caught if "readable" in str(each.message)]
            if said and told < 0:
                told = number
            if told >= 0:
                assert off(logits, model(x), everywhere(x)) < TOLERANCE
        assert len(said) == 1
    assert 0 < told < 6


def test_a_second_remasking_loop_is_not_told_again() -> None:
    model = build()
    call = models.compiled(model, **NEUTRAL)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in (1, 2, 3):
            for x, logits in remasking(call, start(seed=seed, response=12), 10):
                if seed > 1:
                    assert off(logits, model(x), everywhere(x)) < TOLERANCE
    assert len([each for each in caught if "readable" in str(each.message)]) == 1


@pytest.mark.parametrize("name", ["exact", "neutral", "dllm-cache", "dual"])
def test_loops_that_do_not_remask_are_told_nothing(name: str) -> None:
    model = build()
    call = models.compiled(model, **{**EQUAL, **METHODS}[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "dllm: a graph broke at ")
        for seed in (1, 2):
            x = start(seed=seed)
            while (x == MASK).any():
                x = fill(call(x), x)
            call(x)
        x = start(seed=1)  # a new sequence masks much at once, and is no remasking
        call(x)
    assert steps(model)


# -- second heads -----------------------------------------------------------------------------------------------------


class TwoHeads(Whole):
    """Logits, and something else of every token: ``kind`` is its shape behind ``[B, S]``."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.kind = kind
        self.second = torch.nn.Linear(WIDTH, {"value": 1, "column": 1, "quality": 3}[kind])

    def forward(self, ids: torch.Tensor, mask: None = None) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, None)[0]
        x = self.norm(x)
        second = self.second(x)
        return self.head(x), second.squeeze(-1) if self.kind == "value" else second


class SecondFirst(TwoHeads):
    """The other output is the first."""

    def forward(self, ids: torch.Tensor, mask: None = None) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        logits, second = super().forward(ids)
        return second, logits


@pytest.mark.parametrize("form", [TwoHeads, SecondFirst])
@pytest.mark.parametrize("kind", ["value", "column", "quality"])
@pytest.mark.parametrize("name", EQUAL)
def test_a_second_head_is_current_in_every_row(name: str, kind: str, form: type[TwoHeads]) -> None:
    model: Any = form(kind).double().eval()
    call: Any = models.compiled(model, **EQUAL[name])
    at = 0 if form is TwoHeads else 1
    x = start()
    for step in range(6):
        for _ in range(2):
            got, want = call(x), model(x)
            assert off(got[at], want[at], x == MASK) < TOLERANCE
            assert off(got[1 - at], want[1 - at], everywhere(x)) < TOLERANCE, step
        x = fill(want[at], x)


@pytest.mark.parametrize("kind", ["value", "quality"])
def test_a_second_head_alone(kind: str) -> None:
    """No output is logits: a scorer of tokens."""

    class Scorer(TwoHeads):
        def forward(self, ids: torch.Tensor, mask: None = None) -> torch.Tensor:  # type: ignore[override]
            return super().forward(ids)[1]

    model: Any = Scorer(kind).double().eval()
    call: Any = models.compiled(model, **EQUAL["exact"])
    x = start()
    for step in range(5):
        assert off(call(x), model(x), everywhere(x)) < TOLERANCE
        x = x.clone()
        x[:, PROMPT + step] = 5 + step


def test_the_hidden_state_beside_the_logits_is_current() -> None:
    class WithHidden(Whole):
        def forward(self, ids: torch.Tensor, mask: None = None) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
            x = self.embed(ids)
            for layer in self.layers:
                x = layer(x, None)[0]
            x = self.norm(x)
            return self.head(x), x

    model: Any = WithHidden().double().eval()
    call: Any = models.compiled(model, **EQUAL["exact"])
    x = start()
    for _ in range(5):
        got, want = call(x), model(x)
        assert off(got[0], want[0], x == MASK) < TOLERANCE
        assert off(got[1], want[1], everywhere(x)) < TOLERANCE
        x = fill(want[0], x)


class Beside(Whole):
    """Another output is made behind the logits: ``kind`` says of what, ``cut`` where the graph breaks."""

    def __init__(self, kind: str, cut: str = "") -> None:
        super().__init__()
        torch.manual_seed(4)
        self.kind, self.cut = kind, cut
        self.second = torch.nn.Linear(WIDTH, {"quality": 3, "wide": models.VOCABULARY + 3}.get(kind, 1))

    def forward(self, ids: torch.Tensor, mask: None = None) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        x = self.embed(ids)
        if self.cut == "embed":
            torch._dynamo.graph_break()
        for layer in self.layers:
            x = layer(x, None)[0]
        if self.cut == "head":
            torch._dynamo.graph_break()
        x = self.norm(x)
        logits = self.head(x)
        if self.kind == "confidence":
            return logits, logits.softmax(-1).amax(-1)
        return logits, self.second(x).squeeze(-1)


def both_heads(model: Any, x: torch.Tensor) -> None:
    """A loop that fills from the left, in which logits of masks and all of the other output are eager's."""
    call: Any = models.compiled_loop(model, **EQUAL["exact"])
    for _ in range(4):
        got, want = call(x), model(x)
        assert off(got[0], want[0], x == MASK) < TOLERANCE
        assert off(got[1], want[1], everywhere(x)) < TOLERANCE
        x = fill(want[0], x)


@pytest.mark.filterwarnings("ignore:dllm. a graph broke at ")
@pytest.mark.parametrize(
    ("kind", "cut"),
    [
        ("quality", ""),
        ("quality", "embed"),
        ("quality", "head"),
        ("value", "embed"),
        ("confidence", "embed"),
        ("wide", ""),
    ],
)
def test_a_second_head_behind_the_logits_is_current(kind: str, cut: str) -> None:
    """The graph that begins a step need not be the one with the heads; logits need not be the widest."""
    both_heads(Beside(kind, cut).double().eval(), start())


def test_a_number_a_row_is_no_logits_of_a_small_vocabulary() -> None:
    both_heads(Beside("value").double().eval(), start(response=models.VOCABULARY))


def test_a_loop_shows_by_its_logits_and_not_by_a_second_head() -> None:
    """Nobody declares it: the tokens of the first run are not what the logits say, and those of the second are."""
    model: Any = Beside("quality").double().eval()
    call: Any = models.compiled(model, **METHODS["dllm-cache"])
    for seed, greedy in enumerate((False, True)):
        x = start(seed=seed)
        for place in range(PROMPT, PROMPT + 6):
            logits = call(x)[0]
            x = x.clone()
            x[:, place] = (logits if greedy else -logits)[:, place, :MASK].argmax(-1)
        assert bool(partial(model)) == greedy
