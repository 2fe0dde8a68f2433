"""Options: one frozen value. Unknown names and bad values are refused with the nearest valid one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

METHODS = ("dllm-cache", "fast-dllm", "sparse-dllm", "exact")
CACHES = ("prefix", "dual", "none")
LOWERINGS = ("inductor", "eager")

SYNONYMS = {
    "gen_interval": "response_interval",
    "gen_interval_steps": "response_interval",
    "response_interval_steps": "response_interval",
    "prompt_interval_steps": "prompt_interval",
    "block_size": "block_length",
}

PRESETS: dict[str, dict[str, Any]] = {
    "exact": {"method": "exact"},
    "dllm-cache": {"method": "dllm-cache"},
    "fast-dllm": {"method": "fast-dllm", "cache": "prefix", "block_length": 32},
    "fast-dllm/dual": {"method": "fast-dllm", "cache": "dual", "block_length": 32},
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
whose running sums need the token just before. The transfer ratio is 0.25 in all of them. Fast-dLLM's block length
is that of its authors' scripts (arXiv 2505.22618)."""


@dataclass(frozen=True)
class Options:
    """Everything ``torch.compile(model, backend="dllm", options={...})`` understands.

    Attributes:
        method: ``"dllm-cache"``, ``"fast-dllm"``, ``"sparse-dllm"``, or ``"exact"``, which reuses nothing but what is
            provably unchanged.
        prompt_interval: steps between refreshes of the prompt (K_p), at least 1; -1 refreshes always.
        response_interval: steps between refreshes of the whole response (K_r), at least 1; -1 refreshes always.
        transfer_ratio: share of the response recomputed in the steps between (rho), 0 to 1; 0 recomputes none.
        cache: of Fast-dLLM: ``"prefix"`` recomputes from the active block to the end, ``"dual"`` the block alone,
            ``"none"`` everything.
        block_length: tokens of a block of the sampling loop, at least 1; ``None`` takes the response as one block.
        refresh_interval: steps between full steps inside a block, at least 1; ``None`` for none.
        keep_ratio: of Sparse-dLLM: share of the entries outside of the active block that are kept, 0 to 1.
        kernel_size: window that their scores are pooled over, odd; ``None`` for none.
        delay: full steps of a block before the one that chooses them, at least 0.
        mask_id: token id of the mask; by default the id that ends the first call.
        shift: whether the sampler reads row ``i - 1`` for token ``i``, as Dream's does. ``None`` serves both kinds of
            samplers; ``True`` also counts the row before the response as part of it; ``False`` skips the rows before.
        verify: every so many steps the graph also runs without the method, in eager, and ``stats`` reports the
            difference; 0 never.
        lowering: ``"inductor"``, or ``"eager"``, which runs the rewritten graphs uncompiled.
    """

    method: str = "dllm-cache"
    prompt_interval: int = 50
    response_interval: int = 7
    transfer_ratio: float = 0.25
    cache: str = "prefix"
    block_length: int | None = None
    refresh_interval: int | None = None
    keep_ratio: float = 0.5
    kernel_size: int | None = 3
    delay: int = 1
    mask_id: int | None = None
    shift: bool | None = None
    verify: int = 0
    lowering: str = "inductor"

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHODS)
        _one_of("lowering", self.lowering, LOWERINGS)
        _one_of("cache", self.cache, CACHES)
        for name in ("prompt_interval", "response_interval"):
            value = getattr(self, name)
            if not _is_int(value) or (value < 1 and value != -1):
                raise ValueError(
                    f"{name} is {value!r}; give a number of steps, at least 1, or -1 to refresh at every step"
                )
        for name, example in (("block_length", 32), ("refresh_interval", 8)):
            value = getattr(self, name)
            if value is not None and (not _is_int(value) or value < 1):
                raise ValueError(f"{name} is {value!r}; give a whole number of at least 1, such as {example}, or None")
        for name, of in (("transfer_ratio", "response"), ("keep_ratio", "entries outside of a block")):
            ratio = getattr(self, name)
            if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0.0 <= ratio <= 1.0:
                usual = type(self).__dataclass_fields__[name].default
                raise ValueError(f"{name} is {ratio!r}; give a share of the {of} from 0 to 1, such as {usual}")
        window = self.kernel_size
        if window is not None and (not _is_int(window) or window < 1 or window % 2 == 0):
            raise ValueError(f"kernel_size is {window!r}; give an odd number of at least 1, such as 3, or None")
        if not _is_int(self.delay) or self.delay < 0:
            raise ValueError(f"delay is {self.delay!r}; give a number of steps of at least 0, such as 1")
        if self.mask_id is not None and (not _is_int(self.mask_id) or self.mask_id < 0):
            raise ValueError(f"mask_id is {self.mask_id!r}; give the token id of the mask, such as 126336 for LLaDA")
        if self.shift is not None and not isinstance(self.shift, bool):
            raise ValueError(
                f"shift is {self.shift!r}; give True for samplers that read row i - 1 for token i, else False"
            )
        if not _is_int(self.verify) or self.verify < 0:
            raise ValueError(f"verify is {self.verify!r}; give a number of steps between checks, or 0 for none")

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
            raise TypeError(f"options are {given!r}; give a mapping of names to values, or Options")
        base = given if isinstance(given, Options) else cls()
        for name in more.keys() & (given.keys() if isinstance(given, Mapping) else ()):
            raise ValueError(f"option {name!r} is given twice; give it once")
        written = {**(given if isinstance(given, Mapping) else {}), **more}
        preset = written.pop("preset", None)
        chosen: dict[str, Any] = {}
        if preset is not None:
            _one_of("preset", preset, tuple(PRESETS))
            chosen.update(PRESETS[preset])
        named: dict[str, Any] = {}
        known = [field.name for field in fields(cls)]
        for name, value in written.items():
            meant = SYNONYMS.get(name, name)
            if meant not in known:
                near = difflib.get_close_matches(name, [*known, *SYNONYMS, "preset"], n=1, cutoff=0.0)
                raise ValueError(
                    f"there is no option {name!r}; did you mean {near[0]!r}? Options: {', '.join(known)}, preset"
                )
            if meant in named:
                raise ValueError(f"option {meant!r} is given twice, once as {name!r}; give it once")
            named[meant] = value
        return replace(base, **{**chosen, **named})


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _one_of(name: str, value: Any, valid: tuple[str, ...]) -> None:
    if value not in valid:
        near = difflib.get_close_matches(str(value), valid, n=1, cutoff=0.0)
        raise ValueError(f"{name} is {value!r}; did you mean {near[0]!r}? Valid: {', '.join(valid)}")
