"""Masked-diffusion models in lm-evaluation-harness: ``--model dllm``. Importing this needs the extra ``eval``."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from . import checkpoint
from .generate import generate
from .interface.mechanism import is_int
from .likelihood import is_greedy, log_likelihood
from .sampler.family import family
from .sampler.settings import settings_of

Loop = Callable[..., torch.Tensor]
"""``loop(model, ids [B, P], attention_mask=..., gen_length=..., temperature=..., generator=..., **settings)`` returns
ids ``[B, P + gen_length]``."""

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks call the length of a response."""


@register_model("dllm")
class DiffusionLM(LM):  # type: ignore[misc]  # its package is not always installed
    """A masked-diffusion model under lm-evaluation-harness.

    Args:
        pretrained: folder or name of a checkpoint for transformers, ``"tiny"`` for the embedded model, or a model.
        tokenizer: of a model that is given itself, or the folder or name of another one.
        loop: what generates, :func:`dllm_compile.generate` by default; called as :data:`Loop` says.
        batch_size: prompts of a generation, and samples of a likelihood, in one call.
        max_batch_size: of the harness, for ``batch_size=auto``, which is refused.
        device: of the model; a GPU by default, where there is one. The harness says ``cuda:0`` where nothing is said,
            so that this means a CPU where there is none. A model that is given stays where it is.
        dtype: of the weights, such as ``"bfloat16"``; by default what the checkpoint says.
        revision: of the checkpoint.
        trust_remote_code: whether code of the checkpoint runs, as LLaDA's and Dream's must.
        is_causal: ``False`` makes a causal architecture of transformers bidirectional; ``None`` leaves the
            configuration as it is.
        gen_length: tokens of every response, whatever the task says; ``None`` for the task's, or else 256.
        mc_num: samples of a likelihood.
        check_greedy: whether to find out if the model would itself write an answer whose likelihood is asked. It
            takes up to one call a token; without it, metrics that need it count every answer as not written.
        max_length: tokens of prompt and response that the model takes; by default what the configuration says.
        add_special_tokens: whether the tokenizer adds its own to a prompt.
        seed: of samples and of generation.
        settings: of ``loop``: arguments of :func:`dllm_compile.generate` and options of the backend. ``mask_id`` and
            ``shift`` hold for likelihoods too. What is said here goes before what a task says, such as ``temperature``.

    Raises:
        TypeError: a model is given without a tokenizer.
        ValueError: an unknown name, or a value out of range.
    """

    def __init__(
        self,
        pretrained: Any,
        tokenizer: Any = None,
        *,
        loop: Loop | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        trust_remote_code: bool = True,
        is_causal: bool | None = None,
        gen_length: int | None = None,
        mc_num: int = 128,
        check_greedy: bool = True,
        max_length: int | None = None,
        add_special_tokens: bool = False,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.loop: Callable[..., Any] = loop or generate
        self.settings = settings
        if loop is None:
            settings_of(settings)  # refuses what it does not know before weights are loaded
        self.batch_size = _whole("batch_size", 1 if batch_size is None else batch_size)
        self.gen_length = None if gen_length is None else _whole("gen_length", gen_length)
        self.mc_num, self.seed = _whole("mc_num", mc_num), _whole("seed", seed, least=0)
        self.check_greedy, self.add_special_tokens = check_greedy, add_special_tokens
        if isinstance(pretrained, str):
            place = _place(device)
            code = {"revision": revision, "trust_remote_code": trust_remote_code}
            model, own = _load(pretrained, place, _dtype(dtype), is_causal, code)
            if isinstance(tokenizer, str):
                own = _tokenizer(tokenizer, trust_remote_code=trust_remote_code)
            elif tokenizer is not None:
                own = tokenizer
        elif tokenizer is None or isinstance(tokenizer, str):
            raise TypeError("pretrained is a model without a tokenizer; give tokenizer, the tokenizer itself")
        else:
            model, own = pretrained, tokenizer
        self.model, self.tokenizer = model, own
        weight = next(iter(model.parameters()), None) if isinstance(model, torch.nn.Module) else None
        self._device = torch.device("cpu") if weight is None else weight.device
        self.max_length = max_length if max_length is not None else _longest(getattr(model, "config", None))
        self.kind: dict[str, Any] = {name: settings[name] for name in ("mask_id", "shift") if name in settings}
        if "mask_token_id" in settings:
            self.kind["mask_id"] = settings["mask_token_id"]

    # -- likelihood ---------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """LLaDA's Monte Carlo estimate of each continuation, and whether the model would write it itself."""
        results = []
        for request in requests:
            context, continuation = request.args
            results.append(self._score(*self._pair(context, continuation), greedy=self.check_greedy))
            self.cache_hook.add_partial("loglikelihood", request.args, results[-1])
        return results

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """The same estimate of whole texts, behind no prompt (a shifted model: behind the first special token)."""
        results = []
        for request in requests:
            (text,) = request.args
            results.append(self._score(self._start(), self._ids(text), greedy=False)[0])
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, results[-1])
        return results

    def _score(self, prompt: list[int], answer: list[int], greedy: bool) -> tuple[float, bool]:
        if not answer:
            return 0.0, True
        if self.max_length is not None and len(answer) >= self.max_length:
            raise ValueError(
                f"a text of {len(answer)} tokens is to be scored, and the model takes {self.max_length}; no window "
                "makes its likelihood, so leave out the task or give max_length"
            )
        before, behind = (
            torch.tensor(each, dtype=torch.int64, device=self._device).view(1, -1)
            for each in (self._fit(prompt, len(answer)), answer)
        )
        more: dict[str, Any] = {"samples": self.mc_num, "batch_size": self.batch_size, "seed": self.seed, **self.kind}
        found = log_likelihood(self.model, before, behind, **more)
        return found, greedy and is_greedy(self.model, before, behind, **self.kind)

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of a context and of what follows; spaces between them belong to what follows, as tokenizers have it."""
        if not context:
            return self._start(), self._ids(continuation)
        kept = context.rstrip()
        prompt = self._ids(kept)
        return prompt, self._ids(kept + context[len(kept) :] + continuation)[len(prompt) :]

    def _start(self) -> list[int]:
        """The ids in front of a text without a context: none, or the first special token of a shifted model."""
        if not family(self.model, **self.kind).shift:
            return []
        for name in ("bos_token_id", "eos_token_id"):
            token = getattr(self.tokenizer, name, None)
            if token is not None:
                return [token]
        raise ValueError(
            "the model is shifted, the context empty, and the tokenizer has no first token; give a context"
        )

    # -- generation ---------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Responses that end before the first of a task's stop strings, in batches of prompts padded on the left."""
        results: list[str] = [""] * len(requests)
        for turn, (places, given) in enumerate(self._batches(requests)):
            until, length, temperature, more = self._read(given)
            prompts = [self._fit(self._ids(requests[place].args[0]), length) for place in places]
            ids, present = self._padded(prompts)
            draw = torch.Generator(self._device).manual_seed(self.seed + turn)
            told: dict[str, Any] = {"gen_length": length, "temperature": temperature, "generator": draw}
            told.update({**more, **self.settings})
            if self.loop is generate:
                told.update(self._ends(told, until, ids.shape[1]))
            with torch.no_grad():
                out = self.loop(self.model, ids, attention_mask=present, **told)
            for place, response in zip(places, out[:, ids.shape[1] :].tolist(), strict=True):
                results[place] = self._text(response, until)
                self.cache_hook.add_partial("generate_until", requests[place].args, results[place])
        return results

    def _batches(self, requests: list[Any]) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """Places of requests with the same arguments, longest contexts first, and those arguments."""
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(place)
        for text, places in groups.items():
            places.sort(key=lambda place: -len(requests[place].args[0]))
            for first in range(0, len(places), self.batch_size):
                yield places[first : first + self.batch_size], json.loads(text)

    def _read(self, given: dict[str, Any]) -> tuple[list[str], int, float, dict[str, Any]]:
        """Stop strings, length and temperature that a task asks for, and what else it does."""
        given = dict(given)
        until = given.pop("until", None) or []
        until = [until] if isinstance(until, str) else [each for each in until if each]
        asked = [given.pop(name) for name in LENGTHS if name in given]
        length = self.gen_length or (_whole("max_gen_toks", asked[0]) if asked else 256)
        temperature = given.pop("temperature", None)
        sample = given.pop("do_sample", None)
        if sample is None:
            sample = bool(temperature)
        if not sample:
            temperature = 0.0
        return until, length, float(1.0 if temperature is None else temperature), given

    def _ends(self, told: dict[str, Any], until: list[str], prompt: int) -> dict[str, Any]:
        """Where :func:`dllm_compile.generate` ends a response: at the tokenizer's end, and behind stop strings."""
        told = {} if {"eos_id", "eos_token_id"} & told.keys() else {"eos_id": self.tokenizer.eos_token_id}
        if until and told.get("eos_id", 0) is not None:
            decode = self.tokenizer.decode
            told["stopping_criteria"] = [lambda ids, _: _first(decode(ids[0, prompt:].tolist()), until) is not None]
        return told

    def _padded(self, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids ``[B, P]`` with padding on the left, and the mask that says so."""
        longest = max(map(len, prompts))
        known = (getattr(self.tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
        fill = next((token for token in known if token is not None), 0)
        ids = [[fill] * (longest - len(each)) + each for each in prompts]
        present = [[0] * (longest - len(each)) + [1] * len(each) for each in prompts]
        as_ids: dict[str, Any] = {"dtype": torch.int64, "device": self._device}
        shape = (len(prompts), longest)
        return torch.tensor(ids, **as_ids).view(shape), torch.tensor(present, **as_ids).view(shape)

    def _text(self, response: list[int], until: list[str]) -> str:
        """The text of a response before the tokenizer's end and before a stop string, without special tokens."""
        said = self.settings.get("eos_id", self.settings.get("eos_token_id"))
        ends = {self.tokenizer.eos_token_id, *(said if isinstance(said, (list, tuple)) else (said,))}
        response = response[: next((i for i, token in enumerate(response) if token in ends), None)]
        if _first(self.tokenizer.decode(response), until) is not None:
            lengths = range(1, len(response) + 1)
            response = response[
                : next(n for n in lengths if _first(self.tokenizer.decode(response[:n]), until) is not None)
            ]
        text: str = self.tokenizer.decode(response, skip_special_tokens=True)
        return text[: _first(text, until)]

    # -- texts --------------------------------------------------------------------------------------------------------

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=self.add_special_tokens).input_ids
        return ids

    def _fit(self, prompt: list[int], response: int) -> list[int]:
        """The end of a prompt that leaves room for a response."""
        if self.max_length is None or len(prompt) + response <= self.max_length:
            return prompt
        room = self.max_length - response
        if room <= 0:
            raise ValueError(
                f"a response of {response} tokens leaves no room for a prompt in {self.max_length}; give gen_length"
            )
        warnings.warn(
            f"dllm: a prompt of {len(prompt)} tokens was cut to its last {room}, as the model takes {self.max_length} "
            "with the response",
            stacklevel=2,
        )
        return prompt[-room:]

    @property
    def tokenizer_name(self) -> str:
        """Where the tokenizer is from, for caches of the harness."""
        return str(getattr(self.tokenizer, "name_or_path", "")).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The tokenizer's template, where one is asked for."""
        return self.tokenizer.chat_template if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text


