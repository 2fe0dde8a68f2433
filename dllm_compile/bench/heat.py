"""``explain --picture``: how many rows each layer computed at each step of a generation, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dllm_compile.backend import dllm
from dllm_compile.debug import Ran, steps
from dllm_compile.declared import loop
from dllm_compile.quota_loop import quota_loop

from .frontier import drawn_to_files


def ran(model: torch.nn.Module, ids: torch.Tensor, mask_id: int, block: int, options: dict[str, Any]) -> list[Ran]:
    """The steps of LLaDA's loop, one token a call.

    Args:
        model: maps ids ``[B, S]`` to logits, as ``.logits``.
        ids: ``[B, S]`` int64, a prompt, then masks.
        mask_id: the mask token.
        block: tokens of a block of the loop.
        options: of the backend.
    """
    prompt = int((ids[0] != mask_id).sum())
    torch.compiler.reset()
    call: Any = torch.compile(model, backend=dllm, options={**options, "mask_id": mask_id, "lowering": "eager"})
    with torch.no_grad(), loop(), steps() as found:
        for _ in quota_loop(lambda x: call(x).logits, ids.clone(), prompt, ids.shape[1] - prompt, block, mask_id):
            pass
    return found


def draw(found: Sequence[Ran], title: str, path: str) -> None:
    """Write the picture: steps from left to right, layers from below, the first of them lowest.

    Raises:
        ImportError: matplotlib is not installed.
    """
    pyplot = drawn_to_files().pyplot
    layers = max(len(step.computed) for step in found)
    rows = [[step.computed.get(layer, 0) for step in found] for layer in range(layers)]
    figure, axes = pyplot.subplots(figsize=(11, 1.5 + 0.25 * layers))
    image = axes.imshow(rows, origin="lower", aspect="auto", cmap="viridis", interpolation="nearest", vmin=0)
    figure.colorbar(image, ax=axes, label="rows computed")
    axes.set_yticks(range(layers))
    axes.set_xlabel("step")
    axes.set_ylabel("layer")
    axes.set_title(title)
    figure.savefig(path, dpi=120, bbox_inches="tight")
