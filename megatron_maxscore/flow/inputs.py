"""The arguments of a solve: checked, and brought to arrays.

Shape letters: see :mod:`megatron_maxscore`.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_maxscore.flow import outliers, passes
from megatron_maxscore.flow.agreement import ANY_UNIT
from megatron_maxscore.flow.problem import MAX_EXPERTS, BoolArray, FloatArray, IntArray, maxima

MODES = ("auto", "exact", "bounded")


@dataclass(frozen=True)
class Options:
    """What :func:`~megatron_maxscore.flow.solve` was asked for, besides the scores.

    Attributes:
        topk: experts per token.
        capacity_E: (E,) int64, None where the factor gives it.
        capacity_factor: of an equal share.
        warm_BE: (B, E) float64 prices to start from, None for zeros.
        fill_padding: whether padding rows get experts.
    """

    topk: int
    capacity_E: IntArray | None
    capacity_factor: float
    warm_BE: FloatArray | None
    fill_padding: bool

    def capacities(self, rows_B: IntArray, num_experts: int) -> IntArray:
        """Return (B, E) int64 for problems of so many rows."""
        if self.capacity_E is not None:
            return np.broadcast_to(self.capacity_E, (rows_B.size, num_experts))
        # A capacity above the number of rows makes no difference, and might not be an integer.
        each = [
            math.ceil(min(count * self.topk * self.capacity_factor / num_experts, count))
            for count in rows_B.tolist()
        ]
        return np.repeat(np.array(each, np.int64)[:, None], num_experts, 1)

    def compared(self, rows: Rows, dtype: torch.dtype) -> tuple[Any, ...]:
        """Return what must agree between ranks, in the order of ``agreement.ARGUMENTS``."""
        capacity: Any = self.capacity_E
        if capacity is not None and capacity.min() == capacity.max():
            capacity = int(capacity[0])
        return (
            self.topk, rows.num_experts, rows.counts_B.size, str(dtype).removeprefix("torch."),
            capacity, self.capacity_factor, self.warm_BE, self.fill_padding, "exact",
        )  # fmt: skip


def tensor(name: str, value: Any) -> Tensor:
    """Return a tensor as it is, and an array or nested list as a tensor.

    Raises:
        ValueError: it is none of these; names the argument.
    """
    if isinstance(value, Tensor):
        return value
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        kind = type(value).__name__
        raise ValueError(
            f"{name} must be a tensor, an array or nested lists of numbers, got {kind}"
        ) from None


def count(name: str, value: Any) -> int:
    """Return a whole number.

    Raises:
        ValueError: it is another type, like 2.0 or True; names the argument.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {value!r}") from None


def capacity(value: Any, num_experts: int) -> int | Tensor | None:
    """Return capacities as a whole number or a tensor; None where a factor gives them.

    Raises:
        ValueError: they are something else.
    """
    if value is None:
        return None
    is_single = not isinstance(value, Tensor) and np.ndim(value) == 0
    try:
        # Beyond 62 bits a capacity bounds nothing.
        return min(count("capacity", value), 1 << 62) if is_single else tensor("capacity", value)
    except ValueError:
        raise ValueError(
            f"capacity must be an int or ({num_experts},) int64, got {value}"
        ) from None


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise ValueError(f"{name} must be a number, got {value!r}")
    return float(value)


def check(
    scores: Tensor,
    topk: int,
    capacity_factor: float,
    mode: str,
) -> None:
    """Raise a ValueError if an argument is out of range."""
    if scores.dim() not in (2, 3):
        raise ValueError(f"scores must be (T, E) or (B, S, E), got shape {tuple(scores.shape)}")
    if not scores.is_floating_point():
        raise ValueError(f"scores must be floating point, got {scores.dtype}")
    if not 1 <= topk <= scores.shape[-1]:
        raise ValueError(
            f"topk must lie between 1 and the number of experts {scores.shape[-1]}, got {topk}"
        )
    if scores.shape[-1] > MAX_EXPERTS:
        raise ValueError(f"scores may have at most {MAX_EXPERTS} experts, got {scores.shape[-1]}")
    if scores.dim() == 3 and scores.shape[0] == 0:
        raise ValueError("scores hold no problem: the first dimension of (B, S, E) is 0")
    if not (0 < _number("capacity_factor", capacity_factor) < math.inf):
        raise ValueError(f"capacity_factor must be a positive number, got {capacity_factor}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")


