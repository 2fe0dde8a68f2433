"""Several streams through one compiled model, and inputs beside the ids: a row is of the stream it was asked for."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import dllm_compile

from . import loops, models
from .callers import (
    EQUAL,
    EXACT,
    METHODS,
    NEUTRAL,
    PROMPT,
    RESPONSE,
    TOLERANCE,
    Alone,
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
from .models import MASK
from .test_layers_alone import WIDTH

pytestmark = [pytest.mark.shares_graphs, pytest.mark.usefixtures("no_gradients_no_warnings")]


def plain_will_do() -> None:
    """What cannot be cached may be said so; its results are looked at all the same."""
    warnings.filterwarnings("ignore", "dllm: this graph runs on plain Inductor", UserWarning)


# -- what is beside the ids -------------------------------------------------------------------------------------------


class Told(Whole):
    """A denoiser that is told more than its ids; ``kind`` says what, and where it enters."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(9)
        self.kind = kind
        self.classes = torch.nn.Embedding(10, WIDTH)
        self.features = torch.nn.Linear(WIDTH, 2 * WIDTH)

    def enter(self, x: torch.Tensor, more: Any) -> torch.Tensor:
        if self.kind == "label":
            return x + self.classes(more)[:, None]
        if self.kind in ("scalar", "number"):
            return x * (1 + more)
        if self.kind == "times":
            return x * (1 + more[:, None, None])
        if self.kind == "token":
            return x + more
        if self.kind == "pooled":
            return x + more.mean(1, keepdim=True)
        if self.kind == "vector":
            return x + more[:, None]
        return x

    def layer(self, index: int, x: torch.Tensor, more: Any) -> torch.Tensor:
        if self.kind == "modulated":
            x = x * (1 + torch.tanh(more[:, None])) + more[:, None]
        x = self.layers[index](x, None)[0]
        if self.kind == "cross":
            key, value = self.features(more).chunk(2, -1)
            x = x + F.scaled_dot_product_attention(x.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)).squeeze(1)
        return x

    def forward(self, ids: torch.Tensor, more: Any) -> torch.Tensor:  # type: ignore[override]
        x = self.enter(self.embed(ids), more)
        for index in range(len(self.layers)):
            x = self.layer(index, x, more)
        x = x * (1 + more[:, None]) if self.kind == "late" else x
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


def floats(*shape: int) -> Callable[[int], Any]:
    return lambda seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


BESIDE: dict[str, Callable[[int], Any]] = {
    "vector": floats(2, WIDTH),
    "modulated": floats(2, WIDTH),
    "late": floats(2, WIDTH),
    "scalar": floats(),
    "times": floats(2),
    "token": floats(2, 1, WIDTH),
    "label": lambda seed: torch.tensor([seed % 10, (3 * seed + 1) % 10]),
    "number": lambda seed: 0.25 * seed,
    "pooled": floats(2, 5, WIDTH),
    "cross": floats(2, 5, WIDTH),
}
ORDERS = ("abab", "aabb", "abba", "abcabc")


def told(kind: str) -> Told:
    model: Told = Told(kind).double().eval()
    return model


def conditions(kind: str) -> dict[str, Any]:
    null = BESIDE[kind](0)
    return {"a": BESIDE[kind](1), "b": null * 0, "c": BESIDE[kind](3)}


@pytest.mark.parametrize(("kind", "name"), in_turn(BESIDE, ["neutral", "dual"]))
def test_the_same_ids_under_another_condition(kind: str, name: str) -> None:
    """Guidance one after the other; at neutral settings in mid-sequence too, else at the first call of each."""
    plain_will_do()
    model, given = told(kind), conditions(kind)
    call: Any = models.compiled(model, **{**EQUAL, **METHODS}[name])
    for number, order in enumerate(ORDERS):
        x = start(seed=2 + number)
        seen = set()
        for which in order:
            if name == "dual" and which in seen:
                continue
            seen.add(which)
            assert off(call(x, given[which]), model(x, given[which]), readable(x)) < TOLERANCE, order
            x = x if name == "dual" else fill(model(x, given["a"]), x)


