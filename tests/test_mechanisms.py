"""A method is one value: what is made of it, and one from outside of the package."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

import dllm_compile
from dllm_compile import AfterLayer, Mechanism, Option, Options, RowRule, attention_weights
from dllm_compile.interface.mechanism import count, flag
from dllm_compile.mechanisms import OWN, register, tables, unregister

from . import models, shared
from .callers import RESPONSE, TOLERANCE, build, fill, off, readable, start, steps
from .models import MASK

pytestmark = [pytest.mark.shares_graphs, pytest.mark.usefixtures("no_gradients_no_warnings")]


EVERY_THIRD = RowRule(
    "third", lambda facts: facts.masked | facts.since, "them", refresh=lambda facts: facts.since.sum(1, True) >= 3
)


@pytest.fixture(autouse=True)
def _unregistered() -> Iterator[None]:
    """Each test leaves the package's mechanisms alone behind."""
    yield
    for name in tables().registered:
        unregister(name)


@pytest.fixture
def sliding() -> Mechanism:
    """The example's mechanism."""
    from examples.sliding_window import SLIDING_WINDOW

    return register(SLIDING_WINDOW)


def largest_error(options: dict[str, Any], batch: int = 2) -> float:
    """Of the rows a sampler reads in a loop that fills the surest mask, against eager."""
    model, x, worst = build(), start(batch), 0.0
    call = shared.compiled(model, lowering="eager", mask_id=MASK, **options)
    for _ in range(RESPONSE):
        got, want = call(x).clone(), model(x)
        worst = max(worst, off(got, want, readable(x)))
        x = fill(want, x)
    return worst


@pytest.mark.parametrize("mechanism", OWN, ids=lambda each: each.name)
def test_a_neutral_setting_equals_eager(mechanism: Mechanism) -> None:
    tokens = mechanism.unmask or mechanism.threshold or mechanism.ends
    if tokens and not mechanism.rules and not mechanism.methods:
        pytest.skip("it only decides what generate writes")
    assert mechanism.neutral is not None
    assert largest_error(dict(mechanism.neutral)) < TOLERANCE


@pytest.mark.parametrize("mechanism", OWN, ids=lambda each: each.name)
def test_what_is_declared_is_understood(mechanism: Mechanism) -> None:
    for option in mechanism.options:
        assert getattr(Options, option.name) == option.default
        assert f"{option.name}: {option.meaning}" in " ".join((Options.__doc__ or "").split())
    for name, values in mechanism.methods.items():
        made = Options(method=name)
        assert {each: getattr(made, each) for each in values} == dict(values)
        assert made == Options(preset=name) or name in mechanism.presets


# -- a method from outside -------------------------------------------------------------------------------------------


def test_a_sliding_window_equals_eager_where_it_is_neutral(sliding: Mechanism) -> None:
    assert sliding.neutral is not None
    assert largest_error(dict(sliding.neutral)) < TOLERANCE
    assert largest_error({"method": "sliding-window", "window": 2}) > 1e-3


def test_a_sliding_window_computes_the_rows_that_it_says(sliding: Mechanism) -> None:
    model, x = build(), start(1)
    call = shared.compiled(model, lowering="eager", mask_id=MASK, shift=False, method="sliding-window", window=2)
    rows, loop = [], dllm_compile.loop()
    for _ in range(6):
        before = dllm_compile.stats(model)["rows"].get("block", 0)
        with loop:
            x = fill(call(x), x)
        rows.append(dllm_compile.stats(model)["rows"].get("block", 0) - before)
    assert rows == [0, 3, 4, 5, 6, 7]  # two masked ones and those decided since the first call


