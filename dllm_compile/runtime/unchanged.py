"""Whether tensors hold what they held before, however they were written.

PyTorch counts the writes that autograd sees. ``w.data.add_()``, numpy views and ``vector_to_parameters`` go around
that count, ``w.data = t`` puts other memory behind the same object, and a Python ``id`` is used again once its owner is
dead. So a tensor is known by a weak reference to it, by its address, its count of writes, and by what it holds:

- *a sample*: about ``SAMPLE`` numbers at even distances, compared at every call (two launches for all weights of a
  dtype). It sees what merging, averaging, loading and noise do, for these write everywhere. It does not see a write
  that leaves all of these numbers as they were, such as one to a single entry of a matrix;
- *a checksum*: reads all of a tensor once, and sees any write but by a chance of about 2^-60.

Everything here stays on the device and is compared there, as one truth value.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from copy import copy as copy_object
from functools import cache
from itertools import compress
from typing import Any

import torch

from dllm_compile.compat import is_traceable_wrapper_subclass, version

SAMPLE = 64
"""Numbers of a tensor that a sample has. 110 matrices take 0.15 ms on a CPU."""

SMALL = 1 << 16
"""Numbers of an input up to which it is compared as a whole."""

_PLAIN = {torch.Tensor, torch.nn.Parameter}
_owner = weakref.ref.__call__
_PERIOD = 65521  # a prime, so that two rows that change places are not summed into the same columns


def leaves(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The plain tensors that tensors are made of: quantized weights and shards wrap several."""
    if _PLAIN.issuperset(map(type, tensors)):
        return [*tensors]
    out: list[torch.Tensor] = []
    for tensor in tensors:
        if type(tensor) not in _PLAIN and is_traceable_wrapper_subclass(tensor):
            parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
            out += leaves([part for part in parts if isinstance(part, torch.Tensor)])  # a mesh of ranks is none
        else:
            out.append(tensor)
    return out


class Weights:
    """The weights of a model, watched for changes.

    Args:
        tensors: the weights.
        lost: called when one of them dies.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], lost: Callable[[], object]) -> None:
        self.lost = lost
        self.refs: list[weakref.ref[torch.Tensor]] = []
        self.whole: list[torch.Tensor] | None = None
        self._add(tensors)

    def include(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Watch more tensors; returns whether all of them were watched already."""
        if self.known.issuperset(map(id, tensors)):  # one that dies takes its number along
            return True
        self._add([tensor for tensor in tensors if id(tensor) not in self.known])
        return False

    def _add(self, tensors: Sequence[torch.Tensor]) -> None:
        lost, sums = self.lost, self.whole
        self.refs += [weakref.ref(tensor, lambda _: lost()) for tensor in tensors]
        self.look()
        self.whole = None if sums is None else [*sums, *map(checksum, leaves(tensors))]

    def alive(self) -> list[torch.Tensor] | None:
        """The tensors; ``None`` if one has died."""
        found = [each for each in map(_owner, self.refs) if each is not None]
        return found if len(found) == len(self.refs) else None

    def look(self) -> None:
        """Compare with what the living weights hold now, from the next question on."""
        self.refs = [ref for ref in self.refs if ref() is not None]
        self.known = {id(ref()) for ref in self.refs}
        parts = leaves(self.alive() or [])
        self.counted = [not part.is_inference() for part in parts]
        self.marks = _marks(parts, self.counted)
        self.views = _sample_views(parts)
        self.sample = _joined(self.views)
        self.whole = None

    def moved(self) -> bool:
        """Whether a weight is elsewhere in memory, or was written to where PyTorch counts it; reads no values."""
        tensors = self.alive()
        if tensors is None:
            return True
        parts = leaves(tensors)
        return len(parts) != len(self.counted) or _marks(parts, self.counted) != self.marks

    def written(self) -> list[torch.Tensor]:
        """Compare a sample of the weights: truth values on their devices, true where it differs."""
        return [_differ(a, b) for a, b in zip(_joined(self.views), self.sample, strict=True)]

    def sum(self) -> None:
        """Keep a checksum of all weights, to be compared by :meth:`written_anywhere`."""
        self.whole = [checksum(part) for part in leaves(self.alive() or [])]

    def written_anywhere(self) -> bool:
        """Whether the checksum of all weights differs from that of :meth:`sum`; reads all weights once."""
        if self.whole is None:
            return True
        now = [checksum(part) for part in leaves(self.alive() or [])]
        return len(now) != len(self.whole) or any(bool(a != b) for a, b in zip(now, self.whole, strict=True))