@dataclass(frozen=True)
class Scanned:
    """Scores brought to where they can be computed with, and their ranges."""

    scores_NE: np.ndarray
    low_N: FloatArray
    range_N: FloatArray
    largest_B: FloatArray
    has_bad: bool
    has_forbidden: bool


@dataclass(frozen=True)
class Rows:
    """This rank's rows that take part, and where they were."""

    scores_NE: np.ndarray
    start_B: IntArray
    rows: IntArray | None
    size: int
    is_batch: bool

    @classmethod
    def of(cls, scores: Tensor, valid: Tensor | None, fill_padding: bool) -> Rows:
        """Take the valid rows; if padding gets experts, all rows, with scores of 0 in padding."""
        is_batch = scores.dim() == 3
        batch = scores if is_batch else scores[None]
        num_problems, size, num_experts = batch.shape
        wide = batch if batch.dtype == torch.float64 else batch.float()
        scores_NE = wide.cpu().contiguous().numpy().reshape(-1, num_experts)
        valid_N = _valid_rows(valid, batch.shape[:2] if is_batch else batch.shape[1:2])
        rows: IntArray | None = None
        counts_B = np.full(num_problems, size, np.int64)
        if valid_N is not None and not valid_N.all():
            if fill_padding:
                scores_NE = np.where(valid_N[:, None], scores_NE, scores_NE.dtype.type(0))
            else:
                rows = np.flatnonzero(valid_N)
                counts_B = valid_N.reshape(num_problems, size).sum(1)
                scores_NE = scores_NE[rows]
        return cls(scores_NE, np.concatenate([[0], counts_B.cumsum()]), rows, size, is_batch)

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.scores_NE.shape[1])

    @property
    def counts_B(self) -> IntArray:
        """(B,) int64 rows of each problem."""
        return np.diff(self.start_B)

    def units(self) -> IntArray:
        """Return (B,) exponents that bring float64 scores away from the ends of their range.

        :data:`ANY_UNIT` where all scores are 0, which any exponent suits.
        """
        unit_B = np.zeros(self.start_B.size - 1, np.int64)
        if self.scores_NE.dtype != np.float64 or self.scores_NE.size == 0:
            return unit_B
        size_NE = np.where(np.isfinite(self.scores_NE), np.abs(self.scores_NE), 0.0)
        largest_B = maxima(size_NE.max(1), self.start_B)
        exponent_B = np.frexp(largest_B)[1].astype(np.int64)
        unit_B = np.where(np.abs(exponent_B) > 900, -exponent_B, 0)
        return np.where(largest_B == 0.0, ANY_UNIT, unit_B)

    def scan(self, unit_B: IntArray) -> Scanned:
        """Multiply scores by ``2.0 ** unit`` and find out what there is to know of each row."""
        scores_NE = self.scores_NE
        if ((unit_B != 0) & (unit_B != ANY_UNIT)).any():
            unit_B = np.where(unit_B == ANY_UNIT, 0, unit_B)
            scores_NE = np.ldexp(scores_NE, np.repeat(unit_B, self.counts_B)[:, None])
        low_N, high_N, has_bad, has_forbidden = passes.scan(scores_NE)
        with np.errstate(invalid="ignore"):  # a row without allowed experts is refused
            range_N = high_N - low_N
        largest_B = maxima(np.where(range_N > 0, range_N, 0.0), self.start_B)
        return Scanned(scores_NE, low_N, range_N, largest_B, has_bad, has_forbidden)

    def without_outliers(self, scanned: Scanned, limit_B: FloatArray) -> tuple[Scanned, int]:
        """Scale rows down whose range exceeds their problem's limit; return how many, too."""
        limit_N = np.repeat(limit_B, self.counts_B) if np.isfinite(limit_B).any() else np.inf
        rows_O = np.flatnonzero(scanned.range_N > limit_N)
        if rows_O.size == 0:
            return scanned, 0
        limit_O, range_O = np.broadcast_to(limit_N, scanned.range_N.shape)[rows_O], scanned.range_N
        factor_O = outliers.scaled(range_O[rows_O], limit_O) / range_O[rows_O]
        scores_NE, low_N = scanned.scores_NE.copy(), scanned.low_N.copy()
        range_N = scanned.range_N.copy()
        wide_OE = scores_NE[rows_O].astype(np.float64) * factor_O[:, None]
        scores_NE[rows_O] = wide_OE
        low_O, high_O, *_ = passes.scan(np.ascontiguousarray(scores_NE[rows_O]))
        low_N[rows_O], range_N[rows_O] = low_O, high_O - low_O
        largest_B = maxima(np.where(range_N > 0, range_N, 0.0), self.start_B)
        return (
            dataclasses.replace(
                scanned, scores_NE=scores_NE, low_N=low_N, range_N=range_N, largest_B=largest_B
            ),
            int(rows_O.size),
        )

    def wrong(self, scanned: Scanned, topk: int) -> str:
        """Return what is wrong with the scores, "" if nothing is."""
        if scanned.has_bad:
            is_bad_NE = np.isnan(self.scores_NE) | np.isposinf(self.scores_NE)
            bad = np.flatnonzero(is_bad_NE.any(1))
            return f"scores hold NaN or +inf in {bad.size} tokens, first in {self._name(bad[0])}"
        if scanned.has_forbidden:
            degree_N = (self.scores_NE != -np.inf).sum(1)
            short = np.flatnonzero(degree_N < topk)
            if short.size:
                return (
                    f"{self._name(short[0])} has {int(degree_N[short[0]])} allowed experts but "
                    f"needs topk={topk} ({short.size} such tokens); allow more experts for it"
                )
        return ""

    def _name(self, row: int) -> str:
        index = int(row if self.rows is None else self.rows[row])
        problem = f" of problem {index // self.size}" if self.is_batch else ""
        return f"token {index % self.size}{problem}"

    def spread(self, experts_NK: IntArray) -> IntArray:
        """Return (B, S, K) experts, -1 in rows that do not take part."""
        all_NK = experts_NK
        problems, topk = self.start_B.size - 1, experts_NK.shape[1]
        if self.rows is not None:
            all_NK = np.full((problems * self.size, topk), -1, np.int64)
            all_NK[self.rows] = experts_NK
        return all_NK.reshape(problems, self.size, topk)


