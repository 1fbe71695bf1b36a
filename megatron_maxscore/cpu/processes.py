"""Processes that training starts: they run in CPU mode too.

Forked processes inherit what was replaced. Those that are spawned or come from a fork server, like
Megatron's worker that writes checkpoints, start from scratch and would find no CUDA device.
"""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import context
from typing import Any

from torch.utils import data

from megatron_maxscore._replacements import Replacements


def run_in_cpu_mode(target: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> None:
    """Enable CPU mode in this new process and call ``target``."""
    from megatron_maxscore.cpu import enable

    enable()
    target(*args, **kwargs)


def answer_spawn(replacements: Replacements) -> None:
    """Spawned processes enable CPU mode before they begin."""

    def make(original: Any) -> Any:
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            if self._target is not None:
                self._args = (self._target, self._args, self._kwargs)
                self._target, self._kwargs = run_in_cpu_mode, {}

        return init

    for kind in (context.SpawnProcess, context.ForkServerProcess):
        replacements.wrap(kind, "__init__", make)


def answer_pinned_memory(replacements: Replacements) -> None:
    """Data loaders do not pin memory, for which their thread needs a CUDA device."""

    def make(original: Any) -> Any:
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            self.pin_memory = False

        return init

    replacements.wrap(data.DataLoader, "__init__", make)


ANSWERS = (answer_spawn, answer_pinned_memory)
