"""The forms that attention takes in a step: over kept entries, from the change of some values, and choosing entries."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx

from . import rows as row_ops
from .arguments import attention_arguments
from .assignment import KEYS, SALIENT
from .errors import GraphRefused
from .graph import open_sizes
from .rows import ALL
from .writing import Writing


class AttentionForms(Writing):
    """Writes attention calls."""

    def _sparse(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.fx.Node:
        """Attention over the kept entries and the rows computed since."""
        assert self.choices.sparse is not None
        given = attention_arguments(args, kwargs)
        entries = None if given.attn_mask is None and not self.assignment.gaps else self.entries
        more = (entries, self._tokens(), given.attn_mask, given.scale)
        return self._call(self.choices.sparse, (*given[:3], *more))

    def _delta(self, node: torch.fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.fx.Node:
        """Contexts of the active rows: exact for the salient ones, their former ones and the change for the others."""
        assert self.choices.attend is not None
        att = self.unit.attentions[0]
        value = attention_arguments(node.args, node.kwargs).value
        change = self._moved(att.value, value, self._change())
        change = self._call(torch.transpose, (change, 1, 2))
        active, at = self.slot["index:active"], self.slot["index:salient"]
        former = self._call(row_ops.former_rows, (self.state[node], active, self._layout(node)))
        read = attention_arguments(args, kwargs)
        mask = read.attn_mask
        if self.entries is not None and (mask is not None or self.assignment.gaps):
            mask = self._call(row_ops.mask_keys, (mask, self.entries, self._tokens()))
        given = (*read[:3], change, self._written(att.key, SALIENT), at, former)
        both = self._call(self.choices.attend, (*given, mask, read.scale))
        self.turned = self._call(operator.getitem, (both, 1))
        return self._call(operator.getitem, (both, 0))

    def _change(self) -> torch.fx.Node:
        """How far the values of the salient rows are from those in the state, before they enter it."""
        if self.changed is None:
            if len(self.unit.attentions) > 1:
                raise GraphRefused("a layer with several attention calls has no single context", self.unit.outputs[0])
            anchor = self.unit.attentions[0].value
            at, fresh, layout = self._written(anchor, SALIENT), self._raw(anchor), self._layout(anchor)
            if self.computed[anchor] != SALIENT:  # with the queries, by one projection
                fresh = self._call(row_ops.gather_rows, (fresh, self._index(SALIENT, self.computed[anchor]), layout))
            self.changed = self._call(row_ops.changed_rows, (self.state[anchor], at, fresh, layout))
        return self.changed

    def _moved(self, start: torch.fx.Node, end: torch.fx.Node, value: torch.fx.Node) -> torch.fx.Node:
        """``value``, in place of ``start``, through the views and repeats up to ``end``."""
        if end is start:
            return value
        (before,) = [n for n in end.all_input_nodes if n in self.axes.live]
        moved = self._moved(start, before, value)
        args, kwargs = torch.fx.map_arg((end.args, end.kwargs), lambda n: moved if n is before else self._plain(n))
        args = open_sizes(end, args, self._layout(end), self._batch) if end in self.axes.layout else args
        return self.graph.create_node(end.op, end.target, args, kwargs)

    def _evict(self) -> None:
        """Choose the entries to keep, and keep them and the rows that later steps compute."""
        assert self.choices.keep is not None
        assert self.assignment.evict is not None
        assert self.entries is not None
        call = self.unit.attentions[0].node
        given = attention_arguments(call.args, call.kwargs)
        query, key = self._on(given.query, ALL), self._on(given.key, ALL)
        mask = given.attn_mask
        mask = self._plain(mask) if isinstance(mask, torch.fx.Node) else None
        block, outside, fresh = (self.slot[f"index:{name}"] for name in ("block", "outside", "fresh"))
        chosen = (query, key, mask, block, outside, self.entries, fresh, *self.assignment.evict)
        at = self._call(self.choices.keep, chosen)
        self._call(torch.Tensor.copy_, (self.entries, at))
        for node in self.unit.anchors(KEYS):
            self._call(row_ops.keep_rows, (self.state[node], self._available(node), at, self._layout(node)))
