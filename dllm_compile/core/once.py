"""Layers repeat: what a graph calls with the same kinds of values again is run on fake tensors once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.fx

from dllm_compile.compat import FakeTensor, tree_leaves

_PLAIN = (FakeTensor, torch.nn.Parameter)
_NUMBERS = (int, float, bool, complex, str, bytes, type(None), type(...))
_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format)


class Unknown(Exception):
    """A value that has no known kind, so that calls with it cannot be compared."""


class Once:
    """Results of calls on fake tensors, by what is called and by the kinds of the arguments.

    Calls on values of the same kind get the same fake result, so nodes of repeated layers share one fake value. Do not
    use fake values to decide which nodes share memory.

    Args:
        more: what belongs to the kind of a tensor beside its form, such as its layout.
        off: make everything anew.
    """

    def __init__(self, more: Callable[[torch.Tensor], Hashable] = lambda _: None, off: bool = False) -> None:
        self.more, self.off = more, off
        self.results: dict[Hashable, Any] = {}
        self.kinds: dict[int, Hashable] = {}
        self.alive: list[torch.Tensor] = []  # an identity is unique only while its tensor lives

    def get(self, node: torch.fx.Node, values: dict[torch.fx.Node, Any], make: Callable[[], Any]) -> Any:
        """The result of ``make``; or that of an earlier call for a node which calls the same with ``values`` of the
        same kinds.
        """
        key = None if self.off else self._key(node, values)
        if key is None:
            return make()
        if key not in self.results:
            self.results[key] = make()
        return self.results[key]

    def _key(self, node: torch.fx.Node, values: dict[torch.fx.Node, Any]) -> Hashable | None:
        """What a node calls and the kinds of its operands; ``None`` where that cannot be told, or they hold no tensor.

        A call without one may be made for its effect, such as on autocast.
        """
        if not any(isinstance(leaf, torch.Tensor) for n in node.all_input_nodes for leaf in tree_leaves(values[n])):
            return None
        places = {operand: i for i, operand in enumerate(node.all_input_nodes)}

        def kind(value: Any) -> Hashable:
            if isinstance(value, torch.fx.Node):
                return places[value], kind(values[value])
            if isinstance(value, torch.Tensor):
                return self._tensor(value)
            if isinstance(value, (tuple, list)):
                return type(value), *map(kind, value)
            if isinstance(value, dict):
                return dict, *((name, kind(each)) for name, each in value.items())
            if isinstance(value, slice):
                return slice, kind(value.start), kind(value.stop), kind(value.step)
            if isinstance(value, (*_NUMBERS, *_TORCH)):
                return type(value), value
            raise Unknown

        try:
            return node.op, node.target, kind(node.args), kind(node.kwargs)
        except Unknown:
            return None

    def _tensor(self, value: torch.Tensor) -> Hashable:
        known = self.kinds.get(id(value))
        if known is None:
            if type(value) not in _PLAIN or getattr(value, "constant", None) is not None:
                raise Unknown  # a quantized weight has parts; a number may be read of a constant
            form = value.shape, value.stride(), value.storage_offset(), value.dtype, value.device
            known = type(value), form, value.is_conj(), value.is_neg()
            self.kinds[id(value)] = known
            self.alive.append(value)
        return known, self.more(value)
