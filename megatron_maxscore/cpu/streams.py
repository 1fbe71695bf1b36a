"""Streams, events and synchronisation: on the CPU everything is in program order already."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import torch

from megatron_maxscore._replacements import Replacements


class Stream:
    """A stream on which work has always finished."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = torch.device("cpu")

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: Any) -> None:
        return None

    def wait_stream(self, stream: Any) -> None:
        """Do nothing: the other stream's work is done."""

    def wait_event(self, event: Any) -> None:
        """Do nothing: the event has happened."""

    def synchronize(self) -> None:
        """Do nothing."""

    def query(self) -> bool:
        """Return that all work is done."""
        return True

    def record_event(self, event: Event | None = None) -> Event:
        """Return an event that has happened."""
        event = event or Event()
        event.record(self)
        return event


class Event:
    """An event that has happened; ``elapsed_time`` is wall time between records."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._time = 0.0

    def record(self, stream: Any = None) -> None:
        """Note the time."""
        self._time = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        """Do nothing."""

    def synchronize(self) -> None:
        """Do nothing."""

    def query(self) -> bool:
        """Return that the event has happened."""
        return True

    def elapsed_time(self, end: Event) -> float:
        """Return milliseconds from this event to ``end``."""
        return (end._time - self._time) * 1e3


_STREAM = Stream()


def answer_streams(replacements: Replacements) -> None:
    """One stream, which is always the current one."""
    replacements.set(torch.cuda, "Stream", Stream)
    replacements.set(torch.cuda, "Event", Event)
    replacements.set(torch.cuda, "current_stream", lambda device=None: _STREAM)
    replacements.set(torch.cuda, "default_stream", lambda device=None: _STREAM)
    replacements.set(torch.cuda, "set_stream", lambda stream: None)
    replacements.set(torch.cuda, "stream", lambda stream: nullcontext())
    replacements.set(torch.Tensor, "record_stream", lambda self, stream: None)


def answer_synchronisation(replacements: Replacements) -> None:
    """Synchronising returns at once; no CUDA graph is being captured."""
    replacements.set(torch.cuda, "synchronize", lambda device=None: None)
    replacements.set(torch.cuda, "is_current_stream_capturing", lambda: False)
    replacements.set(torch.accelerator, "synchronize", lambda device=None: None)
    replacements.set(torch.accelerator, "current_stream", lambda device=None: _STREAM)
    replacements.set(torch.accelerator, "is_available", lambda: True)
    replacements.set(torch.accelerator, "current_accelerator", lambda check_available=False: None)


def answer_nvtx(replacements: Replacements) -> None:
    """Profiler ranges are ignored."""
    replacements.set(torch.cuda.nvtx, "range_push", lambda message: 0)
    replacements.set(torch.cuda.nvtx, "range_pop", lambda: 0)


ANSWERS = (answer_streams, answer_synchronisation, answer_nvtx)
