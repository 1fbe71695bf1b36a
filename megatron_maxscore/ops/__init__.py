"""Tensor operators of MaxScore routing."""

from megatron_maxscore.ops.finite import finite
from megatron_maxscore.ops.soft_topk import VARIANTS, soft_topk, soft_topk_at

__all__ = ["VARIANTS", "finite", "soft_topk", "soft_topk_at"]
