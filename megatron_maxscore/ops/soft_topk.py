r"""SoftTopk: a differentiable relaxation of choosing k of E.

For one row of logits :math:`z \in R^E` and a temperature t > 0, the bi-entropic variant is

.. math::
    p = \arg\max_{0 \le p \le 1,\ \sum_j p_j = k}
        \sum_j p_j z_j - t \sum_j [p_j \log p_j + (1 - p_j) \log(1 - p_j)]

whose solution is :math:`p_j = \sigma((z_j - \tau) / t)` with the one :math:`\tau` that makes the
sum k. It is the entropic relaxation of the per-token part of the routing flow (choose k distinct
experts of maximum total score). Its definition in the MaxScore paper (Dong et al., Findings of
ACL 2025) was not available to us; this is the variant we implement, under its own name.

The variant ``softmax`` leaves out the bound p <= 1 and the entropy of 1 - p: then
:math:`p_j = k e^{z_j / t} / \sum_l e^{z_l / t}`, k times the softmax that the authors' released
code uses as scores.

Shape letters: see :mod:`megatron_maxscore`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

VARIANTS = ("bientropic", "softmax")

# Safeguarded Newton steps on a function whose slope lies in (-2, 0); float64 has converged by then.
_MAX_STEPS = 40
# Stands for -inf so that differences stay finite; far below any logit that can matter.
_LOWEST = -1e30


def soft_topk(
    logits: Tensor, k: int, temperature: float = 1.0, variant: str = "bientropic"
) -> Tensor:
    """Return entries that sum to k over the last dimension; in [0, 1] with ``bientropic``.

    Example:
        >>> soft_topk(torch.tensor([[2.0, 1.0, 0.0, -1.0]]), k=2)
        tensor([[0.8176, 0.6225, 0.3775, 0.1824]])

    Args:
        logits: (..., E) floating tensor. bfloat16 and float16 are computed in float32. -inf gives
            0 as long as at least k entries of the row are finite. NaN gives NaN in its row.
        k: how many experts a token takes, 1 <= k <= E. At k = E every entry of ``bientropic`` is 1.
        temperature: t > 0, in the unit of the logits; small t approaches the hard choice.
        variant: one of :data:`VARIANTS`.

    Returns:
        (..., E) tensor of the logits' dtype. The gradient of ``bientropic`` is
        ``p (1 - p) / t * (g - sum(p (1 - p) g) / sum(p (1 - p)))``, and 0 where every
        ``p (1 - p)`` underflows.

    Raises:
        ValueError: k, temperature or variant is out of range.
    """
    _check(logits, k, temperature, variant)
    if variant == "softmax":
        return _softmax(logits, k, temperature)
    result: Tensor = _BiEntropic.apply(logits, None, k, float(temperature))
    return result


def soft_topk_at(
    logits: Tensor, experts: Tensor, temperature: float = 1.0, variant: str = "bientropic"
) -> Tensor:
    """Return the entries of :func:`soft_topk` that belong to chosen experts.

    On a GPU it is one kernel, forward and backward each.

    Example:
        >>> soft_topk_at(torch.tensor([[2.0, 1.0, 0.0, -1.0]]), torch.tensor([[0, 3]]))
        tensor([[0.8176, 0.1824]])

    Args:
        logits: (..., E), as for :func:`soft_topk`.
        experts: (..., K) int64, K distinct experts of every row; k is K.
        temperature: as for :func:`soft_topk`.
        variant: as for :func:`soft_topk`.

    Returns:
        (..., K) tensor of the logits' dtype.

    Raises:
        ValueError: k, temperature or variant is out of range.
    """
    _check(logits, experts.shape[-1], temperature, variant)
    if variant == "softmax":
        return _softmax(logits, experts.shape[-1], temperature).gather(-1, experts)
    result: Tensor = _BiEntropic.apply(logits, experts, experts.shape[-1], float(temperature))
    return result


def _check(logits: Tensor, k: int, temperature: float, variant: str) -> None:
    num_experts = logits.shape[-1]
    if not 1 <= k <= num_experts:
        raise ValueError(f"k must lie between 1 and the number of experts {num_experts}, got {k}")
    if not temperature > 0.0 or math.isinf(temperature):
        raise ValueError(f"temperature must be a positive number, got {temperature}")
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating point, got {logits.dtype}")


def _softmax(logits: Tensor, k: int, temperature: float) -> Tensor:
    compute = torch.float64 if logits.dtype == torch.float64 else torch.float32
    scaled = logits.to(compute) / temperature
    return (k * torch.softmax(scaled, dim=-1)).to(logits.dtype)


class _BiEntropic(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, experts: Tensor | None, k: int, temperature: float
    ) -> Tensor:
        ctx.temperature = temperature
        ctx.kernels = kernels = _kernels(logits) if k < logits.shape[-1] else None
        if kernels is not None:
            logits = logits.contiguous()
            experts = None if experts is None else experts.contiguous()
            result: tuple[Tensor, Tensor] = kernels.forward(logits, k, temperature, experts)
            ctx.save_for_backward(logits, result[1], experts)
            return result[0]
        compute = torch.float64 if logits.dtype == torch.float64 else torch.float32
        z_NE = logits.to(compute)
        if k == z_NE.shape[-1]:
            p_NE, v_NE = torch.ones_like(z_NE), torch.zeros_like(z_NE)
        else:
            order_NK = z_NE.topk(k + 1, dim=-1)
            # Only differences matter; those to the k-th are exact where they are small.
            kth_N = order_NK.values[..., k - 1 : k]
            u_NE = (z_NE - torch.where(kth_N.isinf(), 0.0, kth_N)) / temperature
            x_NE = u_NE - threshold(u_NE, order_NK.indices)
            p_NE = torch.sigmoid(x_NE)
            # p (1 - p) without the cancellation in 1 - p.
            v_NE = x_NE.neg_().sigmoid_().mul_(p_NE)
        ctx.save_for_backward(v_NE, experts)
        return (p_NE if experts is None else p_NE.gather(-1, experts)).to(logits.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.kernels is not None:
            logits, tau, experts = ctx.saved_tensors
            result: Tensor = ctx.kernels.backward(
                logits, tau, grad.contiguous(), ctx.temperature, experts
            )
            return result, None, None, None
        v_NE, experts = ctx.saved_tensors
        g_NE = grad.to(v_NE.dtype)
        if experts is not None:
            g_NE = torch.zeros_like(v_NE).scatter_(-1, experts, g_NE)
        total_N = v_NE.sum(-1, keepdim=True)
        mean_N = (v_NE * g_NE).sum(-1, keepdim=True) / torch.where(total_N > 0, total_N, 1.0)
        result_NE = (g_NE - mean_N).mul_(v_NE).div_(ctx.temperature)
        return result_NE.to(grad.dtype), None, None, None


def _kernels(matrix_NE: Tensor) -> Any:
    """Return the Triton kernels where they can run, else None: float64 and the CPU go without."""
    if not matrix_NE.is_cuda or matrix_NE.dtype == torch.float64 or matrix_NE.numel() == 0:
        return None
    try:
        from megatron_maxscore.ops.kernels import soft_topk as kernels
    except ImportError:  # no Triton
        return None
    return kernels


def threshold(u_NE: Tensor, top_NK1: Tensor) -> Tensor:
    """Return the tau with ``sum(sigmoid(u - tau)) == k`` per row, for 1 <= k < E.

    The sum is k exactly if what the k largest entries lack of 1 adds up to what the others have.
    The function to solve compares the logarithms of both sides: nothing cancels, and its slope in
    tau lies in (-2, 0). If the logits are far apart, the function is linear. The start, midway
    between the k-th and the next logit, is then as good as the solution, even if every sigmoid
    underflows. Newton's method with a bracket does the rest.

    Args:
        u_NE: (..., E) float32 or float64.
        top_NK1: (..., k + 1) int64 indices of the k + 1 largest entries, best first.

    Returns:
        (..., 1) tau, in the unit of ``u_NE``.
    """
    num_experts, k = u_NE.shape[-1], top_NK1.shape[-1] - 1
    u_NE = u_NE.clamp(min=_LOWEST)
    # Which of equal entries count as the top makes no difference to the equation.
    values_NK1 = u_NE.gather(-1, top_NK1)
    top_NK = values_NK1[..., :k]
    rest_NE = u_NE.scatter(-1, top_NK1[..., :k], _LOWEST)
    low_N = values_NK1[..., k:] - math.log(k)
    high_N = top_NK[..., -1:] + math.log(num_experts - k)
    tau_N = (values_NK1[..., k:] + top_NK[..., -1:]) / 2
    tolerance = 4 * torch.finfo(u_NE.dtype).eps
    for _ in range(_MAX_STEPS):
        have_NE, lack_NK = (rest_NE - tau_N).sigmoid_(), (tau_N - top_NK).sigmoid_()
        have_N, lack_N = have_NE.sum(-1, keepdim=True), lack_NK.sum(-1, keepdim=True)
        slope_N = (
            have_NE.square_().sum(-1, keepdim=True) / have_N
            + lack_NK.square_().sum(-1, keepdim=True) / lack_N
            - 2.0
        )
        value_N = have_N.log() - lack_N.log()
        low_N = torch.where(value_N > 0, tau_N, low_N)
        high_N = torch.where(value_N < 0, tau_N, high_N)
        newton_N = tau_N - value_N / slope_N
        inside = (newton_N >= low_N) & (newton_N <= high_N)
        next_N = torch.where(inside, newton_N, (low_N + high_N) / 2)
        # If a side underflows, or the row has NaN, tau stays as it is.
        next_N = torch.where(value_N.isfinite(), next_N, tau_N)
        moved = (next_N - tau_N).abs() > tolerance * (1.0 + tau_N.abs())
        tau_N = next_N
        if not bool(moved.any()):
            break
    return tau_N
