"""Choosing each token's best experts at given prices.

Shape letters: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import numpy as np
import torch

from megatron_maxscore.flow.problem import BoolArray, FloatArray, IntArray, Problem

# Below every reduced score: those are above -(E - 1) * 2**36 in size, keys add at most 11 bits.
FORBIDDEN = -(1 << 50)


def reduced_scores(problem: Problem, prices_E: IntArray) -> IntArray:
    """Return (T, E) int64 scores minus prices, ``FORBIDDEN`` at forbidden arcs."""
    r_TE = problem.q_TE - prices_E
    if problem.allowed_TE is not None:
        r_TE[~problem.allowed_TE] = FORBIDDEN
    return r_TE


def largest(values_TE: IntArray, count: int) -> tuple[IntArray, IntArray]:
    """Return values and indices of the ``count`` largest per row, ties by the lower index.

    torch.topk leaves the order of ties open, so the index goes into the key.

    Args:
        values_TE: (T, E) int64, at most 2**52 in size.
        count: how many, 1 <= count <= E.

    Returns:
        Two (T, count) int64 arrays, best first.
    """
    num_experts = values_TE.shape[1]
    bits = max(1, (num_experts - 1).bit_length())
    keys_TE = (values_TE << bits) + np.arange(num_experts - 1, -1, -1, dtype=np.int64)
    top = torch.from_numpy(keys_TE).topk(count, dim=1).values.numpy()
    return top >> bits, num_experts - 1 - (top & ((1 << bits) - 1))


def as_mask(experts_TK: IntArray, num_experts: int) -> BoolArray:
    """Return the (T, E) bool matrix of (T, K) expert indices."""
    x_TE = np.zeros((experts_TK.shape[0], num_experts), np.bool_)
    np.put_along_axis(x_TE, experts_TK, True, axis=1)
    return x_TE


def order_by_score(x_TE: BoolArray, scores_TE: FloatArray, topk: int) -> IntArray:
    """Return (T, K) expert indices of an assignment, best score first, ties by expert index."""
    masked_TE = np.where(x_TE, -scores_TE, np.inf)
    return np.argsort(masked_TE, axis=1, kind="stable")[:, :topk].astype(np.int64)
