"""``finite`` in Triton; :mod:`megatron_maxscore.ops.finite` defines it and is the reference."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Entries that a program of four warps works on.
_TILE = 2048


@triton.jit
def _load(ptr, num_rows, E: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr):
    row_Q = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, BLOCK_E)[None, :]
    inside = (row_Q < num_rows)[:, None] & (e < E)
    place = row_Q[:, None] * E + e
    x = tl.load(ptr + place, mask=inside, other=0.0)
    # float32 holds what narrower types do, but not all that float64 does.
    wide = x if x.dtype == tl.float64 else x.to(tl.float32)
    return x, tl.abs(wide) < float("inf"), place, inside, row_Q


@triton.jit(do_not_specialize=["num_rows"])
def _forward(
    x_ptr, clean_ptr, bad_ptr, num_rows, E: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr
):
    x, is_finite, place, inside, row_Q = _load(x_ptr, num_rows, E, BLOCK_E, ROWS)
    tl.store(clean_ptr + place, tl.where(is_finite, x, 0.0).to(x.dtype), mask=inside)
    bad_Q = tl.max((is_finite == 0).to(tl.int8), 1)
    tl.store(bad_ptr + row_Q, bad_Q, mask=row_Q < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def _backward(
    x_ptr, grad_ptr, result_ptr, num_rows, E: tl.constexpr, BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    _, is_finite, place, inside, _ = _load(x_ptr, num_rows, E, BLOCK_E, ROWS)
    grad = tl.load(grad_ptr + place, mask=inside, other=0.0)
    tl.store(result_ptr + place, tl.where(is_finite, grad, 0.0).to(grad.dtype), mask=inside)


def forward(x_NE: Tensor) -> tuple[Tensor, Tensor]:
    """Return (..., E) with 0 for what is not finite, and (...) bool, which rows had such."""
    clean_NE = torch.empty_like(x_NE)
    bad_N = torch.empty(x_NE.shape[:-1], dtype=torch.bool, device=x_NE.device)
    rows, grid, constants = _tiling(x_NE)
    with torch.cuda.device_of(x_NE):  # Triton launches on the current device
        _forward[grid](
            x_NE, clean_NE, bad_N.view(torch.int8), rows, **constants, enable_fp_fusion=True
        )
    return clean_NE, bad_N


def backward(x_NE: Tensor, grad_NE: Tensor) -> Tensor:
    """Return the gradient, 0 where ``x_NE`` is not finite."""
    result_NE = torch.empty_like(grad_NE)
    rows, grid, constants = _tiling(x_NE)
    with torch.cuda.device_of(x_NE):
        _backward[grid](x_NE, grad_NE, result_NE, rows, **constants, enable_fp_fusion=True)
    return result_NE


def _tiling(x_NE: Tensor) -> tuple[int, tuple[int], dict[str, int]]:
    experts = x_NE.shape[-1]
    rows, block = x_NE.numel() // experts, triton.next_power_of_2(experts)
    rows_of_tile = max(1, _TILE // block)
    constants = {"E": experts, "BLOCK_E": block, "ROWS": rows_of_tile}
    return rows, (triton.cdiv(rows, rows_of_tile),), constants
