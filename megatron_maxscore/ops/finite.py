"""``finite``: replace entries that are not finite by 0, and report which rows had such entries."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor


def finite(matrix_NE: Tensor) -> tuple[Tensor, Tensor]:
    """Replace entries that are NaN or infinite by 0; their gradient is 0.

    On a GPU it is one kernel, forward and backward each.

    Args:
        matrix_NE: (..., E) floating tensor.

    Returns:
        (..., E) tensor of the same dtype, and (...) bool, which rows had such entries.
    """
    result: tuple[Tensor, Tensor] = _Finite.apply(matrix_NE)
    return result


class _Finite(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix_NE: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(matrix_NE)
        kernels = _kernels(matrix_NE)
        if kernels is not None:
            clean_NE, bad_N = kernels.forward(matrix_NE.contiguous())
        else:
            is_finite_NE = torch.isfinite(matrix_NE)
            clean_NE, bad_N = matrix_NE.where(is_finite_NE, 0.0), ~is_finite_NE.all(-1)
        ctx.mark_non_differentiable(bad_N)
        return clean_NE, bad_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_NE: Tensor, _: Any) -> Tensor:
        (matrix_NE,) = ctx.saved_tensors
        kernels = _kernels(matrix_NE)
        if kernels is not None:
            gradient: Tensor = kernels.backward(matrix_NE.contiguous(), grad_NE.contiguous())
            return gradient
        return grad_NE.where(torch.isfinite(matrix_NE), 0.0)


def _kernels(matrix_NE: Tensor) -> Any:
    """Return the Triton kernels where they can run, else None."""
    if not matrix_NE.is_cuda or matrix_NE.numel() == 0:
        return None
    try:
        return importlib.import_module("megatron_maxscore.ops.kernels.finite")
    except ImportError:  # no Triton
        return None
