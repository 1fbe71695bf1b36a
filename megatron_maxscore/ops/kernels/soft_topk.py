"""SoftTopk in Triton; :mod:`megatron_maxscore.ops.soft_topk` defines it and is the reference.

One program reads some rows once, finds their k-th largest and tau in registers, and writes the
result. Float64 logits stay with the reference, since kernels take the temperature as float32.

Shape letters: see :mod:`megatron_maxscore`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_maxscore.ops.kernels.compilations import Compilation

# As in the reference.
_MAX_STEPS = tl.constexpr(40)
_LOWEST = tl.constexpr(-1e30)
_TOLERANCE = tl.constexpr(4 * torch.finfo(torch.float32).eps)
# Entries that a program of four warps works on.
_TILE = 512
_WARPS = 4


@triton.jit
def _select(z, inside, k, ROWS: tl.constexpr):
    """Return the k-th and the next largest of each row, and how many are above, and equal to it."""
    # Integers that sort like the floats. The k-th largest is found bit by bit, the sign first.
    bits = z.to(tl.int32, bitcast=True)
    key = tl.where(inside, bits ^ ((bits >> 31) & 0x7FFFFFFF), -0x80000000)
    at_least_Q = tl.sum((key >= 0).to(tl.int32), 1)
    found_Q = tl.where(at_least_Q >= k, 0, -0x80000000).to(tl.int32)
    for place in range(31):
        higher_Q = found_Q | (1 << (30 - place))
        at_least_Q = tl.sum((key >= higher_Q[:, None]).to(tl.int32), 1)
        found_Q = tl.where(at_least_Q >= k, higher_Q, found_Q)
    kth_Q = (found_Q ^ ((found_Q >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    above_Q = tl.sum((z > kth_Q[:, None]).to(tl.int32), 1)
    ties_Q = tl.sum((inside & (z == kth_Q[:, None])).to(tl.int32), 1)
    below = tl.where(inside & (z < kth_Q[:, None]), z, float("-inf"))
    next_Q = tl.where(above_Q + ties_Q > k, kth_Q, tl.max(below, 1))
    return kth_Q, next_Q, above_Q, ties_Q


@triton.jit
def _chosen(logits_ptr, experts_ptr, row_Q, num_rows, num_experts, k, BLOCK_K: tl.constexpr):
    """Return the (Q, K) logits of the chosen experts, where they stand, and which there are."""
    i = tl.arange(0, BLOCK_K)[None, :]
    inside = (row_Q < num_rows)[:, None] & (i < k)
    at = row_Q[:, None] * k + i
    expert = tl.load(experts_ptr + at, mask=inside, other=0)
    z = tl.load(logits_ptr + row_Q[:, None] * num_experts + expert, mask=inside, other=0.0)
    return z.to(tl.float32), at, inside


@triton.jit(do_not_specialize=["num_rows", "num_experts", "k"])
def _forward(
    logits_ptr, experts_ptr, p_ptr, tau_ptr, num_rows, num_experts, k, temperature,
    BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row_Q = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK_E)[None, :]
    inside = (row_Q < num_rows)[:, None] & (col < num_experts)
    at = row_Q[:, None] * num_experts + col
    z = tl.load(logits_ptr + at, mask=inside, other=float("-inf")).to(tl.float32)
    kth_Q, next_Q, above_Q, ties_Q = _select(z, inside, k, ROWS)
    # Only differences matter; those to the k-th are exact where they are small.
    base_Q = tl.where(tl.abs(kth_Q) == float("inf"), 0.0, kth_Q)
    u = tl.maximum((z - base_Q[:, None]) / temperature, _LOWEST)
    is_above = z > kth_Q[:, None]
    is_below = inside & (z < kth_Q[:, None])
    # Of entries equal to the k-th some are among the k largest, and it does not matter which.
    top_ties_Q = (k - above_Q).to(tl.float32)
    other_ties_Q = (ties_Q - (k - above_Q)).to(tl.float32)
    last_Q = tl.maximum((kth_Q - base_Q) / temperature, _LOWEST)
    next_Q = tl.maximum((next_Q - base_Q) / temperature, _LOWEST)
    low_Q = next_Q - tl.log(k.to(tl.float32))
    high_Q = last_Q + tl.log((num_experts - k).to(tl.float32))
    tau_Q = (last_Q + next_Q) * 0.5
    steps_left = tl.full((), _MAX_STEPS, tl.int32)
    while steps_left > 0:
        have = tl.where(is_below, tl.sigmoid(u - tau_Q[:, None]), 0.0)
        lack = tl.where(is_above, tl.sigmoid(tau_Q[:, None] - u), 0.0)
        tie_has_Q, tie_lacks_Q = tl.sigmoid(last_Q - tau_Q), tl.sigmoid(tau_Q - last_Q)
        have_Q = tl.sum(have, 1) + other_ties_Q * tie_has_Q
        lack_Q = tl.sum(lack, 1) + top_ties_Q * tie_lacks_Q
        have2_Q = tl.sum(have * have, 1) + other_ties_Q * tie_has_Q * tie_has_Q
        lack2_Q = tl.sum(lack * lack, 1) + top_ties_Q * tie_lacks_Q * tie_lacks_Q
        slope_Q = have2_Q / have_Q + lack2_Q / lack_Q - 2.0
        value_Q = tl.log(have_Q) - tl.log(lack_Q)
        low_Q = tl.where(value_Q > 0, tau_Q, low_Q)
        high_Q = tl.where(value_Q < 0, tau_Q, high_Q)
        newton_Q = tau_Q - value_Q / slope_Q
        is_between = (newton_Q >= low_Q) & (newton_Q <= high_Q)
        further_Q = tl.where(is_between, newton_Q, (low_Q + high_Q) * 0.5)
        # Where a side underflows, or the row has NaN, the start stands.
        further_Q = tl.where(tl.abs(value_Q) < float("inf"), further_Q, tau_Q)
        has_moved = tl.abs(further_Q - tau_Q) > (1.0 + tl.abs(tau_Q)) * _TOLERANCE
        steps_left = tl.max(has_moved.to(tl.int32), 0) * (steps_left - 1)
        tau_Q = further_Q
    is_bad_Q = tl.max((z != z).to(tl.int32), 1) > 0
    tau_Q = tl.where(is_bad_Q, float("nan"), tau_Q)
    # From these two numbers and the logits, the backward pass computes p again.
    tl.store(tau_ptr + row_Q, base_Q, mask=row_Q < num_rows)
    tl.store(tau_ptr + num_rows + row_Q, tau_Q, mask=row_Q < num_rows)
    if BLOCK_K > 0:
        z, at, inside = _chosen(
            logits_ptr, experts_ptr, row_Q, num_rows, num_experts, k, BLOCK_K
        )  # fmt: skip
        p = tl.sigmoid((z - base_Q[:, None]) / temperature - tau_Q[:, None])
        tl.store(p_ptr + at, p.to(p_ptr.dtype.element_ty), mask=inside)
    else:
        p = tl.sigmoid((z - base_Q[:, None]) / temperature - tau_Q[:, None])
        tl.store(p_ptr + at, p.to(p_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "num_experts"])
def _backward(
    logits_ptr, experts_ptr, tau_ptr, grad_ptr, result_ptr, num_rows, num_experts, temperature,
    K: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row_Q = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK_E)[None, :]
    inside_Q = row_Q < num_rows
    inside = inside_Q[:, None] & (col < num_experts)
    at = row_Q[:, None] * num_experts + col
    z = tl.load(logits_ptr + at, mask=inside, other=float("-inf")).to(tl.float32)
    base_Q = tl.load(tau_ptr + row_Q, mask=inside_Q, other=0.0)
    tau_Q = tl.load(tau_ptr + num_rows + row_Q, mask=inside_Q, other=0.0)
    x = (z - base_Q[:, None]) / temperature - tau_Q[:, None]
    # p (1 - p) without the cancellation in 1 - p.
    v = tl.where(inside, tl.sigmoid(-x) * tl.sigmoid(x), 0.0)
    if K > 0:
        g = tl.zeros([ROWS, BLOCK_E], tl.float32)
        for i in tl.static_range(K):
            expert_Q = tl.load(experts_ptr + row_Q * K + i, mask=inside_Q, other=0)
            g_Q = tl.load(grad_ptr + row_Q * K + i, mask=inside_Q, other=0.0).to(tl.float32)
            g += tl.where(col == expert_Q[:, None], g_Q[:, None], 0.0)
    else:
        g = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    total_Q = tl.sum(v, 1)
    mean_Q = tl.sum(v * g, 1) / tl.where(total_Q > 0, total_Q, 1.0)
    result = (g - mean_Q[:, None]) * v / temperature
    tl.store(result_ptr + at, result.to(result_ptr.dtype.element_ty), mask=inside)


def forward(
    logits_NE: Tensor, k: int, temperature: float, experts_NK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return SoftTopk, 1 <= k < E, and what the backward pass needs besides the logits.

    Args:
        logits_NE: (..., E) bfloat16, float16 or float32, contiguous.
        k: experts per token.
        temperature: > 0.
        experts_NK: (..., K) int64, contiguous: whose entries to return; None for all.

    Returns:
        (..., E) or (..., K) of the logits' dtype, and (2, N) float32.
    """
    rows, num_experts, tile = _tiling(logits_NE)
    p = torch.empty_like(logits_NE if experts_NK is None else experts_NK, dtype=logits_NE.dtype)
    tau_2N = torch.empty((2, rows), dtype=torch.float32, device=logits_NE.device)
    block_k = 0 if experts_NK is None else triton.next_power_of_2(k)
    with torch.cuda.device_of(logits_NE):  # Triton launches on the current device
        _forward[(triton.cdiv(rows, tile["ROWS"]),)](
            logits_NE, logits_NE if experts_NK is None else experts_NK, p, tau_2N, rows,
            num_experts, k, temperature, **tile, BLOCK_K=block_k, num_warps=_WARPS,
            enable_fp_fusion=True,
        )  # fmt: skip
    return p, tau_2N