@pytest.mark.parametrize(
    "beside",
    [{"keep_ratio": 0.5}, {"saliency_threshold": 0.9, "full_steps": 1}, {"prompt_interval": 4}, {"shift": True}],
    ids=str,
)
def test_a_sliding_window_goes_with_other_mechanisms(sliding: Mechanism, beside: dict[str, Any]) -> None:
    model, x = build(), start()
    options = {"method": "sliding-window", "window": 3, **beside}
    call = shared.compiled(model, lowering="eager", mask_id=MASK, **options)
    for _ in range(RESPONSE):
        x = fill(call(x).clone(), x)
    assert not (x == MASK).any()
    assert count_of_partial(model) >= 4
    if "prompt_interval" not in beside:  # then a refresh is of the response alone
        assert largest_error({**options, "refresh_interval": 1}) < TOLERANCE


def test_all_rows_that_a_window_may_come_to_keep_their_keys(sliding: Mechanism) -> None:
    """With every other key dropped, no step of the window needs one that is not there: none is a refresh."""
    model, loop, x = build(), dllm_compile.loop(), start()
    options = {"method": "sliding-window", "window": 2, "keep_ratio": 0.0, "delay": 0}
    call = shared.compiled(model, lowering="eager", mask_id=MASK, **options)
    for _ in range(6):
        with loop:
            x = fill(call(x).clone(), x)
    with loop:
        assert all(torch.isfinite(call(x)).flatten().tolist())
    assert steps(model)["evict"] == 1
    assert count_of_partial(model) == 6


def count_of_partial(model: torch.nn.Module) -> int:
    return sum(number for name, number in steps(model).items() if name not in ("full", "evict"))


def test_its_options_are_checked_as_those_of_the_package(sliding: Mechanism) -> None:
    def said(**written: Any) -> str:
        with pytest.raises(ValueError) as caught:
            Options(**written)
        return str(caught.value)

    assert said(method="sliding-window", window=0) == "window is 0; give a whole number of at least 1, such as 16"
    assert said(cache="dual", window=8) == ("window is 8, but no mechanism reads it; give cache='sliding-window' too")
    assert "did you mean 'window'?" in said(method="sliding-window", windov=8)
    assert "did you mean 'sliding-window'?" in said(method="sliding-windows")
    made = Options(method="sliding-window", window=8)
    assert (made.window, made.refresh_interval, Options(method="exact").window) == (8, 8, 16)
    assert made == Options.of(
        {"cache": "sliding-window", "refresh_interval": 8, "window": 8, "method": "sliding-window"}
    )
    assert hash(made) == hash(Options.of(made)) != hash(replace(made, window=9))
    assert replace(made, window=9).window == 9
    assert made == pickle.loads(pickle.dumps(made)) == Options(**asdict(made))
    assert made == Options(**{name: value for name, value in asdict(made).items() if name != "more"}, window=8)
    unregister(sliding.name)
    assert made.window == 8
    assert "there is no option 'window'" in said(window=8)
    with pytest.raises(AttributeError, match="window"):
        Options(method="exact").window  # noqa: B018


def test_the_rows_of_a_method_are_its_own(sliding: Mechanism) -> None:
    """Another value of ``cache`` would leave nothing of the method but its name."""
    with pytest.raises(ValueError, match="whose rows are those of cache='sliding-window', and cache is 'dual'"):
        Options(method="sliding-window", cache="dual")


def test_a_loop_goes_on_where_its_mechanism_was_unregistered(sliding: Mechanism) -> None:
    model, loop, x = build(), dllm_compile.loop(), start(1)
    call = shared.compiled(model, lowering="eager", mask_id=MASK, method="sliding-window")
    for step in range(RESPONSE):
        if step == 2:
            unregister(sliding.name)
        with loop:
            x = fill(call(x), x)
    call(start(1, seed=7))  # and another begins
    assert steps(model)["block"] > 3


def test_generate_and_explain_know_it(sliding: Mechanism) -> None:
    model = models.build("llama")
    given = {"mask_id": MASK, "gen_length": 8, "lowering": "eager", "window": 2}
    out = dllm_compile.generate(model, start(1)[:, :6], method="sliding-window", **given)
    assert not (out == MASK).any()
    with pytest.raises(ValueError, match="window is -1; give a whole number of at least 1"):
        dllm_compile.generate(model, start(1)[:, :6], method="sliding-window", **{**given, "window": -1})
    text = str(dllm_compile.explain(model, start(1), method="sliding-window", mask_id=MASK))
    assert "block" in text


