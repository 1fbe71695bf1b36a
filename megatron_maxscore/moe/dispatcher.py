"""``MaxScoreTokenDispatcher``: the all-to-all dispatcher that already knows every split.

Megatron's dispatcher gathers all ranks' token counts and copies the resulting split sizes to the
host before it can start the all-to-all. Under static quotas both are known from the number of
tokens alone, and where the flow was solved over all these ranks, every rank has learned every
rank's loads from it. So neither happens.

Where the flow was solved on the device, the loads are there too; Megatron's own copy on its side
stream brings the sizes to the host.

Shape letters: E experts, R = EP * ETP ranks of the group (P and Q of them), L experts of this rank.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

from megatron_maxscore.flow.device import is_device
from megatron_maxscore.moe.permutation import permute_known
from megatron_maxscore.moe.plan import RoutingPlan
from megatron_maxscore.moe.quotas import quotas


class _Counts(NamedTuple):
    """What a rank sends and gets, as tensors where the loads are.

    Attributes:
        sent_P: (EP,) to each rank.
        received_QP: (ETP, EP) by each expert-tensor-parallel rank from each.
        counts_RL: (R, L) every rank's tokens for each local expert, expert-tensor ranks slowest.
        tokens_L: (L,) their sums.
    """

    sent_P: Tensor
    received_QP: Tensor
    counts_RL: Tensor
    tokens_L: Tensor


class _Splits(NamedTuple):
    input_splits: np.ndarray | None
    output_splits: np.ndarray | None
    output_splits_tp: np.ndarray | None
    counts_RL: Tensor
    tokens_per_expert_L: Tensor


class MaxScoreTokenDispatcher(MoEAlltoAllTokenDispatcher):
    """All-to-all dispatcher with splits known from the routing.

    Where the router says that the loads are its quotas (scope ``local``, capacity factor 1, fixed
    lengths), or knows every rank's loads (scope ``group``), ``preprocess`` issues no collective and
    does not wait for the device. Otherwise Megatron's own ``preprocess`` runs. Which of them is
    decided from configuration and training mode, so alike on every rank.

    Args:
        plan: filled by the layer's router at every routing call.
        *args: as for Megatron's dispatcher.
        **kwargs: as for Megatron's dispatcher.
    """

    def __init__(self, *args: Any, plan: RoutingPlan | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plan = plan or RoutingPlan()
        self._known: dict[int, _Splits] = {}
        self._experts_TK: Tensor | None = None
        self._dtoh_point = self.cuda_dtoh_point

    def preprocess(self, routing_map: Tensor) -> Tensor:
        """Set the splits for this routing map.

        Args:
            routing_map: (T, E) bool.

        Returns:
            (L,) int64 tokens of each local expert over the whole group; on the CPU when static.
        """
        num_tokens = routing_map.shape[0]
        self.cuda_dtoh_point = self._dtoh_point
        is_static, loads_RE, experts_TK = self.plan.take(routing_map)
        if self.config.moe_expert_capacity_factor is not None:
            # Megatron's dropping has changed the map that the plan describes.
            return super().preprocess(routing_map)
        if loads_RE is not None and is_device(loads_RE):
            self._experts_TK = experts_TK
            return self._from_device(loads_RE, num_tokens)
        if loads_RE is not None:
            splits = self._splits(loads_RE.cpu())
        elif is_static:
            if num_tokens not in self._known:
                self._known[num_tokens] = self._splits(self._quotas(num_tokens))
            splits = self._known[num_tokens]
        else:
            return super().preprocess(routing_map)
        self.num_out_tokens = num_tokens * self.config.moe_router_topk
        self.input_splits, self.output_splits = splits.input_splits, splits.output_splits
        self.output_splits_tp = splits.output_splits_tp
        if self.num_local_experts > 1:
            self.num_global_tokens_per_local_expert = splits.counts_RL
        self.cuda_sync_point = "no_sync"
        # Nothing is to be copied either: a stream that branches off and does not come back could
        # not be captured in a graph.
        self.cuda_dtoh_point = "never"
        self._experts_TK = experts_TK
        return splits.tokens_per_expert_L

    def dispatch_preprocess(self, *args: Any, **kwargs: Any) -> Any:
        """Prepare for dispatch; see the base class.

        Where the experts are known Megatron's permutation, which sorts or picks among all T * E
        entries of the map, is replaced by one that sorts the T * K assignments.
        """
        self._experts_TK = None
        original = token_dispatcher.permute
        token_dispatcher.permute = functools.partial(self._permute, original)
        try:
            return super().dispatch_preprocess(*args, **kwargs)
        finally:
            token_dispatcher.permute = original

    def _permute(
        self, original: Any, tokens_TH: Tensor, routing_map: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        experts_TK = self._experts_TK
        if experts_TK is None or kwargs.get("fused") or kwargs.get("drop_and_pad"):
            return original(tokens_TH, routing_map, *args, **kwargs)
        # Where tokens are padded, and by how much, are for fused kernels only.
        return (*permute_known(tokens_TH, kwargs.get("probs"), experts_TK), None, None)

    def _quotas(self, num_tokens: int) -> Tensor:
        """Return the (R, E) int64 quotas."""
        topk, num_experts = self.config.moe_router_topk, self.num_experts
        ranks = self.ep_size * self.tp_size
        return torch.stack([quotas(num_tokens, topk, num_experts, rank) for rank in range(ranks)])

    def _from_device(self, loads_RE: Tensor, num_tokens: int) -> Tensor:
        """Set splits that are still on the device, from the (R, E) int64 loads.

        Megatron copies them on its side stream, once, and waits for them where it first needs them,
        as it does for those that it has gathered itself.
        """
        counts = self._counts(loads_RE)
        self.num_out_tokens = num_tokens * self.config.moe_router_topk
        self.cuda_sync_point = "no_sync"
        if self.ep_size * self.tp_size > 1:
            self.input_splits = counts.sent_P
            self.output_splits = counts.received_QP[self.tp_rank]
            self.output_splits_tp = counts.received_QP.sum(1)
            self._maybe_update_cuda_sync_point("before_ep_alltoall")
        else:
            self._maybe_update_cuda_sync_point("before_finish")
        if self.num_local_experts > 1:
            self.num_global_tokens_per_local_expert = counts.counts_RL
            if not self.config.moe_permute_fusion:
                self._maybe_update_cuda_sync_point("before_permutation_2")
        return counts.tokens_L

    def _counts(self, loads_RE: Tensor) -> _Counts:
        """Return what is sent and received under the (R, E) int64 loads of the ``tp_ep`` ranks."""
        ep, tp = self.ep_size, self.tp_size
        first, last = self.local_expert_indices[0], self.local_expert_indices[-1] + 1
        # tp_ep ranks are ordered with tp fastest; Megatron sorts chunks with tp slowest.
        by_tp = loads_RE.reshape(ep, tp, self.num_experts).transpose(0, 1)
        counts_RL = by_tp[:, :, first:last].reshape(ep * tp, -1).contiguous()
        return _Counts(
            sent_P=by_tp[self.tp_rank, self.ep_group.rank()].reshape(ep, -1).sum(1),
            received_QP=counts_RL.reshape(tp, ep, -1).sum(2),
            counts_RL=counts_RL,
            tokens_L=counts_RL.sum(0),
        )

    def _splits(self, counts_RE: Tensor) -> _Splits:
        """Return all split sizes on the host for the (R, E) int64 loads of the ``tp_ep`` ranks."""
        counts = self._counts(counts_RE)
        counts_RL = counts.counts_RL.to(self.permute_idx_device)
        if self.ep_size * self.tp_size == 1:
            return _Splits(None, None, None, counts_RL, counts.tokens_L)
        received_Q = counts.received_QP.sum(1)
        # Without splits the gather over expert-tensor-parallel ranks is an equal one.
        equal = bool((received_Q == received_Q[0]).all())
        return _Splits(
            input_splits=counts.sent_P.numpy(),
            output_splits=counts.received_QP[self.tp_rank].numpy(),
            output_splits_tp=None if equal else received_Q.numpy(),
            counts_RL=counts_RL,
            tokens_per_expert_L=counts.tokens_L,
        )