class Inputs:
    """The inputs of a sequence beside its ids: masks, positions, conditions, tables, weights that are no parameters.

    Args:
        tensors: what the first call was given.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        parts = leaves(tensors)
        self.kinds = [_kind(part) for part in parts]
        self.refs = [weakref.ref(part) for part in parts]
        self.marks = [_mark(part) for part in parts]
        self.copies = [_bits(part).clone() if part.numel() <= SMALL else None for part in parts]
        self.samples = [
            _bits(_sample_view(part)).clone() if copy is None else None
            for part, copy in zip(parts, self.copies, strict=True)
        ]
        self.sums = [checksum(part) if copy is None else None for part, copy in zip(parts, self.copies, strict=True)]
        self.whole: frozenset[int] = frozenset()

    def compare_whole(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Compare all numbers of these inputs from now on, however large they are; returns whether they are among the
        watched ones.
        """
        wanted = set(map(id, tensors))
        self.whole = frozenset(i for i, ref in enumerate(self.refs) if id(ref()) in wanted)
        return len(self.whole) >= len(wanted)

    def shapes(self) -> list[torch.Size]:
        """Of each tensor, or of each of those that it is made of."""
        return [kind[0] for kind in self.kinds]

    def fit(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether others have the same shapes, dtypes and devices."""
        return [_kind(part) for part in leaves(tensors)] == self.kinds

    def differ(self, tensors: Sequence[torch.Tensor], counted: bool = False) -> list[torch.Tensor]:
        """Truth values on the devices of ``tensors``, true where they hold other values. They must :meth:`fit`.

        The same large tensor, not written to where PyTorch counts it, is compared by its sample, another one whole.
        There may be hundreds, such as scales of quantized weights: those of a dtype and device are compared at once.

        Args:
            tensors: the others.
            counted: every write is known to be one that PyTorch counts: the same tensor needs no look at its values.
        """
        out: list[torch.Tensor] = []
        groups: dict[Any, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for i, part in enumerate(leaves(tensors)):
            copy, sample, known = self.copies[i], self.samples[i], self.sums[i]
            same = self.refs[i]() is part and _mark(part) == self.marks[i]
            if same and counted:
                continue
            if copy is not None:
                groups.setdefault((part.dtype, part.device), []).append((_bits(part), copy))
            elif same and sample is not None and i not in self.whole:
                groups.setdefault((part.dtype, part.device), []).append((_bits(_sample_view(part)), sample))
            else:
                assert known is not None
                out.append(checksum(part) != known)
        return [*out, *(_differ(*map(torch.cat, zip(*pairs, strict=True))) for pairs in groups.values())]

    def checksums(self) -> torch.Tensor:
        """What tells these inputs from others when they are gone: ``[N]`` int64, one of each tensor, on the CPU."""
        pairs = zip(self.copies, self.sums, strict=True)
        sums = [known if copy is None else checksum(copy) for copy, known in pairs]
        return torch.tensor([int(each) for each in sums if each is not None], dtype=torch.int64)

    def of_sequences(self, index: torch.Tensor, batch: int) -> Inputs | None:
        """The inputs of some sequences of a batch.

        Args:
            index: ``[b]`` int64, which ones.
            batch: sequences there were; a tensor whose first dimension is as large has an entry for each.

        Returns:
            ``None`` where one is too large to have been copied.
        """
        if any(copy is None and kind[0][:1] == (batch,) for copy, kind in zip(self.copies, self.kinds, strict=True)):
            return None
        new = copy_object(self)
        new.kinds, new.copies = list(self.kinds), list(self.copies)
        for i, (kind, copy) in enumerate(zip(self.kinds, self.copies, strict=True)):
            if copy is not None and kind[0][:1] == (batch,):
                new.kinds[i] = (torch.Size([len(index), *kind[0][1:]]), *kind[1:])
                new.copies[i] = copy.view(batch, -1)[index.to(copy.device)].flatten()
        return new


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """A 64-bit sum of all bits of a tensor, by place, on its device: a tensor ``[]`` int64."""
    data = _flat(tensor).view(torch.uint8)
    if data.storage_offset() % 8:
        data = data.clone()  # 64-bit words begin at a multiple of 8 bytes
    row = 8 * _PERIOD
    whole = data.numel() // row * row
    rest = torch.nn.functional.pad(data[whole:], (0, row - data.numel() + whole)).view(1, row).view(torch.int64)
    words = data[:whole].view(-1, row).view(torch.int64)
    return ((words.sum(0) + rest[0]) * multipliers(_PERIOD, data.device)).sum()


@cache
def multipliers(count: int, device: torch.device) -> torch.Tensor:
    """Random odd numbers ``[count]`` int64, the same in every run."""
    drawn = torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(0))
    return (drawn * 2 + 1).to(device)


def _kind(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def _mark(tensor: torch.Tensor) -> list[int]:
    return _marks([tensor], [not tensor.is_inference()])


def _marks(tensors: Sequence[torch.Tensor], counted: Sequence[bool]) -> list[int]:
    """Addresses of tensors, and how often each was written to where PyTorch counts it. Called at every step."""
    return [*map(torch.Tensor.data_ptr, tensors), *map(version, compress(tensors, counted))]


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """All numbers of a tensor, ``[N]`` and contiguous; without a copy where they lie densely in any order.

    It keeps the memory alive, not the tensor.
    """
    data = tensor.data
    if data.is_contiguous():
        return data.view(-1)
    order = sorted(range(data.dim()), key=data.stride, reverse=True)
    return data.permute(order).reshape(-1)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers of a tensor as whole numbers ``[N]``, so that equal means equal bits: NaN too."""
    flat = _flat(tensor).contiguous()
    return flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(flat.element_size(), torch.int64))


def _sample_view(tensor: torch.Tensor) -> torch.Tensor:
    flat = _flat(tensor)
    step = max(flat.numel() // SAMPLE, 1)
    return flat[:: step + (step % 2 == 0 and step > 1)]  # an odd distance meets every column of a matrix in turn


def _sample_views(tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Views of a few numbers of each tensor, by dtype and device."""
    groups: dict[Any, list[torch.Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            groups.setdefault((tensor.dtype, tensor.device), []).append(_sample_view(tensor))
    return list(groups.values())


def _joined(groups: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    return [_bits(torch.cat(views)) for views in groups]


def _differ(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a != b).any()
