"""Dynamo makes a few graphs of one function, and what matches none of them runs in eager: said once a function."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.compiler.config
import torch.fx

from .compat import CompileContext
from .core.arguments import called
from .passes.exported import aten_name

_SIZES: dict[int | None, list[str]] = {}  # of the ids that graphs of a function were made for, by its number
_WORTH_SAYING = {"scaled_dot_product_attention", "flex_attention", "embedding"}
_PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum", "linear", "mm", "addmm"}


def warn_of_last(graph: torch.fx.Graph, shown: Sequence[Any]) -> None:
    """Warn once per function that Dynamo has reached its limit of graphs: calls that match none of them run in eager
    mode. Where several were made for ids of one size, say that something else changes.
    """
    made, limit = CompileContext.current_compile_id(), torch.compiler.config.recompile_limit
    if made is None or made.frame_compile_id is None:
        return
    ids = [a for a in shown if isinstance(a, torch.Tensor) and a.dim() == 2 and a.dtype in (torch.int64, torch.int32)]
    sizes = " x ".join(map(str, ids[0].shape)) if ids else ""
    if made.frame_compile_id == 0:
        _SIZES[made.frame_id] = []
    before = _SIZES.setdefault(made.frame_id, [])
    again = sizes in before
    before.append(sizes)
    if made.frame_compile_id + 1 != limit or not worth_saying(graph):
        return
    said = f"dllm: torch.compile made graph {limit} of {limit} that it makes of one function"
    if ids and again:
        reason = (
            f", for ids of {sizes} more than once: something else changes from call to call or from model to model, "
            "such as a list that a hook appends to (TORCH_LOGS=recompiles names it). Calls that match none of these "
            "graphs run in eager, without a cache. Let a hook write into a dictionary or a tensor"
        )
    else:
        reason = (
            f"{', for ids of ' + sizes if ids else ''}; calls of further sizes run in eager, without a cache. Do not "
            "say dynamic=False"
        )
    warnings.warn(f"{said}{reason}, or raise torch.compiler.config.recompile_limit", stacklevel=2)


def worth_saying(graph: torch.fx.Graph) -> bool:
    """Whether a graph does what models do: one of arithmetic alone has no cache that anybody would miss."""
    names = {aten_name(node) or called(node) for node in graph.nodes}
    return bool(names & _WORTH_SAYING) or ("softmax" in names and bool(names & _PRODUCTS))  # a sampler's has none
