"""Options: one frozen value. Unknown names and bad values are refused with the nearest valid one."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

CACHES = ("prefix", "dual", "decoded", "greedy", "none")
LOWERINGS = ("inductor", "eager")

METHODS: dict[str, dict[str, Any]] = {
    "exact": {},
    "dllm-cache": {"prompt_interval": 50, "response_interval": 7, "transfer_ratio": 0.25},
    "fast-dllm": {"cache": "prefix"},
    "sparse-dllm": {"cache": "dual", "keep_ratio": 0.5},
    "dyllm": {"saliency_threshold": 0.99},
    "dkv-cache": {"cache": "decoded", "delay": 1, "refresh_interval": 8},
}
"""A method is a choice of mechanisms, with the values of its authors."""

SYNONYMS = {
    "gen_interval": "response_interval",
    "gen_interval_steps": "response_interval",
    "response_interval_steps": "response_interval",
    "prompt_interval_steps": "prompt_interval",
    "cache_reloading_step": "refresh_interval",
    "cache_steps": "refresh_interval",
    "num_full_steps": "full_steps",
    "block_size": "block_length",
}

PRESETS: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in METHODS},
    "fast-dllm": {"method": "fast-dllm", "cache": "prefix", "block_length": 32},
    "fast-dllm/dual": {"method": "fast-dllm", "cache": "dual", "block_length": 32},
    "sparse-dllm": {"method": "sparse-dllm", "block_length": 32},
    "dkv-cache/greedy": {"method": "dkv-cache", "cache": "greedy", "delay": 0, "refresh_interval": 2, "window_size": 4},
    "dyllm/llada-safe": {"method": "dyllm", "saliency_threshold": 0.995},
    "dyllm/dream": {"method": "dyllm", "saliency_threshold": 0.995},
    "dyllm/dream-safe": {"method": "dyllm", "saliency_threshold": 0.9975},
    "dyllm/tpu": {"method": "dyllm", "whole_interval": 8},
    "fastest": {"method": "fast-dllm", "cache": "dual", "block_length": 32},
    "dllm-cache/llada-instruct-gsm8k": {"prompt_interval": 50, "response_interval": 7},
    "dllm-cache/llada-instruct-gpqa": {"prompt_interval": 50, "response_interval": 6},
    "dllm-cache/llada-instruct-math": {"prompt_interval": 50, "response_interval": 1},
    "dllm-cache/llada-instruct-mbpp": {"prompt_interval": 100, "response_interval": 5},
    "dllm-cache/llada-instruct-humaneval": {"prompt_interval": 50, "response_interval": 8},
    "dllm-cache/llada-instruct-longbench": {"prompt_interval": 100, "response_interval": 8},
    "dllm-cache/llada-base-gsm8k": {"prompt_interval": 25, "response_interval": 5},
    "dllm-cache/llada-base-gpqa": {"prompt_interval": 100, "response_interval": 8},
    "dllm-cache/dream-instruct-gsm8k": {"prompt_interval": 25, "response_interval": 2},
    "dllm-cache/dream-base-gsm8k": {"prompt_interval": 100, "response_interval": 8},
    "dllm-cache/tiny": {"prompt_interval": 50, "response_interval": 2},
}
"""Values the paper's authors recommend by model and task (arXiv 2506.06295), and ``tiny``, found on the embedded model,
whose running sums need the token just before. The transfer ratio is 0.25 in all of them. Fast-dLLM's block length is
that of its authors' scripts (arXiv 2505.22618), DyLLM's thresholds are of its paper (arXiv 2603.08026); ``dyllm/tpu``
is as its authors' port to TPUs. ``fastest`` is the best combination found on the embedded model within a point of
accuracy, by ``bench --plot``; :func:`generate` adds a threshold of 0.9 to it."""


@dataclass(frozen=True, init=False)
class Options:
    """Everything ``torch.compile(model, backend="dllm", options=...)`` understands.

    ``Options(method="dyllm", mask_id=3)`` is what the mapping ``{"method": "dyllm", "mask_id": 3}`` is: synonyms and
    ``preset`` are names too, a method brings the values of its authors, and with nothing named it is dLLM-Cache. Either
    can be given as ``options``. torch hands a mapping to the backend at the first call of the model, and a mistake in
    it is told there; ``Options(...)`` tells it where it is written.

    Mechanisms are independent; where one is ``None`` (or ``cache="none"``) it is off, and a method is a preset of them.

    Attributes:
        method: the preset: ``"dllm-cache"``, ``"fast-dllm"``, ``"sparse-dllm"``, ``"dyllm"``, ``"dkv-cache"``, or
            ``"exact"``, which reuses nothing but what is provably unchanged.
        prompt_interval: steps between refreshes of the prompt (K_p), at least 1; -1 refreshes always.
        response_interval: steps between refreshes of the whole response (K_r), at least 1; -1 refreshes always.
        transfer_ratio: share of the response recomputed in the steps between (rho), 0 to 1; 0 recomputes none. ``None``
            for 0.25. Only without a cache of blocks and without saliency, which choose rows themselves.
        cache: rows computed between two refreshes: ``"dual"`` the active block, ``"prefix"`` from there to the end,
            ``"decoded"`` the masked rows and those just filled, ``"greedy"`` those just filled and those to be filled
            next, which :func:`dllm_compile.generate` tells (other loops do not: all masked rows), ``"none"`` as the
            other mechanisms say.
        window_size: masked rows that ``"greedy"`` computes around each row to be filled, at least 0.
        block_length: tokens of a block of the sampling loop, at least 1; ``None`` takes the response as one block.
        refresh_interval: steps between full steps inside a block, at least 1; ``None`` for none. Beside a
            ``prompt_interval`` they are of the response alone until the prompt is due.
        delay: full steps of a block before the one whose keys are kept, at least 0; ``None`` for 1 with ``keep_ratio``,
            else 0.
        keep_ratio: share of the entries that no step computes between two refreshes that is kept, 0 to 1.
        kernel_size: window that their scores are pooled over, odd; ``None`` for none.
        saliency_threshold: cosine of a context with its former self below which a row is computed again (tau), -1 to 1.
            No value is neutral: only ``full_steps`` of all steps are.
        full_steps: full steps that a sequence begins with where saliency is on, at least 1.
        response_only: whether steps with saliency and no cache leave the prompt alone, but for some; else none does.
        whole_interval: those some are the first four steps and every so many, from 1 counted. DyLLM's CUDA code has 4,
            its port to TPUs 8.
        mask_id: token id of the mask; by default the id that ends the first call.
        shift: whether the sampler reads row ``i - 1`` for token ``i``, as Dream's does. ``None`` serves both kinds of
            samplers; ``True`` also counts the row before the response as part of it; ``False`` skips the rows before.
        readable: rows whose logits are current: ``"masked"``, the masked ones and, unless ``shift`` is ``False``, the
            row before each; or ``"all"`` that a step computes, for samplers that read those of tokens they have filled.
        max_state_bytes: bytes that the sequences under way in a model may keep together; beyond them those used longest
            ago are dropped and begin anew at their next call. The one that is called always has its rows.
        verify: every so many steps the graph also runs without the method, in eager, and ``stats`` reports the
            difference; 0 never.
        cuda_graphs: whether partial steps of a model that is one graph are recorded as CUDA graphs, where it is on
            CUDA; ``mode="reduce-overhead"`` sets it. Rows that differ in number are then padded to multiples of 32.
        lowering: ``"inductor"``, or ``"eager"``, which runs the rewritten graphs uncompiled.

    Raises:
        ValueError: an unknown name, a value out of range, one thing said twice, two mechanisms that would both decide
            one thing, or an option that nothing reads beside the others.
    """

    method: str = "exact"
    prompt_interval: int | None = None
    response_interval: int | None = None
    transfer_ratio: float | None = None
    cache: str = "none"
    window_size: int = 0
    block_length: int | None = None
    refresh_interval: int | None = None
    delay: int | None = None
    keep_ratio: float | None = None
    kernel_size: int | None = 3
    saliency_threshold: float | None = None
    full_steps: int = 4
    response_only: bool = True
    whole_interval: int = 4
    mask_id: int | None = None
    shift: bool | None = None
    readable: str = "masked"
    max_state_bytes: int = 2**31
    verify: int = 0
    cuda_graphs: bool = False
    lowering: str = "inductor"

    def __init__(self, **names: Any) -> None:
        if names.keys() == set(_NAMES):  # all of them: a value made from another, as by ``dataclasses.replace``
            self._set(names, {})
        else:
            self._set(*_resolved(None, names))

    def _set(self, values: Mapping[str, Any], written: Mapping[str, Any]) -> None:
        """Take values of all fields; ``written`` are those that a user named."""
        for name in _NAMES:
            object.__setattr__(self, name, values[name])
        one_of("method", self.method, tuple(METHODS))
        one_of("lowering", self.lowering, LOWERINGS)
        one_of("cache", self.cache, CACHES)
        one_of("readable", self.readable, ("masked", "all"))
        for name, (fits, wanted) in _VALUES.items():
            value = getattr(self, name)
            if not (fits(value) or (value is None and getattr(Options, name) is None)):
                raise ValueError(f"{name} is {value!r}; give {wanted}")
        self._check_method(written)
        self._check_pairs(written)

    def _check_method(self, written: Mapping[str, Any]) -> None:
        """Refuse ``exact`` beside what reuses, and a method whose own mechanisms are all off."""
        for name in _NAMES if written.get("method") == "exact" else ():
            value = getattr(self, name)
            neutral = name in _INTERVALS and value in (1, -1)
            if name in _MECHANISMS and value != getattr(Options, name) and not neutral:
                raise ValueError(
                    f"method is 'exact', which reuses nothing, and {name} is {value!r}; leave out one of them"
                )
        own = [name for name in METHODS[self.method] if name in _MECHANISMS]
        if own and all(getattr(self, name) == getattr(Options, name) for name in own):
            off = " and ".join(f"{name} is {getattr(self, name)!r}" for name in own)
            raise ValueError(
                f"method is {self.method!r}, but {off}, so that nothing of it is left; "
                f"leave out {' and '.join(own)}, or give another method"
            )

    def _check_pairs(self, written: Mapping[str, Any]) -> None:
        """Refuse what two mechanisms would both decide, and what none reads."""
        chooses = "a cache of blocks" if self.cache != "none" else "saliency_threshold"
        if self.transfer_ratio is not None and (self.cache != "none" or self.saliency_threshold is not None):
            raise ValueError(f"transfer_ratio and {chooses} both choose the rows of a step; leave out one of them")
        if self.keep_ratio is not None and self.cache == "greedy":
            raise ValueError(
                "keep_ratio drops keys of rows that cache='greedy' may compute later; leave out one of them"
            )
        kept = self.prompt_interval, self.response_interval, self.saliency_threshold
        if self.keep_ratio is not None and self.cache == "none" and kept == (None, None, None):
            raise ValueError(
                f"keep_ratio is {self.keep_ratio!r}, a share of what a cache keeps; give cache='dual' or "
                "prompt_interval too, or method='sparse-dllm'"
            )
        for name, (_, wanted) in _READ.items():
            value = getattr(self, name)
            said = value is not None and (name in written or value != getattr(Options, name))
            if said and not self.reads(name):
                raise ValueError(f"{name} is {value!r}, but no mechanism reads it; give {wanted} too")

    def reads(self, name: str) -> bool:
        """Whether anything reads an option beside the others, whatever it is set to."""
        return name not in _READ or _READ[name][0](self)

    @property
    def full_steps_of_a_block(self) -> int:
        """Full steps that a block begins with."""
        return 1 + (self.delay if self.delay is not None else int(self.keep_ratio is not None))

    @property
    def share(self) -> float:
        """``transfer_ratio``, or what it is by default."""
        return 0.25 if self.transfer_ratio is None else self.transfer_ratio

    @classmethod
    def of(cls, given: Options | Mapping[str, Any] | None = None, /, **more: Any) -> Options:
        """Options from what a user wrote.

        Args:
            given: options already made, or a mapping of names (synonyms and ``preset`` allowed) to values.
            more: further names.

        Raises:
            TypeError: ``given`` is neither.
            ValueError: an unknown name, a value out of range, or one thing said twice.
        """
        if given is not None and not isinstance(given, (Options, Mapping)):
            raise TypeError(f"options are {given!r}; give a mapping of names to values, or dllm_compile.Options(...)")
        base = given if isinstance(given, Options) else None
        for name in more.keys() & (given.keys() if isinstance(given, Mapping) else ()):
            raise ValueError(f"option {name!r} is given twice; give it once")
        if base is not None and not more:
            return base
        made = cls.__new__(cls)
        made._set(*_resolved(base, {**(given if isinstance(given, Mapping) else {}), **more}))
        return made


def _resolved(base: Options | None, names: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values of all fields from what a user wrote beside ``base``, and what was written under the names of fields."""
    written = dict(names)
    preset = written.pop("preset", None)
    chosen: dict[str, Any] = {}
    if preset is not None:
        one_of("preset", preset, tuple(PRESETS))
        chosen.update(PRESETS[preset])
        of = chosen.get("method", "dllm-cache")
        if written.get("method", of) != of:
            raise ValueError(f"preset {preset!r} is of the method {of!r}, not {written['method']!r}; give one of them")
    named: dict[str, Any] = {}
    for name, value in written.items():
        meant = SYNONYMS.get(name, name)
        if meant not in _NAMES:
            near = nearest(name, [*_NAMES, *SYNONYMS, "preset"])
            raise ValueError(
                f"there is no option {name!r}; did you mean {near!r}? Options: {', '.join(_NAMES)}, preset"
            )
        if meant in named:
            raise ValueError(f"option {meant!r} is given twice, once as {name!r}; give it once")
        named[meant] = value
    chosen.update(named)
    if "method" in chosen:
        named["method"] = chosen["method"]  # by name, or as a preset
    method = chosen.get("method")
    if method is None and "method" not in chosen and base is None and not _OWN & chosen.keys():
        method = "dllm-cache"
    if method is not None:
        one_of("method", method, tuple(METHODS))
        own = METHODS[method]
        if chosen.get("cache", "none") != "none" or chosen.get("saliency_threshold") is not None:
            own = {name: value for name, value in own.items() if name != "transfer_ratio"}  # they choose the rows
        chosen = {**_OFF, "method": method, **own, **chosen}
    before = {name: getattr(base if base is not None else Options, name) for name in _NAMES}
    return {**before, **chosen}, named


