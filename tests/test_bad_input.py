"""Every public entry point, handed what it cannot work with: the sentence it answers, and that it does before anything
is computed."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import dllm_compile
from dllm_compile import Options, __main__, denoise_step, generate, options, tiny
from dllm_compile.bench import bench, demo
from dllm_compile.mechanisms import tables
from dllm_compile.sampler import step as sampler_step
from dllm_compile.sampler import stepper

from . import models
from .sampling_loops import MASK, ids, seeded, toy
from .under_way import under_way

NAN, FAR = float("nan"), 10**6

# -- options -----------------------------------------------------------------------------------------------------------

OPTIONS: list[tuple[dict[Any, Any], str]] = [
    ({"methd": "exact"}, "there is no option 'methd'; did you mean 'method'? Options: method, "),
    ({3: 4}, "there is no option 3; did you mean "),
    ({"method": "nope"}, "method is 'nope'; did you mean "),
    ({"method": ["exact"]}, "method is ['exact']; did you mean 'exact'? Valid: exact, "),
    ({"method": None}, "method is None; did you mean "),
    ({"preset": "fastes"}, "preset is 'fastes'; did you mean 'fastest'?"),
    ({"preset": ["fastest"]}, "preset is ['fastest']; did you mean 'fastest'?"),
    ({"preset": "fastest", "method": "dyllm"}, "preset 'fastest' is of the method 'dkv-cache', not 'dyllm'"),
    ({"cache": "duel"}, "cache is 'duel'; did you mean 'dual'?"),
    ({"cache": True}, "cache is True; did you mean "),
    ({"lowering": "trition"}, "lowering is 'trition'; did you mean "),
    ({"prompt_interval": 0}, "prompt_interval is 0; give a number of steps, at least 1, or -1"),
    ({"response_interval": 2.5}, "response_interval is 2.5; give a number of steps"),
    ({"response_interval": torch.tensor(3)}, "response_interval is tensor(3); give a number of steps"),
    ({"gen_interval": 3, "response_interval": 4}, "option 'response_interval' is given twice"),
    ({"transfer_ratio": 1.5}, "transfer_ratio is 1.5; give a share of the response from 0 to 1"),
    ({"transfer_ratio": NAN}, "transfer_ratio is nan; give a share of the response"),
    ({"cache": "dual", "transfer_ratio": 0.5}, "transfer_ratio and a cache of blocks both choose the rows of a step"),
    ({"saliency_threshold": 2}, "saliency_threshold is 2; give a cosine, such as 0.99, from -1 to 1"),
    ({"saliency_threshold": -5}, "saliency_threshold is -5; give a cosine"),
    ({"saliency_threshold": NAN}, "saliency_threshold is nan; give a cosine"),
    ({"keep_ratio": 0.5}, "keep_ratio is 0.5, a share of what a cache keeps; give cache='dual'"),
    ({"cache": "greedy", "keep_ratio": 0.5}, "keep_ratio drops keys of rows that cache='greedy' may compute later"),
    ({"cache": "dual", "block_length": 0}, "block_length is 0; give a whole number of at least 1"),
    ({"cache": "dual", "refresh_interval": 0}, "refresh_interval is 0; give a whole number of at least 1"),
    ({"cache": "dual", "delay": -1}, "delay is -1; give a whole number of at least 0"),
    ({"cache": "greedy", "window_size": 1.5}, "window_size is 1.5; give a whole number of at least 0"),
    ({"method": "sparse-dllm", "kernel_size": 4}, "kernel_size is 4; give an odd number such as 3, or None"),
    ({"method": "dyllm", "full_steps": 0}, "full_steps is 0; give a whole number of at least 1"),
    ({"method": "dyllm", "response_only": 1}, "response_only is 1; give True or False"),
    ({"mask_id": -1}, "mask_id is -1; give the token id of the mask"),
    ({"mask_id": "[MASK]"}, "mask_id is '[MASK]'; give the token id of the mask"),
    ({"shift": "no"}, "shift is 'no'; give True for samplers that read row i - 1"),
    ({"readable": "some"}, "readable is 'some'; did you mean"),
    ({"max_state_bytes": -1}, "max_state_bytes is -1; give a whole number of at least 0"),
    ({"row_shares": [0.5, 0.25]}, "row_shares is [0.5, 0.25]; give a tuple of falling shares of the rows, above 0"),
    (
        {"method": "es-dllm", "row_depths": (0,)},
        "row_depths is (0,); give a tuple of rising shares of the layers, above 0",
    ),
    ({"confidence_weight": 2}, "confidence_weight is 2; give a weight from 0 to 1, such as 0.5"),
    ({"unskipped_interval": 0}, "unskipped_interval is 0; give a whole number of at least 1"),
    ({"cache": "dual", "unskipped_interval": 4}, "unskipped_interval is 4, but no mechanism reads it; give row_shares"),
    ({"frechet_delta": 1}, "frechet_delta is 1; give a probability, such as 0.25, from 0 and below 1"),
    ({"cache": "dual", "suffix_window": -1}, "suffix_window is -1; give a whole number of at least 0"),
    (
        {"suffix_window": 8},
        "suffix_window is 8, tokens behind the active block, and there are no blocks; give cache='prefix' too, or "
        "method='streaming-dllm'",
    ),
    ({"length_cut": 0}, "length_cut is 0; give a probability, such as 0.95, above 0 and up to 1"),
    ({"threshold_fall": 2}, "threshold_fall is 2; give "),
    ({"keep_outside": 1, "cache": "dual"}, "keep_outside is 1; give True or False"),
    (
        {"keep_outside": True, "cache": "dual", "outside_interval": 0},
        "outside_interval is 0; give a whole number of at least 1",
    ),
    ({"sliding": "both"}, 'sliding is \'both\'; give "greedy" or "constant"'),
    (
        {"sliding": "greedy", "refresh_tokens": 3},
        "refresh_tokens is 3, but no mechanism reads it; give sliding='greedy'",
    ),
    ({"cache": "dual", "rows_before": -1}, "rows_before is -1; give a whole number of at least 0"),
    ({"rows_behind": 3}, "the mechanism 'vicinity' widens the rows of a cache of blocks; give cache='dual' too"),
    ({"cache": "dual", "warmup_steps": 0.5}, "warmup_steps is 0.5; give a whole number of at least 0"),
    ({"whole_interval": 0, "saliency_threshold": 0.9}, "whole_interval is 0; give a whole number of at least 1"),
    ({"verify": -1}, "verify is -1; give a number of steps between checks"),
    ({"cuda_graphs": "yes"}, "cuda_graphs is 'yes'; give True or False"),
    ({"block_length": 32}, "block_length is 32, but no mechanism reads it; give cache, such as cache='dual', too"),
    ({"method": "dyllm", "block_length": 32}, "block_length is 32, but no mechanism reads it"),
    ({"full_steps": 2}, "full_steps is 2, but no mechanism reads it; give saliency_threshold too"),
    ({"full_steps": 4}, "full_steps is 4, but no mechanism reads it; give saliency_threshold too"),
    ({"response_only": False}, "response_only is False, but no mechanism reads it; give saliency_threshold without"),
    ({"method": "dyllm", "cache": "dual", "response_only": False}, "response_only is False, but no mechanism reads"),
    ({"kernel_size": 5}, "kernel_size is 5, but no mechanism reads it; give keep_ratio too"),
    ({"window_size": 4}, "window_size is 4, but no mechanism reads it; give cache='greedy' too"),
    ({"delay": 1}, "delay is 1, but no mechanism reads it; give cache or saliency_threshold too"),
    ({"method": "exact", "cache": "dual"}, "method is 'exact', which reuses nothing, and cache is 'dual'; leave out"),
    ({"method": "exact", "prompt_interval": 50}, "method is 'exact', which reuses nothing, and prompt_interval is 50"),
    ({"preset": "exact", "saliency_threshold": 0.9}, "method is 'exact', which reuses nothing, and saliency_threshold"),
    ({"method": "fast-dllm", "cache": "none"}, "method is 'fast-dllm', but cache is 'none', so that nothing of it is"),
    ({"method": "dyllm", "saliency_threshold": None}, "method is 'dyllm', but saliency_threshold is None, so that"),
    ({"prompt_interval": None, "response_interval": None}, "method is 'dllm-cache', but prompt_interval is None and"),
]


def shown(value: object) -> str:
    """A case as text that is the same in every process."""
    return re.sub(r" at 0x\w+|tensor\(.*?\)", "", str(value), flags=re.DOTALL)[:60]


@pytest.mark.parametrize(("given", "said"), OPTIONS, ids=shown)
def test_options_are_answered(given: dict[Any, Any], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        Options.of(given)
    assert str(caught.value).startswith(said)
    if all(isinstance(name, str) for name in given):
        with pytest.raises(ValueError) as same:
            Options(**given)
        assert str(same.value) == str(caught.value)


def test_every_option_is_in_the_table() -> None:
    assert options.DECLARED.keys() <= {tables().synonyms.get(name, name) for given, _ in OPTIONS for name in given}


COMPILE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"options": {"gen_intervall": 3}}, ValueError, "there is no option 'gen_intervall'; did you mean 'gen_interval'?"),
    ({"options": {"prompt_interval": 0}}, ValueError, "prompt_interval is 0; give a number of steps"),
    ({"options": "exact"}, TypeError, "options are 'exact'; give a mapping of names to values"),
    ({"options": ["exact"]}, TypeError, "options are ['exact']; give a mapping of names to values"),
    ({"options": {"mask_id": FAR}}, ValueError, "mask_id is 1000000, but the model embeds 61 tokens, 0 to 60; give"),
    ({"options": {"mask_id": 61, "method": "exact"}}, ValueError, "mask_id is 61, but the model embeds 61 tokens"),
    ({"mode": "max-autotune"}, ValueError, "mode='max-autotune' is not for this backend; give 'reduce-overhead'"),
]


@pytest.mark.parametrize(("how", "kind", "said"), COMPILE, ids=shown)
def test_a_compiled_model_says_it_plainly_at_every_call(how: dict[str, Any], kind: type[Exception], said: str) -> None:
    if isinstance(how.get("options"), dict):
        how = {"options": {"lowering": "eager", **how["options"]}}
    call = torch.compile(models.build("llama", num_hidden_layers=1), backend="dllm", **how)
    for _ in range(2):
        with pytest.raises(kind) as caught, torch.no_grad():
            call(models.start(5, 4))
        assert type(caught.value) is kind  # no wrapper of Dynamo's
        assert str(caught.value).startswith(said)


def test_options_already_made_are_options_of_torch_compile() -> None:
    made = Options(method="fast-dllm", cache="dual", block_size=2, mask_id=models.MASK, lowering="eager")
    model, x = models.build("llama", num_hidden_layers=1), models.start(5, 4)
    call = torch.compile(model, backend="dllm", options=made)  # type: ignore[call-overload]
    with torch.no_grad(), dllm_compile.loop():
        call(x)
        x[:, 5] = 3
        call(x)
    assert dllm_compile.stats(model)["steps"] == {"full": 1, "block": 1}
    assert under_way().session.options == made


# -- generate ----------------------------------------------------------------------------------------------------------


def of_61(**more: Any) -> Any:
    """A model that tells how many tokens it embeds."""
    return models.build("llama", num_hidden_layers=1, **more)


def returning(make: Callable[[torch.Tensor], Any]) -> Callable[..., Any]:
    """A model that makes something of the right logits."""
    return lambda x: make(toy()(x))


PROMPT = [[4, 5, 6], [7, 8, 9]]
GENERATE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input_ids": PROMPT}, TypeError, "input_ids is a list; give integer ids [batch, tokens]"),
    ({"input_ids": None}, TypeError, "input_ids is None; give integer ids [batch, tokens]"),
    ({"input_ids": {"input_ids": 3}}, TypeError, "input_ids is a dict; give integer ids [batch, tokens]"),
    ({"input_ids": torch.ones(2, 3)}, ValueError, "input_ids is a tensor [2, 3] of float32; give integer ids"),
    ({"input_ids": torch.ones(2, 3) > 0}, ValueError, "input_ids is a tensor [2, 3] of bool; give integer ids"),
    ({"input_ids": torch.tensor([1, 2])}, ValueError, "input_ids is a tensor [2] of int64; give integer ids [batch, "),
    ({"input_ids": torch.ones(1, 2, 3).long()}, ValueError, "input_ids is a tensor [1, 2, 3] of int64; give"),
    ({"input_ids": torch.ones(0, 3).long()}, ValueError, "input_ids is a tensor [0, 3] of int64; give integer ids"),
    ({"input_ids": torch.tensor([[3, -100]])}, ValueError, "input_ids holds the id -100; give ids of at least 0"),
    ({"model": of_61, "input_ids": torch.tensor([[3, 61]])}, ValueError, "input_ids holds the id 61, but the model"),
    ({"model": None}, TypeError, "model is None; give a module or a function that maps ids to logits"),
    ({"model": "llada"}, TypeError, "model is 'llada'; give a module or a function"),
    ({"model": returning(lambda y: {"logits": y})}, TypeError, "the model returned a dict; give one that returns"),
    ({"model": returning(lambda y: (y,))}, TypeError, "the model returned a tuple; give one that returns logits"),
    ({"model": returning(lambda y: None)}, TypeError, "the model returned None; give one that returns logits"),
    ({"model": returning(lambda y: SimpleNamespace(logits=None))}, TypeError, "the model returned a SimpleNamespace"),
    ({"model": returning(lambda y: y[:, -1])}, ValueError, "the model returned a tensor [2, 31] of float64 for ids"),
    ({"model": returning(lambda y: y[:, -1:])}, ValueError, "the model returned a tensor [2, 1, 31] of float64 for"),
    ({"model": returning(lambda y: y.long())}, ValueError, "the model returned a tensor [2, 7, 31] of int64 for ids"),
    ({"attention_mask": [[1, 1, 1]]}, TypeError, "attention_mask is a list; give a tensor [2, 3], 1 at the tokens of"),
    ({"attention_mask": torch.ones(2, 2)}, ValueError, "attention_mask is a tensor [2, 2] of float32; give [2, 3], 1"),
    ({"attention_mask": torch.ones(2, 7)}, ValueError, "attention_mask is a tensor [2, 7] of float32; give [2, 3], 1"),
    ({"attention_mask": torch.ones(1, 3)}, ValueError, "attention_mask is a tensor [1, 3] of float32; give [2, 3], 1"),
    ({"attention_mask": torch.ones(3)}, ValueError, "attention_mask is a tensor [3] of float32; give [2, 3], 1 at"),
    ({"attention_mask": torch.ones(2, 1, 3, 3)}, ValueError, "attention_mask is a tensor [2, 1, 3, 3] of float32; "),
    ({"attention_mask": torch.full((2, 3), 0.5)}, ValueError, "attention_mask holds 0.5; give [2, 3], 1 at the tokens"),
    (
        {"attention_mask": torch.tensor([[0, -1e9, 0]] * 2)},
        ValueError,
        "attention_mask holds -1000000000.0; give [2, 3], 1 at the tokens of input_ids and 0 at padding: it is no add",
    ),
    (
        {"attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])},
        ValueError,
        "attention_mask has padding behind tokens in sequence 1; pad on the left",
    ),
    ({"attention_mask": torch.tensor([[1, 0, 1]] * 2) > 0}, ValueError, "attention_mask has padding behind tokens in"),
    ({"attention_mask": torch.tensor([[0, 1, 1]] * 2)}, ValueError, "the model takes no 'attention_mask'; did you"),
    ({"mask_id": -5}, ValueError, "mask_id is -5; give a token id"),
    ({"model": of_61, "mask_id": FAR}, ValueError, "mask_id is 1000000, but the model embeds 61 tokens, 0 to 60"),
    ({"mask_id": None}, ValueError, "nothing tells the mask token of a function"),
    ({"eos_id": -1}, ValueError, "eos_id is -1; give a token id, or a tuple of them"),
    ({"eos_id": [2, True]}, ValueError, "eos_id is (2, True); give a token id, or a tuple of them"),
    ({"eos_id": "</s>"}, ValueError, "eos_id is '</s>'; give a token id"),
    ({"model": of_61, "eos_id": 400}, ValueError, "eos_id holds the id 400, but the model embeds 61 tokens"),
    ({"remasking": ["entropy"]}, ValueError, "remasking is ['entropy']; did you mean 'entropy'?"),
    ({"remasking": "entropi"}, ValueError, "remasking is 'entropi'; did you mean 'entropy'?"),
    ({"gen_length": 4.0}, ValueError, "gen_length is 4.0; give a whole number of at least 1"),
    ({"gen_length": 4, "block_length": 3}, ValueError, "gen_length 4 is no multiple of block_length 3; give 6"),
    ({"steps": 0}, ValueError, "steps is 0; give a whole number of at least 1"),
    ({"temperature": NAN}, ValueError, "temperature is nan; give a number of at least 0"),
    ({"top_k": 0}, ValueError, "top_k is 0; give a whole number of at least 1"),
    ({"top_p": 1.5}, ValueError, "top_p is 1.5; give a share above 0 and up to 1"),
    ({"cfg_scale": -1}, ValueError, "cfg_scale is -1; give a number of at least 0"),
    ({"threshold": 0.9, "factor": 1.0}, ValueError, "threshold and factor are two rules for one thing; give one"),
    ({"shift": "no"}, ValueError, "shift is 'no'; give True or False"),
    ({"return_dict": "yes"}, TypeError, "return_dict is 'yes'; give True or False"),
    ({"output_history": 1}, TypeError, "output_history is 1; give True or False"),
    ({"generator": 7}, TypeError, "generator is 7; give torch.Generator(device).manual_seed(...), or None"),
    ({"streamer": 7}, TypeError, "streamer is 7; give an object with the methods put and end"),
    ({"generation_config": {"top_k": 3}}, TypeError, "generation_config is a dict; give a GenerationConfig of"),
    ({"treshold": 0.9}, ValueError, "there is no argument 'treshold'; did you mean 'threshold'?"),
    ({"method": "dllm"}, ValueError, "method is 'dllm'; did you mean "),
    ({"method": "exact", "cache": "dual"}, ValueError, "method is 'exact', which reuses nothing, and cache is 'dual'"),
    ({"method": "dllm-cache", "full_steps": 3}, ValueError, "full_steps is 3, but no mechanism reads it"),
    ({"cache": "greedy"}, ValueError, "cache='greedy' computes the rows that are filled next, and confidence is known"),
]


@pytest.mark.parametrize(("given", "kind", "said"), GENERATE, ids=shown)
def test_generate_answers(given: dict[str, Any], kind: type[Exception], said: str) -> None:
    given = {"model": toy(), "input_ids": torch.tensor(PROMPT), "mask_id": MASK, "gen_length": 4, **given}
    model, prompts = given.pop("model"), given.pop("input_ids")
    with pytest.raises(kind) as caught:
        generate(model() if model is of_61 else model, prompts, **given)
    assert str(caught.value).startswith(said)
    assert type(caught.value) is kind


@pytest.mark.parametrize("wrong", [lambda y: {"logits": y}, lambda y: None, lambda y: y[:, -1]])
def test_a_model_without_logits_is_answered_where_it_is_compiled_too(wrong: Callable[[torch.Tensor], Any]) -> None:
    class Wrong(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = of_61()

        def forward(self, ids: torch.Tensor) -> Any:
            return wrong(self.inner(ids).logits)

    with pytest.raises((TypeError, ValueError), match=r"the model returned .*; give one that returns logits"):
        generate(Wrong(), ids(1, 3), gen_length=2, mask_id=models.MASK, method="exact", lowering="eager")


@pytest.mark.parametrize(
    "mask",
    [
        torch.tensor([[0, 1, 1]]),
        torch.tensor([[False, True, True]]),
        torch.tensor([[0.0, 1.0, 1.0]]),
        torch.tensor([[0, 1, 1]], dtype=torch.uint8),
    ],
)
def test_a_padding_mask_of_any_dtype_is_one(mask: torch.Tensor) -> None:
    model, prompt = of_61(), torch.tensor([[0, 5, 6]])
    want = generate(model, prompt[:, 1:], gen_length=3, mask_id=models.MASK)
    got = generate(model, prompt, attention_mask=mask, gen_length=3, mask_id=models.MASK)
    assert isinstance(got, torch.Tensor)
    assert isinstance(want, torch.Tensor)
    assert torch.equal(got[:, 1:], want)


def test_an_empty_prompt_is_a_prompt() -> None:
    got = generate(toy(), torch.zeros(2, 0, dtype=torch.int64), gen_length=4, mask_id=MASK)
    assert isinstance(got, torch.Tensor)
    assert got.shape == (2, 4)
    assert not (got == MASK).any()


@pytest.mark.parametrize("method", ["dllm-cache", "dyllm", "exact", "fast-dllm"])
def test_blocks_of_generate_are_no_option_that_a_user_wrote(method: str) -> None:
    more = {"gen_length": 4, "block_length": 2, "mask_id": models.MASK, "lowering": "eager"}
    got = generate(of_61(), ids(1, 5), method=method, **more)
    assert isinstance(got, torch.Tensor)
    assert not (got == models.MASK).any()


# -- denoise_step ------------------------------------------------------------------------------------------------------

X = torch.tensor([[4, 5, MASK, MASK, MASK], [4, 5, 6, MASK, MASK]])
TWO = torch.tensor([2, 2])
NOISE = torch.full((2, 5, 31), 0.5, dtype=torch.float64)
STEP: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"model": 3}, TypeError, "model is 3; give a module or a function that maps ids to logits"),
    ({"x": X.tolist()}, TypeError, "x is a list; give integer ids [batch, tokens]"),
    ({"x": X.float()}, ValueError, "x is a tensor [2, 5] of float32; give integer ids [batch, tokens]"),
    ({"x": X - 5}, ValueError, "x holds the id -1; give ids of at least 0"),
    ({"x": X + 40, "model": of_61, "mask_id": MASK + 40}, ValueError, "mask_id is 70, but the model embeds 61 tokens"),
    ({"candidates": None}, TypeError, "candidates is None; give a bool tensor [2, 5] on cpu"),
    ({"candidates": (X == MASK).long()}, ValueError, "candidates is a tensor [2, 5] of int64; give a bool tensor [2"),
    ({"candidates": (X == MASK)[:, 1:]}, ValueError, "candidates is a tensor [2, 4] of bool; give a bool tensor [2"),
    ({"candidates": X < 99}, ValueError, "candidates hold positions of x that are not the mask 30; give masked ones"),
    ({"count": 2}, TypeError, "count is 2; give a integer tensor [2] on cpu"),
    ({"count": torch.tensor([2])}, ValueError, "count is a tensor [1] of int64; give a integer tensor [2] on cpu"),
    ({"count": torch.tensor([2.0, 2.0])}, ValueError, "count is a tensor [2] of float32; give a integer tensor [2]"),
    ({"count": torch.tensor([-1, 2])}, ValueError, "count holds -1; give how many tokens to write in each sequence"),
    ({"count": torch.tensor([3, 2])}, ValueError, "count holds 3, but most is 2; give most=3"),
    ({"most": None}, ValueError, "most is None; give the largest entry of count, from 0 to 5 tokens"),
    ({"most": 6}, ValueError, "most is 6; give the largest entry of count, from 0 to 5 tokens"),
    ({"most": True}, ValueError, "most is True; give the largest entry of count, from 0 to 5 tokens"),
    ({"count": None}, ValueError, "most is 2, but there is no count that it is the largest entry of; give both"),
    ({"mask_id": -1}, ValueError, "mask_id is -1; give a token id"),
    ({"mask_id": None}, ValueError, "mask_id is None; give the token id of the mask"),
    ({"shift": "no"}, ValueError, "shift is 'no'; give True or False"),
    ({"shift": None}, ValueError, "shift is None; give True or False"),
    ({"remasking": "low_confidenc"}, ValueError, "remasking is 'low_confidenc'; did you mean 'low_confidence'?"),
    ({"remasking": ["entropy"]}, ValueError, "remasking is ['entropy']; did you mean 'entropy'?"),
    ({"remasking": "origin"}, ValueError, "remasking is 'origin'; did you mean "),
    ({"remasking": "random"}, ValueError, "remasking is 'random' and draws are missing; give both remasking='random'"),
    ({"draws": torch.rand(2, 5)}, ValueError, "remasking is 'low_confidence' and draws are given; give both remask"),
    ({"remasking": "random", "draws": torch.rand(2, 4)}, ValueError, "draws is a tensor [2, 4] of float32; give a fl"),
    ({"temperature": -1}, ValueError, "temperature is -1; give a number of at least 0"),
    ({"temperature": NAN}, ValueError, "temperature is nan; give a number of at least 0"),
    ({"temperature": 1.0}, ValueError, "temperature is 1.0, but noise is None; give noise [batch, tokens, vocabulary]"),
    ({"temperature": 1.0, "noise": NOISE[:, 1:]}, ValueError, "noise is a tensor [2, 4, 31] of float64; give a float"),
    ({"temperature": 1.0, "noise": NOISE[..., 1:]}, ValueError, "noise is for 30 tokens, but the model's logits are o"),
    ({"cfg_scale": 1.0}, ValueError, "cfg_scale is 1.0, but given is None; give given [batch, tokens], True at the"),
    ({"cfg_scale": 1.0, "given": X}, ValueError, "given is a tensor [2, 5] of int64; give a bool tensor [2, 5] on cpu"),
    ({"threshold": "0.9"}, ValueError, "threshold is '0.9'; give a confidence, such as 0.9"),
    ({"threshold": 0.9, "factor": 1.0}, ValueError, "threshold and factor are two rules for one thing; give one"),
    ({"factor": 1.0}, ValueError, "count and factor both say how many tokens are written; give one of them"),
    ({"model": of_61, "attn_mask": X}, ValueError, "the model takes no 'attn_mask'; did you mean"),
    (
        {"model": of_61, "treshold": 0.9},
        ValueError,
        "denoise_step has no argument 'treshold'; did you mean 'threshold'",
    ),
    ({"confidence_threshold": 0.9}, ValueError, "denoise_step has no argument 'confidence_threshold'; did you mean"),
    ({"model": returning(lambda y: (y,))}, TypeError, "the model returned a tuple; give one that returns logits"),
]


def stepped(given: dict[str, Any], step: Callable[..., Any] = denoise_step) -> Any:
    """``denoise_step`` of right arguments but for these."""
    given = {"model": toy(), "x": X, "candidates": X == MASK, "count": TWO, "most": 2, "mask_id": MASK, **given}
    model = given.pop("model")
    if model is of_61:  # whose inputs have names; transformers' take any
        inner = of_61()

        class Named(torch.nn.Module):
            def forward(self, ids: torch.Tensor, attention_mask: Any = None) -> Any:
                return inner(ids, attention_mask=attention_mask)

            def get_input_embeddings(self) -> Any:
                return inner.get_input_embeddings()

        model = Named()
    return step(model, given.pop("x"), given.pop("candidates"), given.pop("count"), given.pop("most"), **given)


@pytest.mark.parametrize(("given", "kind", "said"), STEP, ids=shown)
def test_denoise_step_answers(given: dict[str, Any], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind) as caught:
        stepped(given)
    assert str(caught.value).startswith(said)
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    "given",
    [
        {"remasking": "entropi"},
        {"candidates": (X == MASK).long()},
        {"count": torch.tensor([2])},
        {"threshold": 0.9, "count": None},
    ],
    ids=shown,
)
def test_a_compiled_step_answers_what_needs_no_tensor_read(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as plain:
        stepped(given)
    with pytest.raises(ValueError) as caught:
        stepped(given, torch.compile(denoise_step, backend="eager"))
    assert str(caught.value) == str(plain.value)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"remasking": "random", "draws": torch.rand(2, 5)},
        {"temperature": 0.7, "noise": NOISE},
        {"cfg_scale": 0.5, "given": X != MASK},
        {"count": None, "most": None, "threshold": 0.3},
        {"count": None, "most": None, "factor": 1.0, "shift": True},
    ],
    ids=shown,
)
def test_what_is_asked_of_a_step_leaves_one_graph_without_reads(given: dict[str, Any]) -> None:
    counter = CompileCounter()
    got = stepped(given, torch.compile(denoise_step, backend=counter, fullgraph=True))
    assert torch.equal(got, stepped(given))
    bare = CompileCounter()
    how = {"shift": False, "remasking": "low_confidence", "temperature": 0.0, "cfg_scale": 0.0, "threshold": None}
    how |= dict.fromkeys(("factor", "given", "noise", "draws"))
    stepped({**how, **given}, torch.compile(sampler_step.surest, backend=bare, fullgraph=True))
    assert (counter.frame_count, counter.op_count) == (1, bare.op_count)


def test_generate_asks_nothing_of_its_own_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a step of generate was checked")

    monkeypatch.setattr(sampler_step, "check_step", refuse)
    generate(toy(), ids(1, 3), gen_length=4, mask_id=MASK, temperature=0.5, generator=seeded())
    assert not hasattr(stepper, "denoise_step")


# -- explain and stats -------------------------------------------------------------------------------------------------

FIRST = models.start(5, 4)
EXPLAIN: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"model": 3}, TypeError, "model is 3; give a module or a function that maps ids to logits"),
    ({"ids": FIRST.tolist()}, TypeError, "example_ids is a list; give integer ids [batch, tokens]"),
    ({"ids": FIRST.float()}, ValueError, "example_ids is a tensor [2, 9] of float32; give integer ids"),
    ({"ids": FIRST[0]}, ValueError, "example_ids is a tensor [9] of int64; give integer ids [batch, tokens]"),
    ({"ids": FIRST - 10}, ValueError, "example_ids holds the id -"),
    ({"ids": FIRST + 60}, ValueError, "example_ids holds the id 120, but the model embeds 61 tokens"),
    ({"mask_id": FAR}, ValueError, "mask_id is 1000000, but the model embeds 61 tokens, 0 to 60"),
    ({"mask_id": 1}, ValueError, "example_ids hold no mask 1; give the ids of a first call, its response all masks"),
    ({"ids": torch.arange(9).view(1, 9)}, ValueError, "example_ids hold no id that ends every sequence twice; give"),
    ({"method": "nope"}, ValueError, "method is 'nope'; did you mean"),
    ({"metod": "exact"}, ValueError, "there is no option 'metod'; did you mean 'method'?"),
    ({"method": "exact", "cache": "dual"}, ValueError, "method is 'exact', which reuses nothing, and cache is 'dual'"),
    ({"block_length": 4}, ValueError, "block_length is 4, but no mechanism reads it"),
]


@pytest.mark.parametrize(("given", "kind", "said"), EXPLAIN, ids=shown)
def test_explain_answers(given: dict[str, Any], kind: type[Exception], said: str) -> None:
    given = {"model": of_61(), "ids": FIRST, **given}
    with pytest.raises(kind) as caught:
        dllm_compile.explain(given.pop("model"), given.pop("ids"), **given)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize("model", [3, "llada", toy(), {"model": 3}], ids=lambda each: type(each).__name__)
def test_stats_are_of_a_module(model: Any) -> None:
    with pytest.raises(TypeError, match=r"^model is a \w+; give the module that was compiled, or nothing for all$"):
        dllm_compile.stats(model)


# -- commands ----------------------------------------------------------------------------------------------------------

COMMANDS: list[tuple[str, str]] = [
    ("", "usage: python -m dllm_compile COMMAND [OPTIONS]"),
    ("demos", "there is no command 'demos'; did you mean 'demo'? Commands: demo, bench, explain"),
    ("explain --method nope", "dllm_compile explain: error: argument --method: method is 'nope'; did you mean"),
    ("explain --model /nonexistent", "argument --model: '/nonexistent' is no folder; give one with a config.json"),
    ("explain --model {folder}", "argument --model: transformers cannot load '{folder}': "),
    ("explain --prompt -3", "argument --prompt: '-3' is no whole number of at least 1"),
    ("explain --prompt many", "argument --prompt: 'many' is no whole number of at least 1"),
    ("explain --response 0", "argument --response: '0' is no whole number of at least 1"),
    ("explain --mask-id -1", "argument --mask-id: '-1' is no whole number of at least 0"),
    (
        "explain --mask-id 1999",
        "mask_id is 1999, but the model embeds 1008 tokens, 0 to 1007; give the token id of its mask",
    ),
    ("explain --devise h100", "there is no argument '--devise'; did you mean --device? Flags: "),
    ("explain --device h100", "dllm_compile explain: error: --device goes with --shape"),
    ("explain --length 1024", "--length goes with --shape"),
    ("explain --shape llada", "argument --shape: invalid choice: 'llada'"),
    (
        "explain --shape llada-8b --device a100",
        "argument --device: invalid choice: 'a100'",
    ),
    ("explain --shape llada-8b --mask-id 5", "dllm_compile explain: error: --mask-id goes without --shape"),
    (
        "explain --shape llada-8b --length 4096 64",
        "argument --length: 64 tokens hold no prompt beside a response",
    ),
    ("explain --shape llada-8b --batch 0", "argument --batch: '0' is no whole number of at least 1"),
    ("explain --shape llada-8b --method nope", "argument --method: method is 'nope'; did you mean"),
    ("explain --metod exact", "there is no argument '--metod'; did you mean --method? Flags: "),
    ("demo --problems 0", "argument --problems: '0' is no whole number of at least 1"),
    ("demo --batch 0", "argument --batch: '0' is no whole number of at least 1"),
    ("demo --problems 3 --batch 2", "--problems 3 is not a multiple of --batch 2"),
    ("demo --block 7", "--block 7 does not divide the response of 64 tokens"),
    ("demo --json {folder}/none/rows.json", "'{folder}/none/rows.json' is in no folder that there is; make "),
    ("demo --json {folder}", "argument --json: '{folder}' is a folder; give the name of a file"),
    ("bench --device nope", "argument --device: invalid choice: 'nope'"),
    ("bench --layers 0", "argument --layers: '0' is no whole number of at least 1"),
    ("bench --kind GPT", "argument --kind: invalid choice: 'GPT'"),
    ("bench --prompt -5", "argument --prompt: '-5' is no whole number of at least 1"),
    ("bench --vocabulary 1", "argument --vocabulary: '1' is no whole number of at least 2"),
    ("bench --response-interval 0", "argument --response-interval: '0' is no number of steps of at least 1, nor -1"),
    ("bench --width 100", "a width of 100 cannot be divided among 12 heads of an even width"),
    ("bench --kv-heads 5", "12 heads of queries cannot share 5 of keys"),
    ("bench --response 100", "a response of 100 tokens is no multiple of a block of 8"),
    ("bench --cache-block 2", "a cache block of 2 tokens cannot be freed 4 a call; give at least 4"),
    ("bench --json {folder}/none/rows.json", "is in no folder that there is; make '{folder}/none' first"),
    ("bench --plot {folder}/none/picture.png", "is in no folder that there is; make '{folder}/none' first"),
    ("bench --plot {folder}/picture.gif", "'{folder}/picture.gif' is no PNG file; give a name that ends with .png"),
    ("bench --depth --eviction", "--depth and --eviction are measurements of their own; give one of them"),
    ("bench --kernels --layers 2", "--layers is not for --kernels, whose model is fixed; leave it out"),
    ("bench --steps 3", "--steps goes with --shape"),
    ("bench --shape huge", "argument --shape: invalid choice: 'huge'"),
    ("bench --shape tiny --lengths 16", "argument --lengths: '16' is no pair such as 256,256"),
    ("bench --shape tiny --heads 5", "a width of 128 cannot be divided among 5 heads of an even width"),
    ("bench --shpae tiny", "there is no argument '--shpae'; did you mean --shape?"),
]


@pytest.mark.parametrize(("words", "said"), COMMANDS, ids=lambda each: each[:40] or "nothing")
def test_commands_answer_in_a_sentence_before_they_compute(
    words: str, said: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def computes(*_: Any, **__: Any) -> None:
        raise AssertionError("it has begun to compute")

    for module, name in ((demo, "run"), (bench, "run"), (bench.shape_bench, "run"), (bench.frontier, "main")):
        monkeypatch.setattr(module, name, computes)
    argv = words.replace("{folder}", str(tmp_path)).split()
    with pytest.raises(SystemExit) as caught:
        __main__.main(argv)
    assert caught.value.code == 2
    out, err = capfd.readouterr()
    assert out == ""
    sentence = err.strip().splitlines()[-1] if argv else err
    assert said.replace("{folder}", str(tmp_path)) in sentence
    if words.split()[:1] != ["explain"]:  # which may load a model first, and transformers shows a bar
        assert len(err.strip().splitlines()) == (1 if argv else 2)
    assert "Traceback" not in err


@pytest.mark.parametrize("command", ["demo", "bench"])
def test_an_interrupt_ends_a_command_in_one_line(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr({"demo": demo, "bench": bench}[command], "run", interrupted)
    with pytest.raises(SystemExit) as caught:
        __main__.main([command])
    assert caught.value.code == 130
    assert capsys.readouterr().err == "dllm_compile: interrupted\n"


def test_the_table_has_at_least_120_rows() -> None:
    assert sum(map(len, (OPTIONS, COMPILE, GENERATE, STEP, EXPLAIN, COMMANDS))) >= 120


@pytest.mark.parametrize(
    ("version", "good"), [("4.57.6", False), ("5.1.0", False), ("5.2.0", True), ("5.24.0.dev0", True)]
)
def test_the_embedded_model_needs_a_transformers_that_reads_is_causal(
    monkeypatch: pytest.MonkeyPatch, version: str, good: bool
) -> None:
    monkeypatch.setattr("transformers.__version__", version)
    if good:
        tiny.load()
        return
    with pytest.raises(RuntimeError, match=r"is_causal=False.*install transformers 5\.2 or later"):
        tiny.load()