@pytest.mark.parametrize("kind", ["vector", "modulated", "times", "cross"])
def test_the_condition_is_written_in_place(kind: str) -> None:
    plain_will_do()
    model, more = told(kind), BESIDE[kind](1)
    call: Any = models.compiled(model, **NEUTRAL)
    x = start()
    for _ in range(4):
        assert off(call(x, more), model(x, more), readable(x)) < TOLERANCE
        more.data.mul_(-0.5)
        assert off(call(x, more), model(x, more), readable(x)) < TOLERANCE
        x = fill(model(x, more), x)


class ToldAlone(Told):
    """The same, its layers compiled one at a time."""

    def forward(self, ids: torch.Tensor, more: Any) -> torch.Tensor:  # type: ignore[override]
        x = self.enter(self.embed(ids), more)
        for index in range(len(self.layers)):
            torch._dynamo.graph_break()
            x = self.layer(index, x, more)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


@pytest.mark.parametrize(("kind", "name"), [("vector", "exact"), ("modulated", "neutral"), ("cross", "exact")])
def test_conditions_of_layers_alone(kind: str, name: str) -> None:
    plain_will_do()
    model: Any = ToldAlone(kind).double().eval()
    call: Any = models.compiled(model, **EQUAL[name])
    given = conditions(kind)
    x = start()
    for which in "abbacb":
        assert off(call(x, given[which]), model(x, given[which]), x == MASK) < TOLERANCE
        x = x if which == "b" else fill(model(x, given["a"]), x)


# -- streams ----------------------------------------------------------------------------------------------------------

Stream = Iterator[torch.Tensor]