def check_vocabulary(mask_id: int | None, vocabulary: int | None) -> None:
    """Refuse a mask past the ids that a model embeds, ``vocabulary`` of them; ``None`` where either is not known.

    Raises:
        ValueError: it is past them.
    """
    if mask_id is not None and vocabulary is not None and mask_id >= vocabulary:
        raise ValueError(
            f"mask_id is {mask_id}, but the model embeds {vocabulary} tokens, 0 to {vocabulary - 1}; "
            "give the token id of its mask"
        )


def is_int(value: Any) -> bool:
    """Whether a value is a whole number, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a finite real number, and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def nearest(name: Any, valid: Iterable[str]) -> str:
    """The valid name most like the one given."""
    return difflib.get_close_matches(str(name), list(valid), n=1, cutoff=0.0)[0]


def one_of(name: str, value: Any, valid: tuple[str, ...]) -> None:
    """Refuse a value that is not among the valid ones.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, str) or value not in valid:
        raise ValueError(f"{name} is {value!r}; did you mean {nearest(value, valid)!r}? Valid: {', '.join(valid)}")


def _share_of(what: str, usual: float) -> tuple[Callable[[Any], bool], str]:
    return lambda v: is_number(v) and 0.0 <= v <= 1.0, f"a share of the {what} from 0 to 1, such as {usual}"


