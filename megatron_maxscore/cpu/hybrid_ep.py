"""A stand-in for HybridEP's buffer; :mod:`deep_ep` has what it is for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_maxscore.cpu.routes import Route

# HybridEP moves rows in units of 16 bytes.
_UNIT = 16


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
            route = Route.of(map_TRZ.any(2), self.group)
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
