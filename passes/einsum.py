"""Products of two values that ``einsum`` writes become matrix products.

    before:  einsum("bqhd,bkhd->bhqk", q, k)
    after:   matmul(q.transpose(1, 2), k.transpose(1, 2).transpose(-2, -1))

So attention that is written by ``einsum`` reads as any other to the passes behind. Taken are equations of two operands
with one letter that is summed over, one of each operand alone, and all others in both and in the result. One operand
may have one letter more, as queries whose heads share keys in groups do: the other is expanded along it, as if it had
it, too. The rest, such as a projection, stays as it is. The result is the same up to rounding.

    before:  einsum("bgnqd,bgkd->bgnqk", q, k)
    after:   matmul(q, k.unsqueeze(-1).expand(..., n).permute(0, 1, 4, 2, 3).transpose(-2, -1))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.fx

from dllm_compile.core.arguments import called

Term = tuple[str, ...]


class _Product(NamedTuple):
    """A product of two values: rows on the left, columns on the right.

    Attributes:
        left, right: the operands.
        terms: the letters of each.
        out: those of the result.
        batch: the letters of both, and that of groups, in the order of the result.
        group: a letter that one operand alone has beside ``row`` or ``column``, and how many entries it stands for.
        row, column, summed: the letter of the left side alone, of the right side alone, and that which is summed over.
    """

    left: torch.fx.Node
    right: torch.fx.Node
    terms: tuple[Term, Term]
    out: Term
    batch: Term
    group: dict[str, int]
    row: str
    column: str
    summed: str


def products(graph: torch.fx.Graph, fake: dict[torch.fx.Node, Any]) -> int:
    """Rewrite ``graph`` in place; returns how many products were found.

    Args:
        graph: a copy whose sizes are numbers.
        fake: the fake value of each node; those of new nodes are added.
    """
    found = 0
    for node in list(graph.nodes):
        if node.op == "call_function" and called(node) == "einsum":
            product = _read(node, fake)
            if product is not None:
                _rewrite(graph, node, product, fake)
                found += 1
    return found


def _read(node: torch.fx.Node, fake: dict[torch.fx.Node, Any]) -> _Product | None:
    """The product that a call writes; ``None`` for anything else."""
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    nodes = [each for each in operands if isinstance(each, torch.fx.Node)]
    if not isinstance(equation, str) or len(nodes) != 2 or len(operands) != 2 or node.kwargs:
        return None
    terms = _terms(equation, [fake[each].dim() for each in nodes])
    if terms is None or any(len(set(term)) != len(term) for term in terms):
        return None
    left, right, out = terms
    own = [[each for each in a if each not in b] for a, b in ((left, right), (right, left))]
    summed = [each for each in left if each in right and each not in out]
    both = [each for each in out if each in left and each in right]
    if len(summed) != 1 or {*out} != {*both, *own[0], *own[1]} or not both:
        return None
    sizes = [dict(zip(term, fake[each].shape, strict=True)) for each, term in zip(nodes, (left, right), strict=True)]
    if sizes[0][summed[0]] != sizes[1][summed[0]]:
        return None  # one of them is repeated
    extent = {**sizes[0], **sizes[1]}
    group = {each: extent[each] for each in _groups(own, summed[0], out, extent)}
    own = [[each for each in letters if each not in group] for letters in own]
    if [*map(len, own)] != [1, 1]:
        return None
    batch = tuple(each for each in out if each in both or each in group)
    pair = [(nodes[0], left, own[0][0]), (nodes[1], right, own[1][0])]
    pair.sort(key=lambda each: out.index(each[2]))  # rows come first in the result
    (a, a_term, row), (b, b_term, column) = pair
    return _Product(a, b, (a_term, b_term), out, batch, group, row, column, summed[0])


def _groups(own: Sequence[Sequence[str]], summed: str, out: Term, extent: Mapping[str, int]) -> list[str]:
    """Of the letters that each operand has alone, two of one and one of the other: that which is not the tokens' own.

    Scores have as many rows as columns, and are summed over with values along as many as they have rows.
    """
    if sorted(map(len, own)) != [1, 2]:
        return []
    (one,), two = sorted(own, key=len)
    tokens = [each for each in sorted(two, key=out.index) if extent[each] in (extent[one], extent[summed])]
    return [each for each in two if tokens and each != tokens[-1]]


def _terms(equation: str, ranks: Sequence[int]) -> list[Term] | None:
    """The letters of both operands and of the result, with those that ``...`` stands for."""
    given, arrow, out = equation.replace(" ", "").partition("->")
    written = given.split(",")
    if not arrow or len(written) != 2:
        return None
    counts = [rank - len(term.replace("...", "")) for rank, term in zip(ranks, written, strict=True) if "..." in term]
    if len({*counts}) > 1:
        return None  # they are broadcast
    names = tuple(f"...{i}" for i in range(counts[0] if counts else 0))
    return [_letters(term, names) for term in (*written, out)]


def _letters(term: str, names: Term) -> Term:
    before, dots, behind = term.partition("...")
    return (*before, *(names if dots else ()), *behind)


def _rewrite(graph: torch.fx.Graph, node: torch.fx.Node, product: _Product, fake: dict[torch.fx.Node, Any]) -> None:
    """Put the product in the place of the call."""
    batch, row, column, summed = product.batch, product.row, product.column, product.summed

    def made(call: torch.fx.Node, value: Any) -> torch.fx.Node:
        call.meta, fake[call] = dict(node.meta), value
        return call

    def moved(x: torch.fx.Node, term: Term, to: Term) -> torch.fx.Node:
        """``x`` with its dimensions in another order."""
        order = [term.index(each) for each in to]
        swapped = [at for at, old in enumerate(order) if at != old]
        if not swapped:
            return x
        if len(swapped) == 2:
            return made(graph.call_method("transpose", (x, *swapped)), fake[x].transpose(*swapped))
        return made(graph.call_method("permute", (x, *order)), fake[x].permute(order))

    def with_groups(x: torch.fx.Node, term: Term) -> tuple[torch.fx.Node, Term]:
        """``x`` expanded along the groups that it has no letter of."""
        for letter, count in product.group.items():
            if letter not in term:
                x = made(graph.call_method("unsqueeze", (x, -1)), fake[x].unsqueeze(-1))
                sizes = (*[-1] * len(term), count)
                x, term = made(graph.call_method("expand", (x, *sizes)), fake[x].expand(sizes)), (*term, letter)
        return x, term

    with graph.inserting_before(node):
        (left, a_term), (keys, b_term) = map(with_groups, (product.left, product.right), product.terms)
        left = moved(left, a_term, (*batch, row, summed))
        if b_term.index(column) < b_term.index(summed):  # keys, as other models write them
            keys = moved(keys, b_term, (*batch, column, summed))
            right = made(graph.call_method("transpose", (keys, -2, -1)), fake[keys].transpose(-2, -1))
        else:
            right = moved(keys, b_term, (*batch, summed, column))
        at_out = tuple(product.out.index(each) for each in (*batch, row, column))
        out = made(graph.call_function(torch.matmul, (left, right)), fake[node].permute(at_out))
        out = moved(out, (*batch, row, column), product.out)
    fake[out] = fake[node]
    node.replace_all_uses_with(out)
    graph.erase_node(node)
