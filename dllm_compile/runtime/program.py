"""A graph made ready to run: cut into units, each compiled once per variant and called for every layer like it.

A graph with open sizes is analyzed once; another size is a copy that differs in the constants of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any, TypeVar

import torch
import torch.fx

from dllm_compile.compat import group_size
from dllm_compile.core.axes import Axes
from dllm_compile.core.errors import GraphRefused
from dllm_compile.core.fingerprint import fingerprint, target_name
from dllm_compile.core.graph import output_node, placeholders, refuse_unfollowed
from dllm_compile.core.layout import position, size
from dllm_compile.core.opaque import calls_opaque
from dllm_compile.core.outline import outline
from dllm_compile.core.ranks import looked_up, looks_up
from dllm_compile.core.stand_ins import StandIns, at_values
from dllm_compile.core.units import Unit, closure
from dllm_compile.debug import asked, keep, part
from dllm_compile.options import Options
from dllm_compile.passes import analyzed
from dllm_compile.passes.causal import (
    all_masked,
    depends_on,
    hide,
    masks_of,
    refuse_causal_masks,
    score_masks,
    token_masks,
)

from .cost import whole
from .unchanged import SMALL
from .unit_code import shared

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Signature:
    """What tells the graphs of one model from those of others.

    Attributes:
        units: keys of stem, layers and head, which say all that they compute, for one sequence or for several.
        constants: the same of what they read that does not depend on tokens.
        family: names of all that is called, in order: equal for one sequence and for several.
    """

    units: tuple[str, ...]
    constants: str
    family: tuple[str, ...]


def memoized(method: Callable[[Program, Asked], Answer]) -> Callable[[Program, Asked], Answer]:
    """Keep the results of a method of a program by its argument: a program does not change."""
    name = method.__name__

    def ask(self: Program, asked: Asked) -> Answer:
        key = name, asked
        if key not in self.memo:
            self.memo[key] = method(self, asked)
        answer: Answer = self.memo[key]
        return answer

    return ask


class Program:
    """One graph at one set of input sizes: its units, their code, and which inputs and outputs are which.

    Args:
        module: the graph as Dynamo traced it.
        args: of a call, or what Dynamo shows.
        options: what the user chose.
        stand_ins: analyze the graph at these sizes instead, for :meth:`at` to give it at others.

    Attributes:
        size: sequences and tokens, 0 where there is none.
        sizes: those that Dynamo left open, as they are here.
        units: stem, layers and head, whichever the graph has.
        reads: places of the arguments that are read, not those whose number the graph was analyzed for.
        masks: attention masks that depend on no tokens; see :func:`dllm_compile.passes.causal.masks_of`.
        knows_masks: whether there are no others.
        token_masks: those made of the tokens, with a row for each query; see
            :func:`dllm_compile.passes.causal.token_masks`.
        score_masks: the same where attention is several calls; see :func:`dllm_compile.passes.causal.score_masks`.
        masks_all: whether every attention call reads one of them.
        depth: layers with attention.
        group: the process group whose ranks share the layers; ``None`` where one process has all of them.
        decision: the unit behind the head that chooses tokens, if the graph is a whole denoising step.
        ids: the placeholder that holds token ids, if the graph has it.
        side_inputs: tensors that stem and layers read, but the ids and parameters.
        head_inputs: likewise those that only the head reads.
        signature: equal for graphs of the same model, which may go on with each other's rows.
        first: what a call does before all else; see :func:`dllm_compile.passes.normalize.memory_handed_over`.
        origin: what a value is called in every graph of the same signature, and of smaller batches.
    """

    def __init__(
        self,
        module: torch.fx.GraphModule,
        args: Sequence[Any],
        options: Options,
        stand_ins: StandIns | None = None,
    ) -> None:
        found = analyzed(module, args, options.saliency is not None, stand_ins)
        self.graph, self.seed, self.axes, self.units = found.graph, found.seed, found.axes, found.units
        self.stand_ins, self.size = stand_ins, found.axes.size
        self.sizes = {} if stand_ins is None else stand_ins.values
        self.first, self.group = found.first, found.axes.group
        graph, args, constants, names = found.graph, found.args, found.constants, placeholders(found.graph)
        _keep_units(self.units, self.axes)
        self.ids = self.seed if not args[names.index(self.seed)].is_floating_point() else None
        self.layers = [unit for unit in self.units if unit.is_layer]
        self.depth = sum(bool(unit.attentions) for unit in self.layers)
        self.memo: dict[Any, Any] = {}
        self.exports = {node for unit in self.layers for node in unit.outputs[1:]}
        self.vocabulary = _vocabulary(self.seed, self.axes)
        self.index = {node: i for i, node in enumerate(names)}
        self.reads = [i for node, i in self.index.items() if node.users]
        self.decision = self.units[-1] if len(self.units) > 1 and self.units[-1].stream is None else None
        read = closure([n for unit in self.units if unit is not self.decision for n in unit.nodes], set())
        tensors = [i for n, i in self.index.items() if isinstance(args[i], torch.Tensor) and n is not self.seed]
        model = [i for i in tensors if names[i] in read or self.decision is None]
        given = [i for i in model if not isinstance(args[i], torch.nn.Parameter)]
        behind = (self.head(self.vocabulary), self.decision) if self.ids is not None else (self.decision,)
        before = closure([n for unit in self.units if unit not in behind for n in unit.nodes], set())
        self.head_inputs = [i for i in given if names[i] not in before and self.layers]
        self.side_inputs = [i for i in given if i not in self.head_inputs]
        self.codes = [shared(unit, self.axes, options.lowering) for unit in self.units]
        whole = self.ids is not None
        self.origin = {
            node: (None if whole else unit.key, at, i)
            for at, unit in enumerate(self.units)
            for i, node in enumerate(unit.outputs)
        }
        self.constants = [n for n in constants if any(user not in constants for user in n.users)]
        self.prelude = outline(graph, self.constants) if self.constants else None
        self.masks, self.knows_masks = masks_of(graph, self.axes)
        self.score_masks, self.token_masks = score_masks(self.units, graph, self.axes), token_masks(graph, self.axes)
        several = any(each.scored for unit in self.units for each in unit.attentions)
        self.masks_all = self.knows_masks and bool(self.masks) and all_masked(graph) and not several
        self.result = output_node(graph).args[0]
        self.results = output_node(graph).all_input_nodes
        self.dead = _dead(self.units, set(self.results))
        if not self.units:
            raise GraphRefused("nothing here depends on the tokens")
        parts = [unit.nodes for unit in self.units if unit is not self.decision]
        self.made = constants, [n for n in names if any(u in constants for u in n.users)], self.constants
        if stand_ins is not None:
            run = [*constants, *(node for unit in self.units for node in unit.nodes)]
            handed = {n for unit in self.units for n in (*unit.inputs, *unit.anchors(), unit.stream) if n is not None}
            refuse_unfollowed(run, handed, self.axes, self.seed, stand_ins.values.values())
        self.signature = Signature(
            tuple(unit.key for unit in self.units if unit is not self.decision),
            fingerprint(*self.made, self.axes, self.sizes),
            tuple(target_name(node) for nodes in (constants, *parts) for node in nodes),
        )

    def at(self, args: Sequence[Any]) -> Program | None:
        """The graph at the sizes of other arguments, where it was analyzed for any; ``None`` for a size below 2, which
        Dynamo leaves open only where it is told to.
        """
        assert self.stand_ins is not None
        sizes, other = self.stand_ins.read(args), copy(self)
        if min(sizes.values()) < 2:
            return None
        batch, tokens = args[self.index[self.seed]].shape[:2]
        other.size, other.memo, other.sizes = (batch, tokens), {}, sizes
        for name in ("flops", "computes"):
            vars(other).pop(name, None)
        other.prelude = self.prelude.at(sizes) if self.prelude is not None else None
        other.first = self.first.at(sizes) if self.first is not None else None
        other.masks = [(call, mask.at(sizes)) for call, mask in self.masks]
        other.score_masks = [(call, mask.at(sizes)) for call, mask in self.score_masks]
        other.token_masks = [(call, mask.at(sizes)) for call, mask in self.token_masks]
        other.result = at_values(self.result, sizes)
        other.signature = replace(self.signature, constants=fingerprint(*self.made, self.axes, sizes))
        return other

    @cached_property
    def computes(self) -> tuple[str, ...]:
        """Hashes of what each part computes and of the constants it reads, whatever the strides of inputs."""
        constants = fingerprint(*self.made, self.axes, self.sizes, forms=False)
        return constants, *(unit.code(self.axes, forms=False) for unit in self.units)

    def masked(self, args: Mapping[torch.fx.Node, Any]) -> bool:
        """Whether an attention mask hides a key, or may: one that depends on tokens is not looked at, and inputs of
        more than :data:`dllm_compile.runtime.unchanged.SMALL` numbers are not compared as a whole at every step.

        Args:
            args: the value of each placeholder.
        """
        read = [args[node] for _, mask in self.masks for node in mask.reads]
        given = [each for each in read if isinstance(each, torch.Tensor)]
        watched = all(each.numel() <= SMALL and not isinstance(each, torch.nn.Parameter) for each in given)
        return not (self.knows_masks and watched) or hide(self.masks, args)

    def depends(self, args: Sequence[Any], vocabulary: int | None) -> tuple[torch.Tensor, list[torch.Tensor]] | None:
        """How far each row depends on tokens; ``None`` where attention masks do not prove it, so that any row may
        depend on all.

        Nothing but attention mixes rows then, all of the model is in the graph, and masks are made of inputs that are
        compared at every call. What a layer treats as one otherwise is tried when it first runs.

        Args:
            args: of a call.
            vocabulary: tokens that the model knows.

        Returns:
            ``[B, S]`` int64, see :func:`dllm_compile.passes.causal.depends_on`, and the inputs that masks are made of.
        """
        rest = [unit for unit in self.units if not unit.is_layer and unit is not self.decision]
        whole = self.ids is not None and self.head(vocabulary) is not None and self.group is None
        if not (self.masks_all and whole) or any(unit.mixing(self.axes) for unit in rest):
            return None
        heads = [self.axes.layout[call] for call, _ in self.masks]
        read = {self.index[node] for _, mask in self.masks for node in mask.reads}
        tensors = {i for i in read if isinstance(args[i], torch.Tensor)}
        if any(len(each) != 4 or position(each, "B") != 0 for each in heads) or not tensors <= {*self.side_inputs}:
            return None
        found = depends_on(self.masks, dict(zip(self.index, args, strict=True)), self.size)
        return None if found is None else (found, [args[i] for i in sorted(tensors)])

    def beside_tokens(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """The values that units read and that depend on sizes and other inputs alone, not on tokens.

        Args:
            args: of a call; the graph has to be one that was analyzed for any size.
        """
        assert self.stand_ins is not None
        read = [n for node in self.graph.nodes if node in self.axes.live for n in node.all_input_nodes]
        made = [n for n in dict.fromkeys(read) if n not in self.axes.live and n.op != "placeholder"]
        if not made:
            return ()
        with torch.no_grad():
            values = outline(self.graph, made).at(self.stand_ins.read(args))
            return values(dict(zip(self.index, args, strict=True)))

    def check(self, args: Sequence[Any]) -> None:
        """Check the attention masks of a call: at the first call of a size, and at the first of a sequence with other
        inputs.

        Raises:
            GraphRefused: attention is causal by its mask.
        """
        refuse_causal_masks(
            [*self.masks, *self.score_masks, *self.token_masks], dict(zip(self.index, args, strict=True))
        )

    @cached_property
    def read_whole(self) -> set[torch.fx.Node]:
        """Values that are read on all rows, whichever are computed; see :attr:`dllm_compile.core.axes.Axes.whole`."""
        return {read for _, read in self.axes.whole}

    @cached_property
    def opaque(self) -> bool:
        """Whether the graph calls an opaque module, which runs in eager and may read values on the host."""
        return any(calls_opaque(node) for unit in self.units for node in unit.nodes)

    @memoized
    def head(self, vocabulary: int | None) -> Unit | None:
        """The unit whose first output a sampler reads: it is as wide as the vocabulary.

        A graph of its own could also be a norm that sits between two layers, whose every row is needed.
        """
        for unit in reversed(self.units):
            if unit.is_layer or vocabulary is None:
                break
            if unit.stream is not None and not unit.mixing(self.axes) and self._is_head(unit, vocabulary):
                return unit
        return None

    def _is_head(self, unit: Unit, vocabulary: int) -> bool:
        layouts = [self.axes.layout.get(node) for node in unit.outputs[: unit.leaving]]
        by_row = all(found and None not in (position(found, "T"), position(found, "B")) for found in layouts)
        widths = [size(self.axes.layout[node][-1]) for node in unit.nodes if self.axes.layout.get(node)]
        return bool(layouts) and by_row and max(widths, default=0) >= vocabulary

    @cached_property
    def chooses(self) -> bool:
        """Whether the decision reads a few numbers a row, such as a confidence, in place of logits."""
        head = self.head(self.vocabulary)
        if self.decision is None or head is None:
            return False
        outputs = head.outputs[: head.leaving]
        return all(len(self.axes.layout[node]) == 2 and self._width(node) == 1 for node in outputs)

    @cached_property
    def fills(self) -> bool:
        """Whether the graph is a whole denoising step: it returns token ids for each row."""
        decided = [node for node in self.results if self.decision is not None and node in self.decision.outputs]
        made = [self.axes.fake[node] for node in decided]
        return any(tuple(value.shape) == self.axes.size and value.dtype == torch.int64 for value in made)

    @cached_property
    def hides_attention(self) -> torch.fx.Node | None:
        """The first node that mixes rows, in a graph from ids to logits or token ids in which no attention call was
        found; else ``None``.
        """
        vocabulary = self.vocabulary if self.ids is not None and not self.layers else None
        if vocabulary is None or not any(
            self._width(node) >= vocabulary or self._is_ids(node) for node in self.results
        ):
            return None
        return next((node for unit in self.units for node in unit.mixing_nodes(self.axes)), None)

    @cached_property
    def in_one_layer(self) -> list[torch.fx.Node]:
        """The attention calls of a whole model, where it has several and they are one layer; else empty."""
        whole = self.ids is not None and len(self.layers) == 1 and self.head(self.vocabulary) is not None
        calls = [attention.node for attention in self.layers[0].attentions] if whole else []
        return calls if len(calls) > 1 else []

    def _is_ids(self, node: torch.fx.Node) -> bool:
        """Whether a value is made of the tokens and is one token id for each row."""
        value = self.axes.fake[node] if node in self.axes.live and node is not self.ids else None
        return isinstance(value, torch.Tensor) and value.shape == self.axes.size and value.dtype == torch.int64

    @memoized
    def logits(self, vocabulary: int | None) -> torch.fx.Node | None:
        """The output of the head that has a number for each token of the vocabulary; the narrowest, where several are
        wide enough.
        """
        head = self.head(vocabulary)
        if head is None or vocabulary is None:
            return None
        wide = [node for node in head.outputs if self._width(node) >= vocabulary]
        return min(wide, key=self._width, default=None)

    @memoized
    def reads_all(self, vocabulary: int | None) -> bool:
        """Whether something other than logits and token ids is made of each row behind the layers, such as a quality.

        Rows that no sampler reads may be old, but this is known only of logits and of token ids that the graph returns;
        any other output must be current. The head need not be in the graph that begins a step, so each graph is asked
        for itself, with the vocabulary of the model.
        """
        head, logits = self.head(vocabulary), self.logits(vocabulary)
        decided = self.decision.outputs if self.decision is not None else []
        ids = [node for node in decided if self.axes.fake[node].dtype == torch.int64]
        behind = [*decided, *(head.outputs if head is not None else [])]
        read = [node for node in self.results if node in behind and node not in ids and self._has_tokens(node)]
        return any(logits is None or self._width(node) != self._width(logits) for node in read)

    def _has_tokens(self, node: torch.fx.Node) -> bool:
        return position(self.axes.layout.get(node, ()), "T") is not None

    @memoized
    def has_rows(self, node: torch.fx.Node) -> bool:
        """Whether a value has one token axis and a batch axis."""
        kinds = [factor.kind for dim in self.axes.layout.get(node, ()) for factor in dim]
        return (kinds.count("T"), kinds.count("B")) == (1, 1)

    def _width(self, node: torch.fx.Node) -> int:
        """Numbers that a value has in each row."""
        return prod(factor.size for dim in self.axes.layout.get(node, ()) for factor in dim if factor.kind == "")

    @cached_property
    def flops(self) -> float:
        """FLOPs of a call that computes every row, behind the stem and before the decision."""
        units = [unit for unit in self.units if unit.stream is not None]
        found = [item for unit in units for item in whole(unit, self.axes).items()]
        batch, tokens = self.size
        return sum((float(count) * batch * float(tokens) ** len(names) for names, count in found), 0.0)

    def is_first(self, unit: Unit) -> bool:
        """Whether a unit is known to be the first layer of the model: the ids enter the same graph."""
        return self.ids is not None and unit is self.layers[0]

    def first_weights(self, args: Sequence[Any]) -> list[torch.Tensor]:
        """Parameters of the first layer."""
        given = [args[self.index[n]] for n in self.layers[0].inputs if n in self.index]
        return [a for a in given if isinstance(a, torch.nn.Parameter)]


def _keep_units(units: list[Unit], axes: Axes) -> None:
    """Write each kind of unit as a debug file, where that is asked for."""
    for unit in {unit.key: unit for unit in units}.values() if asked() else ():
        entering = [*([unit.stream] if unit.stream is not None else []), *unit.inputs]
        keep(unit.name, part(unit.nodes, axes.fake, entering, unit.outputs))


def _dead(units: list[Unit], results: set[torch.fx.Node]) -> list[list[torch.fx.Node]]:
    """For each unit, the values that no later unit reads."""
    made = {node for unit in units for node in unit.outputs} - results
    last = {n: i for i, u in enumerate(units) for n in [*u.outputs, *([u.stream] if u.stream else []), *u.inputs]}
    return [[node for node in made if last[node] == i] for i in range(len(units))]


def _vocabulary(seed: torch.fx.Node, axes: Axes) -> int | None:
    """The number of rows of the table that token ids are looked up in; ``None`` where there is no table."""
    if axes.fake[seed].is_floating_point():
        return None
    reading = [user for user in axes.live if looks_up(user)]
    reading.sort(key=lambda user: user.args[0] is not seed)  # positions may be computed from ids and looked up too
    table = reading[0].args[1] if reading else None
    if not isinstance(table, torch.fx.Node):
        return None
    shares = group_size(str(reading[0].args[-1])) if reading[0].target is looked_up else 1
    return int(axes.fake[table].shape[0]) * shares
