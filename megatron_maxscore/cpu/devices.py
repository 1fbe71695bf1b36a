"""Device queries, memory statistics, and device arguments that name CUDA."""

from __future__ import annotations

import os
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils import _device as device_contexts

from megatron_maxscore._replacements import Replacements

CPU = torch.device("cpu")

# Factory functions that take a ``device`` keyword and are called by Megatron with a CUDA device.
_FACTORIES = (
    "arange as_tensor empty empty_like empty_strided eye full full_like linspace ones ones_like "
    "rand rand_like randint randint_like randn randn_like randperm tensor zeros zeros_like"
).split()


def _names_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device == "cuda" or device.startswith("cuda:")
    # A bare index means an accelerator.
    return isinstance(device, int) and not isinstance(device, bool)


def answer_queries(replacements: Replacements) -> None:
    """One device per local rank, which is the CPU.

    Compute capability 10.0: from there on Megatron does not ask for CUDA_DEVICE_MAX_CONNECTIONS=1,
    an ordering of launches that the CPU has anyway.
    """
    count = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    own = int(os.environ.get("LOCAL_RANK", "0"))
    properties = SimpleNamespace(
        name="cpu", major=10, minor=0, total_memory=0, multi_processor_count=1
    )
    answers = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "device_count": lambda: count,
        "current_device": lambda: own,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: "cpu",
        "get_device_capability": lambda device=None: (10, 0),
        "get_device_properties": lambda device=None: properties,
        "temperature": lambda device=None: 0,
        "power_draw": lambda device=None: 0,
        "utilization": lambda device=None: 0,
        "clock_rate": lambda device=None: 0,
        "_lazy_init": lambda: None,
        "_lazy_call": lambda function, **kwargs: function(),
    }
    for name, answer in answers.items():
        replacements.set(torch.cuda, name, answer)


def answer_memory(replacements: Replacements) -> None:
    """Memory statistics are 0: there is no caching allocator."""
    for name in (
        "memory_allocated max_memory_allocated memory_reserved max_memory_reserved "
        "device_memory_used"
    ).split():
        replacements.set(torch.cuda, name, lambda device=None: 0)
    # Callers read single keys by name.
    replacements.set(torch.cuda, "memory_stats", lambda device=None: _Zeros())
    replacements.set(torch.cuda, "mem_get_info", lambda device=None: (0, 0))
    for name in ("empty_cache", "reset_peak_memory_stats", "ipc_collect"):
        replacements.set(torch.cuda, name, lambda *args, **kwargs: None)


def answer_profilers(replacements: Replacements) -> None:
    """CUDA's profiler and the history of its allocator do nothing."""
    runtime = SimpleNamespace(cudaProfilerStart=lambda: 0, cudaProfilerStop=lambda: 0)
    replacements.set(torch.cuda, "cudart", lambda: runtime)
    replacements.set(torch.cuda, "check_error", lambda code: None)
    for name in ("start", "stop"):
        replacements.set(torch.cuda.profiler, name, lambda: None)
    replacements.set(torch.autograd.profiler, "emit_nvtx", lambda *args, **kwargs: nullcontext())
    replacements.set(torch.cuda.memory, "_record_memory_history", lambda *args, **kwargs: None)
    replacements.set(torch.cuda.memory, "_snapshot", lambda device=None: {})
    # An observer of exhausted memory, which is not met here.
    replacements.set(torch._C, "_cuda_attach_out_of_memory_observer", lambda observer: None)


class _Zeros(dict):
    def __missing__(self, key: str) -> int:
        return 0


def answer_device_contexts(replacements: Replacements) -> None:
    """``with torch.cuda.device(...)`` does nothing."""
    replacements.set(torch.cuda, "device", lambda device=None: nullcontext())


def answer_factories(replacements: Replacements) -> None:
    """Tensor factories called with a CUDA device make CPU tensors.

    Plain wrappers and not a TorchFunctionMode: a mode is per thread and absent in the threads and
    nested passes of autograd.
    """

    def make(original: Any) -> Any:
        def factory(*args: Any, **kwargs: Any) -> Any:
            if _names_cuda(kwargs.get("device")):
                kwargs["device"] = CPU
            # Pinned memory needs a CUDA runtime.
            kwargs.pop("pin_memory", None)
            return original(*args, **kwargs)

        return factory

    # ``with torch.device(...)`` recognises factories by a list that torch makes once. Make it now,
    # so that it holds the original functions, which the wrappers call.
    device_contexts._device_constructors()
    for name in _FACTORIES:
        replacements.wrap(torch, name, make)


def answer_tensor_moves(replacements: Replacements) -> None:
    """``.cuda()``, ``.to('cuda')``, ``.pin_memory()`` leave tensors and modules where they are."""

    def make_to(original: Any) -> Any:
        def to(self: Any, *args: Any, **kwargs: Any) -> Any:
            if args and _names_cuda(args[0]):
                args = (CPU, *args[1:])
            if _names_cuda(kwargs.get("device")):
                kwargs["device"] = CPU
            return original(self, *args, **kwargs)

        return to

    def make_new(original: Any) -> Any:
        def new(self: Any, *args: Any, **kwargs: Any) -> Any:
            if _names_cuda(kwargs.get("device")):
                kwargs["device"] = CPU
            return original(self, *args, **kwargs)

        return new

    replacements.wrap(torch.Tensor, "to", make_to)
    replacements.wrap(torch.nn.Module, "to", make_to)
    for name in ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"):
        replacements.wrap(torch.Tensor, name, make_new)
    replacements.set(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    replacements.set(torch.nn.Module, "cuda", lambda self, *args, **kwargs: self)
    replacements.set(torch.Tensor, "pin_memory", lambda self, *args, **kwargs: self)


def answer_tensor_type(replacements: Replacements) -> None:
    """``Tensor.type()`` says ``torch.cuda.FloatTensor``: the optimizer compares such strings."""

    def make(original: Any) -> Any:
        def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if args or kwargs:
                return original(self, *args, **kwargs)
            return original(self).replace("torch.", "torch.cuda.", 1)

        return type_

    replacements.wrap(torch.Tensor, "type", make)


ANSWERS = (
    answer_queries,
    answer_memory,
    answer_profilers,
    answer_device_contexts,
    answer_factories,
    answer_tensor_moves,
    answer_tensor_type,
)