def test_a_rule_may_say_when_every_row_is_computed() -> None:
    """As DSB does (arXiv 2602.05992): when so many tokens were filled since the last time, and where a loop begins."""
    register(Mechanism("third", "a test", rules=(EVERY_THIRD,)))
    model, x = build(), start(1)
    call = shared.compiled(model, lowering="eager", mask_id=MASK, cache="third")
    full, loop = [], dllm_compile.loop()
    for _ in range(RESPONSE):
        before = steps(model)["full"]
        with loop:
            x = fill(call(x), x)
        full.append(steps(model)["full"] - before)
    assert full == [1, 0, 0, 1, 0, 0, 1, 0]
    assert dllm_compile.stats(model)["refreshes"] == {"block": 1, "rule": 2}


def rule_of_a_window(name: str) -> Mechanism:
    def window(facts: Any) -> torch.Tensor:
        return (facts.masked & (facts.masked.cumsum(1) <= 2)) | facts.since

    return Mechanism(name, "a test", rules=(RowRule(name, window, "two masks and what was filled"),))


def rule(name: str, **more: Any) -> Mechanism:
    return Mechanism(name, "a test", rules=(RowRule(name, lambda facts: facts.masked, "masked rows"),), **more)


@pytest.mark.parametrize(
    ("mechanism", "sentence"),
    [
        (rule("dual"), "cache 'dual' is there already; give that of 'dual' another name"),
        (rule("saliency"), "mechanism 'saliency' is there already"),
        (rule("new", methods={"dyllm": {"cache": "new"}}), "method 'dyllm' is there already"),
        (rule("new", presets={"fastest": {"cache": "new"}}), "preset 'fastest' is there already"),
        (rule("new", options=(Option("delay", 1, meaning="it"),)), "'delay' cannot be an option of 'new'"),
        (rule("new", options=(Option("gen_interval", 1),)), "option 'gen_interval' is there already"),
        *(
            (rule("new", options=(Option(name, 1),)), f"{name!r} cannot be an option of 'new': it has a meaning")
            for name in ("temperature", "alg", "streamer", "input_ids", "more", "saliency", "reads", "_set")
        ),
        (rule("new", options=(Option("no name", 1),)), "'no name' cannot be an option of 'new': it is no identifier"),
        (rule("new", options=(Option("on", 4),), switches=("on",)), "whose default is 4; give None or False"),
        (rule("new", options=(Option("own", 0, **count("8")),)), "the default of own is 0; give a whole number"),
        (rule("new", options=(Option("own", 0, read=bool),)), "something reads own only beside others"),
        (rule("new", switches=("own",)), "'new' is switched on by 'own', which is none of its options"),
        (rule("new", methods={"new": {"cash": "new"}}), "there is no option 'cash'; did you mean 'cache'?"),
        (rule("new", methods={"new": {"cache": "knew"}}), "did you mean 'new'?"),
        (rule("new", methods={"new": {"cache": "new", "block_size": 4}}), "give options by their own names"),
        (rule("new", neutral={"cache": "new", "refresh_interval": 0}), "refresh_interval is 0"),
    ],
    ids=lambda each: each if isinstance(each, str) else each.name,
)
def test_what_cannot_be_registered_leaves_nothing_behind(mechanism: Mechanism, sentence: str) -> None:
    before = tables()
    with pytest.raises(ValueError) as caught:
        register(mechanism)
    assert sentence in str(caught.value)
    assert tables() is before


@pytest.mark.parametrize(
    "mechanism",
    [
        rule("new", options=("own",)),
        Mechanism("new", "a test", rules=("new",)),  # type: ignore[arg-type]
        rule("new", options=(Option("own", "a", lambda v: v > 0),)),
        {"name": "new"},
    ],
    ids=["no option", "no rule", "a check that fails", "no mechanism"],
)
def test_errors_of_other_kinds_leave_nothing_behind_either(mechanism: Any) -> None:
    before = tables()
    with pytest.raises(TypeError):
        register(mechanism)
    assert tables() is before


