"""The order of dispatch from known experts.

Megatron's permutation starts from a (T, E) map. From 0.18 on it sorts all entries of the map.
Before that it selects the true ones, so the host waits for the device. If the experts are known,
less is needed: a solve on the device has put the assignments in order already; otherwise a stable
sort of T * K small integers does it. :func:`install` makes Megatron's all-to-all dispatcher use
this order for maps whose plan (:mod:`plan`) has the experts. Replaced symbol: ``permute`` in
``megatron.core.transformer.moe.token_dispatcher``.

Shape letters: see :mod:`megatron_maxscore`.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe import token_dispatcher
from torch import Tensor

from megatron_maxscore._replacements import Replacements
from megatron_maxscore.moe.plan import plan_of

_replacements = Replacements("MaxScore permutation")


def install() -> None:
    """Permute maps with known experts by them; a second call does nothing."""
    if not _replacements:
        _replacements.wrap(token_dispatcher, "permute", _by_experts)


def uninstall() -> None:
    """Undo :func:`install`, for tests."""
    _replacements.undo()


def _by_experts(original: Any) -> Any:
    def permute(tokens_TH: Tensor, routing_map: Tensor, *args: Any, **kwargs: Any) -> Any:
        plan = plan_of(routing_map)
        # The last one is from 0.20, and makes a map that ours does not.
        others = ("fused", "drop_and_pad", "return_batch_invariant_inverse_map")
        if plan.experts_TK is None or any(map(kwargs.get, others)):
            return original(tokens_TH, routing_map, *args, **kwargs)
        order = plan.order
        if order is None:
            order = order_of(plan.experts_TK, routing_map.shape[1])
        # Where tokens are padded, and by how much, are for fused kernels only.
        return (*permute_known(tokens_TH, kwargs.get("probs"), order), None, None)

    return permute


def order_of(experts_TK: Tensor, num_experts: int) -> Tensor:
    """Return assignments in order of their expert, then of their token.

    Args:
        experts_TK: (T, K) int64.
        num_experts: E.

    Returns:
        (2, T * K) int64: the token of each assignment, and its place in a flat (T, E) matrix.
    """
    flat = experts_TK.reshape(-1)
    order = torch.sort(flat.to(torch.int16), stable=True).indices
    token = order // experts_TK.shape[1]
    return torch.stack([token, token * num_experts + flat.index_select(0, order)])


def permute_known(
    tokens_TH: Tensor, probs_TE: Tensor | None, order_2N: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Bring tokens in order of their expert, then of their index.

    Args:
        tokens_TH: (T, H).
        probs_TE: (T, E) gates, or None.
        order_2N: (2, T * K) int64 of :func:`order_of`.

    Returns:
        (T * K, H) tokens, (T * K,) gates if there are any, and (T * K,) int64 which token each is:
        the first three results of Megatron's ``permute`` with the same experts as a map.
    """
    token, place = order_2N.unbind()
    probs = None if probs_TE is None else probs_TE.reshape(-1).index_select(0, place)
    return tokens_TH.index_select(0, token), probs, token
