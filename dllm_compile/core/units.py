"""The parts a graph is cut into, and the roles in a part.

A model is a *stem* (ids to the first hidden state), *layers* (hidden state to hidden state, with attention inside)
and a *head* (hidden state to outputs). Between two parts only one value depends on the tokens: the residual stream.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.fx

from .arguments import attention
from .assignment import FEATURES
from .axes import Axes, linear
from .fingerprint import fingerprint

MOVES = {
    *("view", "reshape", "expand", "transpose", "permute", "contiguous", "unsqueeze", "flatten", "unflatten"),
    *("movedim", "getitem", "repeat_interleave", "repeat"),
}
"""Calls that only move or repeat numbers."""


@dataclass(frozen=True)
class Attention:
    """One attention call and the narrowest values its keys and values come from.

    Attributes:
        node: the ``scaled_dot_product_attention`` call, or the product with values where there are several calls.
        key, value: the nodes whose rows are cached; only views and repeats lie between them and ``node``, or, where
            values are made of keys, calls that treat rows one by one.
        scored: where there are several calls, those before ``node``, see
            :func:`dllm_compile.core.products.scored_attention`.
    """

    node: torch.fx.Node
    key: torch.fx.Node
    value: torch.fx.Node
    scored: tuple[torch.fx.Node, ...] = ()


@dataclass(frozen=True)
class Branch:
    """What a layer adds to the residual stream, or, where nothing is added, what it replaces the stream with.

    Attributes:
        node: the branch output, before the residual add.
        attends: whether attention is inside.
    """

    node: torch.fx.Node
    attends: bool


@dataclass
class Unit:
    """A part of a graph that is compiled on its own.

    Attributes:
        nodes: the nodes that run here, in graph order.
        stream: the residual stream that comes in, ``None`` for a stem.
        outputs: live nodes that later parts or the caller read; those that may leave for fewer rows first.
        logits: of a head, the value ``[B, S, V]`` whose softmax is read; ``None`` where none is known.
        leaving: how many may: the outgoing stream, or what is made of logits.
        inputs: what else is read: weights, masks, position tables.
        attentions, branches: the roles, in order.
    """

    nodes: list[torch.fx.Node]
    stream: torch.fx.Node | None
    outputs: list[torch.fx.Node]
    inputs: list[torch.fx.Node] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)
    branches: list[Branch] = field(default_factory=list)
    leaving: int = 1
    logits: torch.fx.Node | None = None
    key: str = ""

    def seal(self, axes: Axes) -> Unit:
        """Fill in ``inputs`` and ``key`` from ``nodes``."""
        inside = set(self.nodes)
        skip = inside | ({self.stream} if self.stream is not None else set())
        used = (n for node in self.nodes for n in node.all_input_nodes)
        self.inputs = list(dict.fromkeys(n for n in used if n not in skip))
        self.key = self.code(axes)
        return self

    def code(self, axes: Axes, forms: bool = True) -> str:
        """A hash of all that a sealed unit computes; with ``forms``, also of how its inputs lie in memory."""
        entering = [*([self.stream] if self.stream is not None else []), *self.inputs]
        return fingerprint(self.nodes, entering, [*self.outputs, *self.anchors()], axes, forms=forms)

    def anchors(self, keep: frozenset[str] = FEATURES) -> list[torch.fx.Node]:
        """The values whose rows are kept between steps, of the roles in ``keep``; keys and values come first."""
        keys = [n for a in self.attentions for n in (a.key, a.value)] if "key" in keep else []
        contexts = [a.node for a in self.attentions] if "context" in keep else []
        branches = [b.node for b in self.branches if ("attended" if b.attends else "mlp") in keep]
        return list(dict.fromkeys(keys + contexts + branches))

    @property
    def name(self) -> str:
        """The name of units of this kind in logs and in the names of files."""
        return f"{'layer' if self.is_layer else 'part'}-{self.key[:8]}"

    @cached_property
    def is_layer(self) -> bool:
        """Whether rows of something here may be kept between steps."""
        return bool(self.attentions or self.branches)

    @cached_property
    def beside(self) -> frozenset[torch.fx.Node]:
        """The values that are computed here without the residual stream, from ids or masks: they have all rows."""
        streamed = {self.stream}
        for node in self.nodes:
            if any(operand in streamed for operand in node.all_input_nodes):
                streamed.add(node)
        return frozenset((*self.nodes, *self.inputs)) - streamed

    def mixing(self, axes: Axes) -> bool:
        """Whether something here is not known to treat rows one by one."""
        return bool(self.mixing_nodes(axes))

    def mixing_nodes(self, axes: Axes) -> list[torch.fx.Node]:
        """The calls here that are not known to treat rows one by one."""
        return [node for node in self.nodes if node in axes.unproven]


def closure(nodes: Iterable[torch.fx.Node], stop: set[torch.fx.Node]) -> set[torch.fx.Node]:
    """All nodes that ``nodes`` are computed from, themselves included, not looking behind ``stop``."""
    seen: set[torch.fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node in seen or node in stop:
            continue
        seen.add(node)
        todo.extend(node.all_input_nodes)
    return seen


def of_tokens(node: torch.fx.Node) -> bool:
    """Whether a value is made of token ids or other inputs without a layer, as a mask is that hides some tokens."""
    return not any(each.target in (linear, attention) for each in closure([node], set()))


def weights_key(unit: Unit, inputs: list[Any]) -> Any:
    """The key of a layer's state, by its code and weights: one graph may serve every layer."""
    return unit.key, tuple([id(value) for value in inputs if isinstance(value, torch.nn.Parameter)])
