"""Stand-ins for DeepEP and HybridEP, on which Megatron's flex dispatcher runs without GPUs.

Megatron imports ``deep_ep`` and calls ``Buffer`` (DeepEP) or ``HybridEPBuffer`` (HybridEP) from its
own autograd functions. Where the package is missing, CPU mode puts this module in its place. It
does over gloo what the libraries do (deepseek-ai/DeepEP, branches ``main`` and ``hybrid-ep``):

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
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_maxscore._replacements import Replacements

# Group sizes for which DeepEP has settings.
_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)
# HybridEP moves rows in units of 16 bytes.
_UNIT = 16


class EventHandle:
    """An event on a stream."""


class EventOverlap:
    """What a caller may wait for."""

    def __init__(self, event: EventHandle | None = None, extra_tensors: Any = None) -> None:
        self.event, self.extra_tensors = event, extra_tensors

    def current_stream_wait(self) -> None:
        """Wait for nothing: the work is done."""


@dataclass(frozen=True)
class _Route:
    """Which rows a rank sends and gets.

    Attributes:
        rows_N: (N,) int64 token of each row sent, ordered by receiving rank, then token.
        sent_R: rows to each rank.
        received_R: rows from each rank.
        num_tokens: of this rank.
        group: of the ranks.
    """

    rows_N: Tensor
    sent_R: list[int]
    received_R: list[int]
    num_tokens: int
    group: Any

    @classmethod
    def of(cls, is_in_TR: Tensor, group: Any) -> _Route:
        """Return the route for (T, R) bool, which tokens go to which ranks; communicates."""
        sent_R = is_in_TR.sum(0)
        received_R = torch.empty_like(sent_R)
        dist.all_to_all_single(received_R, sent_R, group=group)
        rows_N = is_in_TR.T.nonzero()[:, 1]
        return cls(rows_N, sent_R.tolist(), received_R.tolist(), is_in_TR.shape[0], group)

    def there(self, sent: Tensor) -> Tensor:
        """Return what a rank gets when every rank sends its (N, ...) rows."""
        received = sent.new_empty((sum(self.received_R), *sent.shape[1:]))
        dist.all_to_all_single(
            received, sent.contiguous(), self.received_R, self.sent_R, group=self.group
        )
        return received

    def back(self, rows: Tensor) -> Tensor:
        """Return each token's sum over the ranks that got it, in the type of the rows."""
        returned = rows.new_empty((sum(self.sent_R), *rows.shape[1:]))
        dist.all_to_all_single(
            returned, rows.contiguous(), self.sent_R, self.received_R, group=self.group
        )
        wide = torch.promote_types(rows.dtype, torch.float32)
        total = returned.new_zeros((self.num_tokens, *rows.shape[1:]), dtype=wide)
        parts = zip(self.rows_N.split(self.sent_R), returned.split(self.sent_R), strict=True)
        for rows_of_rank, part in parts:
            total[rows_of_rank] += part.to(wide)  # a token has at most one row from a rank
        return total.to(rows.dtype)


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
        handle: _Route | None = None,
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
            Rows, their experts numbered from the first of this rank with -1 for those elsewhere,
            the weights with 0 for those, the count of each local expert, a handle, an event.
        """
        assert x.dim() == 2 and x.is_contiguous()
        if handle is not None:
            assert topk_idx is None and topk_weights is None
            return handle.there(x[handle.rows_N]), None, None, None, None, EventOverlap()
        assert is_token_in_rank is not None and num_tokens_per_expert is not None
        assert topk_idx is not None and topk_weights is not None
        assert topk_weights.dtype == torch.float32 and topk_weights.shape == topk_idx.shape
        route = _Route.of(is_token_in_rank, self.group)
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
        self, x: Tensor, handle: _Route, topk_weights: Tensor | None = None, **kwargs: Any
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


@dataclass(frozen=True)
class _Places:
    """Where rows that a rank has received stand among the rows of its experts.

    Attributes:
        row_N: (N,) int64 received row of each row that goes into an expert.
        expert_N: (N,) int64 its local expert.
        place_N: (N,) int64 its place in the output.
        rows: how many were received.
        num_experts: of this rank.
        size: rows of the output.
    """

    row_N: Tensor
    expert_N: Tensor
    place_N: Tensor
    rows: int
    num_experts: int
    size: int


class HybridEPBuffer:
    """HybridEP's buffer, with permutation by expert.

    Args:
        group: process group, whose ranks must all have the same number of tokens.
        hidden_dim: H.
        max_num_of_tokens_per_rank: of the real buffer.
        num_local_experts: of each rank.
        use_fp8: must be False.
    """

    def __init__(
        self,
        group: Any,
        hidden_dim: int,
        max_num_of_tokens_per_rank: int,
        num_local_experts: int,
        use_fp8: bool = False,
        **kwargs: Any,
    ) -> None:
        assert not use_fp8
        self.group, self.num_local_experts = group, num_local_experts

    def dispatch_with_permute(
        self,
        *,
        hidden: Tensor,
        routing_map: Tensor | None = None,
        probs: Tensor | None = None,
        scaling_factor: Tensor | None = None,
        num_of_experts_per_rank: int | None = None,
        num_permuted_tokens: int | Tensor | None = None,
        pad_multiple: int | None = None,
        handle: tuple | None = None,
        non_blocking: bool = False,
        fuse_permute_dispatch: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, None, Tensor, tuple]:
        """Send tokens to the ranks of their experts and order the rows by expert.

        All ranks of the group must call it.

        Args:
            hidden: (T, H) tokens.
            routing_map: (T, E) bool.
            probs: (T, E) float32 gates.
            scaling_factor: None.
            num_of_experts_per_rank: of each rank.
            num_permuted_tokens: rows of the output; rows that do not fit are dropped, and the last
                item of the handle says so. None for as many as there are.
            pad_multiple: rows of zeros fill each expert's rows up to a multiple of it.
            handle: of an earlier dispatch, whose route is taken again.
            non_blocking: needs ``num_permuted_tokens``.
            fuse_permute_dispatch: changes nothing.
            **kwargs: settings of the real kernels.

        Returns:
            Rows, their gates, None, (Z,) int64 rows of each local expert with padding, a handle.

        Raises:
            ValueError: ranks have different numbers of tokens, which the library cannot dispatch.
        """
        assert hidden.dim() == 2 and hidden.shape[1] * hidden.element_size() % _UNIT == 0
        if handle is None:
            assert routing_map is not None and routing_map.dtype == torch.bool
            self._check_alike(hidden.shape[0])
            local = num_of_experts_per_rank or self.num_local_experts
            map_TRZ = routing_map.reshape(hidden.shape[0], -1, local)
            route = _Route.of(map_TRZ.any(2), self.group)
            rank_N = torch.repeat_interleave(
                torch.arange(self.group.size()), torch.tensor(route.sent_R)
            )
            received = route.there(map_TRZ[route.rows_N, rank_N])
            places, counts_Z, has_overflow = _place(received, num_permuted_tokens, pad_multiple)
            handle = (route, places, rank_N, counts_Z, has_overflow)
        route, places, rank_N, counts_Z, _ = handle
        rows = _by_expert(route.there(hidden[route.rows_N]), places)
        gates = None
        if probs is not None:
            assert probs.dtype == torch.float32
            gates_TRZ = probs.reshape(probs.shape[0], -1, places.num_experts)
            received = route.there(gates_TRZ[route.rows_N, rank_N])
            gates = received.new_zeros(places.size)
            gates[places.place_N] = received[places.row_N, places.expert_N]
        return rows, gates, None, counts_Z, handle

    def combine_with_unpermute(
        self,
        *,
        hidden: Tensor,
        handle: tuple,
        probs: Tensor | None = None,
        pad_multiple: int | None = None,
        fuse_unpermute_combine: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Add up the rows of each token; all ranks of the group must call it.

        Args:
            hidden: (N, H) in the order of the dispatch.
            handle: of the dispatch.
            probs: (N,) float32, the gradient of the gates.
            pad_multiple: as in the dispatch.
            fuse_unpermute_combine: changes nothing.
            **kwargs: settings of the real kernels.

        Returns:
            (T, H) sums, and (T, E) the gates' values at their tokens and experts.
        """
        route, places, rank_N, _, _ = handle
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = hidden.new_zeros((places.rows, hidden.shape[1]), dtype=wide)
        total.index_add_(0, places.row_N, hidden[places.place_N].to(wide))  # by expert
        combined = None
        if probs is not None:
            own = probs.new_zeros(places.rows, places.num_experts)
            own[places.row_N, places.expert_N] = probs[places.place_N]
            returned = own.new_empty(len(route.rows_N), places.num_experts)
            dist.all_to_all_single(returned, own, route.sent_R, route.received_R, group=route.group)
            ranks = self.group.size()
            combined_TRZ = own.new_zeros(route.num_tokens, ranks, places.num_experts)
            combined_TRZ[route.rows_N, rank_N] = returned
            combined = combined_TRZ.reshape(route.num_tokens, -1)
        return route.back(total.to(hidden.dtype)), combined

    def _check_alike(self, num_tokens: int) -> None:
        own = torch.tensor([num_tokens])
        all_R = [torch.empty_like(own) for _ in range(self.group.size())]
        dist.all_gather(all_R, own, group=self.group)
        numbers = [int(number) for number in all_R]
        if len(set(numbers)) > 1:
            raise ValueError(
                f"HybridEP needs the same number of tokens on every rank, there are {numbers}; "
                "add --moe-hybridep-pad-uneven-dispatch-inputs (from megatron-core 0.19), or use "
                "--moe-token-dispatcher-type alltoall"
            )


def _place(
    received: Tensor, limit: int | Tensor | None, multiple: int | None
) -> tuple[_Places, Tensor, Tensor]:
    """Place received rows, whose local experts are given as (N, Z) bool, in order of experts.

    Returns:
        Their places, (Z,) int64 rows of each expert with padding, and int32 whether some were left
        out.
    """
    counts_Z = received.sum(0)
    padded_Z = counts_Z if not multiple else -(-counts_Z // multiple) * multiple
    expert_N, row_N = received.T.nonzero().unbind(1)
    skipped_Z = (padded_Z - counts_Z).cumsum(0) - (padded_Z - counts_Z)
    place_N = torch.arange(len(row_N)) + skipped_Z[expert_N]
    size = int(padded_Z.sum()) if limit is None else int(limit)
    fits_N = place_N < size
    places = _Places(
        row_N[fits_N], expert_N[fits_N], place_N[fits_N], received.shape[0], received.shape[1], size
    )
    return places, padded_Z, (~fits_N).any().int()


def _by_expert(rows: Tensor, places: _Places) -> Tensor:
    """Return received rows in order of their experts, with rows of zeros between."""
    output = rows.new_zeros(places.size, rows.shape[1])
    output[places.place_N] = rows[places.row_N]
    return output


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
