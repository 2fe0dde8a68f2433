"""ES-dLLM's early skipping, against the same in plain PyTorch and against what it must not change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dllm_compile
from dllm_compile import LayerRows, Mechanism, Option, Skipping
from dllm_compile.interface.mechanism import count
from dllm_compile.mechanisms import register, unregister
from dllm_compile.runtime.skipping import asked_score, going_on, layers_at

from . import shared
from .es_model import EarlySkipping, generated
from .models import MASK
from .test_properties import EXAMPLES, Batch, Model, Shape

pytestmark = [pytest.mark.shares_graphs, pytest.mark.usefixtures("no_gradients_no_warnings")]
PROMPT, BLOCK = 5, 6
TOKENS = PROMPT + 2 * BLOCK
SHAPE = Shape(8, 2, 1, 4, seed=0)
ES: dict[str, Any] = {"cache": "dual", "block_length": BLOCK, "row_shares": (0.5, 0.25)}


def model_of(seed: int, kind: type[Model] = Model) -> Model:
    model = kind(Shape(8, 2, 1, 4, seed))
    model.head.bias.data[MASK] = -100  # no sampler fills in the mask
    return model


def start(batch: int, seed: int) -> torch.Tensor:
    return Batch([PROMPT] * batch, [0] * batch, 2 * BLOCK, seed).ids()


def filled(ids: torch.Tensor, logits: torch.Tensor, count: int, shift: bool) -> torch.Tensor:
    """The surest ``count`` masks of the first block, by logits ``[B, S, V]`` of this step or kept, written."""
    logits = torch.cat([logits[:, :1], logits[:, :-1]], 1) if shift else logits
    ids = ids.clone()
    for row, mine in zip(ids, logits, strict=True):
        masks = (row == MASK).nonzero().flatten()
        masks = masks[(masks - PROMPT) // BLOCK == (masks[0] - PROMPT) // BLOCK]
        best = masks[mine[masks].softmax(-1).amax(-1).argsort(descending=True)[:count]]
        row[best] = mine[best].argmax(-1)
    return ids


def follow(model: Model, seed: int, count: int, shift: bool, lowering: str = "eager", **how: Any) -> EarlySkipping:
    """Run a loop on the backend and in plain sight."""
    ids = start(1, seed)
    options = {"row_shares": how["shares"], "confidence_weight": how["weight"], "unskipped_interval": how["unskipped"]}
    if how.get("refresh") is not None:
        options |= {"cache": "rolling", "refresh_interval": how["refresh"]}
    call = shared.compiled(model, lowering=lowering, mask_id=MASK, shift=shift, **{**ES, **options})
    plain, loop = EarlySkipping(model, TOKENS, PROMPT, BLOCK, shift=shift, **how), dllm_compile.loop()
    with dllm_compile.debug.steps() as ran:
        while bool((ids == MASK).any()):
            with loop:
                got = call(ids)
            plain.step(ids[0])
            read = ids[0].eq(MASK).nonzero().flatten() - int(shift)
            torch.testing.assert_close(got[0][read], plain.logits[read], rtol=1e-9, atol=1e-9)
            ids = filled(ids, got, count, shift)
    for mine, theirs in zip(ran, plain.ran, strict=True):
        rows = {number: at[at < TOKENS].tolist() for number, at in mine.selected.items()}
        assert all(theirs.rows[number] == at for number, at in rows.items())
        assert bool(rows) == (len(theirs.rows[-1]) < len(theirs.rows[0]))
    return plain


@EXAMPLES
@given(
    seed=st.integers(0, 99),
    count=st.integers(1, 3),
    shift=st.booleans(),
    shares=st.sampled_from([(0.5, 0.25), (0.75, 0.5), (1.0, 0.34), (0.2, 0.2)]),
    weight=st.sampled_from([0.0, 0.5, 1.0]),
    unskipped=st.sampled_from([None, 1, 2, 3]),
)
def test_every_step_equals_the_method_spelled_out(seed: int, count: int, shift: bool, **how: Any) -> None:
    plain = follow(model_of(seed % 3), seed, count, shift, **how)
    assert [step.full for step in plain.ran] == [i % -(-BLOCK // count) == 0 for i in range(len(plain.ran))]
    skipped = [len(step.rows[-1]) < len(step.rows[0]) for step in plain.ran if not step.full]
    assert any(skipped) == (how["unskipped"] != 1)


@EXAMPLES
@given(
    seed=st.integers(0, 99),
    count=st.integers(1, 3),
    shift=st.booleans(),
    shares=st.sampled_from([(0.5, 0.25), (0.75, 0.5), (1.0, 1.0)]),
    unskipped=st.sampled_from([None, 3]),
    refresh=st.sampled_from([2, 5, 64]),
)
def test_blocks_begin_without_a_full_step(seed: int, count: int, shift: bool, refresh: int, **how: Any) -> None:
    plain = follow(model_of(seed % 3), seed, count, shift, weight=0.5, refresh=refresh, **how)
    assert [step.full for step in plain.ran] == [i % refresh == 0 for i in range(len(plain.ran))]
    if refresh == 64:
        (begins,) = [step for step in plain.ran[1:] if step.rows[0][-1] == TOKENS - 1][:1]
        assert len(begins.rows[0]) > BLOCK


def test_it_equals_the_method_spelled_out_under_inductor() -> None:
    follow(model_of(1), 1, 1, True, "inductor", shares=(0.5, 0.25), weight=0.5, unskipped=4, refresh=9)


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
@pytest.mark.parametrize("threshold", [None, 0.4])
@pytest.mark.parametrize("shift", [False, True])
def test_generate_writes_what_arrived(
    shift: bool, threshold: float | None, lowering: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lowering == "inductor" and (threshold is None or shift):
        pytest.skip("one case is enough")
    if lowering == "inductor":  # in eager it is traced as generate does it
        shared.steps_of_generate(monkeypatch)
    model, how = model_of(2), {"schedule": "equal"} if threshold is None else {"threshold": threshold}
    for seed, refresh in enumerate((None, None, 9)):
        ids = start(1, seed)
        how |= {} if refresh is None else {"cache": "rolling", "refresh_interval": refresh}
        common = {"mask_id": MASK, "shift": shift, "gen_length": 2 * BLOCK, "output_history": True, **ES, **how}
        got = dllm_compile.generate(model, ids[:, :PROMPT], lowering=lowering, **common)
        plain = EarlySkipping(model, TOKENS, PROMPT, BLOCK, shift=shift, refresh=refresh)
        want = torch.stack(generated(plain, ids[0], threshold))
        assert torch.equal(got.history[1:, 0], want)
        assert any(len(step.arrived) < len(step.rows[0]) for step in plain.ran)


def played(model: Model, ids: torch.Tensor, count: int = 1, **options: Any) -> list[torch.Tensor]:
    """The logits of the masked rows at each step of a loop, and the ids behind it."""
    dllm_compile.reset()
    call, loop, out = shared.compiled(model, lowering="eager", mask_id=MASK, **options), dllm_compile.loop(), []
    while bool((ids == MASK).any()):
        with loop:
            got = call(ids)
        out.append(got[ids == MASK].clone())
        ids = filled(ids, got, count, options.get("shift", False))
    return [*out, ids]


@pytest.mark.parametrize("more", [{}, {"keep_ratio": 0.5}, {"saliency_threshold": 0.9, "full_steps": 1}], ids=str)
@pytest.mark.parametrize("shift", [None, False, True])
def test_shares_of_one_equal_the_block_step(shift: bool | None, more: dict[str, Any]) -> None:
    model, ids = model_of(0), start(2, 3)
    plain = played(model, ids, cache="dual", block_length=BLOCK, shift=shift, **more)
    shares = played(model, ids, **{**ES, "row_shares": (1.0, 1.0)}, shift=shift, **more)
    assert all(torch.equal(a, b) for a, b in zip(plain, shares, strict=True))
    skipped = played(model, ids, **ES, shift=shift, **more)
    assert not all(torch.equal(a, b) for a, b in zip(plain, skipped, strict=False))


@pytest.mark.parametrize("more", [{}, {"keep_ratio": 0.5}, {"saliency_threshold": 0.9, "full_steps": 1}], ids=str)
@pytest.mark.parametrize("shift", [None, False, True])
def test_a_sequence_of_a_batch_is_as_it_is_alone(shift: bool | None, more: dict[str, Any]) -> None:
    """Sequences write one, two and three tokens a step, so that other numbers of their rows go on."""
    model, ids, loop = model_of(1), start(3, 4), dllm_compile.loop()
    call = shared.compiled(model, lowering="eager", mask_id=MASK, shift=shift, **ES, **more)
    calls, together = [], []
    for _ in range(3):  # the block ends for none of them
        calls.append(ids)
        with loop:
            together.append(call(ids).clone())
        each = [filled(ids[i : i + 1], together[-1][i : i + 1], min(i + 1, 2), bool(shift)) for i in range(3)]
        ids = torch.cat(each)
    for row in range(3):
        dllm_compile.reset()
        alone = dllm_compile.loop()
        for x, want in zip(calls, together, strict=True):
            with alone:
                got = call(x[row : row + 1])
            read = x[row] == MASK
            torch.testing.assert_close(got[0][read], want[row][read], rtol=1e-9, atol=1e-9)


class Telling(Model):
    """It also returns the hidden states that leave each layer."""

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
        angles = torch.arange(ids.shape[1])[:, None] * self.get_buffer("rates")
        x, states = self.embed(ids), []
        for layer in self.layers:
            x = layer(x, angles.cos(), angles.sin(), None)
            states.append(x)
        return self.head(self.norm(x)), states


def test_hidden_states_of_skipped_rows_are_those_of_the_step_before() -> None:
    model, ids, loop = model_of(0, Telling), start(2, 7), dllm_compile.loop()
    call, before = shared.compiled(model, lowering="eager", mask_id=MASK, shift=False, **ES), None
    with dllm_compile.debug.steps() as ran:
        for _ in range(3):
            with loop:
                logits, states = call(ids)
            ids = filled(ids, logits, 1, False)
            states = [each.clone() for each in states]
            for layer, (new, old) in enumerate(zip(states, before or [], strict=bool(before))):
                computed = torch.zeros_like(ids, dtype=torch.bool)
                computed[:, PROMPT : PROMPT + BLOCK] = True
                for at in [at for depth, at in ran[-1].selected.items() if layer >= depth]:
                    computed = torch.zeros(2, TOKENS + 1).scatter(1, at, 1.0)[:, :TOKENS].bool()
                assert torch.equal((new != old).any(2), computed), layer
            before = states


class InTwo(Model):
    """Its graph breaks behind the third layer, and before the head."""

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        angles = torch.arange(ids.shape[1])[:, None] * self.get_buffer("rates")
        x = self.embed(ids)
        for layer in self.layers[:3]:
            x = layer(x, angles.cos(), angles.sin(), None)
        torch._dynamo.graph_break()
        for layer in self.layers[3:]:
            x = layer(x, angles.cos(), angles.sin(), None)
        torch._dynamo.graph_break()
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


class Broken(Model):
    """Its graph breaks before each layer: no graph sees the ids."""

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        angles = torch.arange(ids.shape[1])[:, None] * self.get_buffer("rates")
        x = self.embed(ids)
        for layer in self.layers:
            torch._dynamo.graph_break()
            x = layer(x, angles.cos(), angles.sin(), None)
        torch._dynamo.graph_break()
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


@pytest.mark.filterwarnings("ignore:dllm. a graph broke")
@pytest.mark.parametrize("depths", [(0.125, 0.25), (0.25, 0.625)])
@pytest.mark.parametrize("shift", [False, True])
def test_a_model_in_parts_skips_the_same_rows(shift: bool, depths: tuple[float, ...]) -> None:
    ids, model, how = start(2, 5), model_of(2, InTwo), {**ES, "row_depths": depths, "shift": shift}
    played(model, ids, **how)  # how deep the model is, is known behind its first step
    parts = played(model, ids, **how)
    whole = played(model_of(2), ids, **how)
    assert len(whole) == len(parts)
    for a, b in zip(whole[:-1], parts[:-1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert torch.equal(whole[-1], parts[-1])


@pytest.mark.filterwarnings("ignore:dllm. a graph broke")
def test_without_known_logits_nothing_is_skipped() -> None:
    ids, model = start(2, 5), model_of(2, Broken)
    with pytest.warns(UserWarning, match=r"deeper layers skip no rows, as no graph of this model is seen to make"):
        got = played(model, ids, **ES, shift=False)
    want = played(model, ids, cache="dual", block_length=BLOCK, shift=False)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.fixture
def first_rows() -> Iterator[Mechanism]:
    """A mechanism of somebody else: from half of the layers on the first three rows of the step go on."""

    def score(rows: LayerRows) -> torch.Tensor:
        return -rows.there.cumsum(1).to(rows.new.dtype)

    yield register(
        Mechanism(
            "first-rows",
            "nobody",
            options=(Option("first", None, **count("3"), meaning="rows that go on"),),
            switches=("first",),
            skips=Skipping(
                lambda options: (0.5,),
                lambda facts, rows: torch.full((len(rows), 1), facts.options.first),
                score,
            ),
        )
    )
    unregister("first-rows")


@pytest.mark.usefixtures("first_rows")
def test_a_mechanism_of_ones_own_chooses_the_rows() -> None:
    model, ids, loop = model_of(0), start(2, 6), dllm_compile.loop()
    call = shared.compiled(
        model, lowering="eager", mask_id=MASK, shift=False, cache="dual", block_length=BLOCK, first=3
    )
    with dllm_compile.debug.steps() as ran:
        for _ in range(3):
            with loop:
                ids = filled(ids, call(ids), 1, False)
    assert [step.selected.keys() for step in ran] == [set(), {4}, {4}]
    assert all(step.selected[4].tolist() == [[PROMPT, PROMPT + 1, PROMPT + 2]] * 2 for step in ran[1:])


@pytest.mark.usefixtures("first_rows")
def test_what_skips_rows_is_refused_where_it_cannot() -> None:
    for options, said in (
        ({"row_shares": (0.5, 0.25)}, "skips rows of a cache of blocks in deeper layers; give cache='dual' too"),
        ({"method": "dllm-cache", "row_shares": (0.5, 0.25)}, "give cache='dual' too"),
        ({**ES, "first": 3}, "early-skipping and first-rows each decide which rows go on; leave out all but one"),
        ({**ES, "keep_outside": True}, "keep_outside keeps attention of every row of the block, and the mechanism"),
        ({**ES, "row_shares": (0.5,)}, r"row_shares are \(0.5,\) at row_depths \(0.125, 0.25\); give as many of both"),
    ):
        with pytest.raises(ValueError, match=said):
            dllm_compile.Options(**options)
    with pytest.raises(TypeError, match=r"'bad' skips 3; give a dllm_compile\.Skipping"):
        register(Mechanism("bad", "nobody", skips=3))  # type: ignore[arg-type]


@pytest.mark.parametrize("shares", [(1.0, 1), (0.5, 0.25), (0.3, 0.3), (1, 0.001)], ids=str)
def test_shares_at_their_edges_are_taken(shares: tuple[float, ...]) -> None:
    assert dllm_compile.Options(cache="dual", row_shares=shares).row_shares == shares
    assert dllm_compile.Options(method="es-dllm", row_shares=shares).row_shares == shares


@pytest.mark.parametrize("says", [torch.zeros(2, 3), None], ids=["shape", "nothing"])
def test_what_a_mechanism_says_of_rows_is_checked(says: Any) -> None:
    rows = LayerRows(*[torch.zeros(2, 4, 1)] * 2, *[torch.zeros(2, 4)] * 4, None)
    with pytest.raises(ValueError, match=r"it scores rows, and returned .*; give a floating tensor \[2, 4\]"):
        asked_score(lambda _: says, "it scores rows", rows)


def test_equal_scores_go_on_in_order_and_nan_goes_last() -> None:
    nan, there = float("nan"), torch.tensor([[True, True, True, True, False]] * 2)
    score = torch.tensor([[1.0, 1.0, 1.0, 1.0, 9.0], [nan, 0.0, 1.0, nan, 9.0]])
    assert going_on(score, there, torch.tensor([[2], [3]]), 3).tolist() == [[0, 1, 5], [0, 1, 2]]
    assert going_on(score, there, torch.tensor([[5], [1]]), 5).tolist() == [[0, 1, 2, 3, 5], [2, 5, 5, 5, 5]]


@given(layers=st.integers(1, 40), first=st.floats(0.01, 0.6), more=st.floats(0.01, 0.39))
def test_depths_are_the_first_layers_at_or_behind_them(layers: int, first: float, more: float) -> None:
    depths = (first, first + more)
    of = [
        max((i for i, depth in enumerate(depths) if layer >= depth * layers), default=None) for layer in range(layers)
    ]
    begins = {layer: i for layer, i in enumerate(of) if i is not None and (not layer or i != of[layer - 1])}
    assert layers_at(depths, layers) == begins
    assert layers_at((0.1, 0.2), 30) == {3: 0, 6: 1}  # 0.1 * 30 is above 3


def test_less_is_computed() -> None:
    model, ids = model_of(0), start(1, 0)
    played(model, ids, **{**ES, "row_shares": (1.0, 1.0)}, shift=False)
    before = dllm_compile.stats(model)["flops"]
    played(model, ids, **ES, shift=False)
    after = dllm_compile.stats(model)["flops"] - before
    assert 0.3 < after / before < 0.9


def test_explain_tells_of_it() -> None:
    found = str(dllm_compile.explain(model_of(0), start(1, 0), mask_id=MASK, **ES))
    assert "in partial steps, layer 1 and those behind it compute A1 = 3 of the A = 7 rows" in found
    assert "in partial steps, layer 2 and those behind it compute A2 = 2 of the A = 7 rows" in found
