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
from dllm_compile.options import LOWERINGS, METHODS, PRESETS, SYNONYMS

from .models import MASK


def failure(make: Callable[[], object]) -> str:
    """What the ``ValueError`` says."""
    with pytest.raises(ValueError) as caught:
        make()
    return str(caught.value)


def test_defaults_are_the_published_ones() -> None:
    options = Options.of()
    assert options == Options() == Options.of(None) == Options.of({})
    assert dataclasses.asdict(options) == {
        "method": "dllm-cache",
        "prompt_interval": 50,
        "response_interval": 7,
        "transfer_ratio": 0.25,
        "cache": "prefix",
        "block_length": None,
        "refresh_interval": None,
        "keep_ratio": 0.5,
        "kernel_size": 3,
        "delay": 1,
        "mask_id": None,
        "shift": None,
        "verify": 0,
        "lowering": "inductor",
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_set_what_they_say_and_nothing_else(preset: str) -> None:
    assert dataclasses.asdict(Options.of({"preset": preset})) == {**dataclasses.asdict(Options()), **PRESETS[preset]}


def test_a_preset_yields_to_what_is_written_beside_it() -> None:
    got = Options.of({"response_interval": 3, "preset": "dllm-cache/llada-instruct-gsm8k", "mask_id": 5})
    assert (got.prompt_interval, got.response_interval, got.mask_id) == (50, 3, 5)


def test_a_preset_yields_to_a_synonym_beside_it() -> None:
    assert Options.of(preset="dllm-cache/dream-base-gsm8k", gen_interval=2).response_interval == 2


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("gen_interval", "response_interval"),
        ("gen_interval_steps", "response_interval"),
        ("response_interval_steps", "response_interval"),
        ("prompt_interval_steps", "prompt_interval"),
    ],
)
def test_synonyms_mean_the_same(name: str, meant: str) -> None:
    assert Options.of({name: 3}) == Options.of({meant: 3})
    assert getattr(Options.of({name: 3}), meant) == 3
    assert SYNONYMS[name] == meant


def test_names_as_arguments_and_as_a_mapping_are_the_same() -> None:
    assert (
        Options.of(mask_id=3, verify=2)
        == Options.of({"mask_id": 3, "verify": 2})
        == Options.of({"mask_id": 3}, verify=2)
    )


def test_options_already_made_pass_through_and_can_be_changed() -> None:
    made = Options(mask_id=3)
    assert Options.of(made) == made
    assert Options.of(made, verify=2) == Options(mask_id=3, verify=2)
    assert made.verify == 0


@pytest.mark.parametrize("value", [-1, 1, 2, 1000])
@pytest.mark.parametrize("name", ["prompt_interval", "response_interval"])
def test_intervals_at_their_edges_are_taken(name: str, value: int) -> None:
    assert getattr(Options.of({name: value}), name) == value


@pytest.mark.parametrize("value", [0, 1, 0.0, 1.0, 0.25])
def test_transfer_ratios_at_their_edges_are_taken(value: float) -> None:
    assert Options.of(transfer_ratio=value).transfer_ratio == value


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
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(wrong: str, near: str) -> None:
    said = failure(lambda: Options.of({wrong: 1}))
    assert f"there is no option {wrong!r}; did you mean {near!r}?" in said
    assert all(field.name in said for field in dataclasses.fields(Options))


@pytest.mark.parametrize(
    ("name", "valid", "wrong", "near"),
    [
        ("method", METHODS, "dllm_cache", "dllm-cache"),
        ("method", METHODS, "exakt", "exact"),
        ("lowering", LOWERINGS, "induktor", "inductor"),
        ("lowering", LOWERINGS, "eagr", "eager"),
        ("preset", tuple(PRESETS), "dllm-cache/dream-base-gms8k", "dllm-cache/dream-base-gsm8k"),
    ],
)
def test_an_unknown_choice_is_answered_with_the_nearest(
    name: str, valid: tuple[str, ...], wrong: str, near: str
) -> None:
    said = failure(lambda: Options.of({name: wrong}))
    assert f"{name} is {wrong!r}; did you mean {near!r}?" in said
    assert all(choice in said for choice in valid)


INTERVAL = "give a number of steps, at least 1, or -1 to refresh at every step"
RATIO = "give a share of the response from 0 to 1"
MASK_ID = "give the token id of the mask"
SHIFT = "give True for samplers that read row i - 1 for token i, else False"
VERIFY = "give a number of steps between checks, or 0 for none"


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        *(
            (name, value, INTERVAL)
            for name in ("prompt_interval", "response_interval")
            for value in (0, -2, 1.5, "7", True, None)
        ),
        *(("transfer_ratio", value, RATIO) for value in (-0.01, 1.01, 25, "0.25", True, None, math.nan, math.inf)),
        *(("mask_id", value, MASK_ID) for value in (-1, 1.0, "[MASK]", True)),
        *(("shift", value, SHIFT) for value in ("yes", 2, 0, 1, 0.0)),
        *(("verify", value, VERIFY) for value in (-1, 1.5, True, None)),
    ],
)
def test_a_bad_value_is_answered_with_what_was_given_and_what_was_wanted(name: str, value: Any, wanted: str) -> None:
    for make in (lambda: Options.of({name: value}), lambda: Options(**{name: value})):
        said = failure(make)
        assert said.startswith(f"{name} is {value!r}; ")
        assert wanted in said


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
    written = {"preset": "exact", "gen_interval": 3}
    Options.of(written)
    assert written == {"preset": "exact", "gen_interval": 3}


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
        ({"gen_interval": 3, "response_interval": 3}, "option 'response_interval' is given twice"),
    ],
)
def test_torch_compile_hands_on_our_sentence(options: dict[str, Any], sentence: str) -> None:
    assert sentence in compile_error(options=options)


def test_mode_is_refused() -> None:
    assert "mode='max-autotune' is not for this backend; say options={'method': ...} instead" in compile_error(
        mode="max-autotune"
    )


def test_options_reach_the_session() -> None:
    embedding = torch.nn.Embedding(MASK + 1, 4)
    written: dict[str, Any] = {"lowering": "eager", "gen_interval": 3, "mask_id": MASK}
    with torch.no_grad():
        torch.compile(embedding, backend="dllm", options=written)(torch.tensor([[3, 4, MASK, MASK]]))
    (session,) = [s for s in dllm_compile.session.sessions() if s.ids is not None]
    assert session.options == Options(lowering="eager", response_interval=3, mask_id=MASK)
