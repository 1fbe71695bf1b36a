"""Bounded mode on the device: the launches, and the buffers between them.

Every launch and every size follows from the shape of the scores, so nothing is copied to the host
and a CUDA graph can hold a solve. Decides as :mod:`prices` and :mod:`rounds` do, so the experts are
theirs, bit for bit.

Shape letters: T tokens, E experts, K experts per token, G programs.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor

from megatron_maxscore.flow import prices as price_sweeps
from megatron_maxscore.flow import rounds
from megatron_maxscore.flow import sweeps as sweep_rules
from megatron_maxscore.flow.buckets import ALL_BUCKETS, WINDOW_BUCKETS
from megatron_maxscore.flow.device.kernels import (
    all_rows,
    contested,
    layout,
    moves,
    results,
    sweeps,
)
from megatron_maxscore.flow.sample import wanted_sample
from megatron_maxscore.flow.solution import ROUNDING, FlowSolution
from megatron_maxscore.flow.spread import spread_table

# Entries of the score matrix that a program takes at a time, and programs at most.
_TILE = 512
_MOST_PROGRAMS = 384
# Counts that are looked at at a time when price steps are read off them.
_STEP_COUNTS = 1024
# Entries of the cost matrix that the rounds hold in registers.
_COSTS = 16384
_CONTESTED_TILE = 512
# Multiplications must not be fused into additions: decisions would differ from the CPU's. Without a
# number of registers the assembler now and then spills a few for the sake of more programs.
_EXACT: dict[str, Any] = {"enable_fp_fusion": False}
PARALLEL: dict[str, Any] = {**_EXACT, "num_warps": 4, "maxnreg": 168}
SERIAL: dict[str, Any] = {**_EXACT, "num_warps": 8, "maxnreg": 255}


@dataclass(frozen=True)
class Shape:
    """What a solve's launches follow from.

    Attributes:
        tokens: rows of the scores.
        experts: their columns.
        topk: experts per token.
        may_be_loose: whether capacities may leave slack.
    """

    tokens: int
    experts: int
    topk: int
    may_be_loose: bool

    @property
    def units(self) -> int:
        """Assignments."""
        return self.tokens * self.topk

    @property
    def sample(self) -> int:
        """Rows of a sample, 0 where there are too few rows for one."""
        wanted = wanted_sample(self.experts, self.topk)
        return wanted if self.tokens >= 4 * wanted else 0

    @property
    def passes(self) -> int:
        """Launches of passes over the scores."""
        return 1 + rounds.SAMPLED_PASSES if self.sample else price_sweeps.MAX_PASSES

    @property
    def buckets(self) -> int:
        """Buckets of bids for each expert."""
        return WINDOW_BUCKETS if self.sample else ALL_BUCKETS

    @property
    def block_e(self) -> int:
        """Experts, padded."""
        return int(triton.next_power_of_2(self.experts))

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return max(1, _TILE // self.block_e)

    @property
    def programs(self) -> int:
        """Programs of a pass."""
        return min(_MOST_PROGRAMS, -(-self.tokens // self.rows))

    def thresholds(self, units: int, aim: float) -> dict[str, int]:
        """Return units of overflow that sweeps compare with, in 1/1024."""
        return {
            "aim": math.floor(aim * 1024),
            "near": math.floor(sweep_rules.NEAR * units * 1024),
            "too_much": math.floor(sweep_rules.TOO_MUCH * units * 1024),
        }

    def tile(self) -> dict[str, int]:
        """Return the constants of kernels that work on tiles of rows."""
        return {"NUM_EXPERTS": self.experts, "BLOCK_E": self.block_e, "ROWS": self.rows}

    def choice(self) -> dict[str, int]:
        """Return the constants of kernels that choose experts."""
        bits = self.block_e.bit_length() - 1
        return {**self.tile(), "TOPK": self.topk, "TIE_BITS": bits}

    def steps(self, buckets: int) -> dict[str, int]:
        """Return the constants of price steps."""
        block_h = triton.next_power_of_2(buckets)
        return {"BLOCK_H": block_h, "CHUNK": min(_STEP_COUNTS // block_h, self.block_e)}

    def moves(self) -> dict[str, int]:
        """Return the constants of the rounds among contested rows."""
        nodes = triton.next_power_of_2(self.experts + self.may_be_loose)
        classes = rounds.num_classes_of(self.units, self.experts)
        return {
            "NUM_EXPERTS": self.experts,
            "TOPK": self.topk,
            "BLOCK_N": nodes,
            "NODE_BITS": nodes.bit_length() - 1,
            "CLASSES": classes,
            "CHUNK": max(1, min(nodes, _COSTS // (classes * nodes))),
            "TILE": _CONTESTED_TILE,
        }

    def all_moves(self) -> dict[str, int]:
        """Return the constants of the rounds over all rows."""
        constants = {**self.moves(), **self.tile()}
        del constants["TILE"]
        return constants


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """Return how many programs make rounds over all rows."""
    if device.type != "cuda":
        return 2  # Triton's interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache(maxsize=64)
def _spread(num_experts: int, device: torch.device) -> Tensor:
    """Return the table of :mod:`spread` on a device; made once, before a graph is captured."""
    return torch.from_numpy(spread_table(num_experts).astype(np.int32)).to(device)


def solve_bounded(
    scores_TE: Tensor,
    topk: int,
    capacity_E: Tensor,
    prices_E: Tensor,
    is_tight: bool | None,
    tolerance: float = 0.0,
) -> FlowSolution:
    """Solve one rank's problem in bounded mode without a copy to the host.

    Args:
        scores_TE: (T, E) float32, bfloat16 or float16, contiguous; what is not finite counts as 0.
        topk: K < E.
        capacity_E: (E,) int64 on the same device, at most T each, enough for all assignments.
        prices_E: (E,) float32 on the same device.
        is_tight: whether the capacities sum to exactly T * K; None if that is not known.
        tolerance: relative gap that counts as converged.
    """
    tokens, experts = scores_TE.shape
    shape = Shape(tokens, experts, topk, not is_tight)
    launcher = _Launcher(shape, scores_TE.device)
    launcher.run(scores_TE, capacity_E, prices_E, tolerance)
    return launcher.solution()


def _bits_of(value: float) -> int:
    """Return a float64 as the integer of the same bits; kernels' own floats are float32."""
    return int(np.float64(value).view(np.int64))


