"""A graph made ready to run: cut into units, each compiled once per variant and called for every layer like it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
from torch._subclasses.fake_tensor import FakeTensorMode

from .core.axes import Axes, fake_like, follow
from .core.errors import GraphRefused
from .core.graph import fix_sizes, outline, output_node, placeholders
from .core.layout import position, size
from .core.units import Unit
from .lower import Compiled
from .options import Options
from .outbox import Outbox
from .passes import cut, normalized
from .passes.causal import refuse_causal_masks
from .passes.seeds import find_seed
from .unit_code import UnitCode


class Program:
    """One graph at one set of input shapes.

    Attributes:
        units: stem, layers and head, whichever the graph has.
        ids: the placeholder that holds token ids, if the graph has it.
    """

    def __init__(self, module: torch.fx.GraphModule, args: Sequence[Any], options: Options) -> None:
        self.options = options
        fake_mode = FakeTensorMode()
        fake = fake_like(args, fake_mode)
        graph = normalized(fix_sizes(module.graph, fake, fake_mode), fake, fake_mode)
        self.graph = graph
        names = placeholders(graph)
        self.seed, layout = find_seed(graph, args)
        self.axes = follow(graph, fake, fake_mode, {self.seed.name: layout})
        self.shape = (layout[0][0].size, layout[1][0].size)
        self.units, constants = cut(graph, self.axes)
        self.ids = self.seed if not args[names.index(self.seed)].is_floating_point() else None
        self.layers = [unit for unit in self.units if unit.attentions]
        self.exports = {node for unit in self.layers for node in unit.outputs[1:]}
        self.vocabulary = _vocabulary(self.seed, self.axes)
        refuse_causal_masks(graph, self.axes, args)
        self.beside = [
            i
            for i, node in enumerate(names)
            if node is not self.seed
            and isinstance(args[i], torch.Tensor)
            and _belongs_to_sequence(node, args[i], self.shape)
        ]
        self.index = {node: i for i, node in enumerate(names)}
        self._code: dict[str, UnitCode] = {}
        self.codes = [self._code.setdefault(unit.key, UnitCode(unit, self.axes, options)) for unit in self.units]
        self.constants = [n for n in constants if any(user not in constants for user in n.users)]
        self.prelude_reads = [n for n in names if any(user in constants for user in n.users)]
        self.prelude = outline(constants, self.prelude_reads, self.constants) if self.constants else None
        self.prelude_run: Compiled | None = None
        self.result = output_node(graph).args[0]
        self.outbox: dict[torch.fx.Node, Outbox] = {}
        self.results = output_node(graph).all_input_nodes
        if not self.units:
            raise GraphRefused("nothing here depends on the tokens")

    def head(self, vocabulary: int | None) -> Unit | None:
        """The unit whose first output a sampler reads: it is as wide as the vocabulary.

        A graph of its own could also be a norm that sits between two layers, whose every row is needed.
        """
        last = self.units[-1]
        if last.attentions or last.stream is None or not last.outputs or vocabulary is None:
            return None
        layout = self.axes.layout.get(last.outputs[0], ())
        readable = position(layout, "T") is not None and position(layout, "B") is not None
        return last if readable and size(layout[-1]) >= vocabulary and not last.mixing(self.axes) else None

    def answer(self, results: dict[torch.fx.Node, Any], kept: bool) -> Any:
        """The graph's outputs; where ``kept``, a caller may write into them without spoiling what is kept."""
        mine = self.axes.layout if kept else self.exports
        fresh = {n: self.outbox.setdefault(n, Outbox()).copy(v) if n in mine else v for n, v in results.items()}
        return torch.fx.map_arg(self.result, lambda n: fresh[n])

    def first_weights(self, args: Sequence[Any]) -> list[torch.Tensor]:
        """Parameters of the first layer."""
        given = [args[self.index[n]] for n in self.layers[0].inputs if n in self.index]
        return [a for a in given if isinstance(a, torch.nn.Parameter)]


def _vocabulary(seed: torch.fx.Node, axes: Axes) -> int | None:
    """Rows of the table that token ids are looked up in."""
    if axes.fake[seed].is_floating_point():
        return None
    looked_up = [user for user in axes.live if user.target is torch.nn.functional.embedding]
    looked_up.sort(key=lambda user: user.args[0] is not seed)  # positions may be computed from ids and looked up too
    table = looked_up[0].args[1] if looked_up else None
    return int(axes.fake[table].shape[0]) if isinstance(table, torch.fx.Node) else None


def _belongs_to_sequence(node: torch.fx.Node, value: torch.Tensor, shape: tuple[int, int]) -> bool:
    """Masks and positions of this sequence; not weights, not tables of the model."""
    return not isinstance(value, torch.nn.Parameter) and value.dim() > 1 and value.shape[-1] == shape[1]