def test_a_mechanism_defined_again_takes_the_place_of_the_first() -> None:
    first, second = rule("new", methods={"new": {"cache": "new"}}), rule("new", methods={"newer": {"cache": "new"}})
    before = dict(tables().methods), dict(tables().presets), dict(tables().rules)
    register(first)
    register(second)
    assert "newer" in tables().methods
    assert "new" not in tables().methods
    with pytest.raises(ValueError, match="did you mean"):
        register(rule("new", methods={"new": {"cache": "knew"}}))
    assert "newer" in tables().methods
    unregister("new")
    assert (tables().methods, tables().presets, tables().rules) == before


# -- what a rule says --------------------------------------------------------------------------------------------------


WRONG: dict[str, Any] = {
    "integers": lambda facts: facts.masked.long(),
    "too few": lambda facts: facts.masked[:, 1:],
    "one dimension": lambda facts: facts.masked[0],
    "one a sequence": lambda facts: facts.masked.any(1, keepdim=True),
    "another device": lambda facts: facts.masked.to("meta"),
    "nothing": lambda facts: None,
}


@pytest.mark.parametrize(
    ("what", "how"),
    [*(("rows", how) for how in WRONG), *(("refreshes", how) for how in WRONG if how != "one a sequence")],
)
def test_what_a_rule_says_is_checked(what: str, how: str) -> None:
    each = RowRule("new", WRONG[how], "them")
    if what == "refreshes":
        each = RowRule("new", lambda facts: facts.masked, "them", refresh=WRONG[how])
    register(Mechanism("new", "a test", rules=(each,)))
    call = shared.compiled(build(), lowering="eager", mask_id=MASK, cache="new")
    with dllm_compile.loop(), pytest.raises(ValueError, match=f"the rule 'new' says {what}.*give torch.bool"):
        call(start())


def fails(*_: Any) -> Any:
    """A function of somebody's rule that errs."""
    raise KeyError("window")


