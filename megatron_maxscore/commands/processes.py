"""Starts training runs and the like, several at a time, and ends them together."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

# A step in Megatron's log: its number, milliseconds, loss.
STEP = re.compile(
    r"iteration +(\d+)/.*elapsed time per iteration \(ms\): ([\d.]+).* lm loss: ([-+.\deE]+)"
)


class RunError(RuntimeError):
    """A run failed, or could not be begun; its text ends with the log's last lines.

    Attributes:
        log: all that the run has said.
    """

    def __init__(self, text: str, log: str = "") -> None:
        super().__init__(text)
        self.log = log


@contextlib.contextmanager
def alone_in(directory: Path, what: str) -> Iterator[None]:
    """Hold a directory; the system lets go of it when the process ends, however it does.

    Args:
        directory: exists.
        what: writes to it, for the message.

    Raises:
        RunError: another process holds it.
    """
    with (directory / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"another {what} is writing to {directory}; wait for it, or name another --output"
            ) from None
        yield


class Processes:
    """Processes under way, so that all can be ended and none starts afterwards."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen] = set()
        self.is_over = False

    def start(self, command: list[str]) -> subprocess.Popen:
        """Start a command.

        Raises:
            RunError: no more are to start.
        """
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with self._lock:
            if self.is_over:
                raise RunError("stopped before it began")
            process = subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            self._running.add(process)
            return process

    def end(self, process: subprocess.Popen) -> None:
        """End one process; torchrun ends its ranks."""
        process.terminate()
        with self._lock:
            self._running.discard(process)

    def end_all(self) -> None:
        """End all, and let none start."""
        with self._lock:
            self.is_over = True
            for process in self._running:
                process.terminate()


def execute(
    command: list[str],
    log: Path,
    processes: Processes,
    follow: Callable[[str], None] | None = None,
) -> None:
    """Run a command, append its output to a log, hand each line to ``follow``.

    Raises:
        RunError: it did not end with 0.
    """
    said = []
    # Line by line: a checkpoint must not outlive the log of its steps.
    with log.open("a", encoding="utf-8", buffering=1) as file:
        process = processes.start(command)
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                said.append(line)
                if follow is not None:
                    follow(line)
            status = process.wait()
        finally:
            processes.end(process)
    if status:
        tail = "".join(said[-25:])
        raise RunError(f"exit status {status}; the whole log is {log}\n{tail}", "".join(said))
