"""How tokens travel to the ranks of their experts and back, for the stand-ins of dispatchers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Route:
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
    def of(cls, is_in_TR: Tensor, group: Any) -> Route:
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
