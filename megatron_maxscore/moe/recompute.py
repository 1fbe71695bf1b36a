"""What a router chose in a checkpointed forward pass is used again when the pass is recomputed.

Activation recomputation runs a function twice: once in the forward pass without keeping its
activations, and again in the backward pass. The second run must use the experts of the first one.
It finds them by the identity of the checkpointed function, never by the order in which backward
passes come: each function that is handed to a checkpoint is wrapped in a :class:`Region` with a
store of its own. The autograd graph keeps the region alive, and with it what it stores, for as long
as the function may be run again.

Replaced symbols: ``CheckpointFunction.apply`` and ``CheckpointWithoutOutput.checkpoint`` of
``megatron.core.tensor_parallel.random``. If Transformer Engine is installed, also
``transformer_engine.pytorch.distributed.checkpoint``, with which quantised recipes recompute.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Hashable
from typing import Any, Protocol, Self

import torch
from megatron.core.tensor_parallel import random

from megatron_maxscore._replacements import Replacements

# Regions that are running, innermost last. CUDA's backward pass runs in threads of its own.
_local = threading.local()


def _running() -> list[_Run]:
    stack: list[_Run] | None = getattr(_local, "runs", None)
    if stack is None:
        stack = _local.runs = []
    return stack


class Region:
    """A function that a checkpoint runs, with what was decided when it ran for the first time.

    Args:
        function: what the checkpoint was asked to run.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.decided: dict[tuple[Hashable, int], Any] = {}
        self.has_run = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function; the first run stores decisions and later runs read them."""
        runs = _running()
        runs.append(_Run(self))
        try:
            return self.function(*args, **kwargs)
        finally:
            runs.pop()
            self.has_run = True


class _Run:
    """One run of a region.

    Attributes:
        region: the region that runs.
        is_repeated: whether the region has run before.
        calls: how often each decider has been asked so far in this run.
    """

    def __init__(self, region: Region) -> None:
        self.region = region
        self.is_repeated = region.has_run
        self.calls: dict[Hashable, int] = {}

    def next_call(self, decider: Hashable) -> tuple[Hashable, int]:
        """Count a call and return what names it, alike in every run of the region."""
        number = self.calls.get(decider, 0)
        self.calls[decider] = number + 1
        return decider, number


class Keepable(Protocol):
    """What is kept for a region that runs again."""

    def small(self) -> Self:
        """Return it in the form in which it is kept."""

    def whole(self) -> Self:
        """Return what was kept as it is used."""


def decide_once[D: Keepable](decider: Hashable, decide: Callable[[], D]) -> D:
    """Return ``decide()``, or what it gave when the running region ran for the first time.

    A decider may be asked several times in one region, for example if a layer occurs in it several
    times. With a checkpoint inside a checkpoint, the inner region is built anew while the outer one
    is repeated. It then uses what the outer region has stored.

    Args:
        decider: who asks.
        decide: called outside of regions, and in the first run of the outermost one.
    """
    calls = [(run, run.next_call(decider)) for run in _running()]
    for run, call in reversed(calls):
        if run.is_repeated and call in run.region.decided:
            kept = run.region.decided[call]
            decision = kept.whole()
            break
    else:
        decision = decide()
        kept = decision.small() if calls else None
    for run, call in calls:
        if not run.is_repeated:
            run.region.decided[call] = kept
    return decision


def is_first_run() -> bool:
    """Return whether the innermost region runs for the first time: it may be repeated later."""
    runs = _running()
    return bool(runs) and not runs[-1].is_repeated


_replacements = Replacements("MaxScore recomputation")
_quantised = Replacements("MaxScore recomputation in Transformer Engine")


def install() -> None:
    """Make checkpoints run regions; a second call does nothing."""
    if not _replacements:
        _replacements.wrap(random.CheckpointFunction, "apply", _apply_in_region)
        _replacements.wrap(random.CheckpointWithoutOutput, "checkpoint", _checkpoint_in_region)
    # Megatron imports it where it is installed.
    if not _quantised and "transformer_engine.pytorch" in sys.modules:
        from transformer_engine.pytorch import distributed

        _quantised.wrap(distributed, "checkpoint", _call_in_region)


def uninstall() -> None:
    """Undo :func:`install`, for tests; regions that exist keep working."""
    _replacements.undo()
    _quantised.undo()


def _is_kept(args: tuple[Any, ...]) -> bool:
    """Return whether a reentrant checkpoint of these arguments has a backward pass."""
    return torch.is_grad_enabled() and any(
        isinstance(value, torch.Tensor) and value.requires_grad for value in args
    )


def _apply_in_region(original: Any) -> Any:
    def apply(function: Any, distribute_saved_activations: bool, *args: Any) -> Any:
        if _is_kept(args):
            function = Region(function)
        return original(function, distribute_saved_activations, *args)

    return apply


def _checkpoint_in_region(original: Any) -> Any:
    def checkpoint(self: Any, run_function: Any, *args: Any) -> Any:
        if _is_kept(args):
            run_function = Region(run_function)
        return original(self, run_function, *args)

    return checkpoint


def _call_in_region(original: Any) -> Any:
    def checkpoint(function: Any, *args: Any, **kwargs: Any) -> Any:
        # It also has a mode in which only parameters require gradients.
        if torch.is_grad_enabled():
            function = Region(function)
        return original(function, *args, **kwargs)

    return checkpoint
