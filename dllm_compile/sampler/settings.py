"""Settings of one generation: one frozen value, under the names of LLaDA, Dream and Fast-dLLM alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from dllm_compile.interface.blocks import FindBlock
from dllm_compile.interface.mechanism import count, flag, is_number, nearest, one_of, token_id
from dllm_compile.options import all_names

from .rules import RULES, Allowed, Moved, Rule

SYNONYMS = {
    "max_new_tokens": "gen_length",
    "block_size": "block_length",
    "block_len": "block_length",
    "diffusion_steps": "steps",
    "num_steps": "steps",
    "alg": "remasking",
    "confidence_threshold": "threshold",
    "mask_token_id": "mask_id",
    "eos_token_id": "eos_id",
}
PRESET_SETTINGS: dict[str, dict[str, Any]] = {"fastest": {"frechet_delta": 0.25}, "streaming-dllm": {"threshold": 0.9}}
"""Which tokens a preset of the backend writes, unless one of ``HOW_MANY`` says so."""
HOW_MANY = {"threshold", "factor", "frechet_delta"}

RULE_SYNONYMS = {"confidence_threshold": "low_confidence", "margin_confidence": "topk_margin", "neg_entropy": "entropy"}


SCHEDULES = ("equal", "time")
_SCALE = {"fits": lambda v: is_number(v) and v >= 0, "wanted": "a number of at least 0"}
_SHARE = {"fits": lambda v: is_number(v) and 0 < v <= 1, "wanted": "a share above 0 and up to 1"}
_VALUES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("gen_length", "block_length", "steps", "top_k", "drafts"), count("32")),
    **dict.fromkeys(("temperature", "cfg_scale", "factor", "alg_temp"), _SCALE),
    **dict.fromkeys(("top_p", "eps"), _SHARE),
    **dict.fromkeys(("shift", "as_published"), flag()),
    "threshold": {"fits": is_number, "wanted": "a confidence, such as 0.9"},
    "mask_id": token_id(),
}
"""What values of a field are, and how that is said; ``None`` is one too where it is the default."""


@dataclass(frozen=True)
class Settings:
    """How :func:`dllm_compile.generate` samples: the arguments it takes by name.

    Attributes:
        gen_length: tokens of the response; also ``max_new_tokens``.
        block_length: tokens of a block, filled one after another; ``None`` for one block. Also ``block_size``.
        steps: forward calls in all, where the number of tokens a call is fixed; ``None`` for one call a token.
        temperature: 0 takes the best tokens.
        remasking: which tokens to write first: by the probability of the token (``"low_confidence"``,
            ``"maskgit_plus"``), by ``"entropy"``, by ``"topk_margin"``, at ``"random"``, or Dream's ``"origin"``, which
            writes each with the same probability; also ``alg``. At a temperature, the first and ``"random"`` draw as
            LLaDA does, unless the model is shifted; all others draw as Dream does.
        cfg_scale: scale of classifier-free guidance; 0 for none.
        threshold: write all tokens of a block that are this sure, at least one (Fast-dLLM); ``steps`` is then unused.
        factor: the same, with a bound that grows with the number of tokens written at once (Fast-dLLM).
        shift: row ``i - 1`` of the logits predicts token ``i``, as Dream's does; ``None`` asks the model's config.
        mask_id: token id of the mask; ``None`` asks the model's config.
        eos_id: id or ids that end a response. A sequence stops when all its masks lie behind one, and they become it.
        top_p: draw from the fewest tokens that hold more than this share (Dream).
        top_k: draw from so many of the likeliest tokens (Dream).
        alg_temp: draw positions by their confidence at this temperature (Dream); 0 or ``None`` takes the surest.
        schedule: tokens a step: ``"equal"`` parts of a block (LLaDA), or by ``"time"`` (Dream). ``None`` follows the
            model: by time where it is shifted. DyLLM's authors fill equal parts on Dream, too.
        eps: where the schedule by time ends.
        drafts: states that a call of the model looks at together, at least 1: the next ones of the loop, as the logits
            of the state before have it. The ids are those without, from fewer calls (FreeDave). One sequence, at
            temperature 0, with ``cache="dual"``, ``"prefix"`` or none. ``None`` for one.
        as_published: repeat peculiarities of Fast-dLLM's code, so that its traces can be compared with; see
            :class:`dllm_compile.sampler.progress.Progress`. Temperature 0 only.
        rule: which tokens to write, as a mechanism has it that an option switched on; no argument of ``generate``.
        allowed: which candidates mechanisms leave, likewise.
        block: where the block is that a step writes into, likewise; blocks then have no fixed places.
        skips: mechanisms that skip rows in deeper layers: candidates without logits of the step are held back.
        moved: how mechanisms change the threshold from step to step, likewise.
        ends: where mechanisms take a response to end, likewise.

    Raises:
        ValueError: a value is out of range, or two of them contradict each other.
    """

    gen_length: int = 128
    block_length: int | None = None
    steps: int | None = None
    temperature: float = 0.0
    remasking: str = "low_confidence"
    cfg_scale: float = 0.0
    threshold: float | None = None
    factor: float | None = None
    shift: bool | None = None
    mask_id: int | None = None
    eos_id: int | tuple[int, ...] | None = None
    top_p: float | None = None
    top_k: int | None = None
    alg_temp: float | None = None
    schedule: str | None = None
    eps: float = 1e-3
    drafts: int | None = None
    as_published: bool = False
    rule: Rule | None = None
    allowed: Allowed | None = None
    block: FindBlock | None = None
    skips: tuple[str, ...] = ()
    moved: Moved | None = None
    ends: Allowed | None = None

    def __post_init__(self) -> None:
        one_of("remasking", self.remasking, RULES)
        if self.schedule is not None:
            one_of("schedule", self.schedule, SCHEDULES)
        for name, known in _VALUES.items():
            value = getattr(self, name)
            if not (known["fits"](value) or (value is None and getattr(Settings, name) is None)):
                raise ValueError(f"{name} is {value!r}; give {known['wanted']}")
        if not all(map(token_id()["fits"], self.eos)):
            raise ValueError(f"eos_id is {self.eos_id!r}; give a token id, or a tuple of them")
        self._check_rules()

    def check_blocks(self) -> None:
        """Refuse lengths and steps that do not divide into blocks, once it is known what the blocks are.

        Raises:
            ValueError: they do not.
        """
        block, blocks = self.block_length, self.blocks
        if block and self.gen_length % block and self.block is None:
            more = -(-self.gen_length // block) * block
            raise ValueError(f"gen_length {self.gen_length} is no multiple of block_length {block}; give {more}")
        if self.steps and self.steps % blocks and not self.parallel:
            more = -(-self.steps // blocks) * blocks
            raise ValueError(f"steps {self.steps} is no multiple of the number of blocks, {blocks}; give {more}")

    def _check_rules(self) -> None:
        if self.threshold is not None and self.factor is not None:
            raise ValueError("threshold and factor are two rules for one thing; give one of them")
        if self.rule is not None and (self.threshold is not None or self.factor is not None):
            raise ValueError("a mechanism decides which tokens are written, and so does threshold or factor; give one")
        if self.allowed is not None and not self.parallel:
            raise ValueError(
                f"{' and '.join(self.allowed.names)} may hold tokens back, so that a step cannot write a fixed number; "
                "give threshold or factor"
            )
        if self.moved is not None and self.threshold is None:
            raise ValueError(
                f"{' and '.join(self.moved.options)} changes the threshold from step to step, and there is none; give "
                "threshold=0.9 too, or leave it out"
            )
        if self.ends is not None and not self.eos:
            raise ValueError(
                f"{' and '.join(self.ends.names)} looks for the end of a response, and no token is known to end one; "
                "give eos_id"
            )
        rule = "threshold" if self.threshold is not None else "factor"
        if self.parallel and self.remasking == "origin":
            raise ValueError(f"remasking='origin' has no confidence to hold against a {rule}; leave out one of them")
        if self.parallel and self.alg_temp:
            raise ValueError(f"alg_temp draws a fixed number of positions, {rule} takes all that are sure; give one")
        if self.schedule == "equal" and self.remasking == "origin":
            raise ValueError(
                "remasking='origin' writes each token by chance, not in equal parts; leave out one of them"
            )
        if self.as_published and self.block is not None:
            raise ValueError("as_published repeats traces in fixed blocks; leave it out, or the option that moves them")
        if self.as_published and self.temperature:
            raise ValueError("as_published repeats traces at temperature 0; leave out one of them")

    @property
    def blocks(self) -> int:
        """Number of blocks of the response; one where a block moves."""
        if self.block is not None:
            return 1
        return self.gen_length // (self.block_length or self.gen_length)

    @property
    def eos(self) -> tuple[int, ...]:
        """Ids that end a response."""
        return () if self.eos_id is None else self.eos_id if isinstance(self.eos_id, tuple) else (self.eos_id,)

    @property
    def holds_back(self) -> tuple[str, ...]:
        """Names of the mechanisms by which a step may write fewer tokens than there are to write."""
        return (*(self.allowed.names if self.allowed is not None else ()), *self.skips)

    @property
    def asks(self) -> bool:
        """Whether mechanisms have a say in which tokens are written, or how many."""
        return any(each is not None for each in (self.rule, self.allowed, self.moved, self.ends))

    @property
    def reads_candidates(self) -> bool:
        """Whether a step reads the logits of its candidates alone: not where mechanisms look for the end among all
        masks, or choose rows by how sure all are, and not of drafts, which are other states.
        """
        return self.ends is None and not self.skips and self.drafts is None

    @property
    def parallel(self) -> bool:
        """Whether confidence decides how many tokens a step writes."""
        return self.threshold is not None or self.factor is not None or self.rule is not None

    def draws_rows(self, shift: bool) -> bool:
        """Whether a step draws or filters as Dream's does: for masked rows alone, a number that depends on values."""
        if self.remasking == "origin" or self.alg_temp or self.top_k or (self.top_p or 1) < 1:
            return True
        return self.temperature > 0 and (shift or self.remasking not in ("low_confidence", "random"))


