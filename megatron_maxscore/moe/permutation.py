"""The order of dispatch from known experts.

Megatron's permutation gets a (T, E) map: it sorts all its entries (from 0.18), or picks the true
ones, which waits for the device (before). With the experts at hand it is a stable sort of T * K
small integers, of fixed size.

Shape letters: T tokens, K experts per token, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def permute_known(
    tokens_TH: Tensor, probs_TE: Tensor | None, experts_TK: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Bring tokens in order of their expert, then of their index.

    Args:
        tokens_TH: (T, H).
        probs_TE: (T, E) gates, or None.
        experts_TK: (T, K) int64.

    Returns:
        (T * K, H) tokens, (T * K,) gates if there are any, and (T * K,) int64 which token each is:
        the first three results of Megatron's ``permute`` with the same experts as a map.
    """
    flat = experts_TK.reshape(-1).to(torch.int16)
    order = torch.sort(flat, stable=True).indices
    token = order // experts_TK.shape[1]
    probs = None
    if probs_TE is not None:
        probs = probs_TE.gather(1, experts_TK).reshape(-1).index_select(0, order)
    return tokens_TH.index_select(0, token), probs, token