def backward(
    logits_NE: Tensor,
    tau_2N: Tensor,
    grad: Tensor,
    temperature: float,
    experts_NK: Tensor | None = None,
) -> Tensor:
    """Return the gradient by the logits.

    Args:
        logits_NE: (..., E) as in :func:`forward`.
        tau_2N: (2, N) float32 of :func:`forward`.
        grad: (..., E) or (..., K) gradient by its result, contiguous.
        temperature: as there.
        experts_NK: as there.

    Returns:
        (..., E) of the logits' dtype.
    """
    result_NE = torch.empty_like(logits_NE)
    rows, num_experts, tile = _tiling(logits_NE)
    k = 0 if experts_NK is None else experts_NK.shape[-1]
    with torch.cuda.device_of(logits_NE):
        _backward[(triton.cdiv(rows, tile["ROWS"]),)](
            logits_NE, logits_NE if experts_NK is None else experts_NK, tau_2N, grad, result_NE,
            rows, num_experts, temperature, K=k, **tile, num_warps=_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return result_NE


def _tiling(matrix_NE: Tensor) -> tuple[int, int, dict[str, int]]:
    """Return rows, experts, and what a program works on."""
    num_experts = matrix_NE.shape[-1]
    return matrix_NE.numel() // num_experts, num_experts, _tile(num_experts)


def _tile(num_experts: int) -> dict[str, int]:
    block = triton.next_power_of_2(num_experts)
    return {"BLOCK_E": block, "ROWS": max(1, _TILE // block)}


def compilations() -> list[Compilation]:
    """Return what to compile ahead of time."""
    found = []
    for dtype in ("fp32", "bf16"):
        for num_experts, k in ((8, 0), (64, 0), (64, 8), (256, 8), (512, 16)):
            tile = _tile(num_experts)
            name = f"{dtype}, {num_experts} experts" + (f", chosen {k}" if k else "")
            types = {
                "experts_ptr": "*i64", "tau_ptr": "*fp32", "temperature": "fp32",
                "num_rows": "i32", "num_experts": "i32", "k": "i32",
            }  # fmt: skip
            for kernel, constants in ((_forward, {"BLOCK_K": k}), (_backward, {"K": k})):
                constants = {**tile, **constants}
                signature = {
                    argument: types.get(argument, f"*{dtype}")
                    for argument in kernel.arg_names
                    if argument not in constants
                }
                which = f"soft_topk {kernel.__name__.strip('_')}, {name}"
                found.append(Compilation(which, kernel, signature, constants, _WARPS))
    return found
