"""``bench --eviction``: what evicting half of the entries saves, in bytes and in the time of a step."""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from . import backend
from .bench_model import Setting, job_of, random_model
from .generate import generate
from .loop import quota_loop
from .memory import Peaks
from .session import sessions

BLOCK = 32
WAYS: dict[str, dict[str, Any]] = {
    "eager": {},
    "exact": {"method": "exact"},
    "dense (fast-dllm dual)": {"method": "fast-dllm", "cache": "dual", "block_length": BLOCK},
    "sparse-dllm, keep 0.5": {"method": "sparse-dllm", "keep_ratio": 0.5, "block_length": BLOCK},
}


def memory(setting: Setting) -> None:
    """Peak bytes of a whole ``generate``, its compilation aside, and bytes kept between its steps."""
    model, job = random_model(setting), job_of(setting)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    found: dict[str, tuple[int, int]] = {}
    for name, options in WAYS.items():
        call: dict[str, Any] = {
            "gen_length": setting.response,
            "block_length": BLOCK,
            "mask_id": job.mask_id,
            **options,
        }
        torch._dynamo.reset()
        short = {**call, "gen_length": BLOCK, "steps": 4} if not options else call
        generate(model, job.ids[:, : setting.prompt], **short)  # compile
        for session in sessions():
            session.drop()
        with Peaks(job.ids.device) as peaks:
            peaks.start()
            generate(model, job.ids[:, : setting.prompt], **call)
        found[name] = weights + peaks.most, int(backend.stats(model)["state_bytes"])
    eager, dense = found["eager"][0], found["dense (fast-dllm dual)"][1]
    print(
        f"prompt {setting.prompt}, response {setting.response}, {setting.layers} layers, weights {weights / 1e6:.1f} MB"
    )
    print(f"{'':<24}{'peak MB':>10}{'x eager':>9}{'state MB':>10}{'x dense':>9}")
    for name, (peak, state) in found.items():
        shares = f"{peak / eager:>9.2f}{state / 1e6:>10.1f}{state / dense:>9.2f}"
        print(f"{name:<24}{peak / 1e6:>10.1f}{shares}")


def steps(setting: Setting, prompts: tuple[int, ...] = (512, 2048, 4096)) -> None:
    """Median time of a step between two full ones, at several prompts; the two take turns."""
    model = random_model(setting)
    print(f"{'prompt':>8}{'keep 1.0 ms':>13}{'keep 0.5 ms':>13}{'ratio':>8}")
    for prompt in prompts:
        job = job_of(replace(setting, prompt=prompt))
        spent: dict[float, list[float]] = {1.0: [], 0.5: []}
        for _ in range(2):
            for ratio, mine in spent.items():
                mine += _partial(model, job, {**WAYS["sparse-dllm, keep 0.5"], "keep_ratio": ratio})
        whole, half = median(spent[1.0]), median(spent[0.5])
        print(f"{prompt:>8}{1000 * whole:>13.1f}{1000 * half:>13.1f}{whole / half:>8.2f}", flush=True)


def _partial(model: torch.nn.Module, job: Any, options: dict[str, Any]) -> list[float]:
    """Seconds of the sparse steps of one block."""
    torch._dynamo.reset()
    call = torch.compile(model, backend=backend.dllm, options={"mask_id": job.mask_id, **options})
    spent: list[float] = []

    def logits(ids: torch.Tensor) -> torch.Tensor:
        begin = time.perf_counter()
        out: torch.Tensor = call(ids).logits
        spent.append(time.perf_counter() - begin)
        return out

    with torch.no_grad():
        loop = quota_loop(logits, job.ids.clone(), job.prompt, job.response, BLOCK, job.mask_id)
        for _ in zip(range(BLOCK), loop, strict=False):
            pass
    return spent[4:]  # behind the full steps, and the first that compiles


def main() -> None:
    """Command line."""
    setting = Setting(prompt=2048, response=128)
    steps(setting)
    memory(setting)
