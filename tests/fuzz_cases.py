"""Random cases of the standing search: a model, options, and a list of small operations, all of it plain JSON."""

from __future__ import annotations

import random
from typing import Any

from . import fuzz_models

Case = dict[str, Any]
Op = list[Any]

LONG = 100_000
NEUTRAL: tuple[dict[str, Any], ...] = (
    {"method": "exact"},
    {"prompt_interval": 1, "response_interval": 1},
    {"prompt_interval": -1, "response_interval": 1, "transfer_ratio": 0.5},
    {"prompt_interval": 1, "response_interval": 1, "transfer_ratio": 0.0},
    {"prompt_interval": 1, "response_interval": 1, "keep_ratio": 0.5},
    {"method": "fast-dllm", "refresh_interval": 1},
    {"method": "fast-dllm", "cache": "dual", "refresh_interval": 1},
    {"cache": "dual", "refresh_interval": 1, "block_length": 3},
    {"method": "dkv-cache", "refresh_interval": 1},
    {"method": "dkv-cache", "cache": "greedy", "delay": 0, "refresh_interval": 1, "window_size": 2},
    {"method": "flashblock", "refresh_interval": 1},
    {"method": "sparse-dllm", "delay": LONG},
    {"method": "sparse-dllm", "delay": LONG, "block_length": 4, "keep_ratio": 0.3},
    {"cache": "prefix", "keep_ratio": 0.5, "delay": LONG},
    {"method": "dyllm", "full_steps": LONG},
    {"method": "dyllm", "full_steps": LONG, "saliency_threshold": 0.9, "response_only": False},
    {"cache": "dual", "saliency_threshold": 0.99, "full_steps": LONG, "refresh_interval": 1},
    {"cache": "dual", "keep_ratio": 0.5, "saliency_threshold": 0.99, "full_steps": LONG, "delay": LONG},
    {"cache": "decoded", "saliency_threshold": 0.95, "full_steps": LONG, "refresh_interval": 1, "delay": 1},
    {"saliency_threshold": 0.99, "prompt_interval": 1, "response_interval": 1, "full_steps": LONG},
    {"cache": "prefix", "prompt_interval": 1, "response_interval": 1, "refresh_interval": 1},
    {"method": "dsb", "block_length": 4, "rows_before": 2, "refresh_interval": 1},
    {"method": "dinfer", "block_length": 4, "rows_behind": 2, "refresh_interval": 1},
    {"method": "es-dllm", "block_length": 4, "refresh_interval": 1},
)
"""Settings at which the result is eager's."""

LOSSY: tuple[dict[str, Any], ...] = (
    {"prompt_interval": 8, "response_interval": 4, "transfer_ratio": 0.5},
    {"prompt_interval": 50, "response_interval": 7, "transfer_ratio": 0.25},
    {"prompt_interval": 5, "response_interval": 3, "keep_ratio": 0.5},
    {"method": "fast-dllm", "block_length": 4},
    {"method": "fast-dllm", "cache": "dual", "block_length": 4},
    {"method": "fast-dllm", "cache": "dual", "block_length": 3, "refresh_interval": 3},
    {"method": "dkv-cache", "refresh_interval": 4},
    {"method": "flashblock", "block_length": 4},
    {"method": "flashblock", "block_length": 3, "refresh_interval": 4, "outside_interval": 2},
    {"method": "sparse-dllm", "block_length": 4},
    {"method": "dyllm", "saliency_threshold": 0.95},
    {"method": "dyllm", "saliency_threshold": 0.99, "full_steps": 2, "response_only": False},
    {"cache": "dual", "keep_ratio": 0.5, "saliency_threshold": 0.95, "full_steps": 2, "block_length": 4},
    {"method": "dsb", "block_length": 4, "rows_before": 2},
    {"method": "dinfer", "block_length": 4, "rows_before": 2, "rows_behind": 2, "warmup_steps": 1},
    {"method": "es-dllm", "block_length": 4, "unskipped_interval": 3},
)
"""Settings at which it is not."""

FEATURES = (
    "again", "remask", "edit", "score", "teacher", "cond", "weights", "functional", "grad", "dropout", "swap", "keep",
    "threads", "two", "words", "masks", "odd", "prompt", "guide",
    "unsaid", "interrupt",
)  # fmt: skip
"""What a case may do beside the plain loop."""

HOLDS = ("", "write", "data", "numpy", "hold", "storage", "view")
WEIGHTS = ("data", "data=", "copy", "inplace", "replace", "vector", "buffer", "numpy")
PADDINGS = ("none", "left", "right", "ragged")


