"""How many rows a rank receives at most, and the budget that recipes reserve for them.

``--moe-expert-rank-capacity-factor`` sizes the buffer into which Megatron's flex dispatcher
receives: HybridEP drops rows beyond it, NCCL EP stops. In training MaxScore bounds every expert's
load, so the least safe factor is known before the first step. In evaluation by prices nothing
bounds the loads.

Shape letters: see :mod:`megatron_maxscore`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from megatron.core.transformer.moe.token_dispatcher import MoEFlexTokenDispatcher
from torch import Tensor

from megatron_maxscore.moe.config import MaxScoreConfig


def most_rows_of_an_expert(
    options: MaxScoreConfig,
    num_tokens: int,
    sequence: int,
    topk: int,
    num_experts: int,
    ranks: int,
    rotates: bool = True,
) -> int:
    """Return how many rows one expert gets at most in a training pass.

    Args:
        options: scope and capacity factor count.
        num_tokens: of each rank.
        sequence: tokens of a whole sequence, over all ranks among which it is split.
        topk: experts per token.
        num_experts: E.
        ranks: R, that share the experts.
        rotates: whether remainders rotate over the ranks; in a CUDA graph they do not.
    """
    factor = options.capacity_factor
    total = ranks * num_tokens
    if options.scope == "group":
        return math.ceil(total * topk * factor / num_experts)
    if options.scope == "sequence":
        return total * math.ceil(sequence * topk * factor / num_experts) // sequence
    if factor == 1.0 and num_tokens * topk >= num_experts and rotates:
        return math.ceil(total * topk / num_experts)  # remainders rotate over the ranks
    return ranks * math.ceil(num_tokens * topk * factor / num_experts)


def least_rank_factor(most_rows: int, local_experts: int, align: int, assignments: int) -> float:
    """Return the least ``--moe-expert-rank-capacity-factor`` with which all rows fit.

    Args:
        most_rows: the largest number of rows that one expert may get.
        local_experts: Z, experts of each rank.
        align: each expert's rows are padded to a multiple of this; 0 or 1 for no padding.
        assignments: T times K, assignments that each rank makes.
    """
    padded = math.ceil(most_rows / max(align, 1)) * max(align, 1)
    return local_experts * padded / assignments


class BudgetedFlexTokenDispatcher(MoEFlexTokenDispatcher):
    """Megatron's flex dispatcher with a budget of rows that applies only in training.

    In evaluation HybridEP takes as many rows as there are, which costs a host sync.

    Args:
        *args: as for Megatron's dispatcher.
        is_training: whether the layer is in training mode.
        **kwargs: as for Megatron's dispatcher.
    """

    def __init__(self, *args: Any, is_training: Callable[[], bool], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_training = is_training
        self._has_lifted = False

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Prepare for dispatch; see the base class."""
        manager: Any = self._comm_manager
        if not self._is_training():
            manager.moe_expert_rank_capacity_factor = None
            self._has_lifted = True
        elif self._has_lifted:
            # Only if we lifted it: Megatron lifts it too, while it repeats an overflowed step.
            manager.moe_expert_rank_capacity_factor = self.config.moe_expert_rank_capacity_factor
            self._has_lifted = False
        prepared: tuple[Tensor, Tensor] = super().dispatch_preprocess(
            hidden_states, routing_map, probs
        )
        return prepared
