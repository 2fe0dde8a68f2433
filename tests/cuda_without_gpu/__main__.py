"""Launches on CUDA for each step of each method: ``python -m tests.cuda_without_gpu``, of one layer of a small model.

``python -m tests.cuda_without_gpu llada-8b dream-7b`` counts those of each part of these, as ``explain --shape`` does.
"""

from __future__ import annotations

import sys

from . import drive, guard, published


def main() -> None:
    """Print one line for each kind of layer that a method lowers; each of several methods is lowered once."""
    if guard.missing():
        raise SystemExit(f"nothing can be lowered for CUDA here: {guard.missing()}")
    for shape in sys.argv[1:]:
        print("| shape | part | step | Triton kernels | beside them |\n| --- | --- | --- | ---: | --- |")
        for (part, step), every in published.launches(shape).items():
            for counts in every:
                print(f"| {shape} | {part} | {step} | {counts.triton} | {counts.beside} |", flush=True)
    if sys.argv[1:]:
        return
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
