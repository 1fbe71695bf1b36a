"""``examples/pretrain_gpt.py`` with the assignment of the MaxScore authors' released code.

A token's first expert is taken greedily in token order, the second ones by the Hungarian method
(:func:`tools.rivals.greedy_then_hungarian`), for each sequence. Prices, which that code has not,
are those of the optimal flow on the same scores, for evaluation. For the study; started by it.
"""

import dataclasses
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import pretrain_gpt  # noqa: E402
import torch  # noqa: E402

from megatron_maxscore.moe import scopes  # noqa: E402
from tools.rivals import greedy_then_hungarian  # noqa: E402

_solve = scopes.solve


def solve(scores, topk, **arguments):
    """Replace the optimum's experts by the greedy ones; both take exactly the capacity.

    Args:
        scores: (B, S, E), a problem for each sequence.
        topk: 2.
        **arguments: as for ``flow.solve``; one rank, capacity factor 1, no padding.
    """
    best = _solve(scores, topk, **arguments)
    batch, length, num_experts = scores.shape
    assert topk == 2 and length * topk % num_experts == 0, "the released code's case"
    capacity_E = torch.full((num_experts,), length * topk // num_experts)
    experts_BSK = torch.stack(
        [greedy_then_hungarian(scores[b].float(), capacity_E) for b in range(batch)]
    )
    twice_B = (experts_BSK[..., 0] == experts_BSK[..., 1]).any(1)
    # Where the greedy choice has left a token nothing but its first expert.
    experts_BSK[twice_B] = best.experts[twice_B]
    return dataclasses.replace(best, experts=experts_BSK)


scopes.solve = solve

if __name__ == "__main__":
    pretrain_gpt.main()
