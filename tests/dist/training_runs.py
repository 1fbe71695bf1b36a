"""Start real training runs through torchrun and read exact losses back."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_maxscore.cpu.arguments import WITHOUT_TRANSFORMER_ENGINE
from tests import forked
from tools.soak.runs import TINY

ROOT = Path(__file__).resolve().parents[2]
MODEL = (
    f"{TINY} {' '.join(WITHOUT_TRANSFORMER_ENGINE)} --global-batch-size 8 --eval-interval 1000 "
    "--eval-iters 2 --distributed-timeout-minutes 2"
)
MAXSCORE = (
    "--moe-router-type maxscore --maxscore-scope local --maxscore-mode exact "
    "--moe-router-load-balancing-type none"
)
TOPK = "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2"


@dataclass
class Result:
    """What a run printed, its exit status, and its losses as exact hexadecimal floats."""

    status: int
    output: str
    losses: list[str]
    statistics: list[dict]

    @property
    def validation(self) -> dict[str, float]:
        """Validation loss per routing rule, "" for stock."""
        pattern = r"on validation set ?(\([a-z ]+\))? \| lm loss value: ([\d.E+-]+)"
        return {rule: float(loss) for rule, loss in re.findall(pattern, self.output)}

    @property
    def errors(self) -> list[str]:
        """One-line errors."""
        return re.findall(r"^error: .*", self.output, flags=re.MULTILINE)


def run(
    directory: Path,
    ranks: int,
    flags: str,
    module: str = "megatron_maxscore.launch --cpu",
    script: str = "tests/dist/exact_losses.py",
    environment: dict[str, str] | None = None,
    timeout: float = 240.0,
    model: str = MODEL,
) -> Result:
    """Run a training script as torchrun would, or under torchrun if another Megatron is in front.

    Args:
        directory: for the losses, statistics and data cache of this run.
        ranks: processes.
        flags: Megatron's arguments besides ``MODEL``.
        module: launcher module and its options.
        script: training script.
        environment: additional variables.
        timeout: seconds until the run counts as hung and is killed.
        model: Megatron's arguments for every run.
    """
    directory.mkdir(parents=True, exist_ok=True)
    losses, stats = directory / "losses", directory / "stats.jsonl"
    for path in (losses, stats):
        path.unlink(missing_ok=True)
    flags = f"{script} {model} --data-cache-path {directory}/cache {flags}"
    if "launch" in module:
        flags += f" --maxscore-stats-file {stats}"
    command = shlex.split(f"-m {module} {flags}")
    environment = {"OMP_NUM_THREADS": "1", "EXACT_LOSSES": str(losses), **(environment or {})}
    if "PYTHONPATH" in environment:
        done = _torchrun(command, ranks, environment, timeout)
    else:
        done = forked.python(*command, ranks=ranks, environment=environment, timeout=timeout)
    return Result(
        done.returncode,
        done.stdout,
        losses.read_text().split() if losses.exists() else [],
        [json.loads(line) for line in stats.read_text().splitlines()] if stats.exists() else [],
    )


def _torchrun(
    command: list[str], ranks: int, environment: dict[str, str], timeout: float
) -> forked.Done:
    """Start real processes, with another Megatron in front on the path."""
    # Aborted, a rank shows where its threads are.
    environment = {**os.environ, "PYTHONFAULTHANDLER": "1", **environment}
    launcher = f"-m torch.distributed.run --standalone --nproc-per-node {ranks}".split()
    process = subprocess.Popen(
        [sys.executable, *launcher, *command], cwd=ROOT, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.send_signal(signal.SIGABRT)
        try:
            output, _ = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
        raise forked.HungError(f"the run hung; its output:\n{output[-12000:]}") from None
    return forked.Done(process.returncode, output, "")


def succeed(*args, **kwargs) -> Result:
    """Run and assert exit status 0."""
    result = run(*args, **kwargs)
    assert result.status == 0, result.output[-6000:]
    return result