def merged(given: Mapping[str, Any], options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Names and values, and more of them in a mapping.

    Raises:
        TypeError: it is none.
        ValueError: a name is in both.
    """
    if not isinstance(options, (Mapping, type(None))):
        raise TypeError(f"options are {options!r}; give a mapping of names to values")
    for name in given.keys() & (options or {}).keys():
        raise ValueError(f"{name!r} is given twice, once in options; give it once")
    return {**given, **(options or {})}


def settings_of(given: Mapping[str, Any], config: Any = None, prompt: int = 0) -> tuple[Settings, dict[str, Any]]:
    """Read arguments as a user wrote them.

    Args:
        given: names, synonyms among them, and values.
        config: a ``transformers.GenerationConfig`` that fills gaps: length, end of sequence, and where it says to
            sample, how.
        prompt: tokens of the prompt, which ``config.max_length`` counts.

    Returns:
        Settings, and what is left: options of the backend.

    Raises:
        ValueError: an unknown name, a value out of range, or one thing said twice.
    """
    own: dict[str, Any] = {}
    options: dict[str, Any] = {}
    of_the_backend = option_names()
    for name, value in given.items():
        meant = SYNONYMS.get(name, name)
        if meant not in SETTINGS and name not in of_the_backend:
            near, valid = nearest(name, names()), ", ".join(names())
            raise ValueError(f"there is no argument {name!r}; did you mean {near!r}? Arguments: {valid}")
        target = own if meant in SETTINGS else options
        if meant in target:
            raise ValueError(f"{meant!r} is given twice, once as {name!r}; give it once")
        target[meant] = value
    if not HOW_MANY & {*own, *options}:
        for name, value in PRESET_SETTINGS.get(str(options.get("preset")), {}).items():
            (own if name in SETTINGS else options)[name] = value
    if config is not None:
        _check_sampling(own.get("temperature"), config.do_sample)
        own = {**_from_config(config, prompt), **own}
    if own.get("remasking") == "confidence_threshold":
        own.setdefault("threshold", 0.9)
    if "remasking" in own:
        own["remasking"] = RULE_SYNONYMS.get(str(own["remasking"]), own["remasking"])
    if isinstance(own.get("eos_id"), list):
        own["eos_id"] = tuple(own["eos_id"])
    return Settings(**own), options


def _check_sampling(temperature: Any, do_sample: bool | None) -> None:
    """Refuse a temperature beside a configuration that says otherwise whether tokens are drawn."""
    if is_number(temperature) and do_sample is not None and bool(do_sample) != (temperature > 0):
        raise ValueError(
            f"temperature is {temperature!r}, and do_sample is {do_sample}; give do_sample={temperature > 0} too"
        )


def _from_config(config: Any, prompt: int) -> dict[str, Any]:
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    own: dict[str, Any] = {"eos_id": [each for each in ends if each is not None and each >= 0] or None}  # -1: no end
    length = config.max_new_tokens or (config.max_length and config.max_length - prompt)
    if length:
        own["gen_length"] = length
    if config.do_sample:
        own["temperature"] = 1.0 if config.temperature is None else config.temperature
        own.update(top_p=config.top_p, top_k=config.top_k or None)
    return own


_OF_MECHANISMS = ("rule", "allowed", "block", "skips", "moved", "ends")
SETTINGS = tuple(each.name for each in fields(Settings) if each.name not in _OF_MECHANISMS)


def option_names() -> list[str]:
    """Names that :func:`dllm_compile.generate` hands on to the backend, those of registered mechanisms among them."""
    return [name for name in all_names() if name not in SETTINGS and name not in SYNONYMS]


def names() -> list[str]:
    """Every name that decides how a generation runs."""
    return [*SETTINGS, *SYNONYMS, *option_names()]
