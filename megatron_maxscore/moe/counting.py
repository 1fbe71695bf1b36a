"""Which passes count: those whose backward pass has run.

A routing pass changes prices and statistics only when its backward pass runs. So passes without
gradients (scoring in training mode), passes whose loss is thrown away, and the first pass of a
checkpointed function change nothing, and a recomputed pass counts once.

A global batch may be run again before its optimizer step. What a router has added up since the
batch began is therefore closed at the end of every attempt (:meth:`SolveStatistics.take`), which
replaces what an earlier attempt has left.

Shape letters: see :mod:`megatron_maxscore`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_maxscore.flow import FlowSolution
from megatron_maxscore.flow.places import is_device
from megatron_maxscore.moe.plan import RoutingPlan


@dataclass
class Pass:
    """One solve in training, and what it adds if its backward pass runs.

    Attributes:
        prices_E: (E,) float32, the mean over its problems.
        gap: 0-dim float64, the largest of its problems.
        seconds: of the host in it.
        bad_T: (T,) bool, tokens whose logits were not finite; None if it is known that none is.
        lost_tokens: tokens that did not fit into what other ranks expect of this one.
        values: what metrics measured; empty where they are not due.
        has_counted: whether a backward pass has run.
    """

    prices_E: Tensor
    gap: Tensor
    seconds: float
    bad_T: Tensor | None = None
    lost_tokens: int = 0
    values: dict[str, Tensor] = field(default_factory=dict)
    has_counted: bool = False

    @classmethod
    def of(
        cls,
        solution: FlowSolution,
        seconds: float,
        bad_T: Tensor | None,
        plan: RoutingPlan,
        values: dict[str, Tensor],
    ) -> Pass:
        """Return the pass of a solve; arguments are the attributes, and what it gave."""
        assert plan.experts_TK is not None
        return cls(
            prices_E=solution.prices if solution.prices.dim() == 1 else solution.prices.mean(0),
            gap=solution.gap if solution.gap.dim() == 0 else solution.gap.max(),
            seconds=seconds,
            bad_T=bad_T,
            lost_tokens=0 if plan.fits else plan.experts_TK.shape[0],
            values=values,
        )


@dataclass
class SolveStatistics:
    """What a router's counted passes did.

    Attributes:
        solves: how many.
        seconds: of the host in them.
        largest_gap: a 0-dim tensor where it is still on the device.
        bad_tokens: tokens whose logits were not finite, likewise.
        lost_tokens: tokens that did not fit into what other ranks expect of this one.
        values: sums of what metrics measured.
        measured: how many passes metrics measured.
    """

    solves: int = 0
    seconds: float = 0.0
    largest_gap: float | Tensor = 0.0
    bad_tokens: int | Tensor = 0
    lost_tokens: int = 0
    values: dict[str, Tensor] = field(default_factory=dict)
    measured: int = 0

    def add(self, pass_: Pass) -> None:
        """Count a pass."""
        self.solves += 1
        self.seconds += pass_.seconds
        self.lost_tokens += pass_.lost_tokens
        self._see_gap(pass_.gap)
        if pass_.bad_T is not None:
            self.see_bad(pass_.bad_T.sum())
        if pass_.values:
            self.measured += 1
            for name, value in pass_.values.items():
                self.values[name] = self.values[name] + value if name in self.values else value

    def _see_gap(self, gap: Tensor) -> None:
        # In place, since a captured graph keeps the place.
        if not is_device(gap):
            self.largest_gap = max(float(self.largest_gap), float(gap))
        elif isinstance(self.largest_gap, Tensor):
            torch.maximum(self.largest_gap, gap, out=self.largest_gap)
        else:
            self.largest_gap = gap.clamp(min=self.largest_gap)

    def see_bad(self, count: Tensor) -> None:
        """Add a number of bad tokens, a 0-dim int64; in place where it is on the device."""
        if not is_device(count):
            self.bad_tokens += int(count)
        elif isinstance(self.bad_tokens, Tensor):
            self.bad_tokens.add_(count)
        else:
            self.bad_tokens = count + self.bad_tokens

    def take(self) -> SolveStatistics:
        """Return a copy and begin anew; tensors keep their place."""
        taken = copy.copy(self)
        for name in ("largest_gap", "bad_tokens"):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                setattr(taken, name, value.clone())
                value.zero_()
            else:
                setattr(self, name, type(value)(0))
        self.solves, self.seconds, self.lost_tokens, self.measured = 0, 0.0, 0, 0
        self.values = {}
        return taken

    def forget_bad(self) -> None:
        """Begin to count bad and lost tokens anew."""
        self.lost_tokens = 0
        if isinstance(self.bad_tokens, Tensor):
            self.bad_tokens.zero_()
        else:
            self.bad_tokens = 0
