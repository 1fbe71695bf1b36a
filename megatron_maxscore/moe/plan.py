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
    """

    routing_map: Tensor | None = None
    has_static_quotas: bool = False

    def take(self, routing_map: Tensor) -> bool:
        """Return whether ``routing_map`` has static quotas; the plan is used up."""
        static = self.has_static_quotas and self.routing_map is routing_map
        self.routing_map, self.has_static_quotas = None, False
        return static
