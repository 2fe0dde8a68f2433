"""Which rows each value of a unit is computed for: what its users ask for, or what its role says.

Going backwards through the unit, a value is wanted for the rows of those who read it; attention wants every key and
value. A key, a value or a branch output that is kept between steps is computed for the rows of its role instead, since
the others can be read from the state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.fx

from .arguments import attention, attention_arguments
from .assignment import ACTIVE, READABLE, Assignment
from .axes import Axes
from .errors import GraphRefused
from .layout import position
from .rows import ALL, NONE, RowSet, join
from .units import Unit

COUNTED = ((READABLE, ACTIVE),)
"""Row sets whose positions inside another one are handed over too."""


@dataclass
class Demand:
    """Row sets of the values of a unit.

    Attributes:
        anchors: rows computed of the values that are kept between steps; those that attention reads are at hand.
        computed: of each live node; nodes that are not computed are missing.
        leaves: of each output.
    """

    anchors: dict[torch.fx.Node, RowSet]
    computed: dict[torch.fx.Node, RowSet]
    leaves: list[RowSet]


def find_demand(unit: Unit, axes: Axes, assignment: Assignment) -> Demand:
    """Rows of every value of ``unit`` for ``assignment``.

    Raises:
        GraphRefused: rows of the residual stream are needed that do not come in.
    """
    anchors = _anchors(unit, assignment)
    leaves = [assignment.leave if i < unit.leaving else ALL for i in range(len(unit.outputs))]
    computed, missing = _demand(unit, axes, assignment, anchors, leaves)
    if missing:  # what else leaves has the rows of the stream
        leaves = [assignment.leave for _ in unit.outputs]
        computed, missing = _demand(unit, axes, assignment, anchors, leaves)
    if missing:
        raise GraphRefused(f"rows outside {assignment.enter.name!r} of the residual stream are needed", unit.stream)
    return Demand(anchors, computed, leaves)


def _anchors(unit: Unit, assignment: Assignment) -> dict[torch.fx.Node, RowSet]:
    rows: dict[torch.fx.Node, RowSet] = {}
    for att in unit.attentions:
        rows[att.key] = join(rows.get(att.key, NONE), assignment.key)
        rows[att.value] = join(rows.get(att.value, NONE), assignment.value)
        rows[att.node] = assignment.query
    for branch in unit.branches:
        apart = None if branch.attends else assignment.mlp
        rows[branch.node] = assignment.query if apart is None else apart
    return {node: rows[node] for node in unit.anchors(assignment.stored)}


def _demand(
    unit: Unit, axes: Axes, assignment: Assignment, anchors: dict[torch.fx.Node, RowSet], leaves: list[RowSet]
) -> tuple[dict[torch.fx.Node, RowSet], bool]:
    """Rows of each live node, and whether more of the stream is asked for than comes in."""
    wanted: dict[torch.fx.Node, RowSet] = {}
    missing = False
    for node, rows in zip(unit.outputs, leaves, strict=True):
        if node in anchors and rows == anchors[node]:
            continue  # the rows computed for the state are those that leave
        missing |= node in anchors and not rows.within(at_hand(unit, assignment, node))
        wanted[node] = join(wanted.get(node, NONE), rows)
    computed: dict[torch.fx.Node, RowSet] = {}
    live = [node for node in unit.nodes if node in axes.live]
    for node in reversed(live):
        rows = anchors.get(node, wanted.get(node, NONE))
        if rows == NONE:
            continue
        if node in axes.unproven and node in unit.beside:
            rows = ALL  # such as a running sum over ids
        computed[node] = rows
        for operand in node.all_input_nodes:
            if operand in axes.live:
                asked = rows_read(unit, axes, assignment, node, operand, rows)
                wanted[operand] = join(wanted.get(operand, NONE), asked)
    for node in live:
        for operand in node.all_input_nodes:
            if node in computed and operand in computed and operand not in axes.layout:
                computed[node] = computed[operand]  # parts of a split have the rows of the whole
    if unit.stream is None:
        return computed, missing
    asked, enter = wanted.get(unit.stream, NONE), assignment.enter
    return computed, missing or not (asked.within(enter) or (asked, enter) in COUNTED)


def at_hand(unit: Unit, assignment: Assignment, node: torch.fx.Node) -> RowSet:
    """The rows of a kept value that can be read: those that are computed and those in the state."""
    keys = any(node in (att.key, att.value) for att in unit.attentions)
    return assignment.keys if keys else ALL


def rows_read(
    unit: Unit, axes: Axes, assignment: Assignment, node: torch.fx.Node, operand: torch.fx.Node, rows: RowSet
) -> RowSet:
    """Rows of an operand that ``node`` reads for ``rows`` of its own.

    Attention reads the keys and values of the assignment, or all where it is written by several calls, and all of a
    mask that is made of the tokens; a call without a
    token axis reads every row, unless something mixes the rows of the stream, and it may be a part of that.
    """
    if (node, operand) in axes.whole:
        return ALL
    if node.target is attention:
        return rows if operand is attention_arguments(node.args, node.kwargs).query else assignment.keys
    layout = axes.layout.get(node)
    no_tokens = layout is not None and position(layout, "T") is None
    whole = operand in unit.beside or not unit.mixing(axes)
    return ALL if no_tokens and axes.layout.get(operand) is not None and whole else rows