def _first(text: str, until: Iterable[str]) -> int | None:
    """Where the first stop string begins; ``None`` where there is none."""
    return min((place for place in (text.find(each) for each in until) if place >= 0), default=None)


def _whole(name: str, value: Any, least: int = 1) -> int:
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if not is_int(number) or number < least:
        raise ValueError(f"{name} is {value!r}; give a whole number of at least {least}")
    return int(number)


def _place(device: str | None) -> str:
    """Where a model is loaded to."""
    if torch.cuda.is_available():
        return device or "cuda"
    return "cpu" if device is None or device.startswith("cuda") else device


def _dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    found = getattr(torch, name, None) if isinstance(name, str) else name
    if name in (None, "auto"):
        return None
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype is {name!r}; give one of torch, such as bfloat16")
    return found


def _longest(config: Any) -> int | None:
    """Tokens that a configuration allows: LLaDA says ``max_sequence_length``, most say ``max_position_embeddings``."""
    for name in ("max_sequence_length", "max_position_embeddings"):
        if is_int(getattr(config, name, None)):
            return int(getattr(config, name))
    return None


def _load(
    name: str, device: str, dtype: torch.dtype | None, is_causal: bool | None, code: dict[str, Any]
) -> tuple[Any, Any]:
    """A model in evaluation mode and its tokenizer."""
    if name == "tiny":
        from . import tiny

        return tiny.load(device, dtype or torch.float32)
    model = checkpoint.load(name, is_causal=is_causal, dtype=dtype or "auto", **code)
    return model.to(device), _tokenizer(name, **code)


def _tokenizer(name: str, **code: Any) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(name, **code)