def draw(seed: int, index: int, inductor: bool, without: tuple[str, ...] = ()) -> Case:
    """A random case: a function of its arguments alone.

    Args:
        seed: of the search.
        index: of the case in it.
        inductor: whether it runs through Inductor; then it is long and has few shapes, since compiling takes most time.
        without: features that are left out.
    """
    rng = random.Random(f"{seed}/{index}/{inductor}")
    lossy = rng.random() < 0.25
    case: Case = {
        "seed": f"{seed}/{index}",
        "kind": "lossy" if lossy else "neutral",
        "model": fuzz_models.draw(rng, without),
        "dtype": "float64" if lossy else rng.choice(("float64",) * 8 + ("float32", "bfloat16")),
        "lowering": "inductor" if inductor else "eager",
        "dynamic": rng.choice((None, None, False, True)),
        "inference": rng.random() < 0.15,
        "options": _options(rng, lossy),
    }
    if case["dynamic"] and "dynamic" in without:
        case["dynamic"] = None
    if inductor:
        case["model"]["layers"] = min(case["model"]["layers"], 2)
    picked = {name for name in FEATURES if rng.random() < 0.28}
    if case["inference"]:
        picked -= {"weights", "grad", "dropout", "functional"}
    picked -= set(without)
    sizes = _sizes(rng, inductor)
    if lossy and rng.random() < 0.6:
        case["kind"] = "streams"
        case["options"].pop("max_state_bytes", None)  # where one stream's rows are dropped, it begins anew
        told = bool(case["model"].get("cond")) and case["model"].get("cut") in (None, "head")
        case["ops"] = _streams(rng, sizes, picked, told, 60 if inductor else 14)
    else:
        calls = rng.randrange(120, 260) if inductor else rng.randrange(12, 50)
        case["ops"] = _Writer(rng, sizes, picked, inductor, lossy, case["model"]).write(calls)
    return case


def _options(rng: random.Random, lossy: bool) -> dict[str, Any]:
    options = dict(rng.choice(LOSSY if lossy else NEUTRAL))
    if not lossy and rng.random() < 0.25:
        options = {"method": "exact"}
    if rng.random() < 0.3:
        options["shift"] = rng.choice((True, False))
    if rng.random() < 0.8:
        options["mask_id"] = "MASK"
    if rng.random() < 0.25:
        options["readable"] = rng.choice(("all", "all", "masked"))
    if rng.random() < 0.1:
        options["verify"] = rng.choice((1, 3))
    if rng.random() < 0.1:
        options["max_state_bytes"] = rng.choice((1_000, 30_000, 10_000_000))
    return options


def _sizes(rng: random.Random, inductor: bool) -> list[tuple[int, int, int]]:
    """Batch, prompt and response of sequences."""

    def one() -> tuple[int, int, int]:
        return rng.choice((1, 1, 2, 3, 4)), rng.randrange(1, 9), rng.choice((1, 2, 3, 4, 6, 8, 8, 12, 12))

    if not inductor:
        return [one() for _ in range(rng.choice((1, 1, 2, 3)))]
    batch = rng.choice((1, 1, 2, 3))
    prompt, response = rng.randrange(3, 9), rng.choice((6, 8, 12))
    return [(batch, prompt, response)] if rng.random() < 0.6 else [(batch, prompt, response), (batch, prompt + 2, 8)]


def _start(rng: random.Random, slot: int, size: tuple[int, int, int], kind: str, padding: str) -> Op:
    return ["start", slot, rng.randrange(1000), *size, padding, kind]


def _streams(
    rng: random.Random, sizes: list[tuple[int, int, int]], picked: set[str], told: bool, calls: int
) -> list[Op]:
    """Two loops through one compiled model, interleaved or each in a thread of its own.

    ``told``: the graph that has the ids has the conditioning too, so that it tells loops on one prompt apart.
    """
    size, word = rng.choice(sizes), ""
    first = _start(rng, 0, size, "plain", "none")
    second = [first[0], 1, *first[2:]]
    if told and rng.random() < 0.5:
        word = ""  # the same prompt, and each slot's own conditioning
    elif rng.random() < 0.35:
        word = "loop"  # the same prompt twice
    else:
        second[2] = first[2] + 1
        word = "loop" if rng.random() < 0.3 else ""
        second[7] = "blank" if word and rng.random() < 0.5 else "plain"  # any ids go on with one that has no prompt
    source, block = rng.choice(("best", "best", "draw")), rng.choice((0, 4))
    both = []
    for start in (first, second):
        ops: list[Op] = []
        for number in range(calls):
            if number % (size[2] + 1) == 0:
                ops.append([*start[:2], start[2] + 10 * number, *start[3:]])
            ops.append(["call", start[1], "", word])
            if rng.random() < 0.08 and "again" in picked:
                ops.append(["call", start[1], "", word])
            ops.append(["fill", start[1], 100 * start[1] + number, rng.choice((1, 1, 2)), source, block])
            if rng.random() < 0.06 and "remask" in picked:
                ops.append(["remask", start[1], number, 1])
        both.append(ops)
    if "threads" in picked:
        return [["threads", *both]]
    mixed: list[Op] = []
    while both[0] or both[1]:
        mixed.append((both[0] if not both[1] or (both[0] and rng.random() < 0.5) else both[1]).pop(0))
    return mixed


