"""``bench --eviction``: what evicting half of the entries saves, in bytes and in the time of a step."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch

from dllm_compile import backend
from dllm_compile.generate import generate
from dllm_compile.runtime.memory import Peaks
from dllm_compile.runtime.session import sessions

from .model import Setting, job_of, random_model

BLOCK = 32
WAYS: dict[str, dict[str, Any]] = {
    "eager": {},
    "dense (fast-dllm dual)": {"method": "fast-dllm", "cache": "dual", "block_length": BLOCK},
    "sparse-dllm, keep 0.5": {"method": "sparse-dllm", "keep_ratio": 0.5, "block_length": BLOCK},
}


def memory(setting: Setting) -> None:
    """Peak bytes of a ``generate`` of three calls a block, compilation aside, and bytes kept between its steps."""
    model, job = random_model(setting), job_of(setting)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    lengths = {"gen_length": setting.response, "block_length": BLOCK, "steps": 3 * setting.response // BLOCK}
    found: dict[str, tuple[int, int]] = {}
    for name, options in WAYS.items():
        call: dict[str, Any] = {**lengths, "mask_id": job.mask_id, **options}
        torch.compiler.reset()
        if options:
            generate(model, job.ids[:, : setting.prompt], **call)  # compile
        for session in sessions():
            session.drop()
        with Peaks(job.ids.device) as peaks:
            peaks.start()
            generate(model, job.ids[:, : setting.prompt], **call)
        found[name] = weights + peaks.most, int(backend.stats(model)["state_bytes"])
    eager, dense = found["eager"][0], found["dense (fast-dllm dual)"][1]
    print(f"prompt {setting.prompt}, response {setting.response}, weights {weights / 1e6:.1f} MB")
    print(f"{'':<24}{'peak MB':>10}{'x eager':>9}{'state MB':>10}{'x dense':>9}")
    for name, (peak, state) in found.items():
        shares = f"{peak / eager:>9.2f}{state / 1e6:>10.1f}{state / dense:>9.2f}"
        print(f"{name:<24}{peak / 1e6:>10.1f}{shares}", flush=True)


def steps(setting: Setting) -> None:
    """Median time of a step between two full ones where all entries are kept, and where half are; they take turns."""
    job = job_of(setting)
    calls: dict[float, Any] = {}
    spent: dict[float, list[float]] = {1.0: [], 0.5: []}
    for ratio in spent:
        options = {**WAYS["sparse-dllm, keep 0.5"], "keep_ratio": ratio, "mask_id": job.mask_id}
        calls[ratio] = torch.compile(random_model(setting), backend=backend.dllm, options=options)
    ids = job.ids.clone()
    with torch.no_grad():
        for i in range(BLOCK):
            for ratio, call in calls.items():
                begin = time.perf_counter()
                call(ids)
                spent[ratio].append(time.perf_counter() - begin)
            ids[:, setting.prompt + i] = i
    whole, half = (median(spent[ratio][4:]) for ratio in (1.0, 0.5))  # behind the full steps, and one that compiles
    print(f"{setting.prompt:>8}{1000 * whole:>13.1f}{1000 * half:>13.1f}{whole / half:>8.2f}", flush=True)
    torch.compiler.reset()


def main() -> None:
    """Command line."""
    print(f"{'prompt':>8}{'keep 1.0 ms':>13}{'keep 0.5 ms':>13}{'ratio':>8}")
    for prompt in (512, 2048, 4096):
        steps(Setting(prompt=prompt, response=128))
    memory(Setting(prompt=2048, response=128))
