"""What one mechanism says of itself: its source, the options it reads, and the rows it chooses.

Options and their checks, methods, presets and the tests of neutral settings are made from the list of these values; see
:mod:`dllm_compile.mechanisms`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from dllm_compile.core.errors import naming

from .blocks import Blocks, Masks
from .plan import AfterLayer, Call, Skipping

Rows = Callable[["Facts"], torch.Tensor]
"""A pure function of the facts of one step; facts about earlier calls are included in them."""


@dataclass(frozen=True)
class Option:
    """One name in ``options={...}``.

    Attributes:
        name: the name.
        default: its value where the user says nothing; where that is ``None``, so may the user's value be.
        fits: whether a value means something.
        wanted: what to give in place of one that does not, as in "NAME is VALUE; give WANTED".
        meaning: what it does, and the values it may have.
        synonyms: what other code calls it.
        read: given all options, whether anything reads it; ``None`` where something always does.
        beside: what to give too so that something does.
        neutral: values, beside the default, at which nothing is reused.
        yields: names of other options. If the user gives one of these, a method does not set this option.
        values: the words that it may be, in place of ``fits`` and ``wanted``: a wrong one is answered with the nearest.
    """

    name: str
    default: Any
    fits: Callable[[Any], bool] = lambda _: True
    wanted: str = ""
    meaning: str = ""
    synonyms: tuple[str, ...] = ()
    read: Callable[[Any], bool] | None = None
    beside: str = ""
    neutral: tuple[Any, ...] = ()
    yields: tuple[str, ...] = ()
    values: Callable[[], Iterable[str]] | None = None


@dataclass(frozen=True)
class Facts:
    """What a rule is told about one step; those of ``visible`` and ``refresh`` are asked at every step.

    Attributes:
        call: what the ids of the call show. Its ``number`` counts calls of the batch; a sequence that was replaced by
            a new one shows by ``blocks.moved``.
        blocks: where the sequences are.
        response: ``[B, S]`` bool, the rows of the response.
        since: ``[B, S]`` bool, rows whose masks were filled since the last call that computed every row, this call's
            among them.
        options: what the user chose, by name.
    """

    call: Call
    blocks: Blocks
    response: torch.Tensor
    since: torch.Tensor
    options: Any

    @property
    def notes(self) -> Mapping[Any, Any]:
        """By layer, what ``after_layer`` noted at the last step that ran the layer; empty where a sequence begins.

        Tensors are where the model is: reading them on the host waits for the step before.
        """
        return self.call.notes

    @property
    def masked(self) -> torch.Tensor:
        """``[B, S]`` bool, rows that hold the mask."""
        return self.call.masked


@dataclass(frozen=True)
class Confidences:
    """What a rule of unmasking is told about one step of :func:`dllm_compile.generate`.

    Attributes:
        sure: ``[B, S]`` floating, how sure one is of the token proposed for each candidate; ``-inf`` elsewhere.
        candidates: ``[B, S]`` bool, the positions that may be written.
        masked: ``[B, S]`` bool, all positions that hold the mask and are still to be filled.
        options: what the user chose, by name.
        block: ``[B, S]`` bool, the positions of the block that each sequence is at.
        threshold: ``[B, 1]`` floating, the threshold as it is so far; for a mechanism that changes it.
    """

    sure: torch.Tensor
    candidates: torch.Tensor
    masked: torch.Tensor
    options: Any
    block: Any = None
    threshold: Any = None


@dataclass(frozen=True)
class Contexts:
    """What a mechanism is told of the contexts of the rows that a layer computes, the output of each head.

    Attributes:
        new: ``[B, H, Q, h]``, those of this step.
        old: ``[B, H, Q, h]``, those that are kept of the last step that computed the row.
        cosine: ``[B, Q]`` floating, of the two, over all heads side by side; taken before ``new`` is rounded.
        bound: ``[B, 1]`` float32, the value of the option that switches the mechanism on; infinite for a sequence whose
            rows are all salient, whatever the mechanism says.
    """

    new: torch.Tensor
    old: torch.Tensor
    cosine: torch.Tensor
    bound: torch.Tensor


@dataclass(frozen=True)
class RowRule:
    """A value of the option ``cache``: the rows that a step between two refreshes computes.

    The keys and values of these rows are fresh, all others are those of the last step that computed them.

    Attributes:
        name: the value of ``cache``.
        rows: the rows of a step, ``[B, S]`` bool.
        meaning: what they are, in words.
        reach: rows that some step before the next refresh may compute, ``[B, S]`` bool, asked at the refresh where
            ``keep_ratio`` is given: their keys are not evicted. ``None`` where they are ``rows`` themselves. A step
            that would compute another row computes every row.
        refresh: which sequences, ``[B, 1]`` bool, compute every row now; beside a ``prompt_interval`` every row of the
            response. ``None`` leaves that to the options ``refresh_interval`` and ``prompt_interval``, and to where a
            block begins.
        leaves_filled: a token that was filled need not be computed before the next refresh. Else one outside of the
            rows makes every row be computed.
        through_blocks: a sequence that comes to its next block does not refresh for that: its rows are those that the
            rule says.
        in_blocks: whether the rows depend on the blocks only. ``generate`` then takes each block to have a cache of its
            own, as Fast-dLLM does.
        shifts: the rule sees to shifted logits itself (``options.shift``); else the row before each is added.
        after_layer: what is measured in each layer, and decided of the layers behind it; the hidden states that leave
            each layer are kept for that. Not beside eviction and saliency, which keep no whole layers.
        needs_hint: it needs to know which masks are filled next, which ``generate`` says for a random order.
        refused: what about a rule makes it refuse options, as a sentence; ``None`` where it takes them.
    """

    name: str
    rows: Rows
    meaning: str
    reach: Rows | None = None
    refresh: Rows | None = None
    leaves_filled: bool = False
    through_blocks: bool = False
    in_blocks: bool = False
    shifts: bool = False
    after_layer: AfterLayer | None = None
    needs_hint: bool = False
    refused: Callable[[Any], str | None] | None = None


@dataclass(frozen=True, eq=False)
class Mechanism:
    """One way to compute less, or to call the model fewer times, on every model.

    Attributes:
        name: what it is called.
        source: where it is from: paper, code.
        options: names that it adds to ``options={...}``.
        switches: those of them that turn it on, whose default is off.
        neutral: options at which every readable row equals eager's; ``None`` if no options guarantee that for every
            number of steps, or if it computes nothing and only decides what ``generate`` writes.
        rules: values that it adds to the option ``cache``.
        block: where its only switch is on, the rows, ``[B, S]`` bool, of the active block at each call, in place of
            blocks of fixed places. Rules find it in ``facts.blocks.active``, and :func:`dllm_compile.generate` writes
            into it alone. A step after which it lies elsewhere is no refresh. It is asked on the CPU, once a call. One
            mechanism at most.
        widens: where one of ``switches`` is on, rows, ``[B, S]`` bool, that steps between two refreshes compute beside
            those that the rule of ``cache`` chooses; several mechanisms unite.
        narrows: likewise, the rows that these steps compute of all those; several mechanisms intersect.
        reach: where ``widens`` or ``block`` may come to further rows before the next refresh, ``[B, S]`` bool, as
            :attr:`RowRule.reach`; several mechanisms unite.
        refresh: where one of ``switches`` is on, which sequences, ``[B, 1]`` bool, compute every row now, as
            :attr:`RowRule.refresh`; several mechanisms unite.
        present: where one of ``switches`` is on, the rows, ``[B, S]`` bool, that the sequence has in this step; the
            others are neither computed nor read by attention, in full steps too, and their positions stay empty.
            Several mechanisms intersect. Among those present must be the rows whose logits are read. A step at which
            a row comes that no step since the last refresh computed is a refresh.
        visible: where one of ``switches`` is on, the keys, ``[B, S]`` bool, that attention reads in every step;
            several mechanisms intersect, and what eviction keeps of the others is hidden too.
        salient: where its only switch is on, whose value is a number, which of the rows that a layer computes are
            salient, ``[B, Q]`` bool: computed again by the MLP of the layer, and by keys and values of the next; the
            others keep those of the last step that computed them. It is compiled with the layer. One mechanism at most.
        skips: where one of ``switches`` is on, how many of the rows of a partial step go on into deeper layers, and
            which; beside the ``rules`` of ``cache``. One mechanism at most.
        unmask: where one of ``switches`` is on, the candidates, ``[B, S]`` bool, that :func:`dllm_compile.generate`
            writes in a step, in place of ``threshold`` and ``factor``; the surest one where it says none. It is
            compiled with the step: PyTorch on tensors whose sizes depend on no values. One mechanism at most.
        candidates: where one of ``switches`` is on, those of the candidates, ``[B, S]`` bool, that ``unmask``,
            ``threshold`` or ``factor`` choose from in a step; a sequence that it leaves none writes nothing. Compiled
            like ``unmask``; several mechanisms intersect.
        threshold: where one of ``switches`` is on, the ``threshold`` of each sequence in a step, ``[B, 1]`` floating,
            from the one that there is. Compiled like ``unmask``; of several mechanisms each is told what the one
            before it says.
        ends: where one of ``switches`` is on, positions ``[B, S]`` bool that are taken for an end of the response. It
            is asked at the first step of each block, and told of the masks whose likeliest token is an end of sequence
            (the ``candidates``) and how likely each is (``sure``). The response then ends with the block of the first
            of them: what is behind is not decoded, and ``call.wanted`` is ``False`` there. Compiled like ``unmask``;
            of several mechanisms any may say an end.
        methods: values of ``method``, each with the options it stands for.
        presets: values of ``preset``, likewise.
        checks: of all options, a sentence that refuses them, or ``None``.
    """

    name: str
    source: str
    options: tuple[Option, ...] = ()
    switches: tuple[str, ...] = ()
    neutral: Mapping[str, Any] | None = None
    rules: tuple[RowRule, ...] = ()
    block: Callable[[Masks], torch.Tensor] | None = None
    widens: Rows | None = None
    narrows: Rows | None = None
    reach: Rows | None = None
    refresh: Rows | None = None
    present: Rows | None = None
    visible: Rows | None = None
    salient: Callable[[Contexts], torch.Tensor] | None = None
    skips: Skipping | None = None
    unmask: Callable[[Confidences], torch.Tensor] | None = None
    candidates: Callable[[Confidences], torch.Tensor] | None = None
    threshold: Callable[[Confidences], torch.Tensor] | None = None
    ends: Callable[[Confidences], torch.Tensor] | None = None
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    checks: tuple[Callable[[Any], str | None], ...] = ()


def asked(what: str, rows: Callable[[Any], torch.Tensor], facts: Any, like: torch.Tensor) -> torch.Tensor:
    """Call a function of a mechanism, and check that it returns a tensor like ``like``.

    Args:
        what: who says what, for the error: "the rule 'dual' says rows".
        rows: the function.
        facts: what it is told.
        like: ``[B, S]`` or ``[B, 1]`` bool.

    Raises:
        FunctionFailed: the function raises an exception, which is the cause of this one.
        ValueError: it says something else.
    """
    with naming(what):
        said = rows(facts)
    found = (
        f"{said.dtype} {list(said.shape)} on {said.device}"
        if isinstance(said, torch.Tensor)
        else f"a {type(said).__name__}"
    )
    wanted = f"{like.dtype} {list(like.shape)} on {like.device}"
    if found != wanted:
        raise ValueError(f"{what} of {found}; give {wanted}")
    return said


# -- values of options -----------------------------------------------------------------------------------------------


def is_int(value: Any) -> bool:
    """Whether a value is a whole number, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a finite real number, and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def share_of(what: str, usual: float) -> dict[str, Any]:
    """``fits`` and ``wanted`` of an option that is a share from 0 to 1."""
    fits = lambda v: is_number(v) and 0.0 <= v <= 1.0  # noqa: E731
    return {"fits": fits, "wanted": f"a share of the {what} from 0 to 1, such as {usual}"}