class _Launcher:
    """Buffers of one solve, and the kernels in order."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        tokens, experts, programs = shape.tokens, shape.experts, shape.programs
        most_buckets = ALL_BUCKETS if shape.sample else shape.buckets
        constants = shape.moves()
        int32 = functools.partial(torch.empty, dtype=torch.int32, device=device)
        int64 = functools.partial(torch.empty, dtype=torch.int64, device=device)
        float64 = functools.partial(torch.empty, dtype=torch.float64, device=device)
        self.state = int64(layout.state_size(experts))
        self.counts = int32(experts + layout.GAPS.value + experts * shape.buckets)
        self.sample_counts = int32(experts + layout.GAPS.value + experts * most_buckets)
        self.partial = float64(3 * programs)
        self.near, self.slot = int32(layout.NEAR_SIZE.value * tokens), int32(tokens)
        self.x_TE = torch.empty((tokens, experts), dtype=torch.int8, device=device)
        self.claims = int32(tokens)
        self.keys = int64(constants["CLASSES"] * experts * experts)
        self.scratch = int32((3 + constants["CLASSES"]) * constants["BLOCK_N"])
        self.experts_TK = int64((tokens, shape.topk))
        self.prices_E = torch.empty(experts, dtype=torch.float32, device=device)
        self.loads_RE, self.values = int64((1, experts)), float64(3)
        self.converged = torch.empty((), dtype=torch.bool, device=device)

    def run(self, scores_TE: Tensor, capacity_E: Tensor, warm_E: Tensor, tolerance: float) -> None:
        """Launch all kernels."""
        shape, grid = self.shape, (self.shape.programs,)
        spread_CE = _spread(shape.experts, self.device)
        state, counts, partial = self.state, self.counts, self.partial
        block_g = triton.next_power_of_2(shape.programs)
        size = layout.state_size(shape.experts)
        sweeps.scan[grid](
            scores_TE, partial, state, counts, shape.tokens, shape.programs,
            **shape.tile(), BUCKETS=shape.buckets, NUM_STATE=triton.next_power_of_2(size),
            **PARALLEL,
        )  # fmt: skip
        aim = price_sweeps.aim_of(shape.units, shape.experts, is_bounded=True)
        of_all = shape.thresholds(shape.units, aim)
        for index in range(shape.passes):
            sweeps.price_pass[grid](
                scores_TE, warm_E, capacity_E, spread_CE, partial, state, counts, shape.tokens,
                **of_all, lost=int(price_sweeps.LOST * shape.units), max_passes=shape.passes,
                num_programs=shape.programs, **shape.choice(), BUCKETS=shape.buckets,
                **shape.steps(shape.buckets), BLOCK_G=block_g, IS_FIRST=index == 0,
                CAN_SAMPLE=bool(shape.sample), **PARALLEL,
            )  # fmt: skip
            if index == 0 and shape.sample:
                self._sample(scores_TE, capacity_E)
        contested.nearest[grid](
            scores_TE, spread_CE, state, self.near, self.slot, self.x_TE, self.claims,
            shape.tokens, shape.programs, **shape.choice(), **PARALLEL,
        )  # fmt: skip
        moves.move[(1,)](
            capacity_E, state, self.near, self.slot, self.x_TE, self.claims, self.keys,
            self.scratch, shape.tokens, **shape.moves(), **SERIAL,
        )  # fmt: skip
        all_rows.move_all[(_multiprocessors(self.device),)](
            scores_TE, capacity_E, spread_CE, state, self.near, self.slot, self.x_TE, self.claims,
            self.keys, self.scratch, shape.tokens, **shape.all_moves(), **SERIAL,
        )  # fmt: skip
        results.conclude[grid](
            scores_TE, capacity_E, state, self.x_TE, partial, self.experts_TK, self.prices_E,
            self.loads_RE, self.values, self.converged.view(torch.int8), shape.tokens,
            shape.programs, _bits_of(max(tolerance, ROUNDING)), **shape.tile(),
            TOPK=shape.topk, BLOCK_G=block_g, **PARALLEL,
        )  # fmt: skip

    def _sample(self, scores_TE: Tensor, capacity_E: Tensor) -> None:
        shape = self.shape
        units = shape.sample * shape.topk
        sweeps.sample_sweeps[(1,)](
            scores_TE, capacity_E, self.state, self.sample_counts, shape.tokens, shape.sample,
            **shape.thresholds(units, price_sweeps.SAMPLE_AIM * units),
            max_passes=price_sweeps.SAMPLE_PASSES, passes_after=rounds.SAMPLED_PASSES,
            **shape.choice(), **shape.steps(ALL_BUCKETS), **SERIAL,
        )  # fmt: skip

    def solution(self) -> FlowSolution:
        """Return what the kernels have written."""
        objective, bound, gap = self.values.unbind()
        return FlowSolution(
            experts=self.experts_TK,
            prices=self.prices_E,
            objective=objective,
            bound=bound,
            gap=gap,
            converged=self.converged,
            loads=self.loads_RE,
            rounds=0,
            bad=self.state[layout.BAD.value],
        )
