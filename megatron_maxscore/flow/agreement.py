"""The first exchange of a solve: ranks compare their arguments and raise the same errors.

If one rank raised alone, the others would wait for it in the next collective. Each rank therefore
sends its arguments together with a description of what is wrong with them, and then all ranks raise
the same error. The size of this exchange does not depend on the arguments.

Shape letters: see :mod:`megatron_maxscore`.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_maxscore.flow import outliers
from megatron_maxscore.flow.exchange import Exchange
from megatron_maxscore.flow.problem import FloatArray, IntArray

# Arguments that must agree, in the order in which they are compared.
ARGUMENTS = (
    "topk", "number of experts", "number of problems", "dtype", "capacity", "capacity_factor",
    "prices", "fill_padding", "mode",
)  # fmt: skip
# A unit (see :attr:`Own.unit_B`) of scores that are all 0.
ANY_UNIT = 1 << 20
_TEXT_BYTES = 256
# The counts of so many problems fit into the first exchange. More problems need a second one.
_INLINE = 32
_DIGEST = 8
_SHOWN = 24
# Words sent for each problem: its number of rows, their largest range, the unit, and the rows in
# each class of ranges, two classes to a word.
_WORDS = 3 + outliers.CLASSES // 2


@dataclass(frozen=True)
class Own:
    """What one rank sends in the first exchange.

    Attributes:
        arguments: one value for each of :data:`ARGUMENTS`; arrays are compared by their digest.
        error: what is wrong with this rank's arguments; "" if they are fine.
        bad: what is wrong with its scores; "" if they are fine. Raised only if arguments agree.
        has_forbidden: whether any arc of its rows is forbidden.
        rows_B: (B,) int64, the number of its rows in each problem.
        largest_B: (B,) float64, the largest range of these rows, in the unit of ``unit_B``.
        unit_B: (B,) int64, ranges are given in scores times ``2.0 ** unit_B``.
        classes_BX: (B, X) uint32, the number of its rows in each class of ranges, see
            :mod:`outliers`.
    """

    arguments: tuple[Any, ...]
    error: str
    bad: str
    has_forbidden: bool
    rows_B: IntArray
    largest_B: FloatArray
    unit_B: IntArray
    classes_BX: NDArray

    @classmethod
    def wrong(cls, error: str) -> Own:
        """Return what a rank with wrong arguments sends."""
        none_B = np.zeros(0, np.int64)
        classes_BX = np.zeros((0, outliers.CLASSES), np.uint32)
        return cls(
            ("?",) * len(ARGUMENTS), error, "", False, none_B, none_B.astype(float), none_B,
            classes_BX,
        )  # fmt: skip


@dataclass(frozen=True)
class Agreed:
    """What all ranks know after the first exchange.

    Attributes:
        has_forbidden: whether any arc of any rank is forbidden.
        rows_RB: (R, B) int64.
        largest_B: (B,) float64, in scores times ``2.0 ** unit_B``: the largest row range, or a
            bound on it after outliers are scaled down.
        unit_B: (B,) int64.
        limit_B: (B,) float64; rows with a larger range are outliers. inf if there are none.
    """

    has_forbidden: bool
    rows_RB: IntArray
    largest_B: FloatArray
    unit_B: IntArray
    limit_B: FloatArray


def agree(exchange: Exchange, own: Own) -> Agreed:
    """Exchange arguments and counts. One round, two with more than 32 problems.

    Raises:
        ValueError: on every rank the same, if any rank's arguments or scores are wrong, or if
            arguments differ; names rank and values.
    """
    if exchange.size == 1:
        if own.error or own.bad:
            raise ValueError(own.error or own.bad)
        return _agreed([_counts(own)], own.rows_B.size, own.has_forbidden)
    headers = exchange.gather(_header(own), phase="arguments")
    has_forbidden, counts = exchange.same(lambda: _compared(headers))
    if own.rows_B.size > _INLINE:
        counts = exchange.gather(_counts(own), phase="problem sizes")
    return exchange.same(lambda: _agreed(counts, own.rows_B.size, has_forbidden))


def _compared(headers: list[bytes]) -> tuple[bool, list[bytes]]:
    """Return whether any rank has forbidden arcs, and all counts; raise what is wrong."""
    received = [_Header.read(data) for data in headers]
    for rank, header in enumerate(received):
        if header.error and not header.is_bad:
            raise ValueError(f"{header.error} (on rank {rank} of the group)")
    for index, name in enumerate(ARGUMENTS):
        for rank, header in enumerate(received):
            if header.digests[index] != received[0].digests[index]:
                raise ValueError(
                    f"{name} differs between the ranks of the group: "
                    f"{received[0].shown[index]} on rank 0, {header.shown[index]} on rank {rank}; "
                    "pass the same on every rank"
                )
    for rank, header in enumerate(received):
        if header.error:
            raise ValueError(f"{header.error} (on rank {rank} of the group)")
    return any(header.has_forbidden for header in received), [h.counts for h in received]


def _agreed(counts: list[bytes], num_problems: int, has_forbidden: bool) -> Agreed:
    table_RYB = np.stack([np.frombuffer(data, np.int64).reshape(_WORDS, -1) for data in counts])
    table_RYB = table_RYB[:, :, :num_problems]
    rows_RB, unit_RB = table_RYB[:, 0], table_RYB[:, 2]
    largest_RB = np.ascontiguousarray(table_RYB[:, 1]).view(np.float64)
    # The rank with the largest scores has the smallest exponent, and all ranks adopt it.
    unit_B = np.where(rows_RB > 0, unit_RB, ANY_UNIT).min(0)
    unit_B = np.where(unit_B == ANY_UNIT, 0, unit_B)
    shift_RB = np.clip(unit_B - unit_RB, -4000, 4000)
    largest_B = np.ldexp(largest_RB, shift_RB).max(0)
    limit_B = np.full(num_problems, np.inf)
    # Each rank counts ranges in its own unit, so counts can be added only if all units are equal.
    # They differ only for scores near the ends of float64's range. No row is scaled down then.
    if (shift_RB * (rows_RB > 0) * (unit_RB != ANY_UNIT) == 0).all():
        words_RBY = np.ascontiguousarray(table_RYB[:, 3:].transpose(0, 2, 1))
        classes_BX = words_RBY.view(np.uint32).astype(np.int64).sum(0)
        limit_B, largest_B = outliers.limits(classes_BX, largest_B)
    return Agreed(has_forbidden, rows_RB, largest_B, unit_B, limit_B)


@dataclass(frozen=True)
class _Header:
    error: str
    is_bad: bool
    has_forbidden: bool
    digests: list[bytes]
    shown: list[str]
    counts: bytes

    @classmethod
    def read(cls, data: bytes) -> _Header:
        is_bad, has_forbidden, length = struct.unpack_from("<BBH", data)
        text = data[4 : 4 + length].decode(errors="replace")
        place = 4 + _TEXT_BYTES
        digests, shown = [], []
        for _ in ARGUMENTS:
            digests.append(data[place : place + _DIGEST])
            shown.append(data[place + _DIGEST : place + _DIGEST + _SHOWN].rstrip(b"\0").decode())
            place += _DIGEST + _SHOWN
        return cls(text, bool(is_bad), bool(has_forbidden), digests, shown, data[place:])


def _header(own: Own) -> bytes:
    text = (own.error or own.bad).encode()[:_TEXT_BYTES]
    parts = [
        struct.pack("<BBH", bool(own.bad and not own.error), own.has_forbidden, len(text)),
        text.ljust(_TEXT_BYTES, b"\0"),
    ]
    for value in own.arguments:
        is_array = isinstance(value, np.ndarray)
        data = value.tobytes() + str(value.shape).encode() if is_array else repr(value).encode()
        shown = "other values" if is_array else str(value)
        parts.append(hashlib.blake2b(data, digest_size=_DIGEST).digest())
        parts.append(shown.encode()[:_SHOWN].ljust(_SHOWN, b"\0"))
    inline = _counts(own) if own.rows_B.size <= _INLINE else b""
    parts.append(inline.ljust(_WORDS * 8 * _INLINE, b"\0"))
    return b"".join(parts)


def _counts(own: Own) -> bytes:
    problems = own.rows_B.size
    table_YB = np.zeros((_WORDS, max(_INLINE, problems)), np.int64)
    table_YB[0, :problems] = own.rows_B
    table_YB[1, :problems] = own.largest_B.astype(np.float64).view(np.int64)
    table_YB[2, :problems] = own.unit_B
    table_YB[3:, :problems] = np.ascontiguousarray(own.classes_BX).view(np.int64).T
    return table_YB.tobytes()
