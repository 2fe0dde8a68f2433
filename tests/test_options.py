"""Options: what is understood, and what a mistake is answered with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import dllm_compile
from dllm_compile import Options
from dllm_compile.general_options import LOWERINGS
from dllm_compile.mechanisms import METHODS, PRESETS, tables
from dllm_compile.options import DECLARED
from dllm_compile.passes.block_cache import full_steps
from dllm_compile.passes.feature_cache import share as ratio

from .models import MASK


def failure(make: Callable[[], object]) -> str:
    """What the ``ValueError`` says."""
    with pytest.raises(ValueError) as caught:
        make()
    return str(caught.value)


CACHES, SYNONYMS = tables().rules, tables().synonyms
OFF: dict[str, Any] = {
    "method": "exact",
    "prompt_interval": None,
    "response_interval": None,
    "transfer_ratio": None,
    "cache": "none",
    "window_size": 0,
    "block_length": None,
    "refresh_interval": None,
    "delay": None,
    "keep_ratio": None,
    "kernel_size": 3,
    "keep_outside": False,
    "outside_interval": None,
    "saliency_threshold": None,
    "full_steps": 4,
    "response_only": True,
    "whole_interval": 4,
    "sliding": None,
    "refresh_tokens": None,
    "rows_before": None,
    "rows_behind": None,
    "warmup_steps": None,
    "row_shares": None,
    "row_depths": (0.125, 0.25),
    "confidence_weight": 0.5,
    "unskipped_interval": None,
    "suffix_window": None,
    "threshold_fall": None,
    "frechet_delta": None,
    "length_cut": None,
    "mask_id": None,
    "shift": None,
    "readable": "masked",
    "max_state_bytes": 2**31,
    "verify": 0,
    "cuda_graphs": False,
    "lowering": "inductor",
    "more": (),
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "exact": {},
    "dllm-cache": {"prompt_interval": 50, "response_interval": 7, "transfer_ratio": 0.25},
    "fast-dllm": {"cache": "prefix"},
    "sparse-dllm": {"cache": "dual", "keep_ratio": 0.5},
    "flashblock": {"cache": "dual", "keep_outside": True},
    "dyllm": {"saliency_threshold": 0.99},
    "dkv-cache": {"cache": "decoded", "delay": 1, "refresh_interval": 8},
    "dsb": {"cache": "dual", "sliding": "greedy", "rows_before": 24},
    "dinfer": {"cache": "dual", "rows_before": 16, "rows_behind": 16, "warmup_steps": 4},
    "streaming-dllm": {"cache": "prefix", "suffix_window": 96},
    "es-dllm": {"cache": "rolling", "row_shares": (0.5, 0.25), "unskipped_interval": 16, "refresh_interval": 64},
}
"""What each method sets; the rest is off."""


def test_every_mechanism_is_off_where_nothing_is_reused() -> None:
    assert dataclasses.asdict(Options(method="exact")) == OFF


def test_the_constructor_means_what_a_mapping_means() -> None:
    for written in (*({"method": method} for method in METHODS), *({"preset": preset} for preset in PRESETS)):
        assert Options(**written) == Options.of(written)
    assert Options() == Options.of() == Options(method="dllm-cache")
    assert Options(gen_interval=3, mask_id=5) == Options.of({"response_interval": 3, "mask_id": 5})
    assert failure(lambda: Options(gen_intervall=3)) == failure(lambda: Options.of({"gen_intervall": 3}))


@pytest.mark.parametrize("method", METHODS)
def test_one_value_of_options_already_made_is_replaced_alone(method: str) -> None:
    made = Options(method=method)
    assert dataclasses.replace(made) == made
    assert dataclasses.asdict(dataclasses.replace(made, verify=3)) == {**dataclasses.asdict(made), "verify": 3}
    assert Options(**dataclasses.asdict(made)) == made
    assert failure(lambda: dataclasses.replace(made, verify=-1)).startswith("verify is -1; ")


@pytest.mark.parametrize("method", PUBLISHED)
def test_a_method_is_the_mechanisms_and_values_of_its_authors(method: str) -> None:
    assert METHODS.keys() == PUBLISHED.keys()
    assert dataclasses.asdict(Options.of(method=method)) == {**OFF, **PUBLISHED[method], "method": method}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_set_what_they_say_and_nothing_else(preset: str) -> None:
    method = {"method": PRESETS[preset].get("method", "dllm-cache")}
    wanted = {**OFF, **METHODS[method["method"]], **PRESETS[preset], **method}
    assert dataclasses.asdict(Options.of({"preset": preset})) == wanted


def test_without_a_method_it_is_dllm_cache() -> None:
    wanted = Options(method="dllm-cache", prompt_interval=50, response_interval=7, transfer_ratio=0.25)
    assert Options.of() == Options.of(None) == Options.of({}) == wanted
    assert Options.of(mask_id=3, verify=2) == dataclasses.replace(wanted, mask_id=3, verify=2)
    assert Options.of(gen_interval=3) == dataclasses.replace(wanted, response_interval=3)


@pytest.mark.parametrize(
    "own",
    [
        *({"cache": cache} for cache in CACHES),
        *({"cache": "dual", "keep_ratio": ratio} for ratio in (0.0, 0.5, 1.0)),
        *({"prompt_interval": 4, "keep_ratio": ratio} for ratio in (0.0, 0.5, 1.0)),
        *({"saliency_threshold": bound} for bound in (-1.0, 0, 0.0, 0.99, 1.0)),
        {"cache": "decoded", "saliency_threshold": 0.0, "keep_ratio": 0.0, "response_interval": -1},
    ],
    ids=str,
)
def test_a_mechanism_named_alone_is_that_one_alone(own: dict[str, Any]) -> None:
    assert dataclasses.asdict(Options.of(own)) == {**OFF, **own}


def test_a_mechanism_named_beside_a_method_is_added_to_it() -> None:
    assert Options.of(method="fast-dllm", cache="dual").cache == "dual"
    both = Options.of(method="dllm-cache", keep_ratio=0.25)
    assert dataclasses.asdict(both) == {**OFF, **METHODS["dllm-cache"], "method": "dllm-cache", "keep_ratio": 0.25}
    without = Options.of(method="sparse-dllm", keep_ratio=None)
    assert dataclasses.asdict(without) == {**OFF, "method": "sparse-dllm", "cache": "dual"}


def test_another_method_of_options_already_made_is_that_method() -> None:
    made = [Options.of(method=method, mask_id=3, verify=2) for method in METHODS]
    for before in made:
        for wanted in made:
            assert Options.of(before, method=wanted.method) == wanted


@pytest.mark.parametrize(
    ("given", "full", "share"),
    [
        ({}, 1, 0.25),
        ({"transfer_ratio": 0.0}, 1, 0.0),
        ({"method": "sparse-dllm"}, 2, 0.25),
        ({"method": "sparse-dllm", "delay": 0}, 1, 0.25),
        ({"method": "dkv-cache"}, 2, 0.25),
        ({"cache": "dual", "delay": 3}, 4, 0.25),
    ],
    ids=str,
)
def test_what_none_stands_for(given: dict[str, Any], full: int, share: float) -> None:
    options = Options.of(given)
    assert (full_steps(options), ratio(options)) == (full, share)


# -- two mechanisms for one thing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "other"),
    [
        ({"cache": "dual", "transfer_ratio": 0.5}, "a cache of blocks"),
        ({"cache": "decoded", "transfer_ratio": 0.0, "saliency_threshold": 0.9}, "a cache of blocks"),
        ({"method": "fast-dllm", "transfer_ratio": 1.0}, "a cache of blocks"),
        ({"method": "dllm-cache", "saliency_threshold": 0.9, "transfer_ratio": 0.25}, "saliency_threshold"),
        ({"method": "dyllm", "transfer_ratio": 0.25}, "saliency_threshold"),
    ],
    ids=str,
)
def test_two_mechanisms_that_choose_the_rows_are_refused(given: dict[str, Any], other: str) -> None:
    said = failure(lambda: Options.of(given))
    assert said == f"transfer_ratio and {other} both choose the rows of a step; leave out one of them"
    assert Options.of({**given, "transfer_ratio": None}).transfer_ratio is None


@pytest.mark.parametrize("other", [{"cache": "dual"}, {"saliency_threshold": 0.9}], ids=str)
def test_beside_what_chooses_rows_dllm_cache_is_its_intervals(other: dict[str, Any]) -> None:
    got = Options.of({"method": "dllm-cache", **other})
    assert (got.prompt_interval, got.response_interval, got.transfer_ratio) == (50, 7, None)


@pytest.mark.parametrize(
    "given", [{"keep_ratio": 0.5}, {"keep_ratio": 0.0}, {"method": "sparse-dllm", "cache": "none"}]
)
def test_a_share_of_nothing_is_refused(given: dict[str, Any]) -> None:
    said = failure(lambda: Options.of(given))
    assert said.startswith(f"keep_ratio is {given.get('keep_ratio', 0.5)!r}, a share of what a cache keeps; ")
    assert "give cache='dual' or prompt_interval too, or method='sparse-dllm'" in said
    for kept in ({"prompt_interval": 4}, {"response_interval": 4}, {"saliency_threshold": 0.9}, {"cache": "decoded"}):
        assert Options.of({**given, **kept}).keep_ratio is not None


# -- what is written ---------------------------------------------------------------------------------------------------


def test_a_preset_yields_to_what_is_written_beside_it() -> None:
    got = Options.of({"response_interval": 3, "preset": "dllm-cache/llada-instruct-gsm8k", "mask_id": 5})
    assert (got.prompt_interval, got.response_interval, got.mask_id) == (50, 3, 5)


def test_a_preset_yields_to_a_synonym_beside_it() -> None:
    assert Options.of(preset="dllm-cache/dream-base-gsm8k", gen_interval=2).response_interval == 2


READ: dict[str, dict[str, Any]] = {
    "transfer_ratio": {"prompt_interval": 4},
    "block_length": {"cache": "prefix"},
    "refresh_interval": {"cache": "dual"},
    "delay": {"saliency_threshold": 0.9},
    "window_size": {"cache": "greedy"},
    "whole_interval": {"saliency_threshold": 0.9},
    "kernel_size": {"keep_ratio": 0.5, "prompt_interval": 4},
    "outside_interval": {"keep_outside": True, "cache": "dual"},
    "full_steps": {"saliency_threshold": 0.9},
    "response_only": {"saliency_threshold": 0.9},
    "refresh_tokens": {"sliding": "greedy", "cache": "dual"},
    "row_depths": {"row_shares": (0.5,), "cache": "dual"},
    "confidence_weight": {"row_shares": (0.5, 0.25), "cache": "dual"},
    "unskipped_interval": {"row_shares": (0.5, 0.25), "cache": "dual"},
}
"""Something that reads an option which not every mechanism does."""

ELSEWHERE = (
    ({"prompt_interval_steps": 25, "gen_interval_steps": 5}, {"prompt_interval": 25, "response_interval": 5}),
    ({"num_full_steps": 2}, {"full_steps": 2}),
    ({"response_interval_steps": 4, "block_size": 16}, {"response_interval": 4, "block_length": 16}),
    ({"gen_interval": 3}, {"response_interval": 3}),
    ({"cache_reloading_step": 8}, {"refresh_interval": 8}),
    ({"cache_steps": 8}, {"refresh_interval": 8}),
    ({"prompt_update": 8}, {"refresh_interval": 8}),
    ({"block_update": 4}, {"unskipped_interval": 4}),
)


@pytest.mark.parametrize(("written", "meant"), ELSEWHERE, ids=str)
def test_synonyms_mean_the_same(written: dict[str, int], meant: dict[str, int]) -> None:
    beside = {other: value for name in meant for other, value in READ.get(name, {}).items()}
    assert Options.of({**written, **beside}) == Options.of({**meant, **beside})


def test_every_synonym_is_known() -> None:
    assert {name for written, _ in ELSEWHERE for name in written} == SYNONYMS.keys()


def test_names_as_arguments_and_as_a_mapping_are_the_same() -> None:
    assert (
        Options.of(mask_id=3, verify=2)
        == Options.of({"mask_id": 3, "verify": 2})
        == Options.of({"mask_id": 3}, verify=2)
    )


def test_options_already_made_pass_through_and_can_be_changed() -> None:
    made = Options(method="exact", mask_id=3)
    assert Options.of(made) == made
    assert Options.of(made, verify=2) == Options(method="exact", mask_id=3, verify=2)
    assert Options.of(made, keep_ratio=0.5, cache="dual") == Options(mask_id=3, keep_ratio=0.5, cache="dual")
    assert made.verify == 0


EDGES: dict[str, tuple[Any, ...]] = {
    "prompt_interval": (-1, 1, 2, 1000, None),
    "response_interval": (-1, 1, 2, 1000, None),
    "transfer_ratio": (0, 1, 0.0, 1.0, 0.25, None),
    "block_length": (1, 32, None),
    "refresh_interval": (1, 8, None),
    "delay": (0, 1, 9, None),
    "kernel_size": (1, 3, 7, None),
    "outside_interval": (1, 8, None),
    "full_steps": (1, 4, 1000),
    "response_only": (True, False),
    "whole_interval": (1, 4, 8),
    "sliding": ("greedy", "constant", None),
    "refresh_tokens": (1, 32, None),
    "rows_before": (0, 24, None),
    "rows_behind": (0, 16, None),
    "warmup_steps": (0, 4, None),
    "row_depths": ((0.125,), (0.999,)),
    "confidence_weight": (0, 0.5, 1.0),
    "unskipped_interval": (1, 16, None),
    "threshold_fall": (0, 0.3, 1, None),
    "frechet_delta": (0, 0.25, 0.999, None),
    "cuda_graphs": (True, False),
    "mask_id": (0, 126336, None),
    "shift": (True, False, None),
    "readable": ("masked", "all"),
    "max_state_bytes": (0, 1, 2**40),
    "verify": (0, 1, 100),
}


OF_A_CACHE = {name: {"cache": "dual"} for name in ("rows_before", "rows_behind", "warmup_steps")}
"""Switches of a mechanism that changes the steps of a cache."""


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in EDGES.items() for value in values])
def test_values_at_their_edges_are_taken(name: str, value: Any) -> None:
    given = {name: value, **READ.get(name, OF_A_CACHE.get(name, {}))}
    assert getattr(Options.of(given), name) is value
    assert getattr(Options(**given), name) is value


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("prompt_intervall", "prompt_interval"),
        ("gen_intervals", "gen_interval"),
        ("mask", "mask_id"),
        ("transfer", "transfer_ratio"),
        ("presets", "preset"),
        ("lowring", "lowering"),
        ("Method", "method"),
        ("verfy", "verify"),
        ("shfit", "shift"),
        ("keep_ration", "keep_ratio"),
        ("saliency", "saliency_threshold"),
        ("block_len", "block_length"),
        ("cach", "cache"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(wrong: str, near: str) -> None:
    said = failure(lambda: Options.of({wrong: 1}))
    assert f"there is no option {wrong!r}; did you mean {near!r}?" in said
    assert all(name in said for name in DECLARED)


@pytest.mark.parametrize(
    ("name", "valid", "wrong", "near"),
    [
        ("method", METHODS, "dllm_cache", "dllm-cache"),
        ("method", METHODS, "exakt", "exact"),
        ("cache", CACHES, "duals", "dual"),
        ("cache", CACHES, "decode", "decoded"),
        ("cache", CACHES, None, "none"),
        ("lowering", LOWERINGS, "induktor", "inductor"),
        ("lowering", LOWERINGS, "eagr", "eager"),
        ("preset", tuple(PRESETS), "dllm-cache/dream-base-gms8k", "dllm-cache/dream-base-gsm8k"),
    ],
)
def test_an_unknown_choice_is_answered_with_the_nearest(
    name: str, valid: tuple[str, ...], wrong: Any, near: str
) -> None:
    said = failure(lambda: Options.of({name: wrong}))
    assert f"{name} is {wrong!r}; did you mean {near!r}?" in said
    assert all(choice in said for choice in valid)


INTERVAL = "give a number of steps, at least 1, or -1 to refresh at every step"
NO_SHARE = (-0.01, 1.01, 25, "0.25", True, math.nan, math.inf)
BAD: dict[str, tuple[str, tuple[Any, ...]]] = {
    "prompt_interval": (INTERVAL, (0, -2, 1.5, "7", True)),
    "response_interval": (INTERVAL, (0, -2, 1.5, "7", True)),
    "transfer_ratio": ("give a share of the response from 0 to 1", NO_SHARE),
    "block_length": ("give a whole number of at least 1, such as 32", (0, -1, 1.0, "32", True)),
    "window_size": ("give a whole number of at least 0, such as 4", (-1, 1.0, "4", True)),
    "refresh_interval": ("give a whole number of at least 1, such as 8", (0, -1, 1.0, "8", True)),
    "delay": ("give a whole number of at least 0, such as 1", (-1, 1.0, "1", True)),
    "keep_ratio": ("give a share of the entries outside of a block from 0 to 1", NO_SHARE),
    "kernel_size": ("give an odd number such as 3, or None", (0, 2, -1, 3.0, "3", True)),
    "keep_outside": ("give True or False", (0, 1, "yes", None)),
    "outside_interval": ("give a whole number of at least 1, such as 8", (0, -1, 1.0, "8", True)),
    "saliency_threshold": ("give a cosine, such as 0.99, from -1 to 1", ("0.99", True, math.nan, [0.9], 2, -5, 1.001)),
    "full_steps": ("give a whole number of at least 1, such as 4", (0, -1, 4.0, "4", True, None)),
    "response_only": ("give True or False", (0, 1, "yes", None)),
    "whole_interval": ("give a whole number of at least 1, such as 4", (0, -1, 8.0, "8", True, None)),
    "sliding": ('give "greedy" or "constant"', ("both", True, 1, [])),
    "refresh_tokens": ("give a whole number of at least 1, such as 32", (0, 1.0, "8", True)),
    "rows_before": ("give a whole number of at least 0, such as 16", (-1, 1.0, "8", True)),
    "rows_behind": ("give a whole number of at least 0, such as 16", (-1, 1.0, "8", True)),
    "warmup_steps": ("give a whole number of at least 0, such as 4", (-1, 1.0, "8", True)),
    "row_shares": (
        "give a tuple of falling shares of the rows, above 0 and up to 1, such as (0.5, 0.25)",
        ((), 0.5, (0.25, 0.5), (0.5, 0.0), (1.5, 1), (0.5, math.nan), [0.5, 0.25], ("0.5", "0.25"), (True, 0.5)),
    ),
    "row_depths": (
        "give a tuple of rising shares of the layers, above 0 and below 1, such as (0.125, 0.25)",
        ((), 0.125, (0.25, 0.125), (0.5, 0.5), (0, 0.5), (0.5, 1.0), [0.125, 0.25], None),
    ),
    "confidence_weight": ("give a weight from 0 to 1, such as 0.5", (-0.1, 1.1, "0.5", True, math.nan, None)),
    "unskipped_interval": ("give a whole number of at least 1, such as 16", (0, -1, 1.0, "16", True)),
    "suffix_window": ("give a whole number of at least 0, such as 96", (-1, 96.0, "96", True)),
    "threshold_fall": ("give a share of the threshold from 0 to 1, such as 0.3", (-0.1, 1.1, "0.3", True, math.nan)),
    "frechet_delta": ("give a probability, such as 0.25, from 0 and below 1", (1, -0.1, "0.25", True, math.nan)),
    "length_cut": ("give a probability, such as 0.95, above 0 and up to 1", (0, 1.1, "0.95", True, math.nan)),
    "cuda_graphs": ("give True or False", (0, 1, "yes", None)),
    "mask_id": ("give the token id of the mask", (-1, 1.0, "[MASK]", True)),
    "shift": ("give True for samplers that read row i - 1 for token i, else False", ("yes", 2, 0, 1, 0.0)),
    "readable": ("Valid: masked, all", ("every", "", 1, None, True)),
    "max_state_bytes": ("give a whole number of at least 0", (-1, 1.5, "2 GiB", True, None)),
    "verify": ("give a number of steps between checks, or 0 for none", (-1, 1.5, True, None)),
}


def test_bad_values_are_known_of_every_option() -> None:
    assert BAD.keys() | {"method", "cache", "lowering", "more"} == OFF.keys()


@pytest.mark.parametrize(
    ("name", "value", "wanted"), [(name, value, wanted) for name, (wanted, bad) in BAD.items() for value in bad]
)
def test_a_bad_value_is_answered_with_what_was_given_and_what_was_wanted(name: str, value: Any, wanted: str) -> None:
    for make in (lambda: Options.of({name: value}), lambda: Options(**{name: value})):
        said = failure(make)
        assert said.startswith(f"{name} is {value!r}; ")
        assert wanted in said


@pytest.mark.parametrize("name", READ)
def test_an_option_that_nothing_reads_is_refused(name: str) -> None:
    value = {"response_only": True, "row_depths": (0.125,)}.get(name, 1)  # its default, too, where it is written
    said = failure(lambda: Options.of({"method": "exact", name: value}))
    assert said.startswith(f"{name} is {value}, but no mechanism reads it; give ")
    assert next(iter(READ[name])) in said
    assert getattr(Options.of({name: value, **READ[name]}), name) is value
    assert READ.keys() == {name for name, option in DECLARED.items() if option.read is not None}


@pytest.mark.parametrize("beside", [{"cache": "dual"}, {"keep_ratio": 0.5}, {"saliency_threshold": 0.9}], ids=str)
def test_nothing_that_reuses_goes_with_exact(beside: dict[str, Any]) -> None:
    (name, value), *_ = beside.items()
    for how in ({"method": "exact"}, {"preset": "exact"}):
        said = failure(lambda how=how: Options.of({**how, **beside}))  # type: ignore[misc]
        assert said == f"method is 'exact', which reuses nothing, and {name} is {value!r}; leave out one of them"
    assert Options.of(method="exact", prompt_interval=1, response_interval=-1).prompt_interval == 1  # nothing either
    assert "response_interval is 2" in failure(lambda: Options.of(method="exact", response_interval=2))


@pytest.mark.parametrize(
    ("method", "off"),
    [
        ("fast-dllm", {"cache": "none"}),
        ("dkv-cache", {"cache": "none"}),
        ("dyllm", {"saliency_threshold": None}),
        ("dllm-cache", {"prompt_interval": None, "response_interval": None}),
        ("sparse-dllm", {"cache": "none", "keep_ratio": None}),
        ("fast-dllm", {"cache": "none", "saliency_threshold": 0.9}),
    ],
)
def test_a_method_of_which_nothing_is_left_is_refused(method: str, off: dict[str, Any]) -> None:
    said = failure(lambda: Options.of({"method": method, **off}))
    (name, value), *_ = off.items()
    assert said.startswith(f"method is {method!r}, but {name} is {value!r}")
    assert "nothing of it is left; leave out" in said


def test_a_preset_of_another_method_is_refused() -> None:
    said = failure(lambda: Options.of(preset="dyllm/dream", method="exact"))
    assert said == "preset 'dyllm/dream' is of the method 'dyllm', not 'exact'; give one of them"
    said = failure(lambda: Options.of(preset="dllm-cache/llada-base-gsm8k", method="fast-dllm"))
    assert said.startswith("preset 'dllm-cache/llada-base-gsm8k' is of the method 'dllm-cache', not 'fast-dllm'; give")
    assert Options.of(preset="fastest", method="dkv-cache") == Options.of(preset="fastest")


def test_one_thing_said_twice_is_refused() -> None:
    said = failure(lambda: Options.of({"gen_interval": 3, "response_interval": 4}))
    assert "option 'response_interval' is given twice" in said
    assert "'response_interval'; give it once" in said


def test_two_synonyms_for_one_thing_are_refused() -> None:
    assert "given twice" in failure(lambda: Options.of({"gen_interval": 3}, gen_interval_steps=3))


def test_one_name_in_the_mapping_and_as_an_argument_is_refused() -> None:
    assert "given twice" in failure(lambda: Options.of({"mask_id": 3}, mask_id=4))


@pytest.mark.parametrize("given", ["exact", ["mask_id"], 3])
def test_something_that_is_no_mapping_is_refused(given: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        Options.of(given)


def test_options_cannot_be_changed() -> None:
    options = Options()
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.mask_id = 3  # type: ignore[misc]
    assert hash(options) == hash(Options())


def test_what_a_user_wrote_is_left_as_it_was() -> None:
    written = {"preset": "dllm-cache/llada-base-gsm8k", "gen_interval": 3}
    Options.of(written)
    assert written == {"preset": "dllm-cache/llada-base-gsm8k", "gen_interval": 3}


# -- through torch.compile ---------------------------------------------------------------------------------------------


def compile_error(**kwargs: Any) -> str:
    """What the first call of a compiled model raises, in whatever it is wrapped."""
    model = torch.compile(torch.nn.Linear(3, 3), backend="dllm", **kwargs)
    with pytest.raises(Exception) as caught, torch.no_grad():
        model(torch.zeros(2, 3))
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"gen_intervall": 3}, "there is no option 'gen_intervall'; did you mean 'gen_interval'?"),
        ({"prompt_interval": 0}, "prompt_interval is 0; give a number of steps, at least 1"),
        ({"method": "dkv"}, "method is 'dkv'; did you mean"),
        ({"cache": "dual", "transfer_ratio": 0.5}, "transfer_ratio and a cache of blocks both choose the rows"),
        ({"keep_ratio": 0.5}, "keep_ratio is 0.5, a share of what a cache keeps; give cache='dual'"),
        ({"gen_interval": 3, "response_interval": 3}, "option 'response_interval' is given twice"),
    ],
)
def test_torch_compile_hands_on_our_sentence(options: dict[str, Any], sentence: str) -> None:
    assert sentence in compile_error(options=options)


def test_a_mode_of_inductor_is_refused() -> None:
    said = compile_error(mode="max-autotune")
    assert "mode='max-autotune' is not for this backend; give 'reduce-overhead', or say options=" in said


def test_reduce_overhead_asks_for_cuda_graphs() -> None:
    embedding = torch.nn.Embedding(MASK + 1, 4)
    with torch.no_grad():
        torch.compile(embedding, backend="dllm", mode="reduce-overhead")(torch.full((1, 4), MASK))
    assert [
        s.options.cuda_graphs for s in dllm_compile.runtime.session.sessions() if s.shares({id(embedding.weight)})
    ] == [True]


def test_options_reach_the_session() -> None:
    embedding = torch.nn.Embedding(MASK + 1, 4)
    written: dict[str, Any] = {"lowering": "eager", "gen_interval": 3, "mask_id": MASK}
    with torch.no_grad():
        torch.compile(embedding, backend="dllm", options=written)(torch.tensor([[3, 4, MASK, MASK]]))
    (session,) = [s for s in dllm_compile.runtime.session.sessions() if s.batches]
    assert session.options == Options.of(written)
    assert dataclasses.asdict(session.options) == {
        **OFF,
        **METHODS["dllm-cache"],
        **{"method": "dllm-cache", "lowering": "eager", "response_interval": 3, "mask_id": MASK},
    }


def test_greedy_rows_are_not_evicted() -> None:
    said = failure(lambda: Options.of(preset="dkv-cache/greedy", keep_ratio=0.5))
    assert said == "keep_ratio drops keys of rows that cache='greedy' may compute later; leave out one of them"
