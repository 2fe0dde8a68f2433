"""The programs of one graph: analyzed for two sizes, and for no others where these come out the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from .core.outline import outline
from .program import Program

MOST = 64
"""Input shapes of a graph whose analysis is kept, and others that are known to be served by one of these."""
Key = tuple[tuple[Any, ...], tuple[Any, ...]]
"""Numbers and types of the inputs, sizes among them, and the numbers that were read of tensors."""
BATCH, TOKENS = 0, 1


def key_of(inputs: Sequence[Any], read: Sequence[Any]) -> Key:
    """What a program is made for.

    Args:
        inputs: tensors and numbers.
        read: numbers that were read of some of them.
    """
    flat: list[Any] = []
    for each in inputs:
        flat += [each.dim(), *each.shape, each.dtype] if isinstance(each, torch.Tensor) else [each]
    return tuple(flat), tuple(read)


class _Made:
    """A program, and what it is good for.

    Attributes:
        program: made for ``key`` and ``size``.
        roles: of numbers in the key, which of the two sizes they are, by their place: 0 for sequences, 1 for tokens.
        any_number: which of the two sizes may be any.
    """

    def __init__(self, program: Program, key: Key, args: Sequence[Any]) -> None:
        self.program, self.key = program, key
        self.size = self.size_of(args)
        self.roles: dict[int, int] = {}
        self.any_number: set[int] = set()

    def size_of(self, args: Sequence[Any]) -> tuple[int, ...]:
        """Sequences and tokens of a call."""
        return tuple(args[self.program.index[self.program.seed]].shape[:2])

    def serves(self, key: Key, args: Sequence[Any]) -> bool:
        """Whether the program is good for a call, or known to be."""
        if len(key[0]) != len(self.key[0]) or key[1] != self.key[1]:
            return False
        size = self.size_of(args)
        if any(size[axis] != self.size[axis] and (axis not in self.any_number or size[axis] < 2) for axis in (0, 1)):
            return False
        expected = (size[self.roles[i]] if i in self.roles else n for i, n in enumerate(self.key[0]))
        return all(type(a) is type(b) and a == b for a, b in zip(expected, key[0], strict=True))

    def compare(self, other: _Made, args: Sequence[Any]) -> None:
        """See whether the program serves other sizes, as those of ``args``, for which ``other`` was made."""
        changed = {axis for axis in (BATCH, TOKENS) if self.size[axis] != other.size[axis]} - self.any_number
        roles = self._roles(other, changed)
        if roles is None or any(min(self.size[axis], other.size[axis]) < 2 for axis in changed):
            return
        if changed and _same_parts(self.program, other.program) and _same_constants(self.program, other.program, args):
            self.roles |= roles
            self.any_number |= changed

    def _roles(self, other: _Made, changed: set[int]) -> dict[int, int] | None:
        """Which numbers of the key are sizes that changed; ``None`` where others did too, or it cannot be told."""
        if len(self.key[0]) != len(other.key[0]) or self.key[1] != other.key[1]:
            return None
        out = {}
        for i, (a, b) in enumerate(zip(self.key[0], other.key[0], strict=True)):
            if type(a) is type(b) and a == b:
                if self.roles.get(i) in (BATCH, TOKENS) and self.size[self.roles[i]] != other.size[self.roles[i]]:
                    return None
                continue
            fits = [axis for axis in (BATCH, TOKENS) if (a, b) == (self.size[axis], other.size[axis])]
            if len(fits) != 1 or (fits[0] not in changed and self.roles.get(i) != fits[0]):
                return None
            out[i] = fits[0]
        return out


class Programs:
    """The programs of one graph, by their keys.

    A graph with symbols for sizes is good for any that Dynamo's guards let through; the analysis of it knows one number
    of sequences and one of tokens. Where that of others comes out with the same parts, results and constants, the older
    program serves every number of them.
    """

    def __init__(self) -> None:
        self.made: dict[Key, _Made | None] = {}
        self.served: dict[Key, Program] = {}

    def get(self, key: Key) -> tuple[Program | None] | None:
        """The program for calls with this key, ``(None,)`` where there can be none; ``None`` where nobody knows."""
        program = self.served.get(key)
        if program is not None:
            return (program,)
        made = self.made  # replaced as a whole by other threads
        return (each.program if (each := made[key]) is not None else None,) if key in made else None

    def serving(self, key: Key, args: Sequence[Any]) -> Program | None:
        """One that was made for other sizes and is known to serve these."""
        return next((each.program for each in self.made.values() if each is not None and each.serves(key, args)), None)

    def add(self, key: Key, program: Program | None, args: Sequence[Any]) -> None:
        """Remember the program for a call; what is known of the others may come to be good for more sizes by it."""
        if program is not None and program in self.all():
            self.served = _shortened(self.served) | {key: program}
            return
        others = [each for each in self.made.values() if each is not None]
        new = _Made(program, key, args) if program is not None else None
        self.made = _shortened(self.made) | {key: new}  # code is shared, and stays
        if new is not None:
            for each in others:
                each.compare(new, args)

    def all(self) -> list[Program]:
        """Those that were made."""
        return [each.program for each in self.made.values() if each is not None]

    def refuse(self, program: Program) -> None:
        """From now on there is none where ``program`` served."""
        self.made = {
            key: each if each is None or each.program is not program else None for key, each in self.made.items()
        }
        self.served = {key: each for key, each in self.served.items() if each is not program}


def _shortened(known: dict[Key, Any]) -> dict[Key, Any]:
    return dict(list(known.items())[1 - MOST :])


def _same_parts(a: Program, b: Program) -> bool:
    """Whether two programs run the same units and return the same of what these make."""
    if [unit.key for unit in a.units] != [unit.key for unit in b.units] or len(a.masks) != len(b.masks):
        return False
    return bool(_results(a) == _results(b))


def _results(program: Program) -> Any:
    """What is returned, by where it comes from."""
    given = {node: ("input", i) for node, i in program.index.items()}
    constants = {node: ("constant", i) for i, node in enumerate(program.constants)}
    names = {**given, **constants, **program.origin}
    return tree_flatten(torch.fx.map_arg(program.result, names.__getitem__))


def _same_constants(program: Program, other: Program, args: Sequence[Any]) -> bool:
    """Whether what ``program`` computes of sizes and of no tokens is, for other sizes, what ``other`` has."""
    with torch.no_grad():
        mine = program.prelude(dict(zip(program.index, args, strict=True))) if program.prelude is not None else ()
        given = dict(zip(other.index, args, strict=True))
        exact = outline(other.graph, other.constants)(given) if other.constants else ()
    return len(mine) == len(exact) and all(map(_equal, mine, exact))


def _equal(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return type(a) is type(b) and bool(a == b)
    alike = (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)
    return alike and torch.equal(a, b)
