"""What holds for any model shape, prompt and schedule: neutral is exact, rows and sequences are apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import dllm_compile

from . import loops
from .models import MASK, VOCABULARY, compiled_loop
from .under_way import all_under_way

pytestmark = pytest.mark.shares_graphs

QUICK = (Phase.explicit, Phase.generate)  # an example takes a compilation: shrinking would take minutes
EXAMPLES = settings(max_examples=8, deadline=None, derandomize=True, database=None, phases=QUICK)
NEUTRAL: dict[str, Any] = {"prompt_interval": 1, "response_interval": 1}


@dataclass(frozen=True)
class Shape:
    """A model."""

    layers: int
    heads: int
    groups: int
    head_dim: int
    seed: int

    @property
    def width(self) -> int:
        """Of the residual stream."""
        return self.heads * self.head_dim


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Norm(torch.nn.Module):
    """Root mean square, as models of transformers write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Layer(torch.nn.Module):
    """Root-mean-square norms, rotary positions, grouped keys and values, a gated MLP."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, width, inner = shape, shape.width, shape.width // shape.groups
        self.norm_a, self.norm_m = Norm(width), Norm(width)
        self.q, self.o = (torch.nn.Linear(width, width, bias=False) for _ in range(2))
        self.k, self.v = (torch.nn.Linear(width, inner, bias=False) for _ in range(2))
        self.gate, self.up = (torch.nn.Linear(width, 20, bias=False) for _ in range(2))
        self.down = torch.nn.Linear(20, width, bias=False)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, heads, S, head_dim]``."""
        return x.view(*x.shape[:2], -1, self.shape.head_dim).transpose(1, 2)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        a = self.norm_a(x)
        q, k = turned(self.heads(self.q(a)), cos, sin), turned(self.heads(self.k(a)), cos, sin)
        k, v = (t.repeat_interleave(self.shape.groups, 1) for t in (k, self.heads(self.v(a))))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.o(out.transpose(1, 2).reshape(x.shape))
        m = self.norm_m(x)
        y: torch.Tensor = x + self.down(torch.nn.functional.silu(self.gate(m)) * self.up(m))
        return y


class Model(torch.nn.Module):
    """Small enough to be compiled in a fraction of a second."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        torch.manual_seed(shape.seed)
        self.embed = torch.nn.Embedding(VOCABULARY, shape.width)
        self.layers = torch.nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = Norm(shape.width)
        self.head = torch.nn.Linear(shape.width, VOCABULARY)
        rates = 100.0 ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        self.register_buffer("rates", torch.cat([rates, rates]))
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.4) if parameter.dim() > 1 else None
        self.double().eval()

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits ``[B, S, V]``; ``mask`` is ``[B, S]``, 0 where a token is hidden."""
        angles = torch.arange(ids.shape[1], device=ids.device)[:, None] * self.get_buffer("rates")
        seen = None if mask is None else mask.bool()[:, None, None, :]
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, angles.cos(), angles.sin(), seen)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


@dataclass(frozen=True)
class Batch:
    """Sequences of one length whose responses begin at ``prompts`` and whose first ``padding`` tokens are hidden."""

    prompts: list[int]
    padding: list[int]
    response: int
    seed: int

    @property
    def tokens(self) -> int:
        """Of each sequence."""
        return max(self.prompts) + self.response

    def ids(self) -> torch.Tensor:
        """``[B, S]``; the first token differs from row to row, so that no two rows look like guidance."""
        generator = torch.Generator().manual_seed(self.seed)
        ids = torch.randint(8, MASK, (len(self.prompts), self.tokens), generator=generator)
        ids[:, 0] = torch.arange(3, 3 + len(self.prompts))
        for row, prompt in enumerate(self.prompts):
            ids[row, prompt:] = MASK
        return ids

    def extra(self) -> dict[str, torch.Tensor]:
        """The attention mask, where anything is hidden."""
        mask = torch.ones(len(self.padding), self.tokens, dtype=torch.int64)
        for row, hidden in enumerate(self.padding):
            mask[row, :hidden] = 0
        return {"mask": mask} if any(self.padding) else {}


SHAPES = st.builds(
    Shape,
    layers=st.integers(1, 3),
    heads=st.sampled_from([2, 4, 6]),
    groups=st.sampled_from([1, 2]),
    head_dim=st.sampled_from([2, 4, 6]),
    seed=st.integers(0, 99),
)
SETTINGS = st.fixed_dictionaries(
    {
        "prompt_interval": st.sampled_from([-1, 1, 2, 3, 5]),
        "response_interval": st.sampled_from([-1, 1, 2, 3, 4]),
        "transfer_ratio": st.sampled_from([0.0, 0.05, 0.25, 0.5, 1.0]),
        "shift": st.sampled_from([None, True, False]),
    }
)


