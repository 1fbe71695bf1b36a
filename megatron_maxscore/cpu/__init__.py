"""Run Megatron's training loop on CPU with gloo.

Megatron calls ``torch.cuda`` unconditionally in its training loop. CPU mode answers those calls:
every device that names CUDA becomes the CPU, ``nccl`` becomes gloo, streams and events become
no-ops. Nothing happens on import; :func:`enable` installs the answers, :func:`disable` removes
them, and both may be called twice. What is answered is listed by module:

* :mod:`~megatron_maxscore.cpu.devices` -- device queries, memory statistics, device arguments
* :mod:`~megatron_maxscore.cpu.streams` -- streams, events, synchronisation
* :mod:`~megatron_maxscore.cpu.rng` -- the CUDA generator and Megatron's RNG tracker
* :mod:`~megatron_maxscore.cpu.collectives` -- the backend name and gloo's gaps
* :mod:`~megatron_maxscore.cpu.deep_ep` -- DeepEP and HybridEP, where they are missing
* :mod:`~megatron_maxscore.cpu.processes` -- spawned processes and data loaders
* :mod:`~megatron_maxscore.cpu.megatron_fixes` -- symbols of Megatron that assume a GPU build
* :mod:`~megatron_maxscore.cpu.arguments` -- Megatron's arguments without Transformer Engine

It knows nothing of MaxScore: ``python -m megatron_maxscore.cpu SCRIPT ARGS`` runs stock Megatron.
"""

from __future__ import annotations

import itertools
import os
import socket
import sys

import torch

from megatron_maxscore._replacements import Replacements
from megatron_maxscore.cpu import (
    arguments,
    collectives,
    deep_ep,
    devices,
    megatron_fixes,
    processes,
    rng,
    streams,
)

_replacements = Replacements("CPU mode")

# Asked for before any answer is installed: afterwards is_available() says True.
_cuda_is_available = torch.cuda.is_available


def is_enabled() -> bool:
    """Return whether CPU mode is on in this process."""
    return bool(_replacements)


def enable() -> None:
    """Install CPU mode in this process; a second call does nothing.

    Call it before Megatron modules other than ``megatron.core.jit`` are imported: some of them
    bind CUDA functions by name when they are imported.
    """
    if is_enabled():
        return
    # torch.compile on these wrappers gains nothing on CPU and costs seconds of start-up.
    _compile(False)
    for part in (deep_ep, devices, streams, rng, collectives, processes, megatron_fixes):
        for answer in part.ANSWERS:
            answer(_replacements)


def disable() -> None:
    """Remove every answer; a second call does nothing."""
    if is_enabled():
        _compile(True)
    _replacements.undo()


def _compile(allowed: bool) -> None:
    """Let ``torch.compile`` compile, or run functions as they are; also those made before."""
    if allowed:
        os.environ.pop("TORCHDYNAMO_DISABLE", None)
    else:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    # Reads the environment only when it is imported, which Megatron may have done.
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].config.disable = not allowed


class NoDeviceError(ValueError):
    """The environment promises CUDA devices, and none was found."""


def enable_if_needed(forced: bool = False) -> bool:
    """Enable CPU mode when asked for or when there is no CUDA device; return whether it is on.

    Every rank prints one line when it switches on. With a CUDA device and ``forced=False`` nothing
    is changed.

    Raises:
        NoDeviceError: there is no CUDA device, though the environment promises some, and nobody has
            asked for the CPU. One rank of a job on the CPU would hold up all others.
    """
    if is_enabled():
        return True
    if not forced and _cuda_is_available():
        return False
    host = socket.gethostname()
    if not forced and (promise := _promised_devices()):
        raise NoDeviceError(
            f"no CUDA device was found on {host}, though {promise}; see what nvidia-smi says "
            "there, or train on the CPU: --cpu before the script, or CUDA_VISIBLE_DEVICES set to "
            "nothing"
        )
    enable()
    why = "it was asked for" if forced else "no CUDA device was found"
    rank = os.environ.get("RANK", "0")
    print(
        f"megatron_maxscore: CPU mode (gloo) on rank {rank}, {host}: {why}",
        file=sys.stderr,
        flush=True,
    )
    return True


def _promised_devices() -> str:
    """Return what in the environment or on the command line promises CUDA devices, "" if nothing.

    Where that is ``CUDA_VISIBLE_DEVICES``, nothing and -1 mean that there are to be none.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        hidden = visible.strip() in ("", "-1", "NoDevFiles")
        return "" if hidden else f"CUDA_VISIBLE_DEVICES is {visible}"
    # The first is a number, the second a list of indices.
    for name, none in (("SLURM_GPUS_ON_NODE", ("", "0")), ("SLURM_JOB_GPUS", ("",))):
        if os.environ.get(name, "") not in none:
            return f"{name} is {os.environ[name]}"
    if "--distributed-backend=nccl" in sys.argv:
        return "--distributed-backend nccl was given"
    for flag, value in itertools.pairwise(sys.argv):
        if (flag, value) == ("--distributed-backend", "nccl"):
            return "--distributed-backend nccl was given"
    return ""


def answer_arguments() -> None:
    """Add what Megatron has to be told without Transformer Engine, in CPU mode.

    Call it once ``megatron.training`` may be imported.
    """
    if is_enabled():
        arguments.answer_arguments(_replacements)
