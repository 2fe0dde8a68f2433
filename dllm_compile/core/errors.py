"""Errors: one class a kind. What was given, what was wanted, what to do."""

from __future__ import annotations

import torch.fx


class DllmError(Exception):
    """Base of every error about a graph. Mistakes in options are ``ValueError`` or ``TypeError``."""


class GraphRefused(DllmError):
    """A graph, or a part of one, that the compiler does not take.

    It never reaches the user: the graph then runs on plain Inductor and the reason is said once.

    Args:
        reason: one sentence for the reader.
        node: the node at fault, if there is one.
    """

    def __init__(self, reason: str, node: torch.fx.Node | None = None) -> None:
        self.reason = reason
        self.node = node
        super().__init__(f"{reason} (at {describe(node)})" if node is not None else reason)


class InvalidGraph(DllmError):
    """A rewrite made a graph that breaks its own contract: a defect of ours, never of the user."""


def describe(node: torch.fx.Node) -> str:
    """Name a node with what it calls and the line of the model it came from."""
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    line = source_line(node)
    return f"node {node.name!r} ({target})" + (f", {line}" if line else "")


def source_line(node: torch.fx.Node) -> str:
    """The innermost ``File ..., line N`` that Dynamo recorded for a node, or the empty string."""
    trace = node.meta.get("stack_trace") or ""
    places = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    return places[-1] if places else ""