def llada(call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Stream:
    """LLaDA's loop in blocks of 4, a token a call: the ids after each call."""
    return loops.llada(call, x.clone(), PROMPT, steps=RESPONSE, block_length=4, mask_id=MASK)


def alone(begin: Callable[[Callable[..., torch.Tensor]], Stream], build_it: Any, options: dict[str, Any]) -> Any:
    """The ids of each step of a stream that has a fresh compiled model for itself, and its partial steps."""
    dllm_compile.reset()
    model = build_it()
    history = list(begin(models.compiled(model, **options)))
    return history, partial(model)


def interleaved(begins: list[Any], build_it: Any, options: dict[str, Any]) -> tuple[list[list[torch.Tensor]], Any]:
    """The ids of each step of streams that take turns on one compiled model."""
    dllm_compile.reset()
    model = build_it()
    call = models.compiled(model, **options)
    streams = [begin(call) for begin in begins]
    return [list(each) for each in zip(*zip(*streams, strict=True), strict=True)], model


def same(got: list[torch.Tensor], want: list[torch.Tensor]) -> bool:
    return len(got) == len(want) and all(map(torch.equal, got, want))


def prompts(call: Any) -> Stream:
    return llada(call, start(seed=1))


def other_prompts(call: Any) -> Stream:
    return llada(call, start(seed=2))


def other_batch(call: Any) -> Stream:
    return llada(call, start(batch=3, seed=3))


def other_length(call: Any) -> Stream:
    return loops.llada(call, start(seed=4, response=16), PROMPT, steps=RESPONSE, block_length=4, mask_id=MASK)


def first_condition(call: Any) -> Stream:
    return llada(lambda x: call(x, BESIDE["modulated"](1)), start())


def null_condition(call: Any) -> Stream:
    return llada(lambda x: call(x, 0 * BESIDE["modulated"](1)), start())


def drawn(call: Callable[[torch.Tensor], torch.Tensor]) -> Stream:
    """Tokens that are not the model's, in any order: for four calls it is in doubt whether this is a loop."""
    x, draw = start(seed=5), torch.Generator().manual_seed(5)
    for place in (PROMPT + torch.randperm(RESPONSE, generator=draw)).tolist():
        logits = call(x)
        x = x.clone()
        x[:, place] = logits[:, place, :MASK].argsort(-1)[:, torch.randint(MASK // 2, (), generator=draw)]
        yield x


STREAMS: dict[str, tuple[list[Any], Any]] = {
    "prompts": ([prompts, other_prompts], build),
    "batch": ([prompts, other_batch], build),
    "length": ([prompts, other_length], build),
    "condition": ([first_condition, null_condition], lambda: told("modulated")),
    "alone": ([prompts, other_prompts], lambda: build("alone")),
}


@pytest.mark.parametrize(
    ("name", "kind"), [*(("dual", kind) for kind in STREAMS), ("dllm-cache", "condition"), ("dllm-cache", "alone")]
)
def test_streams_that_take_turns_go_as_if_alone(name: str, kind: str) -> None:
    begins, build_it = STREAMS[kind]
    wanted = [alone(begin, build_it, METHODS[name]) for begin in begins]
    got, model = interleaved(begins, build_it, METHODS[name])
    assert [same(a, b) for a, (b, _) in zip(got, wanted, strict=True)] == [True] * len(begins)
    assert partial(model) == sum(count for _, count in wanted) > 0


def test_a_stream_that_is_in_doubt_was_not_given_up() -> None:
    given = conditions("modulated")
    begins = [lambda call, more=given[which]: drawn(lambda x: call(x, more)) for which in "ab"]
    wanted = [alone(begin, lambda: told("modulated"), METHODS["dual"]) for begin in begins]
    dllm_compile.reset()
    model = told("modulated")
    call = models.compiled(model, **METHODS["dual"])
    first, second = (begin(call) for begin in begins)
    got: tuple[list[torch.Tensor], list[torch.Tensor]] = [next(first), next(first)], []
    for a, b in zip_longest(first, second):
        got[0].extend([a] if a is not None else [])
        got[1].append(b)
    assert [same(a, b) for a, (b, _) in zip(got, wanted, strict=True)] == [True, True]
    assert partial(model) == sum(count for _, count in wanted) > 0


@pytest.mark.parametrize("name", ["dllm-cache", "prefix", "sparse", "dyllm", "dkv-cache"])
def test_two_prompts_that_take_turns_under_every_method(name: str) -> None:
    test_streams_that_take_turns_go_as_if_alone(name, "prompts")


@pytest.mark.parametrize(
    ("name", "kind"), [("exact", "condition"), ("neutral", "prompts"), ("neutral", "batch"), ("neutral", "alone")]
)
def test_streams_that_take_turns_are_eager_at_neutral_settings(name: str, kind: str) -> None:
    begins, build_it = STREAMS[kind]
    model = build_it()
    call = models.compiled(model, **EQUAL[name])

    def checked(x: torch.Tensor, *more: Any) -> torch.Tensor:
        got: torch.Tensor = call(x, *more)
        assert off(got, model(x, *more), x == MASK) < TOLERANCE
        return got

    streams = [begin(checked) for begin in begins]
    assert len(list(zip(*streams, strict=True))) == RESPONSE


@pytest.mark.parametrize("name", ["neutral", "dllm-cache", "dual"])
def test_many_streams_stay_right_and_bounded(name: str) -> None:
    options = {**EQUAL, **METHODS}[name]
    model = build()
    call = models.compiled(model, **options)
    call(start(seed=100))
    one = dllm_compile.stats(model)["state_bytes"]
    assert one > 0 or name == "neutral"
    dllm_compile.reset()
    most = int(2.5 * one) if one else 2**16
    model = build()
    call = models.compiled(model, max_state_bytes=most, **options)
    xs = {seed: start(seed=seed) for seed in range(2, 9)}
    for _ in range(4):
        for seed, x in xs.items():
            got = call(x).clone()
            if name == "neutral" or not (x[:, PROMPT] != MASK).any():
                assert off(got, model(x), readable(x)) < TOLERANCE
            assert got[x == MASK].isfinite().all()
            xs[seed] = fill(model(x), x)
            assert dllm_compile.stats(model)["state_bytes"] <= most
    assert dllm_compile.stats(model)["sequences"] >= len(xs)


@pytest.mark.parametrize("name", ["dllm-cache", "dual"])
def test_the_stream_used_least_recently_goes_first(name: str) -> None:
    model = build()
    call = models.compiled(model, **METHODS[name])
    call(start(seed=100))
    one = dllm_compile.stats(model)["state_bytes"] + dllm_compile.stats(model)["logits_bytes"]
    dllm_compile.reset()
    model = build()
    call = models.compiled(model, max_state_bytes=int(2.5 * one), **METHODS[name])
    xs = [start(seed=seed) for seed in (2, 3)]
    for turn in range(RESPONSE // 2):
        for i, x in enumerate(xs):
            before = partial(model)
            xs[i] = fill(call(x), x)
            assert (partial(model) == before + 1) == (turn > 0)


# -- loops as objects -------------------------------------------------------------------------------------------------


def sampled(call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, seed: int) -> Stream:
    """From left to right at temperature 1."""
    draw = torch.Generator().manual_seed(seed)
    for place in range(PROMPT, x.shape[1]):
        probability = call(x)[:, place].softmax(-1)
        x = x.clone()
        x[:, place] = torch.multinomial(probability, 1, generator=draw)[:, 0]
        yield x


@pytest.mark.parametrize(
    ("name", "form"),
    [("neutral", "whole"), ("dllm-cache", "whole"), ("dual", "alone"), ("sparse", "whole"), ("dyllm", "alone")],
)
def test_the_best_of_three_answers_to_one_prompt(name: str, form: str) -> None:
    """Each loop object is a loop with a state of its own, entered once a call."""
    options = {**EQUAL, **METHODS}[name]
    wanted, count = [], 0
    for seed in range(3):
        dllm_compile.reset()
        model = build(form)
        call = models.compiled(model, **options)
        with dllm_compile.loop():
            wanted.append(list(sampled(call, start(), seed)))
        count += partial(model)
    dllm_compile.reset()
    model = build(form)
    call = models.compiled(model, **options)
    words = [dllm_compile.loop() for _ in wanted]

    def within(word: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(x: torch.Tensor) -> torch.Tensor:
            with word:
                return call(x).clone()

        return run

    streams = [sampled(within(word), start(), seed) for seed, word in enumerate(words)]
    got = [list(each) for each in zip(*zip(*streams, strict=True), strict=True)]
    assert [same(a, b) for a, b in zip(got, wanted, strict=True)] == [True] * 3
    assert partial(model) == count
    assert count > 0 or name == "neutral"


def test_a_loop_within_a_loop_and_one_left_by_an_error() -> None:
    model = build()
    call = models.compiled(model, **METHODS["dual"])
    outer, inner = dllm_compile.loop(), dllm_compile.loop()
    x, y = start(seed=1), start(seed=2)
    with outer:
        x = fill(call(x), x)
        with inner:
            y = fill(call(y), y)
        before = partial(model)
        x = fill(call(x), x)
        assert partial(model) == before + 1
    with contextlib.suppress(KeyError), inner:
        raise KeyError
    with inner:
        y = fill(call(y), y)
    assert partial(model) == before + 2
    z = start(seed=3)
    assert off(call(z), model(z), readable(z)) < TOLERANCE


def test_a_loop_that_begins_anew_on_another_prompt_and_shape() -> None:
    model = build()
    call = models.compiled(model, **METHODS["dual"])
    word = dllm_compile.loop()
    for x in (start(seed=1), start(seed=2), start(batch=3, seed=3), start(seed=1)):
        with word:
            assert off(call(x), model(x), readable(x)) < TOLERANCE
            call(fill(model(x), x))


# -- guidance ----------------------------------------------------------------------------------------------------------


def guided(call: Callable[[torch.Tensor], torch.Tensor], order: str, prompt: int) -> list[torch.Tensor]:
    """The logits ``[2, S, V]`` of a loop in blocks of 4, with and without its prompt, ``b`` and ``a``: from one call of
    both, or from two calls; ``order`` says which comes first.
    """
    x, out = start(batch=1, prompt=prompt, response=12), []
    for place in range(prompt, prompt + 12):
        blank = x.clone()
        blank[:, :prompt] = MASK
        given = {"b": x, "a": blank}
        if len(order) == 2:
            found = dict(zip(order, call(torch.cat([given[each] for each in order])).clone().chunk(2), strict=True))
        else:
            found = {each: call(given[each]).clone() for each in order[::2]}
        out.append(torch.cat([found["b"], found["a"]])[:, place : place + 4])
        best = out[-1].sum(0).argmax(-1)
        x = x.clone()
        x[:, place] = best[0] % MASK
    return out


@pytest.mark.parametrize("prompt", [1, 6])
@pytest.mark.parametrize("order", ["ab", "b+a", "a+b"])
@pytest.mark.parametrize("name", ["dual", "dyllm"])
def test_guidance_is_the_same_in_one_call_and_in_two(name: str, order: str, prompt: int) -> None:
    """Rows of a call without the prompt are never those of one with it, and both have the same blocks."""
    wanted, model = guided(models.compiled_loop(build(), **METHODS[name]), "ba", prompt), build()
    got = guided(models.compiled_loop(model, **METHODS[name]), order, prompt)
    again = order == "a+b"  # the call without the prompt is known to be one when the other has come, and begins anew
    for step, (a, b) in enumerate(zip(got, wanted, strict=True)):
        same = torch.tensor([True, step == 0 or not again])
        assert off(a[:, 0], b[:, 0], same) < TOLERANCE, step
    assert partial(model) == (11 if order == "ab" else 22 - again) - (2 if name == "dual" else 0) * (
        1 + (order != "ab")
    )


def test_a_loop_of_masks_alone_that_fills_the_first_keeps_its_blocks() -> None:
    """What it filled first could be a prompt, until the calls go on with it."""
    model = build()
    call, x = models.compiled_loop(model, **METHODS["dual"]), start(prompt=0, response=12)
    for _ in range(12):
        x = fill(call(x), x)
    assert steps(model) == {"full": 5, "block": 7}  # the first call, two in doubt, two blocks


def test_two_lengths_of_response_to_one_prompt_are_no_guidance() -> None:
    model = build()
    call, x = models.compiled_loop(model, **METHODS["dual"]), start(batch=1).expand(2, -1).clone()
    x[0, PROMPT + 4 :] = 1  # padding; in the other row there are masks behind the response of this one
    for step in range(RESPONSE):
        got = call(x).clone()
        assert step not in (0, 4, 5) or off(got, model(x), readable(x)) < TOLERANCE
        x = fill(got, x)
    assert steps(model) == {"full": 3, "block": 5}


def test_blocks_stay_where_they_were_behind_a_token_that_was_masked_again() -> None:
    """Such a call fills masks of an earlier one and is in doubt, so that it computes every row, but has the blocks."""
    model = build()
    call, x = models.compiled_loop(model, **METHODS["dual"]), start(batch=1)
    for step, place in enumerate([0, 1, 2, 1, 3, 7, 5, 6, 4]):
        got = call(x).clone()
        x[:, PROMPT + place] = got[:, PROMPT + place].argmax(-1)
        if step == 2:
            x[:, PROMPT + 1] = MASK
    assert steps(model) == {"full": 3, "block": 6}


# -- batches whose sequences come and go ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_sequence_that_finishes_leaves_the_others_going(name: str) -> None:
    model = build()
    call = models.compiled(model, **METHODS[name])
    x = start(batch=3)
    logits = call(x)
    begun, counted = dllm_compile.stats(model)["sequences"], []
    while (x == MASK).any():
        x = torch.cat([fill(logits, x, 2)[:1], fill(logits, x)[1:]])  # the first is done after four calls
        if not (x == MASK).any():
            break
        before = partial(model)
        logits = call(x).clone()
        counted.append(partial(model) - before)
        assert logits[x == MASK].isfinite().all()
    assert dllm_compile.stats(model)["sequences"] == begun
    assert sum(counted[3:]) >= len(counted[3:]) - 2  # a block's first steps are full


@pytest.mark.parametrize(("form", "name"), [("whole", "exact"), ("whole", "neutral"), ("alone", "neutral")])
def test_sequences_come_and_go_at_neutral_settings(form: str, name: str) -> None:
    model = build(form)
    call = models.compiled(model, **EQUAL[name])
    x = start(batch=3)
    for turn in range(12):
        assert off(call(x), model(x), readable(x)) < TOLERANCE
        x = fill(model(x), x)
        for row in range(3):
            if (turn + 2 * row) % 5 == 4:
                x[row] = start(batch=1, seed=50 + 3 * turn + row)[0]
    while len(x) > 1:
        assert off(call(x), model(x), readable(x)) < TOLERANCE
        x = fill(model(x), x)[1:]


@pytest.mark.parametrize("name", ["dllm-cache", "dual", "prefix", "dyllm"])
def test_a_new_prompt_in_a_running_batch(name: str) -> None:
    """The new row is right at its first call; the others do not begin anew."""
    model = build()
    call = models.compiled(model, **METHODS[name])
    x = start(batch=3, response=16)
    replaced = new = 0
    for turn in range(16):
        logits = call(x).clone()
        if turn in (5, 9, 13):
            row = x[new : new + 1]
            assert off(logits[new : new + 1], model(row), readable(row)) < TOLERANCE
        x = fill(logits, x)
        if turn in (4, 8, 12):
            new = turn // 4 - 1
            x[new] = start(batch=1, seed=60 + turn, response=16)[0]
            replaced += 1
    assert replaced == 3
    assert dllm_compile.stats(model)["sequences"] <= 3 + replaced  # a batch may count as one or as its rows
    assert partial(model) >= 8


@pytest.mark.parametrize("name", ["dllm-cache", "dual", "sparse", "dyllm"])
def test_a_batch_that_shrinks_goes_on(name: str) -> None:
    model = build()
    call = models.compiled(model, **METHODS[name])
    x = start(batch=4)
    calls = 0
    while len(x):
        logits = call(x).clone()
        calls += 1
        if calls == 1:
            assert off(logits, model(x), readable(x)) < TOLERANCE
            begun = dllm_compile.stats(model)["sequences"]
        fast = fill(logits, x, 2)
        x = torch.cat([fast[:2], fill(logits, x)[2:]]) if len(x) > 2 else fill(logits, x)
        x = x[(x == MASK).any(1)]
    assert dllm_compile.stats(model)["sequences"] == begun
    assert partial(model) >= calls - (6 if name == "sparse" else 4)  # two blocks, each with a full step or two; with
    # sparse-dllm all sequences begin a block together, so that the faster two make the others do so once more
    assert steps(model)["repeat"] == 0


def test_rows_of_a_batch_in_another_order() -> None:
    model = build()
    call = models.compiled(model, **EXACT)
    x = start(batch=3)
    for _ in range(4):
        assert off(call(x), model(x), readable(x)) < TOLERANCE
        x = fill(model(x), x).roll(1, 0)


def test_the_form_of_layers_alone_has_its_streams_apart() -> None:
    assert issubclass(Alone, Whole)
    model = build("alone")
    call = models.compiled(model, **METHODS["dual"])
    xs = [start(seed=1), start(seed=2), start(batch=3, seed=3)]
    words = [dllm_compile.loop() for _ in xs]  # no graph has the logits that would show it
    for turn in range(3):
        for i, x in enumerate(xs):
            with words[i]:
                got = call(x).clone()
            if not turn:
                assert off(got, model(x), x == MASK) < TOLERANCE
            xs[i] = fill(got, x)
    assert partial(model) >= 5
