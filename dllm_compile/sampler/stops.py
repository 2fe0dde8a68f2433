"""Where stopping criteria end a response: behind the first tokens that one of them is true of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from .check import kind_of

Criterion = Callable[[torch.Tensor, None], Any]
"""Maps ids ``[1, N]`` and the absence of scores to whether the sequence ends with them, as in transformers."""


@dataclass(frozen=True)
class Stopping:
    """Stopping criteria, and the padding of a configuration of transformers, if there is any."""

    criteria: tuple[Criterion, ...]
    padding: int | None

    def fill(self, eos: tuple[int, ...]) -> int:
        """The token id that replaces everything behind an end: the padding, or else an end of sequence.

        Raises:
            ValueError: neither is known.
        """
        for token in (self.padding, *eos):
            if token is not None and token >= 0:
                return token
        raise ValueError(
            "stopping criteria end a response before its length, and no token is known for what is behind; give "
            "eos_id, or pad_token_id through transformers"
        )


def stopping_of(given: Iterable[Any] | None, strings: Any, tokenizer: Any, config: Any) -> Stopping | None:
    """What a user asked for, but criteria that are settings of the loop: a length and ends of sequence.

    Args:
        given: criteria, those that transformers makes of ``config`` among them.
        strings: texts that end a response, or one; or ``None``.
        tokenizer: what ``strings`` are looked up in.
        config: a ``GenerationConfig``, or ``None``.

    Raises:
        TypeError: one cannot be called.
        ValueError: there are strings and no tokenizer.
    """
    given = list(given or ())
    for each in given:
        if not callable(each):
            raise TypeError(f"stopping_criteria hold {kind_of(each)}; give functions of ids and scores")
    there = {type(each).__name__ for each in given}
    criteria = [each for each in given if config is None or not _is_setting(each, config)]
    if config is not None and strings is None and "StopStringCriteria" not in there:
        strings = config.stop_strings
    if strings is not None:
        if tokenizer is None:
            raise ValueError(
                f"stop_strings are {strings!r}, and there is no tokenizer (transformers hands a custom loop none); "
                "give stopping_criteria=[transformers.StopStringCriteria(tokenizer, stop_strings)]"
            )
        criteria.append(_of_strings(strings, tokenizer))
    if config is not None and config.max_time is not None and "MaxTimeCriteria" not in there:
        from transformers import MaxTimeCriteria

        criteria.append(MaxTimeCriteria(config.max_time))
    return Stopping(tuple(criteria), getattr(config, "pad_token_id", None)) if criteria else None


def _of_strings(strings: Any, tokenizer: Any) -> Criterion:
    from transformers import StopStringCriteria

    try:
        criterion: Criterion = StopStringCriteria(tokenizer, strings)
    except ValueError as error:  # it spells letters with the tokenizer, which one of whole words cannot
        raise ValueError(
            f"stop_strings are {strings!r}, and transformers cannot look for them with this tokenizer ({error}); give "
            "stopping_criteria of your own, such as [lambda ids, scores: tokenizer.decode(ids[0]).endswith(string)]"
        ) from error
    return criterion


def _is_setting(criterion: Any, config: Any) -> bool:
    """Whether transformers made a criterion of the length or the ends of a configuration, which are settings."""
    kind = type(criterion).__name__
    if kind == "MaxLengthCriteria":
        return bool(criterion.max_length == config.max_length)
    if kind != "EosTokenCriteria":
        return False
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return bool(criterion.eos_token_id.tolist() == ends)


class Stops:
    """Asks criteria about each sequence, token by token, as far as no mask is before them.

    Args:
        stopping: the criteria.
        eos: ids that end a response; may be empty.
        x: ``[B, S]`` int64, prompts and masks.
        prompt: tokens of the prompts. As long as nothing behind a prompt is settled, criteria are asked about it alone,
            as a clock may run out, unless its own text already satisfies one.
    """

    def __init__(self, stopping: Stopping, eos: tuple[int, ...], x: torch.Tensor, prompt: int) -> None:
        self.criteria, self.fill = stopping.criteria, stopping.fill(eos)
        self.ends, self.asked = [x.shape[1]] * len(x), [prompt] * len(x)
        by_text = [each for each in self.criteria if type(each).__name__ != "MaxTimeCriteria"]
        said = [prompt == 0 or _any(by_text, x[i : i + 1, :prompt]) for i in range(len(x))]
        self.first = [prompt + int(each) for each in said]

    def behind(self, x: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """The tokens behind an end: ``[B, S]`` bool on the CPU.

        Args:
            x: ``[B, S]`` int64.
            masked: ``[B, S]`` bool on the CPU, what is masked in it.
        """
        tokens = x.shape[1]
        settled = torch.where(masked, torch.arange(tokens), tokens).amin(1).tolist()
        for i, end in enumerate(self.ends):
            if end < tokens:
                continue
            lengths = range(max(self.asked[i], self.first[i]), settled[i] + 1)
            self.ends[i] = next((n for n in lengths if _any(self.criteria, x[i : i + 1, :n])), tokens)
            self.asked[i] = settled[i]
        return torch.arange(tokens) >= torch.tensor(self.ends).unsqueeze(1)


def _any(criteria: Iterable[Criterion], ids: torch.Tensor) -> bool:
    """Whether one of ``criteria`` is true of ids ``[1, N]``."""
    return any(bool(torch.as_tensor(each(ids, None)).all()) for each in criteria)
