"""The kernels of the package, as tests replace them."""

from __future__ import annotations

import sys

from megatron_maxscore.flow import engine
from megatron_maxscore.moe import router, seam
from megatron_maxscore.ops.kernels import finite, soft_topk

KERNELS = (
    (engine, "solve_kernel"), (soft_topk, "_forward"), (soft_topk, "_backward"),
    (finite, "_forward"), (finite, "_backward"),
)  # fmt: skip


class _Intercepted:
    """Stands for a kernel where the package launches it: ``kernel[grid](...)``."""

    def __init__(self, kernel, name, launch):
        self.kernel, self.name, self.launch = kernel, name, launch

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launch(
            self.name, self.kernel, grid, arguments, options
        )


def intercept(monkeypatch, launch):
    """Have ``launch(name, kernel, grid, arguments, options)`` called for every launch."""
    for module, name in KERNELS:
        monkeypatch.setattr(module, name, _Intercepted(getattr(module, name), name, launch))


def count_as_a_device(monkeypatch):
    """Let tensors on the CPU, where the interpreter works, count as a device's."""
    for module in (router, seam):
        monkeypatch.setattr(module, "is_device", lambda tensor: True)
    # The package's name for it is the function's.
    for name, kernels in (("soft_topk", soft_topk), ("finite", finite)):
        module = sys.modules[f"megatron_maxscore.ops.{name}"]
        monkeypatch.setattr(module, "_kernels", lambda matrix, kernels=kernels: kernels)