@st.composite
def batches(draw: st.DrawFn, ragged: bool = False, least: int = 1) -> Batch:
    count = draw(st.integers(least, 3))
    longest = draw(st.integers(1, 7))
    prompts = [draw(st.integers(1, longest)) if ragged else longest for _ in range(count)]
    padding = [draw(st.integers(0, prompt - 1)) for prompt in prompts]
    return Batch(prompts, padding, draw(st.sampled_from([2, 4, 6, 9])), draw(st.integers(0, 99)))


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def fresh(model: torch.nn.Module, **options: Any) -> Callable[..., torch.Tensor]:
    """Ids to logits through a new compile, which sees nothing of earlier examples."""
    dllm_compile.reset()
    return compiled_loop(model, **options)


def stepping() -> set[int]:
    return {each.number for each in all_under_way()}


def scattered(x: torch.Tensor, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """``steps`` calls, between which each sequence gets one token at a random masked place."""
    generator = torch.Generator().manual_seed(seed)
    x = x.clone()
    for _ in range(steps):
        yield x.clone()
        for row in x:
            masked = (row == MASK).nonzero()[:, 0]
            at = masked[int(torch.randint(masked.numel(), (), generator=generator))]
            row[at] = torch.randint(8, MASK, (), generator=generator)


@EXAMPLES
@given(SHAPES, batches(), st.data())
def test_neutral_settings_equal_eager(shape: Shape, batch: Batch, data: st.DataObject) -> None:
    lengths = [n for n in range(1, batch.response + 1) if batch.response % n == 0]
    block = data.draw(st.sampled_from(lengths), "block length")
    steps = batch.response // block * data.draw(st.integers(1, block), "steps a block")
    model, extra, prompt = Model(shape), batch.extra(), batch.prompts[0]
    call = fresh(model, **NEUTRAL)

    def checked(x: torch.Tensor) -> torch.Tensor:
        got, want = call(x, **extra), model(x, **extra)
        assert (got - want)[x == MASK].abs().max() < 1e-9
        return got

    def eager(x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(x, **extra)
        return logits

    how = {"steps": steps, "block_length": block, "mask_id": MASK}
    got = list(loops.llada(checked, batch.ids(), prompt, **how))
    want = list(loops.llada(eager, batch.ids(), prompt, **how))
    assert len(got) == len(want) == steps
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert stepping() == {steps - 1}


@EXAMPLES
@given(SHAPES, batches(ragged=True, least=2), SETTINGS)
def test_a_row_of_a_batch_equals_the_row_alone(shape: Shape, batch: Batch, options: dict[str, Any]) -> None:
    model, extra = Model(shape), batch.extra()
    call = fresh(model, **options)
    calls = list(scattered(batch.ids(), min(batch.response, 6), batch.seed))
    together = [call(x, **extra).clone() for x in calls]
    assert stepping() == {len(calls) - 1}
    alone = fresh(model, **options)
    for row in range(len(batch.prompts)):
        dllm_compile.reset()
        only = {name: value[row : row + 1] for name, value in extra.items()}
        for x, want in zip(calls, together, strict=True):
            masked = x[row] == MASK
            got = alone(x[row : row + 1], **only)[0]
            assert (got - want[row])[masked].abs().max() < 1e-9
        assert stepping() == {len(calls) - 1}


@EXAMPLES
@given(SHAPES, batches(), st.integers(100, 199), SETTINGS)
def test_nothing_leaks_from_one_sequence_into_the_next(
    shape: Shape, batch: Batch, other: int, options: dict[str, Any]
) -> None:
    extra, prompt = batch.extra(), batch.prompts[0]
    call = fresh(Model(shape), **options)
    how = {"steps": batch.response, "block_length": batch.response, "mask_id": MASK}

    def generate(x: torch.Tensor) -> list[torch.Tensor]:
        """Logits of the masked rows at each step, and the final ids."""
        seen: list[torch.Tensor] = []

        def recorded(x: torch.Tensor) -> torch.Tensor:
            out = call(x, **extra)
            seen.append(out[x == MASK].clone())
            return out

        return [*(y for y in loops.llada(recorded, x, prompt, **how)), *seen]

    first, second = (Batch(batch.prompts, batch.padding, batch.response, seed).ids() for seed in (batch.seed, other))
    alone = generate(second.clone())  # on a fresh compile
    generate(first)
    after = generate(second.clone())
    assert len(alone) == 2 * batch.response
    assert all(torch.equal(a, b) for a, b in zip(alone, after, strict=True))


@EXAMPLES
@given(SHAPES, batches(ragged=True), st.data())
def test_any_edits_equal_eager_under_neutral_settings(shape: Shape, batch: Batch, data: st.DataObject) -> None:
    model, extra, x = Model(shape), batch.extra(), batch.ids()
    call = fresh(model, **NEUTRAL)
    places = st.tuples(st.integers(0, x.shape[0] - 1), st.integers(0, x.shape[1] - 2))
    edits = st.lists(st.tuples(places, st.one_of(st.just(MASK), st.integers(3, MASK - 1))), max_size=4)
    for _ in range(5):
        got, want, masked = call(x, **extra), model(x, **extra), x == MASK
        assert masked.any(1).all()  # the last token is never edited
        assert (got - want)[masked].abs().max() < 1e-9
        for place, token in data.draw(edits, "edits"):
            x[place] = token
