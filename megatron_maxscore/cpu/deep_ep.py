"""Stand-ins for DeepEP and HybridEP, on which Megatron's flex dispatcher runs without GPUs.

Megatron imports ``deep_ep`` and calls ``Buffer`` (DeepEP, here) or ``HybridEPBuffer`` (HybridEP, in
:mod:`hybrid_ep`) from its own autograd functions. Where the package is missing, CPU mode puts this
module in its place. It does over gloo what the libraries do (deepseek-ai/DeepEP, branches ``main``
and ``hybrid-ep``):

- A token is sent once to every *rank* that holds one of its experts, not once to every expert.
- Received rows are ordered by source rank, then token.
- Sums of a token's rows are taken first on the rank of the experts, in the type of the rows, then
  over ranks, in float32. So results differ in rounding from those of the all-to-all.

The libraries take bfloat16 rows alone; these take any floating type, since CPU mode trains in
float32. Events and streams mean nothing here.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megatron_maxscore._replacements import Replacements
from megatron_maxscore.cpu.hybrid_ep import HybridEPBuffer
from megatron_maxscore.cpu.routes import Route

# Group sizes for which DeepEP has settings.
_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)


class EventHandle:
    """An event on a stream."""


class EventOverlap:
    """What a caller may wait for."""

    def __init__(self, event: EventHandle | None = None, extra_tensors: Any = None) -> None:
        self.event, self.extra_tensors = event, extra_tensors

    def current_stream_wait(self) -> None:
        """Wait for nothing: the work is done."""


class Buffer:
    """DeepEP's buffer, for ranks within a node.

    Args:
        group: process group.
        num_nvl_bytes: size of the real buffer.
        num_rdma_bytes: size of the real buffer.
    """

    num_sms = 20

    def __init__(
        self, group: Any, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0, **kwargs: Any
    ) -> None:
        self.group, self.num_nvl_bytes, self.num_rdma_bytes = group, num_nvl_bytes, num_rdma_bytes

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Note the number of multiprocessors."""
        assert new_num_sms % 2 == 0, "The SM count must be even"
        Buffer.num_sms = new_num_sms

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Any:
        """Return settings, which ask for no memory."""
        assert num_ranks in _SIZES, f"Unsupported number of EP ranks: {num_ranks}"
        return SimpleNamespace(
            get_nvl_buffer_size_hint=lambda hidden_bytes, ranks: 0,
            get_rdma_buffer_size_hint=lambda hidden_bytes, ranks: 0,
        )

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(
        self, topk_idx: Tensor, num_experts: int, **kwargs: Any
    ) -> tuple[Tensor, None, Tensor, Tensor, EventOverlap]:
        """Return tokens per rank (R,), None, tokens per expert (E,), and who goes where (T, R).

        Args:
            topk_idx: (T, K) int64 experts, -1 = none.
            num_experts: E, spread evenly over the ranks.
            **kwargs: events, which mean nothing here.
        """
        assert topk_idx.dtype == torch.int64
        ranks = self.group.size()
        chosen_TE = torch.zeros(topk_idx.shape[0], num_experts + 1, dtype=torch.int64)
        chosen_TE.scatter_add_(1, topk_idx % (num_experts + 1), torch.ones_like(topk_idx))
        chosen_TE = chosen_TE[:, :-1]  # the last column took those that are none
        is_in_TR = chosen_TE.reshape(-1, ranks, num_experts // ranks).sum(2) > 0
        return (
            is_in_TR.sum(0).int(), None, chosen_TE.sum(0).int(), is_in_TR, EventOverlap()
        )  # fmt: skip

    def dispatch(
        self,
        x: Tensor,
        handle: Route | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, list[int] | None, Any, EventOverlap]:
        """Send tokens to the ranks of their experts; all ranks of the group must call it.

        Args:
            x: (T, H) tokens.
            handle: of an earlier dispatch, whose route is taken again, without experts.
            num_tokens_per_rank: (R,).
            num_tokens_per_rdma_rank: None.
            is_token_in_rank: (T, R) bool.
            num_tokens_per_expert: (E,).
            topk_idx: (T, K) int64.
            topk_weights: (T, K) float32.
            **kwargs: events, which mean nothing here.

        Returns:
            The received rows; the experts of each row, numbered from the first expert of this rank,
            with -1 for experts elsewhere; their weights, with 0 for experts elsewhere; the number
            of rows of each local expert; a handle; an event.
        """
        assert x.dim() == 2 and x.is_contiguous()
        if handle is not None:
            assert topk_idx is None and topk_weights is None
            return handle.there(x[handle.rows_N]), None, None, None, None, EventOverlap()
        assert is_token_in_rank is not None and num_tokens_per_expert is not None
        assert topk_idx is not None and topk_weights is not None
        assert topk_weights.dtype == torch.float32 and topk_weights.shape == topk_idx.shape
        route = Route.of(is_token_in_rank, self.group)
        local = num_tokens_per_expert.numel() // self.group.size()
        rank_N = torch.repeat_interleave(
            torch.arange(self.group.size()), torch.tensor(route.sent_R)
        )
        experts_NK = topk_idx[route.rows_N] - (rank_N * local)[:, None]
        is_there_NK = (experts_NK >= 0) & (experts_NK < local)
        experts = route.there(experts_NK.masked_fill(~is_there_NK, -1))
        weights = route.there(topk_weights[route.rows_N].masked_fill(~is_there_NK, 0.0))
        counts = torch.bincount(experts[experts >= 0], minlength=local).tolist()
        return route.there(x[route.rows_N]), experts, weights, counts, route, EventOverlap()

    def combine(
        self, x: Tensor, handle: Route, topk_weights: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Send rows back and add up those of each token; all ranks of the group must call it.

        Args:
            x: rows in the order in which they were received.
            handle: of the dispatch.
            topk_weights: likewise, float32.
            **kwargs: events, which mean nothing here.
        """
        weights = None
        if topk_weights is not None:
            assert topk_weights.dtype == torch.float32
            weights = handle.back(topk_weights)
        return handle.back(x), weights, EventOverlap()


def answer_package(replacements: Replacements) -> None:
    """``import deep_ep`` finds this module, unless the package is installed."""
    if "deep_ep" in sys.modules or importlib.util.find_spec("deep_ep") is not None:
        return
    utils = ModuleType("deep_ep.utils")
    utils.__dict__.update(EventHandle=EventHandle, EventOverlap=EventOverlap)
    package = ModuleType("deep_ep")
    package.__dict__.update(Buffer=Buffer, HybridEPBuffer=HybridEPBuffer, utils=utils)
    for module in (package, utils):
        module.__spec__ = ModuleSpec(module.__name__, None)
        replacements.set_item(sys.modules, module.__name__, module)


ANSWERS = (answer_package,)
