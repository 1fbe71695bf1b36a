"""The kernels that replace what is not finite, beside the reference."""

from __future__ import annotations

import pytest
import torch

from megatron_maxscore.ops import finite
from megatron_maxscore.ops.kernels import finite as kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(5, 3, 8), (1, 1), (70, 17), (9, 256)])
def test_kernels_are_the_reference(dtype, shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype)
    grad = torch.randn(shape, generator=generator).to(dtype)
    flat = x.view(-1)
    if dtype == torch.float64:
        flat[1:2] = 1e300  # finite, though not in float32
    for place, value in ((0, float("nan")), (3, float("inf")), (-1, -float("inf"))):
        flat[min(place, flat.numel() - 1)] = value
    leaf = x.clone().requires_grad_()
    clean, bad = finite(leaf)
    clean.backward(grad)
    assert torch.equal(clean, torch.nan_to_num(x, 0.0, 0.0, 0.0))
    assert torch.equal(bad, ~torch.isfinite(x).all(-1))
    assert torch.equal(leaf.grad, grad * torch.isfinite(x))
    found, found_bad = kernels.forward(x)
    assert torch.equal(found, clean) and torch.equal(found_bad, bad)
    assert torch.equal(kernels.backward(x, grad), leaf.grad)