def _count(example: str, least: int = 1) -> tuple[Callable[[Any], bool], str]:
    return lambda v: is_int(v) and v >= least, f"a whole number of at least {least}, such as {example}"


_INTERVAL = (
    lambda v: is_int(v) and (v >= 1 or v == -1),
    "a number of steps, at least 1, or -1 to refresh at every step",
)
_FLAG = (lambda v: isinstance(v, bool), "True or False")
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "prompt_interval": _INTERVAL,
    "response_interval": _INTERVAL,
    "transfer_ratio": _share_of("response", 0.25),
    "window_size": _count("4", 0),
    "block_length": _count("32, or None"),
    "refresh_interval": _count("8, or None"),
    "delay": _count("1", 0),
    "keep_ratio": _share_of("entries outside of a block", 0.5),
    "kernel_size": (lambda v: v is None or (is_int(v) and v % 2 == 1 and v > 0), "an odd number such as 3, or None"),
    "saliency_threshold": (lambda v: is_number(v) and -1 <= v <= 1, "a cosine, such as 0.99, from -1 to 1"),
    "full_steps": _count("4"),
    "response_only": _FLAG,
    "whole_interval": _count("4"),
    "cuda_graphs": _FLAG,
    "mask_id": (lambda v: is_int(v) and v >= 0, "the token id of the mask, such as 126336 for LLaDA"),
    "shift": (lambda v: isinstance(v, bool), "True for samplers that read row i - 1 for token i, else False"),
    "max_state_bytes": _count("2**31", 0),
    "verify": (lambda v: is_int(v) and v >= 0, "a number of steps between checks, or 0 for none"),
}
"""What values of a field are, and how that is said; ``None`` is one too where it is the default."""