def _valid_rows(valid: Tensor | None, shape: torch.Size) -> BoolArray | None:
    if valid is None:
        return None
    check_valid(valid, shape)
    return valid.detach().cpu().numpy().reshape(-1)


def check_valid(valid: Tensor | None, shape: torch.Size) -> None:
    """Raise a ValueError if a mask has another shape or dtype."""
    if valid is not None and (valid.shape != shape or valid.dtype != torch.bool):
        raise ValueError(
            f"valid must be {tuple(shape)} bool, got {tuple(valid.shape)} {valid.dtype}"
        )


def check_capacity(capacity: Tensor, num_experts: int) -> None:
    """Raise a ValueError if a tensor of capacities has another shape or dtype."""
    if capacity.shape != (num_experts,) or capacity.is_floating_point():
        raise ValueError(
            f"capacity must be an int or ({num_experts},) int64, got "
            f"{tuple(capacity.shape)} {capacity.dtype}"
        )


def capacity_of(capacity: int | Tensor | None, num_experts: int) -> IntArray | None:
    """Return the (E,) int64 capacities, None where a factor gives them."""
    if capacity is None:
        return None
    if isinstance(capacity, Tensor):
        check_capacity(capacity, num_experts)
        capacity_E = capacity.detach().cpu().numpy().astype(np.int64)
    else:
        capacity_E = np.full(num_experts, capacity, np.int64)
    if (capacity_E < 0).any():
        raise ValueError(f"capacity must be at least 0, got {int(capacity_E.min())}")
    return capacity_E


def warm_prices(
    warm: Tensor | None, num_problems: int, num_experts: int, is_batch: bool
) -> FloatArray | None:
    """Return the (B, E) float64 prices to start from, None if none were given."""
    shape = (num_problems, num_experts)
    if warm is None:
        return None
    if warm.shape != shape[1:] and not (is_batch and warm.shape == shape):
        either = f" or {shape}" if is_batch else ""
        raise ValueError(f"prices must be {shape[1:]}{either}, got shape {tuple(warm.shape)}")
    warm_BE = warm.detach().to(torch.float64).cpu().numpy()
    if not np.isfinite(warm_BE).all():
        raise ValueError("prices must be finite; start from zeros instead")
    return np.array(np.broadcast_to(warm_BE, shape))