class _Writer:
    """Writes the operations of a case that eager is compared with call by call."""

    def __init__(
        self,
        rng: random.Random,
        sizes: list[tuple[int, int, int]],
        picked: set[str],
        inductor: bool,
        lossy: bool,
        model: dict[str, Any],
    ) -> None:
        self.rng, self.sizes, self.picked, self.inductor, self.lossy = rng, sizes, picked, inductor, lossy
        self.model = model
        self.block = rng.choice((0, 0, 3, 4))
        self.source = rng.choice(("best", "best", "draw", "random"))
        self.most = rng.choice((1, 1, 2, 4))

    def write(self, calls: int) -> list[Op]:
        """Operations with about so many calls."""
        ops: list[Op] = []
        made = 0
        while made < calls:
            slots = (0, 1) if "two" in self.picked else (0,)
            if "threads" in self.picked and self.rng.random() < 0.3:
                slots = tuple(range(self.rng.choice((2, 3))))
                part = [[op for _ in range(3) for op in self._generation(slot)] for slot in slots]
                ops.append(["threads", *([op for op in each if op[0] not in GLOBAL] for each in part)])
            else:
                part = [self._generation(slot) for slot in slots]
                ops += self._mixed([list(each) for each in part])
            made += sum(op[0] in ("call", "score", "beside") for each in part for op in each)
        return ops

    def _mixed(self, parts: list[list[Op]]) -> list[Op]:
        """Several lists in one, each in its order."""
        out: list[Op] = []
        while any(parts):
            out.append(self.rng.choice([part for part in parts if part]).pop(0))
        return out

    def _call(self, slot: int) -> Op:
        rng = self.rng
        hold = rng.choice(HOLDS) if "keep" in self.picked and rng.random() < 0.4 else ""
        word = rng.choice(("loop", "exact")) if "words" in self.picked and rng.random() < 0.3 else ""
        return ["call", slot, hold, word]

    def _generation(self, slot: int) -> list[Op]:
        rng, kind, padding = self.rng, "plain", "none"
        if "odd" in self.picked:
            kind = rng.choice(("plain", "blank", "infill") if self.inductor else ("plain", "blank", "infill", "guided"))
        if "masks" in self.picked:
            padding = rng.choice(PADDINGS)
        size = rng.choice(self.sizes)
        ops = [_start(rng, slot, size, kind, padding)]
        left = size[2]
        while left > 0 and rng.random() > 0.03:
            ops.append(self._call(slot))
            ops += self._beside(slot)
            count = rng.randrange(1, self.most + 1)
            ops.append(["fill", slot, rng.randrange(1000), count, self.source, self.block])
            left -= count
        if rng.random() < 0.5:
            ops.append(self._call(slot))  # every token is there
        if "score" in self.picked and rng.random() < 0.5:
            ops += [op for _ in range(rng.randrange(2, 12)) for op in self._sample(slot)]
        return ops

    def _sample(self, slot: int) -> list[Op]:
        word = (
            "exact"
            if (self.lossy and "unsaid" not in self.picked) or ("words" in self.picked and self.rng.random() < 0.5)
            else ""
        )
        kind = "teacher" if "teacher" in self.picked and self.rng.random() < 0.2 else "masked"
        return [["score", slot, self.rng.randrange(10_000), kind, word]]

    def _beside(self, slot: int) -> list[Op]:
        """What happens between a call and the tokens that it fills."""
        rng, ops, seed = self.rng, list[Op](), self.rng.randrange(1000)
        happens = {name for name in self.picked if rng.random() < 0.15}
        if "again" in happens:
            ops.append(self._call(slot))
        if "remask" in happens:
            ops.append(["remask", slot, seed, rng.choice((1, 1, 2))])
        if "edit" in happens:
            ops.append(["edit", slot, seed, 1, "response"])
        if "prompt" in happens:
            ops.append(["edit", slot, seed, 1, "prompt"])
        if "guide" in happens:
            ops.append(["beside", slot, rng.choice(("blank", "null"))])
        if "cond" in happens and self.model.get("cond"):
            ops += [["cond", slot, seed, rng.choice(("new", "inplace"))], self._call(slot)]
        if "masks" in happens and rng.random() < 0.3:
            ops += [["hide", slot, seed], self._call(slot)]
        if "weights" in happens:
            ops += [["weights", rng.choice(WEIGHTS), seed], self._call(slot)]
        if "swap" in happens:
            ops.append(["swap", slot, seed])
        if "interrupt" in happens and not self.lossy:
            ops += [self._call(slot), ["interrupt", slot, rng.randrange(1, 150)]]
        rare = 0.15 if self.inductor else 0.5
        for name in ("functional", "grad", "dropout"):
            if name in happens and rng.random() < rare:
                ops.append([name, slot, seed])
        return ops


GLOBAL = ("weights", "functional", "grad", "dropout", "interrupt")
"""Operations that no other thread may meet."""
