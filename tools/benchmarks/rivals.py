"""Other ways to assign tokens to experts, for comparison.

Each returns (T, K) expert indices. Only OR-tools and HiGHS are exact; the others neither promise
capacities nor the best total score.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def sinkhorn(scores: Tensor, topk: int) -> Tensor:
    """Megatron's ``sinkhorn`` on the scores, then top-k, as its router does."""
    from megatron.core.transformer.moe.moe_utils import sinkhorn

    return sinkhorn(scores).topk(topk, dim=1).indices


def quantile_balancing(scores: Tensor, topk: int, beta: Tensor) -> tuple[Tensor, Tensor]:
    """One step of Megatron's ``qb_dual_update``; returns indices and the next beta."""
    from megatron.core.transformer.moe.moe_utils import qb_dual_update

    return qb_dual_update(scores, topk, beta)


def greedy_then_hungarian(scores: Tensor, capacity: Tensor) -> Tensor:
    """Top-2: a first expert greedily in token order, the second ones by the Hungarian method.

    Re-stated from a description of the code that the authors of MaxScore released: each token in
    turn takes its best expert that has room; then the second experts are the best assignment to the
    slots that are left. A token's first expert is ruled out for it by a low score.
    """
    values = scores.double().numpy()
    room = capacity.numpy().copy()
    num_tokens = values.shape[0]
    first = np.empty(num_tokens, np.int64)
    for token in range(num_tokens):
        first[token] = np.where(room > 0, values[token], -np.inf).argmax()
        room[first[token]] -= 1
    slots = np.repeat(np.arange(room.size), room)
    second_values = values.copy()
    finite_range = np.ptp(values) + 1.0
    second_values[np.arange(num_tokens), first] = values.min() - 10.0 * finite_range
    rows, columns = linear_sum_assignment(second_values[:, slots], maximize=True)
    second = np.empty(num_tokens, np.int64)
    second[rows] = slots[columns]
    return torch.from_numpy(np.stack([first, second], 1))
