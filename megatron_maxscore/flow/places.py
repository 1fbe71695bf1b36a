"""Where bounded mode can run, and how tensors get there."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor


@functools.cache
def has_triton() -> bool:
    """Return whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def is_device(tensor: Tensor) -> bool:
    """Return whether a tensor is where the engine runs, and the host would wait to read it."""
    return tensor.is_cuda and has_triton()


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on a device, without waiting for what the device still does."""
    if device.type != "cuda" or values.is_cuda:
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def is_interpreted() -> bool:
    """Return whether Triton's interpreter lets the engine run on tensors on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1" and has_triton()
