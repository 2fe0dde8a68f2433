"""Launches of a layer on CUDA for each step of each method: ``python -m tests.cuda_without_gpu``."""

from __future__ import annotations

from . import drive, guard


def main() -> None:
    """Print one line for each kind of layer that a method lowers; each of several methods is lowered once."""
    if guard.missing():
        raise SystemExit(f"nothing can be lowered for CUDA here: {guard.missing()}")
    print("| method | step | Triton kernels | beside them |\n| --- | --- | ---: | --- |")
    for name in drive.METHODS:
        found = {
            (each.step, each.counts.beside): each.counts
            for each in drive.run(name, lowering=True).lowered
            if each.part == "layer"
        }
        for (step, beside), counts in found.items():
            print(f"| {name} | {step} | {counts.triton} | {beside} |", flush=True)


if __name__ == "__main__":
    main()
