"""Run Python commands in processes that are forked from one that has imported Megatron already.

Importing torch and Megatron takes several seconds of a core, and the suite starts hundreds of
processes. Here each test process has a server for commands and one for training ranks, in CPU mode;
each run is a fork of one of them. Ranks get the environment that torchrun would give them, but
share the seed of string hashes; those of tests/dist/pool.py do not. Tests of the start itself, of
signals, of other releases, of what must come before Megatron is imported, and of whether CPU mode
is taken, start real processes.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_maxscore import cpu

ROOT = Path(__file__).resolve().parents[1]
# What most runs import. None of it starts threads or reads the command line; megatron.training must
# find our hooks, so it is not among them.
IMPORTED = (
    "megatron.core.datasets.gpt_dataset", "megatron.core.dist_checkpointing",
    "megatron.core.distributed", "megatron.core.models.gpt", "megatron.core.optimizer",
    "megatron.core.pipeline_parallel", "megatron.core.transformer.moe.moe_layer", "numba",
    "sentencepiece", "tensorboard", "transformers",
)  # fmt: skip
# What CPU mode sets.
OF_CPU_MODE = ("TORCHDYNAMO_DISABLE",)
# Between the end of the first rank that failed and the end of the others.
GRACE_SECONDS = 15.0


@dataclass
class Done:
    """What a run printed, and its exit status: of several ranks 1 if any failed."""

    returncode: int
    stdout: str
    stderr: str


class HungError(AssertionError):
    """A run did not end in time."""


def python(
    *command: object,
    ranks: int = 0,
    environment: dict[str, str] | None = None,
    timeout: float = 240.0,
) -> Done:
    """Run a command in a fork, or in several with what torchrun tells its ranks.

    Args:
        command: what one would write after ``python``: ``-m MODULE``, ``-c CODE`` or a script, and
            its arguments.
        ranks: processes with the environment of torchrun and one stream for all; 0 for one without.
        environment: variables besides those of this process.
        timeout: seconds until every process is aborted, so that it shows where its threads are.

    Raises:
        HungError: it did not end in time; has what was printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        request = {
            "command": [str(part) for part in command],
            "ranks": ranks, "timeout": timeout,
            "environment": {**os.environ, **(environment or {})},
            "stdout": f"{folder}/stdout", "stderr": f"{folder}/stderr",
        }  # fmt: skip
        server = _server("ranks" if ranks else "commands")
        assert server.stdin is not None and server.stdout is not None
        try:
            server.stdin.write(json.dumps(request) + "\n")
            server.stdin.flush()
            line = server.stdout.readline()
            assert line, "the process that forks has ended; its errors are above"
        except BaseException:
            # Such as pytest's time limit: nothing of this run may go on, or be taken for the next.
            _end(server)
            _server.cache_clear()
            raise
        answer = json.loads(line)
        printed = [Path(request[name]).read_text(errors="replace") for name in ("stdout", "stderr")]
    if answer["hung"]:
        raise HungError(f"{command} hung; it printed:\n{''.join(printed)[-12000:]}")
    return Done(answer["status"], *printed)


@functools.cache
def _server(kind: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.forked", kind],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        # Read when transformers is imported.
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        # A group of processes of its own, which the forks belong to.
        start_new_session=True,
    )  # fmt: skip
    atexit.register(_end, process)
    return process


def _end(server: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def serve(kind: str) -> dict[str, Any] | None:
    """Answer requests until there are none; in a fork return what it has to do.

    Args:
        kind: "ranks" with CPU mode, or "commands", which turn it on themselves if they need it.
    """
    answers = os.fdopen(os.dup(1), "w")
    # Nothing that is imported may print into the answers.
    os.dup2(2, 1)
    if kind == "ranks":
        # Before Megatron is imported, as the launcher does.
        cpu.enable()
    for name in IMPORTED:
        importlib.import_module(name)
    # Otherwise every fork's collector copies all pages of what was imported.
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        children, port = {}, _free_port()
        for rank in range(max(1, request["ranks"])):
            child = os.fork()
            if not child:
                answers.close()
                _become(rank, port, request)
                return request
            children[child] = rank
        status, hung = _wait(children, time.monotonic() + request["timeout"])
        if request["ranks"]:
            status = min(abs(status), 1)
        answers.write(json.dumps({"status": status, "hung": hung}) + "\n")
        answers.flush()
    return None


def _free_port() -> int:
    """Return a port that nobody else takes meanwhile: the system gives out those from 32768 on."""
    while True:
        port = random.SystemRandom().randrange(15000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _become(rank: int, port: int, request: dict[str, Any]) -> None:
    """Take environment, directory, streams and command line of a new process."""
    own = {name: os.environ[name] for name in OF_CPU_MODE if name in os.environ}
    os.environ.clear()
    os.environ.update(request["environment"], **own)
    if request["ranks"]:
        size = str(request["ranks"])
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size,
            GROUP_RANK="0", ROLE_RANK=str(rank), ROLE_WORLD_SIZE=size,
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
    for number, name in ((1, "stdout"), (2, "stderr")):
        # Ranks share one file, as they share torchrun's streams.
        path = request["stdout"] if request["ranks"] else request[name]
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    Path(request["stderr"]).touch()
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    import faulthandler

    faulthandler.enable()


def _wait(children: dict[int, int], end: float) -> tuple[int, bool]:
    """Wait for the children, and end all once one has failed; return a status and whether in time.

    The status is that of the first that failed, 0 if none has.
    """
    status, killed = 0, False
    while children:
        child, code = os.waitpid(-1, os.WNOHANG)
        if child in children:
            del children[child]
            failed = os.waitstatus_to_exitcode(code)
            if failed and not status:
                status = failed
                _signal(children, signal.SIGTERM)
                end = min(end, time.monotonic() + GRACE_SECONDS)
        elif time.monotonic() > end:
            if not status:
                status, killed = -signal.SIGABRT, True
                _signal(children, signal.SIGABRT)
                end = time.monotonic() + GRACE_SECONDS
            else:
                _signal(children, signal.SIGKILL)
                end = time.monotonic() + GRACE_SECONDS
        else:
            time.sleep(0.02)
    return status, killed


def _signal(children: dict[int, int], number: signal.Signals) -> None:
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)


def carry_out(command: list[str]) -> None:
    """Do what ``python`` would do with the command."""
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    elif command[0] == "-c":
        sys.argv = ["-c", *command[2:]]
        exec(compile(command[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = list(command)
        sys.path[0] = str(Path(command[0]).resolve().parent)
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    work = serve(sys.argv[1])
    if work is not None:
        carry_out(work["command"])
