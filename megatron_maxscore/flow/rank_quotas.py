"""How a group's ranks share out its experts' capacities, from the loads of their sweeps.

Shape letters: see :mod:`megatron_maxscore`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def quotas_of(
    loads_RE: Tensor, capacity_E: Tensor, rows_R: Tensor, topk: int, prices_E: Tensor
) -> Tensor:
    """Return how many rows each rank is to give each expert, close to what it gives them now.

    A rank's quotas sum to ``rows * topk``, an expert's quotas to at most its capacity. No quota is
    larger than its rank's number of rows. Each rank can therefore meet its quotas on its own.

    Args:
        loads_RE: (R, E) int64, rows that each rank gives each expert now, ``rows * topk`` in sum.
        capacity_E: (E,) int64, of all ranks, at most all rows each and enough for them.
        rows_R: (R,) int64 rows of each rank.
        topk: K.
        prices_E: (E,); if capacities leave slack, experts of price 0 should be the idle ones.

    Returns:
        (R, E) int64, the same on every rank.
    """
    ranks, num_experts = loads_RE.shape
    total_E = loads_RE.sum(0)
    give_E, room_E = (total_E - capacity_E).clamp(min=0), (capacity_E - total_E).clamp(min=0)
    is_free_E = (prices_E <= 0) & (capacity_E.sum() > total_E.sum())
    wanted_E = torch.where(is_free_E, 0, room_E)
    # Room at experts with a price is filled first. If overfull experts have too few units for
    # that, free experts give some as well.
    missing = (wanted_E.sum() - give_E.sum()).clamp(min=0)
    spare_E = torch.where(is_free_E, torch.minimum(total_E, capacity_E), 0)
    before_E = spare_E.cumsum(0) - spare_E
    give_E = give_E + torch.minimum((missing - before_E).clamp(min=0), spare_E)
    free_room_E = torch.where(is_free_E, room_E, 0)
    end_E = torch.where(is_free_E, wanted_E.sum() + free_room_E.cumsum(0), wanted_E.cumsum(0))
    # Expert e asks ranks in turn, from rank e on, for what it gives.
    index_R = torch.arange(ranks, device=loads_RE.device)
    order_RE = (index_R[:, None] + torch.arange(num_experts, device=loads_RE.device)) % ranks
    asked_RE = loads_RE.gather(0, order_RE)
    before_RE = asked_RE.cumsum(0) - asked_RE
    asked_RE = torch.minimum((give_E - before_RE).clamp(min=0), asked_RE)
    given_RE = torch.zeros_like(loads_RE).scatter_(0, order_RE, asked_RE)
    # Given units are numbered rank by rank, and room expert by expert. Equal numbers match.
    last_R = given_RE.sum(1).cumsum(0)[:, None]
    first_R = last_R - given_RE.sum(1)[:, None]
    taken_RE = torch.minimum(last_R, end_E) - torch.maximum(first_R, end_E - room_E)
    near_RE = loads_RE - given_RE + taken_RE.clamp(min=0)
    # The way that is always possible (McNaughton's wrap-around rule): units are dealt to the rows
    # in turn, one expert after the other, so no row gets the same expert twice.
    rows, last_R = rows_R.sum(), rows_R.cumsum(0)
    before_E = capacity_E.cumsum(0) - capacity_E
    units_E = torch.minimum((rows * topk - before_E).clamp(min=0), capacity_E)
    start_E = units_E.cumsum(0) - units_E

    def rows_before(position_E: Tensor) -> Tensor:
        turns_E = torch.div(position_E, rows.clamp(min=1), rounding_mode="floor")
        within_RE = (position_E - turns_E * rows) - (last_R - rows_R)[:, None]
        return turns_E * rows_R[:, None] + torch.minimum(within_RE.clamp(min=0), rows_R[:, None])

    turn_RE = rows_before(start_E + units_E) - rows_before(start_E)
    return torch.where((near_RE <= rows_R[:, None]).all(), near_RE, turn_RE)
