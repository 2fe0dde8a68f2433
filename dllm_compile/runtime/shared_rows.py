"""All rows of logits on a CPU, in memory that callers read too.

Logits of a whole vocabulary are large (1 GB for 2,112 tokens of LLaDA in float32), and to copy them takes as long as a
step of a few rows. So what is handed out is the very memory that keeps them between steps, until somebody writes into
it, by whatever way: the writer gets memory of his own (PyTorch's copy-on-write storages). All rows that a head has
computed at once are not copied at all: its output is kept as it is.

A step that computes some rows writes them in place, if no caller holds an earlier result. A loop mostly holds the last
one while it asks for the next: then the rows go into a second memory, all of them the first time, later only those
written since.

numpy, DLPack and compiled code ask for memory to write into even where they read. A caller who was seen to do so gets
copies in memory that is used again; see :mod:`.output_buffers`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from dllm_compile.compat import can_share_until_written, is_shared_until_written, shared_until_written

from .output_buffers import OutputBuffers, is_free, over


def can_share(device: torch.device) -> bool:
    """Whether PyTorch notices every write into memory on a device that several tensors share."""
    return device.type == "cpu"


class _Handed:
    """A tensor that was handed out; the caller holds a second tensor over the same storage."""

    def __init__(self, own: torch.Tensor) -> None:
        self.tensor = shared_until_written(own)
        self.storage = self.tensor.untyped_storage()

    def written(self) -> bool:
        """Whether somebody asked for memory to write into, and so has memory of his own."""
        return not is_shared_until_written(self.tensor)


class _Memory:
    """All rows, and what was handed out of them.

    Attributes:
        own: the rows ``[B, S, ...]``, contiguous; no caller can write into them.
        handed: tensors that share this memory, until somebody writes into them.
    """

    def __init__(self, own: torch.Tensor) -> None:
        self.own = own
        self.handed: list[_Handed] = []

    def is_held(self) -> bool:
        """Whether a caller still holds a tensor that shares this memory; forgets the others."""
        self.handed = [each for each in self.handed if not (each.written() or is_free(each))]
        return bool(self.handed)

    def hand_out(self) -> torch.Tensor:
        self.handed.append(_Handed(self.own))
        return self.handed[-1].tensor.detach()


class SharedRows:
    """All rows of one value, up to date, and tensors that share them.

    Args:
        shape: ``[B, S, ...]``.
        dtype: of the value.

    Attributes:
        memory: the one that is up to date, and a second one.
        behind: ``[B, S]`` bool, rows that the second lacks.
        copies: what a caller gets who was seen to write.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.shape, self.dtype = tuple(shape), dtype
        self.memory: list[_Memory] = []
        self.behind = torch.zeros(self.shape[:2], dtype=torch.bool)
        self.copies: OutputBuffers | None = None

    @property
    def rows(self) -> torch.Tensor:
        """All rows ``[B, S, ...]``, not to be written into; zero where none was put so far."""
        if not self.memory:
            with torch.inference_mode(False):  # a later call may write to it outside of inference mode
                self.memory = [_Memory(torch.zeros(self.shape, dtype=self.dtype))]
        return self.memory[0].own

    @property
    def nbytes(self) -> int:
        """Bytes of all memory."""
        return sum(each.own.nbytes for each in self.memory) + (self.copies.bytes() if self.copies else 0)

    def put_all(self, value: torch.Tensor) -> None:
        """Keep ``value`` ``[B or 1, S, ...]`` as it is, without a copy where it is contiguous and has a storage of its
        own. Whoever else holds it may write into it.
        """
        self._look()
        self.memory = [_Memory(_kept(value.detach(), self.shape, self.dtype))]

    def put(self, fresh: torch.Tensor, index: torch.Tensor) -> None:
        """Put some rows in the place of earlier ones.

        Args:
            fresh: ``[B or 1, K, ...]``.
            index: their positions ``[B, K]`` int64, ``S`` for no row.
        """
        self._look()
        given = torch.zeros(self.shape[0], self.shape[1] + 1, dtype=torch.bool).scatter_(1, index, True)[:, :-1]
        into, fresh = self._writable(given), fresh.detach().expand(len(index), *fresh.shape[1:])
        for sequence, numbers in enumerate(index.tolist()):
            for place, begin, end in _runs(numbers, self.shape[1]):
                into[sequence, begin:end].copy_(fresh[sequence, place : place + end - begin])
        self.behind = self.behind | given  # not in place: either may have been made in inference mode

    def hand_out(self) -> torch.Tensor:
        """A tensor with all rows, into which the caller may write without changing anything else."""
        self._look()
        rows = self.rows
        return self.memory[0].hand_out() if self.copies is None else self.copies.copy(rows)

    def of(self, rows: torch.Tensor) -> SharedRows:
        """The same of other ``rows`` ``[B, S, ...]``, in memory of its own."""
        new = SharedRows(rows.shape, rows.dtype)
        new.memory = [_Memory(rows)]
        new.copies = None if self.copies is None else OutputBuffers()
        return new

    def longer(self, tokens: int) -> SharedRows:
        """A copy with rows for ``tokens``; those that are new are zero."""
        with torch.inference_mode(False):
            more = torch.zeros((self.shape[0], tokens, *self.shape[2:]), dtype=self.dtype)
            more[:, : self.shape[1]] = self.rows
        return self.of(more)

    def _look(self) -> None:
        """Hand out copies from now on, if a caller was seen to write."""
        if self.copies is None and any(handed.written() for each in self.memory for handed in each.handed):
            self.copies = OutputBuffers()
        if self.copies is not None:
            self.memory = self.memory[:1]

    def _writable(self, given: torch.Tensor) -> torch.Tensor:
        """Memory with all rows that no caller holds, which takes the first place; rows ``given``, ``[B, S]`` bool, are
        about to be written.
        """
        into = self.rows
        if not self.memory[0].is_held():
            return into
        here, *others = self.memory
        free = next((each for each in others if not each.is_held()), None)
        if free is None:
            with torch.inference_mode(False):
                free = _Memory(here.own.clone())
        else:
            for sequence, numbers in enumerate(self.behind & ~given):
                for _, begin, end in _runs(numbers.nonzero().flatten().tolist(), self.shape[1]):
                    free.own[sequence, begin:end].copy_(here.own[sequence, begin:end])
        self.memory, self.behind = [free, here], torch.zeros_like(given)
        return free.own


def _kept(value: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor ``[B, S, ...]`` with ``value`` in it, in its memory where that can be shared until somebody writes."""
    alike = (tuple(value.shape), value.dtype) == (tuple(shape), dtype) and value.is_contiguous()
    with torch.inference_mode(False):
        if alike and value.untyped_storage().nbytes() == value.nbytes and can_share_until_written(value):
            return over(shared_until_written(value).untyped_storage(), dtype, shape)
        return torch.empty(shape, dtype=dtype).copy_(value)


def _runs(numbers: Sequence[int], none: int) -> Iterator[tuple[int, int, int]]:
    """Place, begin and end of each run of consecutive numbers; ``none`` is left out."""
    begin = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1 or numbers[i] == none:
            if numbers[begin] < none:
                yield begin, numbers[begin], numbers[i - 1] + 1
            begin = i
