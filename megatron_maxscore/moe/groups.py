"""Group-limited routing: each token prefers the experts of a few groups.

What a group is worth to a token follows Megatron's rule: the sum of the group's largest scores,
here of score minus price. In training a first flow chooses the groups, so that every group is
chosen equally often. A group that most tokens want could not serve them all anyway. A second flow
chooses the experts. For it, scores of experts outside a token's groups are lowered by the range of
the token's scores. An assignment therefore always exists, and a token leaves its groups only if
capacities leave no other way. In evaluation by prices each token chooses its groups on its own, as
in stock Megatron.

Shape letters: see :mod:`megatron_maxscore`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """How experts are grouped.

    Attributes:
        number: groups of equal size.
        chosen: of each token.
        topk: experts per token.
    """

    number: int
    chosen: int
    topk: int

    @classmethod
    def of(cls, config: Any) -> Groups | None:
        """Return the groups of a TransformerConfig, None if routing is not limited to any."""
        if not config.moe_router_group_topk:
            return None
        return cls(
            config.moe_router_num_groups, config.moe_router_group_topk, config.moe_router_topk
        )

    def scores(self, biased_TE: Tensor) -> Tensor:
        """Return (T, G) what Megatron's rule compares: the sum of each group's largest scores.

        Args:
            biased_TE: (T, E) score minus price, up to a constant.
        """
        grouped = biased_TE.reshape(biased_TE.shape[0], self.number, -1)
        return grouped.topk(self.topk // self.chosen, dim=-1).values.sum(-1)

    def best(self, scores_TG: Tensor) -> Tensor:
        """Return (T, chosen groups) int64, the groups that each token chooses on its own."""
        return scores_TG.topk(self.chosen, dim=-1, sorted=False).indices

    def inside(self, chosen: Tensor, num_experts: int) -> Tensor:
        """Return (T, E) bool, which experts are in the (T, chosen groups) groups of each token."""
        shape = (chosen.shape[0], self.number)
        is_chosen_TG = chosen.new_zeros(shape).scatter_(1, chosen, 1).bool()
        return is_chosen_TG.repeat_interleave(num_experts // self.number, dim=1)

    @staticmethod
    def only(biased_TE: Tensor, inside_TE: Tensor) -> Tensor:
        """Return scores that are -inf at experts outside the groups, as Megatron does."""
        return biased_TE.masked_fill(~inside_TE, -math.inf)

    @staticmethod
    def preferred(scores_TE: Tensor, inside_TE: Tensor) -> Tensor:
        """Return scores, lowered by the row's range at experts outside; float32 at least."""
        # In a narrower type lowered scores would lose too many digits.
        wide_TE = scores_TE if scores_TE.element_size() >= 4 else scores_TE.float()
        range_T1 = wide_TE.amax(1, keepdim=True) - wide_TE.amin(1, keepdim=True)
        return wide_TE - range_T1 * ~inside_TE
