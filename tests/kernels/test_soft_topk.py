"""The SoftTopk kernels in the interpreter, beside the reference."""

from __future__ import annotations

import pytest
import torch

from megatron_maxscore.ops import soft_topk, soft_topk_at
from megatron_maxscore.ops.kernels import soft_topk as kernels

# Kernels compute what they then mask out, too.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SIZES = [(2, 1), (3, 2), (8, 1), (17, 16), (64, 8), (100, 5), (160, 6), (512, 16)]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fill new tensors with NaN, so that what a kernel leaves out shows."""

    def empty_like(tensor, **options):
        dtype = options.get("dtype", tensor.dtype)
        return torch.full(tensor.shape, float("nan"), dtype=dtype)

    def empty(size, dtype, device):
        return torch.full(size, float("nan"), dtype=dtype, device=device)

    monkeypatch.setattr(torch, "empty_like", empty_like)
    monkeypatch.setattr(torch, "empty", empty)


def both(logits, k, temperature, grad):
    """Return results and gradients, of the kernels and of the reference."""
    p, tau = kernels.forward(logits, k, temperature)
    found = p, kernels.backward(logits, tau, grad, temperature)
    leaf = logits.clone().requires_grad_()
    expected = soft_topk(leaf, k, temperature)
    expected.backward(grad)
    return found, (expected.detach(), leaf.grad)


@pytest.mark.parametrize(("num_experts", "k"), SIZES)
def test_chosen_experts(num_experts, k):
    generator = torch.Generator().manual_seed(num_experts)
    logits = torch.randn(11, num_experts, generator=generator)
    # Not the k best: the flow's choice may be any.
    experts = torch.stack([torch.randperm(num_experts, generator=generator)[:k] for _ in logits])
    grad = torch.randn(11, k, generator=generator)
    p, tau = kernels.forward(logits, k, 0.7, experts)
    found = kernels.backward(logits, tau, grad, 0.7, experts)
    leaf = logits.clone().requires_grad_()
    expected = soft_topk(leaf, k, 0.7).gather(1, experts)
    expected.backward(grad)
    torch.testing.assert_close(p, expected.detach(), atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(found, leaf.grad, atol=2e-6, rtol=1e-4)
    again = logits.clone().requires_grad_()
    soft_topk_at(again, experts, 0.7).backward(grad)
    assert torch.equal(again.grad, leaf.grad)


@pytest.mark.parametrize(("num_experts", "k"), SIZES)
@pytest.mark.parametrize(
    ("scale", "temperature"), [(1e-4, 0.3), (1.0, 1.0), (30.0, 3.0), (1e4, 1.0)]
)
def test_equals_the_reference(num_experts, k, scale, temperature):
    generator = torch.Generator().manual_seed(num_experts)
    logits = scale * torch.randn(11, num_experts, generator=generator)
    grad = torch.randn(11, num_experts, generator=generator)
    found, expected = both(logits, k, temperature, grad)
    torch.testing.assert_close(found[0], expected[0], atol=2e-6, rtol=2e-6)
    largest = float(expected[1].abs().max())
    torch.testing.assert_close(found[1], expected[1], atol=2e-6 * largest, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    logits = torch.randn(9, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    grad = torch.randn(9, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    found, expected = both(logits, 3, 1.0, grad)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        # The interpreter cuts off what the reference rounds.
        torch.testing.assert_close(one, other, atol=2**-9, rtol=2**-7)


def test_ties_and_forbidden():
    logits = torch.tensor(
        [
            [1.0, 1.0, 1.0, 1.0, 1.0],
            [2.0, 1.0, 1.0, 1.0, 0.0],
            [0.0, -0.0, 0.0, -0.0, 1.0],
            [3.0, 2.0, float("-inf"), float("-inf"), 1.0],
            [3.0, 2.0, float("-inf"), float("-inf"), float("-inf")],
        ]
    )
    found, expected = both(logits, 2, 1.0, torch.randn(5, 5))
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-6)
    assert (found[0][logits == float("-inf")] == 0).all()


def test_nan_stays_in_its_row():
    logits = torch.randn(4, 6)
    clean = soft_topk(logits, 2)
    logits[1, 3] = float("nan")
    p, _ = kernels.forward(logits, 2, 1.0)
    assert p[1].isnan().any()
    torch.testing.assert_close(p[[0, 2, 3]], clean[[0, 2, 3]], atol=2e-6, rtol=2e-6)
