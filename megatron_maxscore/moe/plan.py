"""What a router tells its dispatcher about the assignment it has just made."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class RoutingPlan:
    """Shared by the router and the dispatcher of one layer, renewed by every routing call.

    Attributes:
        routing_map: the very tensor that the router returned; another one means that the counts
            below do not describe what is dispatched.
        has_static_quotas: whether the loads are exactly the quotas, on every rank.
        loads_RE: (R, E) int64 loads of every rank of ``tp_ep``, None if not known.
        experts_TK: (T, K) int64 what the map says, None if not known.
    """

    routing_map: Tensor | None = None
    has_static_quotas: bool = False
    loads_RE: Tensor | None = None
    experts_TK: Tensor | None = None

    def forget(self) -> None:
        """Nothing is known of the loads."""
        self.has_static_quotas, self.loads_RE, self.experts_TK = False, None, None

    def take(self, routing_map: Tensor) -> tuple[bool, Tensor | None, Tensor | None]:
        """Return whether a map has static quotas, its loads and experts if known.

        The plan is used up.
        """
        known = self.has_static_quotas, self.loads_RE, self.experts_TK
        if self.routing_map is not routing_map:
            known = False, None, None
        self.routing_map = None
        self.forget()
        return known