def count(example: str, least: int = 1) -> dict[str, Any]:
    """``fits`` and ``wanted`` of an option that is a whole number of at least ``least``."""
    fits = lambda v: is_int(v) and v >= least  # noqa: E731
    return {"fits": fits, "wanted": f"a whole number of at least {least}, such as {example}"}


def interval() -> dict[str, Any]:
    """``fits``, ``wanted`` and ``neutral`` of an option that is a number of steps, or -1 for every step."""
    fits = lambda v: is_int(v) and (v >= 1 or v == -1)  # noqa: E731
    return {"fits": fits, "wanted": "a number of steps, at least 1, or -1 to refresh at every step", "neutral": (1, -1)}


def flag() -> dict[str, Any]:
    """``fits`` and ``wanted`` of an option that is a truth value."""
    return {"fits": lambda v: isinstance(v, bool), "wanted": "True or False"}


def token_id() -> dict[str, Any]:
    """``fits`` and ``wanted`` of an option that is a token id."""
    fits = lambda v: is_int(v) and v >= 0  # noqa: E731
    return {"fits": fits, "wanted": "a token id, such as 126336 for LLaDA"}


def nearest(name: Any, valid: Iterable[str]) -> str:
    """The valid name most like the one given."""
    return difflib.get_close_matches(str(name), list(valid), n=1, cutoff=0.0)[0]


def one_of(name: str, value: Any, valid: Iterable[str]) -> None:
    """Refuse a value that is not among the valid ones.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, str) or value not in valid:
        raise ValueError(f"{name} is {value!r}; did you mean {nearest(value, valid)!r}? Valid: {', '.join(valid)}")
