"""Persistent pools of gloo ranks for tests.

Starting a rank costs seconds of imports, so a pool of each size lives for the whole session. A
case is a module-level function ``case(rank, world_size, **arguments)``; it runs on every rank and
its results come back in rank order. A case that hangs is killed and fails with every rank's stack.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 90.0
# Once a rank has failed, the others get this long before they count as waiting for it.
GRACE_SECONDS = 5.0
START_SECONDS = 120.0


class RankError(AssertionError):
    """A rank failed, or hung; the message has every rank's traceback or stack."""


def _serve(rank: int, size: int, directory: str, pipe: Connection) -> None:
    stacks = open(Path(directory) / f"stack{rank}", "w")
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "OMP_NUM_THREADS": "1",
    }
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    from megatron_maxscore import cpu

    cpu.enable()
    dist.init_process_group(
        "nccl", init_method=f"file://{directory}/store", rank=rank, world_size=size
    )
    pipe.send(("ready", None))
    while True:
        task = pipe.recv()
        if task is None:
            break
        case, arguments = task
        try:
            torch.manual_seed(1234)
            pipe.send(("done", case(rank, size, **arguments)))
        except BaseException:
            pipe.send(("failed", traceback.format_exc()))
    dist.destroy_process_group()


class Pool:
    """``size`` ranks in one process group."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._directory = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, size, self._directory.name, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._collect(START_SECONDS)

    @property
    def is_alive(self) -> bool:
        """Whether the pool can run another case."""
        return bool(self._pipes)

    def run(
        self, case: Callable[..., Any], timeout: float = TIMEOUT_SECONDS, **arguments: Any
    ) -> list[Any]:
        """Run a case on every rank and return the results in rank order.

        Raises:
            RankError: a rank raised, died or hung.
        """
        for pipe in self._pipes:
            pipe.send((case, arguments))
        return self._collect(timeout)

    def _collect(self, timeout: float) -> list[Any]:
        answers: dict[int, tuple[str, Any]] = {}
        deadline = time.monotonic() + timeout
        while len(answers) < self.size:
            waiting = {self._pipes[r]: r for r in range(self.size) if r not in answers}
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = waiting[pipe]  # type: ignore[index]
                try:
                    answers[rank] = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    answers[rank] = ("failed", "the process died")
                if answers[rank][0] == "failed":
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        failed = {rank: text for rank, (kind, text) in answers.items() if kind == "failed"}
        missing = [rank for rank in range(self.size) if rank not in answers]
        if not failed and not missing:
            return [answers[rank][1] for rank in range(self.size)]
        report = [f"rank {rank} failed:\n{text}" for rank, text in sorted(failed.items())]
        report += [f"rank {rank} hung:\n{self._stack(rank)}" for rank in missing]
        if missing or any(text == "the process died" for text in failed.values()):
            self.close()
        raise RankError("\n".join(report))

    def _stack(self, rank: int) -> str:
        pid = self._processes[rank].pid
        assert pid is not None
        os.kill(pid, signal.SIGUSR1)
        time.sleep(0.5)
        return (Path(self._directory.name) / f"stack{rank}").read_text()

    def close(self) -> None:
        """End all ranks; kill those that do not end by themselves."""
        for pipe in self._pipes:
            try:
                pipe.send(None)
            except OSError:
                pass
        for process in self._processes:
            process.join(timeout=2.0)
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in self._pipes:
            pipe.close()
        self._pipes = []
        self._directory.cleanup()
