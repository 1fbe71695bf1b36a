"""``MaxScoreTokenDispatcher``: the all-to-all dispatcher that already knows every split.

Megatron's dispatcher gathers all ranks' token counts and copies the resulting split sizes to the
host before it can start the all-to-all. Under static quotas both are known from the number of
tokens alone, so neither happens.

Shape letters: E experts, R = EP * ETP ranks of the group, L experts of this rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

from megatron_maxscore.moe.plan import RoutingPlan
from megatron_maxscore.moe.quotas import quotas


class _Splits(NamedTuple):
    input_splits: np.ndarray | None
    output_splits: np.ndarray | None
    output_splits_tp: np.ndarray | None
    counts_RL: Tensor
    tokens_per_expert_L: Tensor


class MaxScoreTokenDispatcher(MoEAlltoAllTokenDispatcher):
    """All-to-all dispatcher with splits known without communication in scope ``local``.

    Where the router says that the loads are its quotas (capacity factor 1, fixed lengths, routed
    by the flow), ``preprocess`` issues no collective and no copy to the host. Otherwise Megatron's
    own ``preprocess`` runs. Which of the two is decided from configuration and training mode, so
    alike on every rank.

    Args:
        plan: filled by the layer's router at every routing call.
        *args: as for Megatron's dispatcher.
        **kwargs: as for Megatron's dispatcher.
    """

    def __init__(self, *args: Any, plan: RoutingPlan | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plan = plan or RoutingPlan()
        self._known: dict[int, _Splits] = {}

    def preprocess(self, routing_map: Tensor) -> Tensor:
        """Set the splits for this routing map.

        Args:
            routing_map: (T, E) bool.

        Returns:
            (L,) int64 tokens of each local expert over the whole group; on the CPU when static.
        """
        if not self.plan.take(routing_map):
            return super().preprocess(routing_map)
        num_tokens = routing_map.shape[0]
        if num_tokens not in self._known:
            self._known[num_tokens] = self._static_splits(num_tokens)
        splits = self._known[num_tokens]
        self.num_out_tokens = num_tokens * self.config.moe_router_topk
        self.input_splits, self.output_splits = splits.input_splits, splits.output_splits
        self.output_splits_tp = splits.output_splits_tp
        if self.num_local_experts > 1:
            self.num_global_tokens_per_local_expert = splits.counts_RL
        self.cuda_sync_point = "no_sync"
        return splits.tokens_per_expert_L

    def _static_splits(self, num_tokens: int) -> _Splits:
        ep, tp = self.ep_size, self.tp_size
        topk, num_experts = self.config.moe_router_topk, self.num_experts
        counts_RE = torch.stack(
            [quotas(num_tokens, topk, num_experts, rank) for rank in range(ep * tp)]
        )
        first, last = self.local_expert_indices[0], self.local_expert_indices[-1] + 1
        # tp_ep ranks are ordered with tp fastest; Megatron sorts chunks with tp slowest.
        by_tp = counts_RE.reshape(ep, tp, num_experts).transpose(0, 1)
        counts_RL = by_tp[:, :, first:last].reshape(ep * tp, -1).contiguous()
        tokens_L = counts_RL.sum(0)
        if ep * tp == 1:
            return _Splits(None, None, None, counts_RL.to(self.permute_idx_device), tokens_L)
        own_E = by_tp[self.tp_rank, self.ep_group.rank()]
        received = counts_RL.reshape(tp, ep, -1).sum(2)
        # Without splits the gather over expert-tensor-parallel ranks is an equal one.
        equal = num_tokens * topk % num_experts == 0
        return _Splits(
            input_splits=own_E.reshape(ep, -1).sum(1).numpy(),
            output_splits=received[self.tp_rank].numpy(),
            output_splits_tp=None if equal else received.sum(1).numpy(),
            counts_RL=counts_RL.to(self.permute_idx_device),
            tokens_per_expert_L=tokens_L,
        )
