"""Kernels run on the device of their tensors, which need not be the current one."""

from __future__ import annotations

import contextlib

import torch

from megatron_maxscore.flow import solve
from megatron_maxscore.ops.kernels import finite, soft_topk
from tests.kernels.our_kernels import KERNELS, intercept


def test_launches_are_on_the_device_of_the_scores(monkeypatch):
    """Triton launches on the current device and its stream, whatever its arguments are on."""
    scores = torch.randn(32, 8)
    current, launched = [], []

    @contextlib.contextmanager
    def device_of(tensor):
        current.append(tensor)
        yield
        current.pop()

    def launch(name, kernel, grid, arguments, options):
        launched.append(len(current))
        return kernel[grid](*arguments, **options)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    intercept(monkeypatch, launch)
    solve(scores, 2, mode="bounded")
    p, tau = soft_topk.forward(scores, 2, 1.0)
    soft_topk.backward(scores, tau, p.contiguous(), 1.0)
    finite.forward(scores)
    finite.backward(scores, scores)
    assert launched == [1] * len(KERNELS)
