"""``model.generate(ids, custom_generate=dllm_compile.generate)``: what transformers hands over is done or refused.

A custom loop may be a function from transformers 4.56 on; its own arguments have to be bound to it until 4.57.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel

import dllm_compile
from dllm_compile import Generated, generate, tiny
from dllm_compile.sampler.handed import REFUSED

from . import models
from .sampling_loops import Streamer, ids, seeded

BY_NAME = hasattr(transformers.GenerationMixin, "_extract_generation_mode_kwargs")
by_name = pytest.mark.skipif(not BY_NAME, reason="this transformers takes no argument of a custom loop")


def causal_lm(**more: Any) -> Any:
    """A model that transformers keeps a key-value cache for, as by default."""
    model = models.build("llama-cache", **more)
    model.config.mask_token_id = models.MASK
    return model


def stays_causal() -> bool:
    model, x = causal_lm(), ids(1, 6)
    with torch.no_grad():
        return torch.equal(model(x).logits[:, 0], model(x + torch.eye(6, dtype=x.dtype)[-1]).logits[:, 0])


cached = pytest.mark.skipif(stays_causal(), reason="this transformers ignores is_causal=False: nothing can be cached")


def through(model: Any, prompts: torch.Tensor, own: dict[str, Any] | None = None, **call: Any) -> Any:
    """Generate through transformers; ``own`` are bound arguments of ours."""
    return model.generate(prompts, custom_generate=partial(generate, **(own or {})), **call)


def tokens(*args: Any, **more: Any) -> torch.Tensor:
    result = generate(*args, **more)
    assert isinstance(result, torch.Tensor)
    return result


# -- what is done ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [{}, {"use_cache": True}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_a_key_value_cache_is_no_option_of_ours(call: dict[str, Any]) -> None:
    model, prompts = causal_lm(), ids(2, 6)
    assert model.generation_config.use_cache
    got = model.generate(prompts, custom_generate=generate, max_new_tokens=8, **call)
    assert torch.equal(got, tokens(model, prompts, gen_length=8))


@cached
@pytest.mark.parametrize("own", [{"options": {"cache": "dual"}}, {"cache": "dual"}])
def test_the_option_cache_is_heard_beside_a_key_value_cache(own: dict[str, Any]) -> None:
    model, prompts = causal_lm(), ids(2, 6)
    block = {"block_length": 4, "lowering": "eager"}
    got = through(model, prompts, {**own, **block}, max_new_tokens=8)
    assert torch.equal(got, tokens(model, prompts, gen_length=8, cache="dual", **block))
    assert dllm_compile.stats(model)["steps"]["block"] == 12


@by_name
def test_names_of_ours_are_arguments_of_the_models_generate() -> None:
    model, prompts = causal_lm(), ids(2, 6)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    want = tokens(model, prompts, attention_mask=mask, gen_length=8, block_length=4, threshold=0.3)
    call = {"custom_generate": generate, "attention_mask": mask, "max_new_tokens": 8, "threshold": 0.3}
    assert torch.equal(model.generate(prompts, block_length=4, **call), want)
    assert torch.equal(model.generate(prompts, block_size=4, **call), want)
    rich = model.generate(prompts, block_length=4, return_dict_in_generate=True, **call)
    assert isinstance(rich, Generated)
    assert torch.equal(rich["sequences"], want)


@by_name
@cached
def test_options_are_arguments_of_the_models_generate() -> None:
    model, prompts = causal_lm(), ids(2, 6)
    want = tokens(model, prompts, gen_length=8, block_length=4, threshold=0.3)
    call = {"custom_generate": generate, "max_new_tokens": 8, "threshold": 0.3}
    exact = model.generate(prompts, block_length=4, method="exact", lowering="eager", **call)
    assert torch.equal(exact, want)
    exact = model.generate(prompts, options={"block_length": 4, "method": "exact", "lowering": "eager"}, **call)
    assert torch.equal(exact, want)


def test_few_names_are_those_of_transformers_too() -> None:
    """Those of sampling mean the same there; ``cache`` can be said in ``options``; a new one has to be looked at."""
    theirs = {
        *vars(transformers.GenerationConfig()),
        *inspect.signature(transformers.GenerationMixin.generate).parameters,
    }
    theirs |= {*inspect.signature(transformers.LlamaForCausalLM.forward).parameters, "cache"}
    theirs -= {*inspect.signature(transformers.GenerationMixin._sample).parameters, "kwargs"}
    same = theirs & {*inspect.signature(generate).parameters}
    assert same == {"cache", "stop_strings", "temperature", "top_k", "top_p"}


def test_a_length_and_ends_are_taken() -> None:
    model, prompt, own = causal_lm(), ids(1, 6), {"block_length": 2}
    free = tokens(model, prompt, gen_length=12, **own)
    end = int(free[0, 9])
    want = tokens(model, prompt, gen_length=12, eos_id=end, **own)
    assert not torch.equal(want, free)
    assert torch.equal(through(model, prompt, own, max_length=18, eos_token_id=end), want)
    assert torch.equal(through(model, prompt, own, max_length=18, eos_token_id=[end, 0], pad_token_id=0), want)
    config = transformers.GenerationConfig(max_new_tokens=12, eos_token_id=end)
    assert torch.equal(through(model, prompt, own, generation_config=config), want)
    assert torch.equal(tokens(model, prompt, generation_config=config, **own), want)


def test_sampling_is_taken() -> None:
    model, prompts = causal_lm(), ids(1, 6)
    model.generation_config.top_k = 5
    more: dict[str, Any] = {"max_new_tokens": 8, "do_sample": True}
    for call, want in (
        ({}, {"temperature": 1.0, "top_k": 5}),
        ({"top_p": 0.3}, {"temperature": 1.0, "top_k": 5, "top_p": 0.3}),
        ({"temperature": 3.0}, {"temperature": 3.0, "top_k": 5}),
        (
            {"temperature": 3.0, "top_k": 0} if not BY_NAME else {"temperature": 3.0, "top_k": None},
            {"temperature": 3.0},
        ),
    ):
        torch.manual_seed(3)
        got = through(model, prompts, **more, **call)
        assert torch.equal(got, tokens(model, prompts, gen_length=8, generator=seeded(3), **want)), call
    greedy = through(model, prompts, max_new_tokens=8)
    assert torch.equal(greedy, tokens(model, prompts, gen_length=8))
    assert not torch.equal(greedy, got)


def test_a_prompt_is_answered_as_often_as_asked_for() -> None:
    model, prompts = causal_lm(), ids(2, 6)
    got = through(model, prompts, max_new_tokens=8, do_sample=True, temperature=3.0, num_return_sequences=3)
    assert torch.equal(got[:, :6], prompts.repeat_interleave(3, 0))
    assert len(got.unique(dim=0)) == 6


def test_a_streamer_gets_the_prompt_once_and_the_rest_in_order() -> None:
    model, prompt, streamer = causal_lm(), ids(1, 6), Streamer()
    got = through(model, prompt, max_new_tokens=8, streamer=streamer)
    assert streamer.given[0] == prompt[0].tolist()
    assert [token for tokens in streamer.given for token in tokens] == got[0].tolist()
    assert streamer.ended == 1
    direct = Streamer()
    generate(model, prompt, generation_config=transformers.GenerationConfig(max_new_tokens=8), streamer=direct)
    assert direct.given == streamer.given


def test_padding_that_transformers_sees_in_a_prompt_is_asked_about() -> None:
    """Without a mask it takes every token that is also the one for padding to be padding."""
    model, prompts = causal_lm(), torch.tensor([[4, 5, 6, 7, 8, 9]])
    with pytest.raises(ValueError, match="hold the padding token 6 behind other tokens"):
        through(model, prompts, max_new_tokens=8, pad_token_id=6)
    want = tokens(model, prompts, gen_length=8)
    assert torch.equal(
        through(model, prompts, max_new_tokens=8, pad_token_id=6, attention_mask=torch.ones_like(prompts)), want
    )
    mask = (prompts != 4).long()
    want = tokens(model, prompts, gen_length=8, attention_mask=mask)
    assert torch.equal(through(model, prompts, max_new_tokens=8, pad_token_id=4), want)


@cached
def test_the_embedded_model_generates_as_any_other() -> None:
    model, tokenizer = tiny.load()
    prompts = tiny.encode(tiny.problems(2, seed=3), tokenizer)
    assert (prompts == tokenizer.convert_tokens_to_ids(tiny.FILLER)).any()
    with pytest.raises(ValueError, match=r"cannot look for them with this tokenizer \(.+\); give stopping_criteria"):
        tokens(model, prompts, stop_strings="ba", tokenizer=tokenizer)
    want = tokens(model, prompts, gen_length=tiny.RESPONSE_LENGTH, threshold=0.9)
    got = through(model, prompts, {"threshold": 0.9}, max_new_tokens=tiny.RESPONSE_LENGTH, use_cache=True)
    assert torch.equal(got, want)


# -- stopping criteria -------------------------------------------------------------------------------------------------


def letters() -> Any:
    """A tokenizer with a letter for each token of the model."""
    tokenizer = Tokenizer(WordLevel({chr(ord("0") + i): i for i in range(models.VOCABULARY)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def text(sequence: torch.Tensor) -> str:
    return "".join(chr(ord("0") + int(token)) for token in sequence)


PAD = 1


@pytest.mark.parametrize("own", [{}, {"block_length": 4}, {"threshold": 0.2}])
def test_a_response_ends_with_the_first_stop_string(own: dict[str, Any]) -> None:
    model, prompts, tokenizer = causal_lm(), ids(2, 6), letters()
    free = tokens(model, prompts, gen_length=16, **own)
    stop = text(free[0, 9:11])
    assert stop not in text(free[1])
    criteria = [transformers.StopStringCriteria(tokenizer, [stop])]
    got = through(
        model, prompts, {**own, "return_dict": True}, stopping_criteria=criteria, max_new_tokens=16, pad_token_id=PAD
    )
    end = 6 + text(free[0, 6:]).index(stop) + 2
    assert torch.equal(got.sequences[0, :end], free[0, :end])
    assert (got.sequences[0, end:] == PAD).all()
    assert torch.equal(got.sequences[1], free[1])


def test_a_prompt_that_ends_with_the_stop_string_is_answered() -> None:
    model, prompts = causal_lm(), ids(1, 6)
    free = tokens(model, prompts, gen_length=8)
    more: dict[str, Any] = {"tokenizer": letters(), "eos_id": PAD, "gen_length": 8}
    assert torch.equal(tokens(model, prompts, stop_strings=text(prompts[0, 4:]), **more), free)
    got = tokens(model, prompts, stop_strings=[text(free[0, 6:8])], **more)
    assert torch.equal(got[0, :8], free[0, :8])
    assert (got[0, 8:] == PAD).all()


def test_stop_strings_find_a_tokenizer_or_are_refused() -> None:
    model, prompts, tokenizer = causal_lm(), ids(1, 6), letters()
    stop = text(tokens(model, prompts, gen_length=8)[0, 7:9])
    more: dict[str, Any] = {"max_new_tokens": 8, "pad_token_id": PAD}
    want = tokens(model, prompts, gen_length=8, stop_strings=stop, tokenizer=tokenizer, eos_id=PAD)
    config = transformers.GenerationConfig(stop_strings=[stop], **more)
    assert torch.equal(tokens(model, prompts, generation_config=config, tokenizer=tokenizer), want)
    with pytest.raises(ValueError, match="tokenizer"):
        generate(model, prompts, generation_config=config)
    with pytest.raises(ValueError, match="tokenizer"):
        through(model, prompts, stop_strings=[stop], **more)
    if BY_NAME:  # and until then transformers makes the criterion, without the bound tokenizer
        assert torch.equal(through(model, prompts, {"tokenizer": tokenizer}, stop_strings=stop, **more), want)
        with pytest.raises(ValueError, match=r"stopping_criteria=\[transformers.StopStringCriteria"):
            through(model, prompts, stop_strings=[stop], tokenizer=tokenizer, **more)
    else:
        assert torch.equal(through(model, prompts, stop_strings=stop, tokenizer=tokenizer, **more), want)


def test_sequences_go_on_while_any_does_and_no_longer() -> None:
    """What is counted: forward calls, which an end saves."""
    model, prompts = causal_lm(), ids(2, 6)
    more: dict[str, Any] = {"gen_length": 16, "block_length": 2, "eos_id": PAD, "return_dict": True}

    def longer_than(count: int, row: int | None) -> Callable[..., bool]:
        return lambda x, scores: x.shape[1] > count and (row is None or torch.equal(x[0, :6], prompts[row]))

    free = generate(model, prompts, **more)
    both = generate(model, prompts, stopping_criteria=[longer_than(8, None)], **more)
    first = generate(model, prompts, stopping_criteria=[longer_than(8, 0)], **more)
    assert isinstance(both, Generated)
    assert isinstance(first, Generated)
    assert isinstance(free, Generated)
    assert (both.nfe, first.nfe, free.nfe) == (4, 16, 16)
    assert torch.equal(both.sequences[:, :9], free.sequences[:, :9])
    assert (both.sequences[:, 9:] == PAD).all()
    assert torch.equal(first.sequences[1], free.sequences[1])
    assert torch.equal(first.sequences[0], both.sequences[0])
    # in both cases the first tokens are known before a mask behind them is filled, as in the loop without criteria


def test_a_clock_ends_a_response_that_has_no_token_yet() -> None:
    model, prompts = causal_lm(), ids(1, 6)
    asked: list[int] = []

    def late(x: torch.Tensor, scores: None) -> bool:
        asked.append(x.shape[1])
        return len(asked) == 4

    more: dict[str, Any] = {"max_new_tokens": 16, "eos_id": PAD, "remasking": "entropy"}
    got = generate(model, prompts, stopping_criteria=[late], output_history=True, **more)
    assert isinstance(got, Generated)
    assert got.history is not None
    assert asked == [6, 6, 6, 6]
    assert got.nfe == 3  # the first question is asked before the first call
    assert (got.history[2, 0, 6:] != models.MASK).sum() == 2
    assert (got.sequences[0, 6:] == PAD).all()


def test_the_configured_time_is_kept() -> None:
    model, prompts = causal_lm(), ids(1, 6)
    more: dict[str, Any] = {"max_time": 1e-9, "max_new_tokens": 16, "pad_token_id": PAD}
    config = transformers.GenerationConfig(**more)
    for got in (
        through(model, prompts, {"return_dict": True}, **more),
        generate(model, prompts, generation_config=config, return_dict=True),
    ):
        assert isinstance(got, Generated)
        assert got.nfe == 1


def test_a_streamer_gets_nothing_behind_an_end() -> None:
    model, prompt, streamer = causal_lm(), ids(1, 6), Streamer()
    criteria = [lambda x, scores: x.shape[1] >= 10]
    got = through(model, prompt, stopping_criteria=criteria, max_new_tokens=8, pad_token_id=PAD, streamer=streamer)
    assert [token for tokens in streamer.given for token in tokens] == got[0].tolist()
    assert (got[0, 10:] == PAD).all()


# -- what is refused ---------------------------------------------------------------------------------------------------

REFUSALS: dict[str, Any] = {
    "num_beams": 2,
    "repetition_penalty": 1.5,
    "no_repeat_ngram_size": 2,
    "min_new_tokens": 2,
    "bad_words_ids": [[4]],
    "forced_eos_token_id": 0,
    "suppress_tokens": [4],
    "sequence_bias": [[[4], 2.0]],
    "remove_invalid_values": True,
    "renormalize_logits": True,
    "guidance_scale": 1.5,
    "prompt_lookup_num_tokens": 3,
}
SAMPLED: dict[str, Any] = {"min_p": 0.1, "typical_p": 0.5, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1}
RETURNED = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


@pytest.mark.parametrize("name", [*REFUSALS, *SAMPLED, *RETURNED])
def test_what_the_loops_do_not_do_is_refused(name: str) -> None:
    model, prompts = causal_lm(attn_implementation="eager"), ids(1, 6)
    call = {name: {**REFUSALS, **SAMPLED}.get(name, True)}
    call |= {"do_sample": True} if name in SAMPLED else {}
    call |= {"return_dict_in_generate": True} if name in RETURNED else {}
    call |= {"eos_token_id": 2} if name == "min_new_tokens" else {}
    with pytest.raises(ValueError, match=f"^{name} is .* and generate does not do that"):
        through(model, prompts, max_new_tokens=8, **call)
    with pytest.raises(ValueError, match=f"^{name} is .* and generate does not do that"):
        generate(model, prompts, generation_config=transformers.GenerationConfig(max_new_tokens=8, **call))


def test_what_transformers_would_have_done_before_is_refused_without_it() -> None:
    for name, value in {"num_return_sequences": 2, "token_healing": True}.items():
        config = transformers.GenerationConfig(max_new_tokens=8, do_sample=True, **{name: value})
        with pytest.raises(ValueError, match=f"^{name} is "):
            generate(causal_lm(), ids(1, 6), generation_config=config)


DONE = {"max_length", "max_new_tokens", "max_time", "stop_strings", "do_sample", "temperature", "top_k", "top_p"}
DONE |= {"eos_token_id", "pad_token_id", "num_return_sequences", "return_dict_in_generate", "token_healing"}
OF_A_CACHE = {"use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "low_memory"}
OF_A_CACHE |= {"return_legacy_cache", "compile_config", "disable_compile", "continuous_batching_config"}
OF_OTHER_LOOPS = {"early_stopping", "length_penalty", "is_assistant", "num_assistant_tokens", "target_lookbehind"}
OF_OTHER_LOOPS |= {"num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_lookbehind"}
OF_OTHER_LOOPS |= {"assistant_ensemble_weight", "max_matching_ngram_size", "speculation_type"}
OF_OTHER_MODELS = {"bos_token_id", "decoder_start_token_id"}
NOT_READ = {"transformers_version", "generation_kwargs"}


def test_every_field_of_a_configuration_is_done_refused_or_of_other_loops() -> None:
    """A field that a new transformers brings has to be looked at."""
    fields = {name for name in vars(transformers.GenerationConfig()) if not name.startswith("_")}
    assert fields - {*REFUSED} - DONE - OF_A_CACHE - OF_OTHER_LOOPS - OF_OTHER_MODELS - NOT_READ == set()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"logits_processor": [transformers.LogitNormalization()]}, "logits_processor holds a LogitNormalization"),
        (
            {"logits_processor": [transformers.TopKLogitsWarper(2)], "do_sample": True},
            "logits_processor holds a TopKLogitsWarper, .* give top_k with do_sample=True",
        ),
        ({"logits_processor": [transformers.TemperatureLogitsWarper(0.5)]}, "TemperatureLogitsWarper"),
        ({"prefix_allowed_tokens_fn": lambda row, x: [4]}, "holds a PrefixConstrainedLogitsProcessor"),
        ({"inputs_embeds": torch.zeros(1, 6, 32, dtype=torch.float64)}, "nothing else: leave out inputs_embeds"),
        ({"labels": torch.zeros(1, 6, dtype=torch.int64)}, "nothing else: leave out labels"),
        ({"position_ids": torch.arange(6, 12).unsqueeze(0)}, "position_ids count other than the tokens do"),
        ({"synced_gpus": True}, "generate has no synced_gpus"),
    ],
)
def test_what_would_be_lost_is_refused(call: dict[str, Any], said: str) -> None:
    call = {**call, "logits_processor": transformers.LogitsProcessorList(call.get("logits_processor", []))}
    with pytest.raises(ValueError, match=said):
        through(causal_lm(), ids(1, 6), max_new_tokens=8, **call)


def test_an_assistant_is_refused() -> None:
    with pytest.raises(ValueError, match="generate has no assistant_model"):
        through(causal_lm(), ids(1, 6), max_new_tokens=8, assistant_model=causal_lm())


@pytest.mark.parametrize(
    "call", [{"do_sample": False, "temperature": 0.7}, {"temperature": 0.7}, {"do_sample": True, "temperature": 0.0}]
)
def test_a_temperature_and_do_sample_do_not_contradict(call: dict[str, Any]) -> None:
    model, prompts = causal_lm(), ids(1, 6)
    own = {name: value for name, value in call.items() if name == "temperature"}
    rest = {name: value for name, value in call.items() if name != "temperature"}
    with pytest.raises(ValueError, match=r"temperature is .*, and do_sample is (True|False); give do_sample="):
        through(model, prompts, own, max_new_tokens=8, **rest)


def test_keys_and_values_of_earlier_tokens_are_refused() -> None:
    model, prompts = causal_lm(), ids(1, 6)
    held = transformers.DynamicCache()
    model(prompts[:, :3], past_key_values=held, use_cache=True)
    assert held.get_seq_length() == 3
    with pytest.raises(ValueError, match=r"(cache|past_key_values) holds 3 tokens, and generate starts from none"):
        through(model, prompts, max_new_tokens=8, past_key_values=held, use_cache=False)
    with pytest.raises((ValueError, TypeError), match=r"holds 3 tokens|multiple values for keyword argument 'cache'"):
        through(model, prompts, max_new_tokens=8, past_key_values=held)


def test_padding_is_counted_as_transformers_counts_it() -> None:
    model, prompts = causal_lm(), ids(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    want = tokens(model, prompts, attention_mask=mask, gen_length=8)
    call: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 8}
    assert torch.equal(through(model, prompts, **call), want)
    counted = (mask.cumsum(1) - 1).clamp(min=0)
    assert torch.equal(through(model, prompts, position_ids=counted, **call), want)


@cached
def test_warm_reads_options() -> None:
    model = models.build("llama")  # which does not say its mask
    made = dllm_compile.warm(model, 6, 8, options={"mask_id": models.MASK, "cache": "dual", "lowering": "eager"})
    assert made.steps["block"]