@pytest.mark.parametrize(
    ("said", "more"),
    [
        ("the rule 'new' says rows", {"rules": (RowRule("new", fails, "them"),)}),
        ("the rule 'new' says refreshes", {"rules": (RowRule("new", lambda f: f.masked, "them", refresh=fails),)}),
        ("the rule 'new' says reach", {"rules": (RowRule("new", lambda f: f.masked, "them", reach=fails),)}),
        ("the mechanism 'new' narrows to rows", {"narrows": fails}),
        ("the mechanism 'new' says visible keys", {"visible": fails}),
        (
            "the rule 'new' measures layers",
            {"rules": (RowRule("new", lambda f: f.masked, "them", after_layer=AfterLayer(fails, fails)),)},
        ),
        (
            "the rule 'new' decides behind layer 0",
            {"rules": (RowRule("new", lambda f: f.masked, "them", after_layer=AfterLayer(attention_weights, fails)),)},
        ),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_what_a_function_raises_names_its_rule(said: str, more: dict[str, Any]) -> None:
    switch = Option("on", False, **flag(), meaning="it")
    register(Mechanism("new", "a test", options=(switch,), switches=("on",), **more))
    options = {"cache": "new"} if "rules" in more else {"cache": "dual", "on": True}
    options |= {"keep_ratio": 0.5, "delay": 0} if "reach" in said else {}
    call = shared.compiled(build(), lowering="eager", mask_id=MASK, **options)
    with dllm_compile.loop(), pytest.raises(RuntimeError) as caught:
        call(start())
    assert str(caught.value) == f"{said} by a function that raised KeyError: 'window'"
    assert isinstance(caught.value.__cause__, KeyError)


def test_what_a_measure_raises_under_inductor_names_its_rule() -> None:
    """Where the layer is compiled, and a graph that cannot be runs plainly."""
    after = AfterLayer(fails, fails)
    register(Mechanism("new", "a test", rules=(RowRule("new", lambda f: f.masked, "them", after_layer=after),)))
    call = shared.compiled(build(), mask_id=MASK, cache="new")
    with dllm_compile.loop(), pytest.raises(RuntimeError, match="the rule 'new' measures layers by a function that"):
        call(start())


def test_rows_outside_of_what_was_kept_are_computed_with_all_others() -> None:
    """Without ``reach`` nothing says that a window moves on: a step beyond what it was is a refresh."""
    register(rule_of_a_window("new"))
    model, x, loop, refreshes = build(), start(1), dllm_compile.loop(), 0
    call = shared.compiled(model, lowering="eager", mask_id=MASK, cache="new", keep_ratio=0.5, delay=0)
    for _ in range(RESPONSE):
        with loop:
            got = call(x).clone()
        want, before, refreshes = model(x), refreshes, steps(model)["evict"]
        if refreshes > before:
            assert off(got, want, x == MASK) < TOLERANCE
        x = fill(want, x)
    assert refreshes == RESPONSE - 1  # all but the last, whose window was in that of the one before


def test_a_refresh_of_the_response_alone_is_one() -> None:
    """Beside a long ``prompt_interval`` it computes the response, and what was filled counts anew."""
    register(Mechanism("third", "a test", rules=(EVERY_THIRD,)))
    model, x, loop, rows = build(), start(1), dllm_compile.loop(), []
    call = shared.compiled(model, lowering="eager", mask_id=MASK, shift=False, cache="third", prompt_interval=100)
    for _ in range(RESPONSE):
        before = sum(dllm_compile.stats(model)["rows"].values())
        with loop:
            x = fill(call(x), x)
        rows.append(sum(dllm_compile.stats(model)["rows"].values()) - before)
    assert rows == [14, 8, 8, 8, 5, 5, 8, 2]  # masked ones and those filled since, or the response


# -- blocks, further rows and refreshes from outside -----------------------------------------------------------------


def last_masks(told: dllm_compile.Masks) -> torch.Tensor:
    """A block of the last masks of a response."""
    return told.masked & (told.masked.flip(1).cumsum(1).flip(1) <= told.length)


BACKWARDS = Mechanism(
    "backwards",
    "no source",
    options=(Option("backwards", False, **flag(), meaning="blocks begin at the end"),),
    switches=("backwards",),
    block=last_masks,
    widens=lambda facts: facts.call.filled & (facts.call.number > 0),
    refresh=lambda facts: facts.since.sum(1, True) >= 3,
    methods={"backwards": {"cache": "dual", "backwards": True}},
)


def test_a_block_of_ones_own_is_written_by_generate_and_computed_between_refreshes() -> None:
    register(BACKWARDS)
    model, x = build(), start()
    common = {"gen_length": RESPONSE, "block_length": 2, "mask_id": MASK, "shift": False, "lowering": "eager"}
    out = dllm_compile.generate(
        model, x[:, :-RESPONSE], method="backwards", steps=RESPONSE, output_history=True, **common
    )
    for before, after in zip(out.history[:-1], out.history[1:], strict=True):
        filled, masked = before != after, before == MASK
        assert filled.sum(1).tolist() == [1, 1]
        assert not (filled & (masked.flip(1).cumsum(1).flip(1) > 2)).any()
    found = dllm_compile.stats(model)
    assert found["refreshes"] == {"block": 1, "backwards": 2}
    assert found["steps"] == {"full": 3, "block": RESPONSE - 3}
    assert found["rows"]["block"] == 3 * (RESPONSE - 3) - 1  # two masks, at last one, and the token that was filled


def test_two_mechanisms_that_say_the_block_are_refused() -> None:
    register(BACKWARDS)
    with pytest.raises(ValueError, match="sliding-block and backwards each decide where the block is; leave out all"):
        Options(method="backwards", sliding="greedy")


@pytest.mark.parametrize("name", ["widens", "refresh", "block"])
def test_functions_that_nothing_switches_on_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="nothing switches it on; name an option in `switches`"):
        register(Mechanism("mine", "no source", **{name: lambda facts: facts.masked}))
