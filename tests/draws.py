"""Random problems that several tests draw."""

from __future__ import annotations

import torch


def unequal_capacities(tokens, experts, topk, tight, generator):
    """Draw capacities that hold what is demanded, or exactly that."""
    while True:
        capacity = torch.randint(tokens + 1, (experts,), generator=generator)
        if capacity.sum() >= tokens * topk:
            break
    while tight and capacity.sum() > tokens * topk:
        expert = int(torch.randint(experts, (1,), generator=generator))
        capacity[expert] = max(0, int(capacity[expert]) - 1)
    return capacity
