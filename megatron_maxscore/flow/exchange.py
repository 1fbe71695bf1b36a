"""The collectives of ranks that solve one problem together.

All ranks of a process group run the same code. They sum counts over the ranks, and every rank
receives a few rows from every other rank. From these data all ranks take the same decisions. A
single rank exchanges nothing and takes the same decisions, too.

Shape letters: see :mod:`megatron_maxscore`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_maxscore.errors import LostRankError
from megatron_maxscore.flow.problem import IntArray

_Result = TypeVar("_Result")
# Counts below this are sent two to an int32.
_PACKED = 1 << 16


class Exchange:
    """One rank alone; the base of exchanges between ranks.

    Attributes:
        size: R.
        rank: this rank among them.
        rounds: collectives so far.
        sent: bytes this rank has contributed to them.
    """

    size = 1
    rank = 0
    rounds = 0
    sent = 0

    def gather(self, payload: bytes, sizes: list[int] | None = None, *, phase: str) -> list[bytes]:
        """Return every rank's bytes, in rank order. One collective.

        Args:
            payload: this rank's bytes.
            sizes: how many bytes each rank has; None if all have equally many.
            phase: what is exchanged, for error messages.

        Raises:
            LostRankError: another rank did not take part within the group's timeout.
        """
        return [payload]

    def sum(self, counts: list[np.ndarray], below: int, *, phase: str) -> list[np.ndarray]:
        """Return counts summed over the ranks. One collective.

        Args:
            counts: integer arrays of the same shapes on every rank, >= 0.
            below: all sums are smaller than this.
            phase: what is exchanged, for error messages.

        Raises:
            LostRankError: another rank did not take part within the group's timeout.
        """
        return counts

    def gather_tensor(self, own: Tensor, *, phase: str) -> Tensor:
        """Return every rank's tensor, one after the other along the first dimension.

        One collective on the tensor's device, which the host does not wait for.

        Args:
            own: this rank's, contiguous and of the same shape on every rank.
            phase: what is exchanged, for error messages.
        """
        return own

    def sum_tensor(self, counts: Tensor, *, phase: str) -> Tensor:
        """Sum a tensor over the ranks in its place, and return it.

        One collective on the tensor's device, which the host does not wait for.

        Args:
            counts: integers, contiguous and of the same shape on every rank.
            phase: what is exchanged, for error messages.
        """
        return counts

    def same(self, compute: Callable[[], _Result]) -> _Result:
        """Return what is computed from data that all ranks have alike."""
        return compute()


class GroupExchange(Exchange):
    """Ranks of a process group, gloo or NCCL."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.size, self.rank = group.size(), group.rank()
        is_nccl = dist.get_backend(group) == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if is_nccl else "cpu"

    def gather(self, payload: bytes, sizes: list[int] | None = None, *, phase: str) -> list[bytes]:
        """See the base class; shorter payloads are filled up to the longest."""
        sizes = [len(payload)] * self.size if sizes is None else sizes
        longest = max(sizes)
        if longest == 0:
            return [b""] * self.size
        own = torch.frombuffer(bytearray(payload.ljust(longest, b"\0")), dtype=torch.uint8)
        everyone = torch.empty(self.size * longest, dtype=torch.uint8, device=self.device)
        with self._round(phase, longest):
            _all_gather(everyone, own.to(self.device), self.group)
            data = everyone.cpu().numpy().tobytes()
        return [data[r * longest : r * longest + size] for r, size in enumerate(sizes)]

    def gather_tensor(self, own: Tensor, *, phase: str) -> Tensor:
        """See the base class."""
        everyone = own.new_empty((self.size * own.shape[0], *own.shape[1:]))
        with self._round(phase, own.numel() * own.element_size()):
            _all_gather(everyone, own, self.group)
        return everyone

    def sum_tensor(self, counts: Tensor, *, phase: str) -> Tensor:
        """See the base class."""
        with self._round(phase, counts.numel() * counts.element_size()):
            dist.all_reduce(counts, group=self.group)
        return counts

    def sum(self, counts: list[np.ndarray], below: int, *, phase: str) -> list[np.ndarray]:
        """See the base class."""
        flat = np.concatenate([part.ravel() for part in counts])
        sent = pack(flat, below)
        tensor = torch.from_numpy(sent).to(self.device)
        with self._round(phase, sent.nbytes):
            dist.all_reduce(tensor, group=self.group)
            received = tensor.cpu().numpy()
        return split_like(unpack(received, flat.size, below), counts)

    @contextlib.contextmanager
    def _round(self, phase: str, size: int) -> Iterator[None]:
        self.rounds += 1
        self.sent += size
        try:
            yield
        except RuntimeError as error:
            where = f"round {self.rounds} of flow.solve, rank {self.rank} of {self.size}"
            cause = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise LostRankError(phase, where, cause) from error


def _all_gather(everyone: Tensor, own: Tensor, group: Any) -> None:
    # torch 2.14 renamed the function. It is looked up at every call, since somebody may wrap it
    # after this module is imported.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(everyone, own, group=group)


def pack(flat: np.ndarray, below: int) -> np.ndarray:
    """Return counts as the integers that are sent: two to an int32 where their sums are small."""
    if below >= 1 << 31:
        return flat.astype(np.int64)
    if below >= _PACKED:
        return flat.astype(np.int32)
    halves = np.zeros(flat.size + flat.size % 2, np.uint32)
    halves[: flat.size] = flat
    # Sums stay below 2**16, so nothing is carried from one half into the other.
    return (halves[::2] | halves[1::2] << np.uint32(16)).view(np.int32)


def unpack(sent: np.ndarray, count: int, below: int) -> IntArray:
    """Undo :func:`pack`."""
    if below >= _PACKED:
        return sent.astype(np.int64)
    bits = sent.view(np.uint32)
    flat = np.empty(2 * bits.size, np.int64)
    flat[::2], flat[1::2] = bits & np.uint32(0xFFFF), bits >> np.uint32(16)
    return flat[:count]


def split_like(flat: np.ndarray, counts: list[np.ndarray]) -> list[np.ndarray]:
    """Cut a flat array into arrays of the given shapes and dtypes."""
    ends = np.cumsum([part.size for part in counts])[:-1]
    return [
        piece.reshape(part.shape).astype(part.dtype)
        for piece, part in zip(np.split(flat, ends), counts, strict=True)
    ]


def exchange_of(group: Any) -> Exchange:
    """Return the exchange of a process group; None and groups of one rank need none.

    An argument that is an exchange already is returned as it is. Simulated ranks use this.
    """
    if isinstance(group, Exchange):
        return group
    return Exchange() if group is None or group.size() == 1 else GroupExchange(group)
