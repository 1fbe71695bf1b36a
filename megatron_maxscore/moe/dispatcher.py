"""``MaxScoreTokenDispatcher``: the all-to-all dispatcher that already knows every split.

Megatron's dispatcher gathers all ranks' token counts and copies the resulting split sizes to the
host before it can start the all-to-all. MaxScore often needs neither. Static quotas follow from the
number of tokens alone. If the flow was solved over all these ranks, the solve has told every rank
the loads of all ranks.

If that solve ran on the device, the loads are on the device too. Megatron's own copy on its side
stream then brings the split sizes to the host.

Shape letters: see :mod:`megatron_maxscore`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from megatron.core.transformer.moe.moe_utils import get_align_size_for_quantization
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

from megatron_maxscore.flow.places import is_device, sent
from megatron_maxscore.moe import permutation
from megatron_maxscore.moe.capture import holds_dispatch, is_capturing
from megatron_maxscore.moe.config import MaxScoreConfig
from megatron_maxscore.moe.plan import RoutingPlan, StaticLoads, attach, plan_of
from megatron_maxscore.moe.quotas import quotas
from megatron_maxscore.moe.ranges import nvtx
from megatron_maxscore.moe.seam import seen_with


class _Counts(NamedTuple):
    """What a rank sends and gets, as tensors where the loads are.

    Attributes:
        sent_R: (EP,) rows that this rank sends to each expert-parallel rank.
        received_RR: (ETP, EP) rows that each expert-tensor-parallel rank gets from each
            expert-parallel rank.
        counts_RZ: (R, Z) tokens of every rank for each local expert; the expert-tensor-parallel
            rank is the slowest index of the ranks.
        tokens_Z: (Z,) sums of ``counts_RZ`` over the ranks.
    """

    sent_R: Tensor
    received_RR: Tensor
    counts_RZ: Tensor
    tokens_Z: Tensor


class _Splits(NamedTuple):
    input_splits: np.ndarray | None
    output_splits: np.ndarray | None
    output_splits_tp: np.ndarray | None
    counts_RZ: Tensor
    tokens_per_expert_Z: Tensor


class _Filled(NamedTuple):
    """A dispatch to which rows of zeros were added.

    Attributes:
        shape: of the hidden states that were to be dispatched.
        rows: how many of their rows were dispatched.
        is_reported: whether someone raises an error for rows that were not.
    """

    shape: torch.Size
    rows: int
    is_reported: bool


def knows_splits(config: Any, options: MaxScoreConfig) -> bool:
    """Return whether a layer's dispatcher is ours and takes its splits from the routing.

    For fp8 and fp4 Megatron pads each expert's rows to a multiple. Then the splits are taken from
    the routing only if all quotas are such multiples already. Otherwise Megatron pads the routing
    map, counts its rows and gathers the counts of all ranks.

    Args:
        config: a TransformerConfig.
        options: MaxScore's own options.
    """
    if config.moe_token_dispatcher_type != "alltoall":
        return False
    if not config.moe_router_padding_for_quantization:
        return True
    multiple = config.num_moe_experts * max(get_align_size_for_quantization(config), 1)
    assignments = math.prod(options.fixed_shape or (0, 0)) * config.moe_router_topk
    is_static = options.scope == "local" and options.capacity_factor == 1.0
    return is_static and assignments > 0 and assignments % multiple == 0


# Attributes of Megatron's dispatcher. If splits are known in advance, these are on the host, and
# the same in every microbatch that a graph is replayed for.
_ON_THE_HOST = (
    "tokens_per_expert", "input_splits", "output_splits", "output_splits_tp", "num_out_tokens",
    "num_global_tokens_per_local_expert",
)  # fmt: skip
_PREPARED = (
    *_ON_THE_HOST, "hidden_shape", "hidden_shape_before_permute", "cuda_sync_point",
    "cuda_dtoh_point",
)  # fmt: skip


class MaxScoreTokenDispatcher(MoEAlltoAllTokenDispatcher):
    """All-to-all dispatcher with splits known from the routing.

    The router attaches a plan (:mod:`plan`) to its routing map. In scope ``local``, with capacity
    factor 1 and a fixed shape of microbatches, the plan says that every rank's loads are its
    quotas. In scope ``group`` it holds every rank's loads. In both cases ``preprocess`` issues no
    collective and does not wait for the device. Otherwise Megatron's own ``preprocess`` runs. The
    choice depends on configuration and training mode only, so all ranks make the same one.

    A rank with fewer tokens than the configuration says adds rows of zeros, since the others expect
    its quotas. A rank with more tokens dispatches none of them, and all ranks raise an error at the
    end of the training step. Without Megatron's training loop the output of these tokens is NaN.

    Args:
        *args: as for Megatron's dispatcher.
        **kwargs: as for Megatron's dispatcher.
    """

    # Megatron's, which has no types.
    config: Any
    cudagraph_attrs: list[str]
    cuda_dtoh_point: str
    input_splits: Any
    output_splits: Any
    output_splits_tp: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        permutation.install()
        self._known: dict[StaticLoads, _Splits] = {}
        self._filled: _Filled | None = None
        self._dtoh_point = self.cuda_dtoh_point
        # Host values from when the preparation was captured in a graph, since a replay sets none;
        # and whether Python, not a replay, has prepared the next dispatch.
        self._captured: dict[str, Any] = {}
        self._is_prepared = False
        if holds_dispatch(self.config):
            self.cudagraph_attrs = [n for n in self.cudagraph_attrs if n not in _ON_THE_HOST]
        self._config_without_padding = seen_with(
            self.config, {"moe_router_padding_for_quantization": False}
        )

    @property
    def _rank(self) -> int:
        """This rank's number in ``tp_ep``, whose ranks are ordered with tp fastest."""
        return int(self.ep_group.rank()) * self.tp_size + int(self.tp_rank)

    @property
    def real_rows(self) -> int | None:
        """How many rows are tokens, where rows of zeros were added to what is being dispatched."""
        return None if self._filled is None else self._filled.rows

    def preprocess(self, routing_map: Tensor) -> Tensor:
        """Set the splits for this routing map.

        Args:
            routing_map: (T, E) bool.

        Returns:
            (Z,) int64 tokens of each local expert over the whole group; on the CPU when static.
        """
        self.cuda_dtoh_point = self._dtoh_point
        plan = plan_of(routing_map)
        num_tokens = routing_map.shape[0] if plan.num_tokens is None else plan.num_tokens
        if plan.loads_RE is not None and is_device(plan.loads_RE):
            return self._from_device(plan.loads_RE, num_tokens)
        if plan.static is not None:
            splits = self._static_splits(plan.static)
        elif plan.loads_RE is not None:
            splits = self._splits(plan.loads_RE.cpu())
        else:
            return super().preprocess(routing_map)
        self.num_out_tokens = num_tokens * self.config.moe_router_topk
        self.input_splits, self.output_splits = splits.input_splits, splits.output_splits
        self.output_splits_tp = splits.output_splits_tp
        if self.num_local_experts > 1:
            self.num_global_tokens_per_local_expert = splits.counts_RZ
        self.cuda_sync_point = "no_sync"
        # Nothing needs to be copied either. Megatron would copy on a side stream without joining
        # it again, which a CUDA graph cannot capture.
        self.cuda_dtoh_point = "never"
        return splits.tokens_per_expert_Z

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Prepare for dispatch; see the base class.

        1. Add rows of zeros if the others expect more rows than this rank has, or if its tokens do
           not fit. The dispatcher remembers what was added until :meth:`combine_postprocess`, as it
           does with Megatron's own splits, since the combine gets no other arguments.
        2. Let Megatron permute tokens. It asks :meth:`preprocess` for the splits, and finds the
           order in the map's plan (:mod:`permutation`). If experts' rows are to be padded, static
           loads are such multiples already (:func:`knows_splits`), so padding is turned off.

        Args:
            hidden_states: (S, B, H).
            routing_map: (T, E) bool.
            probs: (T, E) gates.
        """
        # 1.
        plan = plan_of(routing_map)
        self._filled = None
        if plan.num_tokens not in (None, routing_map.shape[0]) or not plan.fits:
            hidden_states, routing_map, probs = self._fill(hidden_states, routing_map, probs, plan)
        # 2.
        config = self.config
        if plan.static is not None:
            self.config = self._config_without_padding
        try:
            with nvtx("dispatch"):
                dispatched: tuple[Tensor, Tensor] = super().dispatch_preprocess(
                    hidden_states, routing_map, probs
                )
        finally:
            self.config = config
        if is_capturing():
            self._captured = {name: getattr(self, name, None) for name in _PREPARED}
        self._is_prepared = True
        return dispatched

    def token_dispatch(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Send tokens; see the base class. After a graph's replay the splits are those it knows."""
        if self._captured and not self._is_prepared:
            self._filled = None
            for name, value in self._captured.items():
                setattr(self, name, value)
        self._is_prepared = False
        sent: tuple[Tensor, Tensor] = super().token_dispatch(*args, **kwargs)
        return sent

    def combine_postprocess(self, permutated_local_input_tokens: Tensor) -> Tensor:
        """Bring tokens back to where they were; see the base class."""
        output: Tensor = super().combine_postprocess(permutated_local_input_tokens)
        if self._filled is None:
            return output
        shape, rows, is_reported = self._filled
        output_TH = output.reshape(-1, output.shape[-1])[:rows]
        missing = math.prod(shape[:-1]) - rows
        if missing:
            filler = output_TH.new_full((missing, shape[-1]), 0.0 if is_reported else math.nan)
            output_TH = torch.cat([output_TH, filler])
        return output_TH.reshape(shape)

    def _fill(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor, plan: RoutingPlan
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Add rows of zeros until every expert gets what the other ranks expect; no host sync.

        Returns:
            Hidden states (T + N, 1, H), map and gates (T + N, E) with N the largest load, where T
            is 0 if this rank's tokens do not fit.
        """
        hidden_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        assert plan.static is not None
        expected_E = sent(self._quotas(plan.static)[self._rank], routing_map.device)
        assignments = plan.static.num_tokens * self.config.moe_router_topk
        most = math.ceil(assignments / self.num_experts)
        rows = hidden_TH.shape[0] if plan.fits else 0
        # Slices, even empty ones, keep the backward pass's collectives in the graph.
        missing_E = expected_E - routing_map[:rows].sum(0)
        added_NE = torch.arange(most, device=routing_map.device)[:, None] < missing_E
        filled_map = torch.cat([routing_map[:rows], added_NE])
        attach(
            filled_map,
            RoutingPlan(static=plan.static, num_tokens=plan.num_tokens),
        )
        self._filled = _Filled(hidden_states.shape, rows, plan.is_reported)
        zeros_NH = hidden_TH.new_zeros(most, hidden_TH.shape[1])
        zeros_NE = probs.new_zeros(most, self.num_experts)
        return (
            torch.cat([hidden_TH[:rows], zeros_NH]).unsqueeze(1),
            filled_map,
            torch.cat([probs[:rows], zeros_NE]),
        )

    def _static_splits(self, static: StaticLoads) -> _Splits:
        if static not in self._known:
            # Quotas repeat after a number of turns, which the sizes decide; a few are kept.
            if len(self._known) >= 2 * self.num_experts:
                self._known.clear()
            self._known[static] = self._splits(self._quotas(static))
        return self._known[static]

    def _quotas(self, static: StaticLoads) -> Tensor:
        """Return the (R, E) int64 quotas."""
        ranks = self.ep_size * self.tp_size
        rows = [
            quotas(
                static.num_tokens, self.config.moe_router_topk, self.num_experts, rank, ranks,
                static.turn,
            )
            for rank in range(ranks)
        ]  # fmt: skip
        return torch.stack(rows)

    def _from_device(self, loads_RE: Tensor, num_tokens: int) -> Tensor:
        """Set splits that are still on the device, from the (R, E) int64 loads.

        Megatron copies them on its side stream, once, and waits for them where it first needs them,
        as it does for those that it has gathered itself.
        """
        counts = self._counts(loads_RE)
        self.num_out_tokens = num_tokens * self.config.moe_router_topk
        self.cuda_sync_point = "no_sync"
        if self.ep_size * self.tp_size > 1:
            self.input_splits = counts.sent_R
            self.output_splits = counts.received_RR[self.tp_rank]
            self.output_splits_tp = counts.received_RR.sum(1)
            self._maybe_update_cuda_sync_point("before_ep_alltoall")
        else:
            self._maybe_update_cuda_sync_point("before_finish")
        if self.num_local_experts > 1:
            self.num_global_tokens_per_local_expert = counts.counts_RZ
            if not self.config.moe_permute_fusion:
                self._maybe_update_cuda_sync_point("before_permutation_2")
        return counts.tokens_Z

    def _counts(self, loads_RE: Tensor) -> _Counts:
        """Return what is sent and received under the (R, E) int64 loads of the ``tp_ep`` ranks."""
        ep, tp = self.ep_size, self.tp_size
        first, last = self.local_expert_indices[0], self.local_expert_indices[-1] + 1
        # tp_ep ranks are ordered with tp fastest; Megatron sorts chunks with tp slowest.
        by_tp = loads_RE.reshape(ep, tp, self.num_experts).transpose(0, 1)
        counts_RZ = by_tp[:, :, first:last].reshape(ep * tp, -1).contiguous()
        return _Counts(
            sent_R=by_tp[self.tp_rank, self.ep_group.rank()].reshape(ep, -1).sum(1),
            received_RR=counts_RZ.reshape(tp, ep, -1).sum(2),
            counts_RZ=counts_RZ,
            tokens_Z=counts_RZ.sum(0),
        )

    def _splits(self, counts_RE: Tensor) -> _Splits:
        """Return all split sizes on the host for the (R, E) int64 loads of the ``tp_ep`` ranks."""
        counts = self._counts(counts_RE)
        counts_RZ = sent(counts.counts_RZ, torch.device(self.permute_idx_device))
        if self.ep_size * self.tp_size == 1:
            return _Splits(None, None, None, counts_RZ, counts.tokens_Z)
        received_R = counts.received_RR.sum(1)
        # Without splits the gather over expert-tensor-parallel ranks is an equal one.
        equal = bool((received_R == received_R[0]).all())
        return _Splits(
            input_splits=counts.sent_R.numpy(),
            output_splits=counts.received_RR[self.tp_rank].numpy(),
            output_splits_tp=None if equal else received_R.numpy(),
            counts_RZ=counts_RZ,
            tokens_per_expert_Z=counts.tokens_Z,
        )