def _has_cache(options: Options) -> bool:
    return options.cache != "none"


def _has_saliency(options: Options) -> bool:
    return options.saliency_threshold is not None


def _has_refreshes(options: Options) -> bool:
    return _has_cache(options) or _has_saliency(options)


def _has_intervals(options: Options) -> bool:
    return (options.prompt_interval, options.response_interval) != (None, None)


def _keeps_all_of_no_blocks(options: Options) -> bool:
    return _has_saliency(options) and not _has_cache(options) and options.keep_ratio is None


_READ: dict[str, tuple[Callable[[Options], bool], str]] = {
    "transfer_ratio": (_has_intervals, "prompt_interval or response_interval"),
    "block_length": (_has_cache, "cache, such as cache='dual',"),
    "refresh_interval": (_has_refreshes, "cache or saliency_threshold"),
    "delay": (_has_refreshes, "cache or saliency_threshold"),
    "window_size": (lambda options: options.cache == "greedy", "cache='greedy'"),
    "whole_interval": (_keeps_all_of_no_blocks, "saliency_threshold without cache and keep_ratio"),
    "kernel_size": (lambda options: options.keep_ratio is not None, "keep_ratio"),
    "full_steps": (_has_saliency, "saliency_threshold"),
    "response_only": (_keeps_all_of_no_blocks, "saliency_threshold without cache and keep_ratio"),
}
"""Options that only some mechanisms read: whether one does, and what to give so that one does."""

_NAMES = tuple(each.name for each in fields(Options))
_OFF = {name: getattr(Options, name) for name in {*_READ, *(own for row in METHODS.values() for own in row)}}
_INTERVALS = {"prompt_interval", "response_interval"}
_OWN = {"cache", "keep_ratio", "saliency_threshold"}  # one of these named without a method: that mechanism alone
_MECHANISMS = _INTERVALS | _OWN
