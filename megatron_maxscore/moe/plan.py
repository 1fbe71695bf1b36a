"""What a router tells the dispatcher about the assignment it has just made.

The plan is an attribute of the routing map. Whoever has the map that the router returned has its
plan, and a map that was changed on the way has none. So neither the router nor the dispatcher has
to remember a plan between calls, and several layers can run at the same time.

Shape letters: see :mod:`megatron_maxscore`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

_ATTRIBUTE = "maxscore_plan"


@dataclass(frozen=True)
class StaticLoads:
    """Loads that every rank knows without communication: the quotas of :mod:`quotas`.

    Attributes:
        num_tokens: of every rank.
        turn: where remainders start; the same on every rank.
    """

    num_tokens: int
    turn: int


@dataclass(frozen=True)
class RoutingPlan:
    """One routing call's assignment.

    Attributes:
        experts_TK: (T, K) int64, each token's experts, as in the map; None if only the map has
            them.
        order: (2, T * K) int64 the assignments in order of their expert, as
            :func:`megatron_maxscore.moe.permutation.order_of` returns it; None if not known.
        static: what every rank sends, if that is known in advance.
        loads_RE: (R, E) int64 what every rank sends, if the solve has found it; else None. If both
            ``static`` and ``loads_RE`` are None, the dispatcher gathers the counts of all ranks,
            as Megatron's does.
        num_tokens: number of tokens whose assignments this rank sends; None: all rows of the map.
        fits: False if this rank's tokens do not fit into what the other ranks expect of it. The
            dispatcher then sends rows of zeros in their place, so that no rank waits in vain.
        is_reported: whether someone will raise an error if they do not fit.
    """

    experts_TK: Tensor | None = None
    order: Tensor | None = None
    static: StaticLoads | None = None
    loads_RE: Tensor | None = None
    num_tokens: int | None = None
    fits: bool = True
    is_reported: bool = False

    def small(self) -> RoutingPlan:
        """Return it as it is kept until a checkpointed pass is recomputed: experts as int16."""
        assert self.experts_TK is not None
        return replace(self, experts_TK=self.experts_TK.to(torch.int16), order=None)

    def whole(self) -> RoutingPlan:
        """Undo :meth:`small`, but for the order."""
        assert self.experts_TK is not None
        return replace(self, experts_TK=self.experts_TK.long())


# What is known of a map that the router has not made.
UNKNOWN = RoutingPlan()


def attach(routing_map: Tensor, plan: RoutingPlan) -> None:
    """Make a plan that of a routing map, (T, E) bool."""
    setattr(routing_map, _ATTRIBUTE, plan)


def plan_of(routing_map: Tensor) -> RoutingPlan:
    """Return the plan of a routing map, (T, E) bool."""
    plan: RoutingPlan = getattr(routing_map, _ATTRIBUTE, UNKNOWN)
    return plan
