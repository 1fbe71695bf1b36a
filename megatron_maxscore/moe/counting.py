"""Which passes count: those whose backward pass has run.

A routing pass changes prices and statistics only when its backward pass runs. So passes without
gradients (scoring in training mode), passes whose loss is thrown away, and the first pass of a
checkpointed function change nothing, and a recomputed pass counts once.

Megatron may run a global batch several times before the optimizer takes its step. So at the end of
every attempt :meth:`SolveStatistics.take` hands out what the router has added up in it. That
replaces what an earlier attempt at the same batch left.

All counts are tensors whose memory stays where it is. So a CUDA graph that holds a pass adds to
them whenever it is replayed.

Shape letters: see :mod:`megatron_maxscore`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_maxscore.flow import FlowSolution
from megatron_maxscore.moe.plan import RoutingPlan

_COUNTS = ("solves", "bad_tokens", "lost_tokens", "largest_gap", "values_I")


@dataclass
class Pass:
    """One solve in training, and what it adds if its backward pass runs.

    Attributes:
        prices_E: (E,) float32, the mean over its problems.
        gap: 0-dim float64, the largest of its problems.
        seconds: time that the host spent in the solve.
        bad_T: (T,) bool, tokens whose logits were not finite; None if it is known that there are
            none.
        lost_tokens: tokens that were not sent, since this rank had more than the others expect.
        values_I: (I,) float64 what metrics measured; None if nothing is logged in this iteration.
        has_counted: whether a backward pass has run.
    """

    prices_E: Tensor
    gap: Tensor
    seconds: float
    bad_T: Tensor | None = None
    lost_tokens: int = 0
    values_I: Tensor | None = None
    has_counted: bool = False

    @classmethod
    def of(
        cls,
        solution: FlowSolution,
        seconds: float,
        bad_T: Tensor | None,
        plan: RoutingPlan,
        values_I: Tensor | None,
    ) -> Pass:
        """Return the pass of a solve; arguments are the attributes, and what it gave."""
        assert plan.experts_TK is not None
        return cls(
            prices_E=solution.prices if solution.prices.dim() == 1 else solution.prices.mean(0),
            gap=solution.gap if solution.gap.dim() == 0 else solution.gap.max(),
            seconds=seconds,
            bad_T=bad_T,
            lost_tokens=0 if plan.fits else plan.experts_TK.shape[0],
            values_I=values_I,
        )


@dataclass
class SolveStatistics:
    """What a router's counted passes did.

    Attributes:
        solves: 0-dim int64, how many.
        bad_tokens: 0-dim int64, tokens whose logits were not finite.
        lost_tokens: 0-dim int64, tokens that did not fit into what other ranks expect of this one.
        largest_gap: 0-dim float64.
        values_I: (I,) float64 sums of what metrics measured; 0 where that was not due.
        seconds: of the host in solves; those of a CUDA graph take none.
    """

    solves: Tensor
    bad_tokens: Tensor
    lost_tokens: Tensor
    largest_gap: Tensor
    values_I: Tensor
    seconds: float = 0.0

    @classmethod
    def zeros(cls, device: torch.device, num_values: int) -> SolveStatistics:
        """Return those of no pass.

        Args:
            device: of the scores.
            num_values: I.
        """
        solves, bad, lost = torch.zeros(3, dtype=torch.int64, device=device).unbind()
        values = torch.zeros(1 + num_values, dtype=torch.float64, device=device)
        return cls(solves, bad, lost, values[0], values[1:])

    def add(self, pass_: Pass) -> None:
        """Count a pass, in place."""
        self.solves += 1
        self.seconds += pass_.seconds
        if pass_.lost_tokens:
            self.lost_tokens += pass_.lost_tokens
        # Exact mode solves on the host.
        gap = pass_.gap.to(self.largest_gap)
        torch.maximum(self.largest_gap, gap, out=self.largest_gap)
        if pass_.bad_T is not None:
            self.bad_tokens += pass_.bad_T.sum()
        if pass_.values_I is not None:
            self.values_I += pass_.values_I

    def take(self) -> SolveStatistics:
        """Return a copy and begin anew, in place."""
        taken = copy.copy(self)
        for name in _COUNTS:
            setattr(taken, name, getattr(self, name).clone())
        self.clear()
        return taken

    def clear(self) -> None:
        """Begin anew, in place."""
        for name in _COUNTS:
            getattr(self, name).zero_()
        self.seconds = 0.0

    def to(self, device: torch.device) -> SolveStatistics:
        """Return it on another device."""
        if self.solves.device == device:
            return self
        if self.solves.is_meta:
            return SolveStatistics.zeros(device, self.values_I.numel())
        moved = {name: getattr(self, name).to(device) for name in _COUNTS}
        return SolveStatistics(**moved, seconds=self.seconds)

    def forget_bad(self) -> None:
        """Begin to count bad and lost tokens anew, in place."""
        self.bad_tokens.zero_()
        self.lost_tokens.zero_()
