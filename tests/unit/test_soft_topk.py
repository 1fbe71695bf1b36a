"""SoftTopk: invariants first, then independent references, then edge cases."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from megatron_maxscore.ops import soft_topk

SIZES = [(2, 1), (3, 1), (3, 2), (5, 5), (16, 2), (17, 16), (64, 8), (64, 63)]


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(SIZES),
    st.sampled_from([1e-4, 1.0, 30.0, 1e4]),
    st.sampled_from([0.05, 1.0, 3.0]),
)
@settings(max_examples=150, deadline=None)
def test_sum_range_and_order(seed, size, scale, temperature):
    num_experts, k = size
    logits = scale * torch.randn(20, num_experts, generator=torch.Generator().manual_seed(seed))
    p = soft_topk(logits, k, temperature)
    assert torch.isfinite(p).all() and (p >= 0).all() and (p <= 1).all()
    torch.testing.assert_close(p.sum(-1), torch.full((20,), float(k)), atol=2e-5 * k, rtol=0)
    ordered = p.gather(1, logits.argsort(dim=1))
    assert (ordered.diff(dim=1) >= 0).all(), "a larger logit never gets a smaller value"


def reference(row: list[float], k: int, temperature: float) -> list[float]:
    """Bisection on tau in plain Python."""

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x)) if x > -700 else 0.0

    def excess(tau: float) -> float:
        return sum(sigmoid((z - tau) / temperature) for z in row) - k

    width = temperature * 60
    tau = brentq(excess, min(row) - width, max(row) + width, xtol=1e-14)
    return [sigmoid((z - tau) / temperature) for z in row]


@pytest.mark.parametrize(("num_experts", "k"), [s for s in SIZES if s[0] != s[1]])
@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_equals_bisection(num_experts, k, temperature):
    logits = 3 * torch.randn(6, num_experts, dtype=torch.float64)
    expected = [reference(row, k, temperature) for row in logits.tolist()]
    p = soft_topk(logits, k, temperature)
    torch.testing.assert_close(p, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize(("num_experts", "k"), SIZES)
def test_gradcheck(num_experts, k):
    logits = torch.randn(4, num_experts, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: soft_topk(z, k, 0.7), logits)


def test_maximises_its_objective():
    # Any other point with the same sum has a lower entropy-regularised value.
    logits = torch.randn(8, 12, dtype=torch.float64)
    p = soft_topk(logits, 3, 0.8)

    def value(q):
        entropy = -(torch.xlogy(q, q) + torch.xlogy(1 - q, 1 - q)).sum(-1)
        return (q * logits).sum(-1) + 0.8 * entropy

    for _ in range(20):
        step = 1e-3 * torch.randn_like(p)
        q = p + step - step.mean(-1, keepdim=True)
        inside = ((q > 0) & (q < 1)).all(-1)
        assert (value(q) <= value(p) + 1e-12)[inside].all()


def test_all_experts_are_taken_when_k_is_e():
    logits = torch.randn(3, 4, requires_grad=True)
    p = soft_topk(logits, 4)
    p.sum().backward()
    assert torch.equal(p, torch.ones(3, 4)) and torch.equal(logits.grad, torch.zeros(3, 4))


def test_gradient_is_zero_where_everything_underflows():
    logits = torch.tensor([[1e4, 5e3, -5e3, -1e4]], requires_grad=True)
    p = soft_topk(logits, 2)
    assert p.tolist() == [[1.0, 1.0, 0.0, 0.0]]
    (p * torch.tensor([[1.0, 2.0, 3.0, 4.0]])).sum().backward()
    assert torch.equal(logits.grad, torch.zeros(1, 4))


def test_gradient_ignores_constants():
    logits = torch.randn(5, 9, requires_grad=True)
    soft_topk(logits, 2).sum().backward()
    assert logits.grad.abs().max() < 1e-6, "the sum is constant"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    logits = torch.randn(10, 16).to(dtype).requires_grad_()
    p = soft_topk(logits, 4)
    wide = logits.detach().float().requires_grad_()
    expected = soft_topk(wide, 4)
    assert p.dtype == dtype and torch.equal(p, expected.to(dtype))
    weights = torch.randn(10, 16).to(dtype)
    (p * weights).sum().backward()
    (expected * weights.float()).sum().backward()
    torch.testing.assert_close(logits.grad.float(), wide.grad, rtol=2e-2, atol=1e-3)


def test_shapes_and_minus_infinity():
    logits = torch.randn(2, 3, 5)
    assert torch.equal(soft_topk(logits, 2)[1], soft_topk(logits[1], 2))
    p = soft_topk(torch.tensor([[-math.inf, 1.0, 2.0, 0.0]]), 2)
    assert p[0, 0] == 0.0 and p.sum().item() == pytest.approx(2.0)
    assert soft_topk(torch.tensor([[-math.inf, 1.0, 2.0, -math.inf]]), 2).tolist() == [[0, 1, 1, 0]]
    mixed = soft_topk(torch.tensor([[math.nan, 0.0, 1.0], [0.0, 1.0, 2.0]]), 1)
    assert mixed[0].isnan().all() and mixed[1].sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_softmax_variant(dtype):
    logits = (3 * torch.randn(6, 10)).to(dtype).requires_grad_()
    p = soft_topk(logits, 3, 0.5, "softmax")
    weights = [[math.exp(float(z) / 0.5) for z in row] for row in logits.tolist()]
    expected = torch.tensor([[3 * w / sum(row) for w in row] for row in weights])
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(p.float(), expected, rtol=tolerance, atol=tolerance)
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(lambda z: soft_topk(z, 3, 0.5, "softmax"), logits)


def test_empty_input():
    assert soft_topk(torch.zeros(0, 4), 2).shape == (0, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(k=0), "k must lie between 1 and the number of experts 4, got 0"),
        (dict(k=5), "got 5"),
        (dict(k=2, temperature=0.0), "temperature must be a positive number, got 0.0"),
        (dict(k=2, variant="hard"), "variant must be one of bientropic, softmax, got 'hard'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        soft_topk(torch.randn(2, 4), **arguments)


def test_integer_logits_are_refused():
    with pytest.raises(ValueError, match="floating point"):
        soft_topk(torch.ones(2, 4, dtype=torch.int64), 2)
