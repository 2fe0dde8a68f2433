"""``bench --saliency``: a step of DyLLM where a tenth of the response is salient in every layer."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch

from dllm_compile import backend
from dllm_compile.explain import explain
from dllm_compile.passes import saliency
from dllm_compile.runtime.cost import A, R, S, T

from .model import Setting, job_of, random_model

SHARE = 0.1
FULL, STEPS = 3, 24


def main() -> None:
    """Command line: print times of steps, and the share of the saved FLOPs that is saved in time."""
    setting = Setting()
    model, job = random_model(setting), job_of(setting)
    count = round(SHARE * setting.response)

    def most_drifted(similarity: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
        """So many of the rows whose contexts drifted most, whatever the threshold."""
        rows = similarity.shape[1]
        found = similarity.topk(count, 1, largest=False).indices.sort(1).values
        listed = torch.nn.functional.pad(found, (0, rows - count), value=0) + rows * (
            torch.arange(rows, device=found.device) >= count
        )
        return listed, torch.full_like(found[:, 0], count)

    real = vars(saliency)["salient_rows"]
    vars(saliency)["salient_rows"] = most_drifted
    try:
        spent, readable = _time(model, job, {"saliency_threshold": 0.99, "full_steps": FULL})
    finally:
        vars(saliency)["salient_rows"] = real
        torch.compiler.reset()
    found = explain(model, job.ids, saliency_threshold=0.99, full_steps=FULL, mask_id=job.mask_id)
    lengths = {symbol: found.lengths[symbol.name] for e in found.flops.values() for symbol in e.free_symbols}
    full = found.flops["full"].subs({**lengths, R: lengths[S]})
    part = found.flops["salient"].subs({**lengths, A: setting.response, T: count, R: readable})
    faster, fewer = spent["full"] / spent["response"], float(full / part)
    for name, seconds in spent.items():
        print(f"{name:<10}{1000 * seconds:>9.1f} ms")
    print(f"response steps: {faster:.2f}x faster than a full one of plain Inductor, {fewer:.2f}x fewer FLOPs")
    print(f"realised speed-up over FLOP reduction: {faster / fewer:.2f}")


def _time(model: torch.nn.Module, job: Any, options: dict[str, Any]) -> tuple[dict[str, float], int]:
    """Median seconds of Inductor's full step, and of steps on the response and on all rows; and readable rows."""
    plain: list[float] = []
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(model)
        for _ in range(5):
            begin = time.perf_counter()
            compiled(job.ids)
            plain.append(time.perf_counter() - begin)
        torch.compiler.reset()
        call = torch.compile(model, backend=backend.dllm, options={"mask_id": job.mask_id, "shift": False, **options})
        x = job.ids.clone()
        steps: dict[str, list[float]] = {"response": [], "whole": []}
        for i in range(STEPS):
            begin = time.perf_counter()
            call(x)
            steps["whole" if (i + 1) % 4 == 0 else "response"].append(time.perf_counter() - begin)
            x[:, job.prompt + i] = i
    ran = {name: median(spent[4:]) for name, spent in steps.items()}  # the first ones are full, or compile
    return {"full": median(plain[2:]), **ran}, job.response - STEPS // 2
