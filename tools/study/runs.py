"""Starts the study's training runs, resumes killed ones, and keeps what came out of them.

A run trains through the launcher with Megatron's own loop, saves checkpoints on the way, is
evaluated with ``python -m megatron_maxscore evaluate``, and leaves one line in the file of results.
A run whose line is there is not repeated; one that was killed goes on from its last checkpoint.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.metadata
import json
import math
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_maxscore.commands.processes import STEP, Processes, RunError, execute
from megatron_maxscore.cpu.arguments import WITHOUT_TRANSFORMER_ENGINE

from .arms import Run

ROOT = Path(__file__).resolve().parents[2]
# The training script of every run.
SCRIPT = "examples/pretrain_gpt.py"
# Checkpoints of a run that is under way: so many, not more often than so many steps.
SAVES, SAVE_EVERY = 4, 100
# How often the validation curve gets a point, and of how many global batches.
CURVE_POINTS, CURVE_BATCHES = 6, 4
# Sequences that are also decoded token by token.
DECODED = 4
# Segments of the load maps over training, which one seed keeps.
SEGMENTS, LOAD_MAP_SEED = 30, 21
# On the way, that is; the one at the end is of other samples.
# Of MaxScore's two rules that by prices.
_VALID = re.compile(
    r"validation loss at iteration (\d+)(?: \(price routing\))? \| lm loss value: (\S+)"
)
# What Megatron and our router say when they give up on a run; "nan" alone is in every step's line.
_DIVERGED = re.compile(
    r".*(?:found (?:NaN|Inf)|[Uu]nexpected result (?:nan|inf)|were NaN or infinite).*"
)


class Results:
    """The file of results: one JSON object per line, written whole or not at all.

    Raises:
        ValueError: the file is not what this writes; names the line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lines = self._read()

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        lines = []
        for number, text in enumerate(self.path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                line = json.loads(text)
                line["key"], line["purpose"], line["evaluation"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path}, line {number}, is no result of this study ({error!r}); mend or "
                    "move the file"
                ) from None
            lines.append(line)
        return lines

    def of(self, run: Run) -> dict[str, Any] | None:
        """Return the result of a run, None if it is still to do."""
        return next((line for line in self.lines if line["key"] == run.key), None)

    def add(self, line: dict[str, Any]) -> None:
        """Append a result, beside those that other processes have written meanwhile."""
        with self._lock, self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.lines = [*self._read(), line]
            partial = self.path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(each) + "\n" for each in self.lines))
            partial.replace(self.path)


def data_flags(run: Run, data: Path, directory: Path) -> list[str]:
    """Return the flags that name tokenizer and data sets."""
    return [
        *("--tokenizer-type", "SentencePieceTokenizer"),
        *("--tokenizer-model", str(data / run.family / "tokenizer.model")),
        *("--train-data-path", str(data / run.family / "train_text_document")),
        *("--valid-data-path", str(data / run.family / "valid_text_document")),
        *("--data-cache-path", str(directory / "cache")),
    ]


def training_command(run: Run, data: Path, directory: Path) -> list[str]:
    """Return the torchrun command line of a run."""
    size = run.size
    return [
        *f"{sys.executable} -m torch.distributed.run --standalone".split(),
        *"--nproc-per-node 1 -m megatron_maxscore.launch".split(),
        *(("--cpu",) if run.device == "cpu" else ()),
        *(SCRIPT, *run.flags.split(), *WITHOUT_TRANSFORMER_ENGINE, "--num-workers", "0"),
        *data_flags(run, data, directory),
        *("--eval-interval", str(max(1, size.iterations // CURVE_POINTS))),
        *("--eval-iters", str(CURVE_BATCHES)),
        *("--save", str(directory / "checkpoint"), "--load", str(directory / "checkpoint")),
        *("--save-interval", str(min(max(SAVE_EVERY, size.iterations // SAVES), size.iterations))),
        *("--maxscore-stats-file", str(directory / "stats.jsonl")),
        # Otherwise a step with NaN is run again, and saved in a checkpoint on the way out.
        *("--rerun-mode", "disabled"),
    ]


def evaluation_command(run: Run, data: Path, directory: Path) -> list[str]:
    """Return the command line that evaluates a run's checkpoint."""
    sequences = run.size.valid_sequences
    return [
        *(sys.executable, "-m", "megatron_maxscore", "evaluate"),
        *("--data", str(data / run.family / "valid_text_document")),
        *(("--sequences", str(sequences)) if sequences else ()),
        *("--decode", str(DECODED if "maxscore" in run.flags else 0)),
        *("--output", str(directory / "evaluation.json"), "--"),
        *run.flags.split(),
        *data_flags(run, data, directory),
        *("--load", str(directory / "checkpoint")),
    ]


def _by_iteration(lines: Iterator[str], pattern: re.Pattern) -> dict[int, tuple[str, ...]]:
    """Return the last match for each iteration; a resumed run repeats some."""
    found = {}
    for line in lines:
        if match := pattern.search(line):
            found[int(match[1])] = match.groups()[1:]
    return dict(sorted(found.items()))


@functools.cache
def code_digest() -> str:
    """Return a digest of what trains a run: the package's sources and the training scripts."""
    folders = (ROOT / "megatron_maxscore", ROOT / "examples")
    paths = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    total = hashlib.sha256()
    for path in paths:
        total.update(path.read_bytes())
    return total.hexdigest()[:12]


@functools.cache
def revision() -> str:
    """Return the commit that is checked out, with "+" if files differ from it."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "not a checkout"


def _about(run: Run) -> dict[str, Any]:
    """Return what a line of results says of its run."""
    return {
        "key": run.key,
        "purpose": run.purpose,
        "family": run.family,
        "size": run.size.name,
        "arm": run.arm.name,
        "learning_rate": run.setting.learning_rate,
        "factor": run.setting.factor,
        "seed": run.seed,
        "iterations": run.size.iterations,
        "tokens": run.size.iterations * run.size.tokens_per_step,
        "data": run.data,
        "device": run.device,
        "flags": run.flags,
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("megatron-maxscore", "megatron-core", "torch")
        },
        "revision": revision(),
        "code": code_digest(),
    }


def summary(run: Run, directory: Path, seconds: float) -> dict[str, Any]:
    """Return a run's line of results from what it has written.

    Raises:
        RunError: steps are missing.
    """
    text = (directory / "log").read_text(encoding="utf-8").splitlines()
    steps, valid = _by_iteration(iter(text), STEP), _by_iteration(iter(text), _VALID)
    stats = {}
    for line in (directory / "stats.jsonl").read_text().splitlines():
        entry = json.loads(line)
        stats[entry["iteration"]] = entry
    wanted = range(1, run.size.iterations + 1)
    evaluation = json.loads((directory / "evaluation.json").read_text())
    evaluation.pop("data", None)  # a path of this machine
    if list(steps) != list(wanted) or sorted(stats) != list(wanted):
        raise RunError(f"{directory} lacks steps; remove it and start again")
    losses = np.array([float(values[1]) for values in steps.values()])
    ordered = [stats[i] for i in wanted]
    loads_ILE = np.array([entry["loads"] for entry in ordered], dtype=float)
    dropped = np.array([entry["dropped"] for entry in ordered], dtype=float)
    maxvio_IL = np.array([entry["maxvio"] for entry in ordered])
    # The first tenth is what every router needs to find its feet; both are kept.
    late = len(ordered) // 10
    solve = sum(entry["solve_seconds"] for entry in ordered[1:])
    step = sum(entry["step_seconds"] for entry in ordered[1:])
    line = {
        **_about(run),
        "train_loss": [round(float(x), 4) for x in losses],
        "curve": {i: round(float(values[0]), 5) for i, values in valid.items()},
        "maxvio_mean": float(maxvio_IL.mean()),
        "maxvio_mean_late": float(maxvio_IL[late:].mean()),
        "maxvio_max": float(maxvio_IL.max()),
        "dropped": float(dropped.sum() / (dropped.sum() + loads_ILE.sum())),
        "solve_share": float(solve / step) if any(e["solves"] for e in ordered) else None,
        "ms_per_step": float(np.median([float(v[0]) for v in list(steps.values())[1:]])),
        "seconds": round(seconds, 1),
        "evaluation": evaluation,
    }
    if dropped.any():
        share_I = dropped.sum(1) / (dropped.sum(1) + loads_ILE.sum((1, 2)))
        line["dropped_by_step"] = [round(float(share), 4) for share in share_I]
    if run.milestones:
        line["milestones"] = {
            step: json.loads((directory / f"evaluation-{step}.json").read_text())["rules"]
            for step in run.milestones
        }
    if run.seed == LOAD_MAP_SEED:
        segments = min(SEGMENTS, len(ordered))
        relative = loads_ILE / loads_ILE.mean(2, keepdims=True).clip(1e-9)
        parts = [part.mean(0).round(3).tolist() for part in np.array_split(relative, segments)]
        line["load_map"] = parts
    return line


def carry_out(
    run: Run, data: Path, output: Path, processes: Processes, step: Callable
) -> dict[str, Any]:
    """Train, evaluate and summarise one run.

    Args:
        run: what to do.
        data: directory with a directory per family.
        output: directory for the runs' directories.
        processes: what is under way, for whoever ends it.
        step: called with the number of the iteration that is done and its loss.

    Returns:
        The line of results. A run whose loss or scores become infinite or NaN has "diverged" in it
        and an infinite loss.
    """
    directory = output / run.key
    code, digest = directory / "code", code_digest()
    if directory.exists() and (not code.exists() or code.read_text() != digest):
        # What other sources have begun is not gone on with.
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    code.write_text(digest)
    (directory / "run.txt").write_text(run.title + "\n" + run.flags + "\n")
    clock = directory / "seconds"
    before = float(clock.read_text()) if clock.exists() else 0.0
    started = time.monotonic()

    def follow(line: str) -> None:
        if match := STEP.search(line):
            step(int(match[1]), float(match[3]))
            clock.write_text(str(before + time.monotonic() - started))

    try:
        evaluate_on_the_way(run, data, directory, processes, follow)
        execute(training_command(run, data, directory), directory / "log", processes, follow)
    except RunError as error:
        said = _DIVERGED.search(error.log)
        if processes.is_over or said is None:
            raise
        lost = {"rules": {"own": {"loss": math.inf}}, "comparison": {}}
        return {**_about(run), "diverged": said[0], "evaluation": lost}
    command = evaluation_command(run, data, directory)
    execute(command, directory / "evaluation.log", processes)
    return summary(run, directory, before + time.monotonic() - started)


def evaluate_on_the_way(
    run: Run, data: Path, directory: Path, processes: Processes, follow: Callable[[str], None]
) -> None:
    """Train up to each milestone, and evaluate there; what was evaluated is not again.

    Megatron ends a run at the first multiple of ``--exit-interval``, and saves; a run that goes on
    from there continues bit for bit.

    Raises:
        RunError: a command failed, or the last checkpoint is not that of the milestone.
    """
    tracker = directory / "checkpoint" / "latest_checkpointed_iteration.txt"

    def saved() -> int:
        return int(tracker.read_text()) if tracker.exists() else 0

    for step in run.milestones:
        found = directory / f"evaluation-{step}.json"
        if found.exists():
            continue
        if saved() < step:
            command = [*training_command(run, data, directory), "--exit-interval", str(step)]
            execute(command, directory / "log", processes, follow)
        if saved() != step:
            raise RunError(
                f"{directory} has a checkpoint of step {saved()}, not {step}; remove it and start "
                "again"
            )
        execute(evaluation_command(run, data, directory), directory / "evaluation.log", processes)
        (directory / "evaluation.json").replace(found)


def carry_out_all(
    runs: list[Run], data: Path, output: Path, results: Results, jobs: int, keep: bool
) -> None:
    """Carry out runs, several at a time, and record each; stop at the first that fails.

    Args:
        runs: what to do; those with results are left out.
        data: directory with a directory per family.
        output: directory for the runs' directories.
        results: where results go.
        jobs: how many at a time.
        keep: keep the runs' directories, checkpoints included.

    Raises:
        RunError: a run failed; the others were stopped and go on from their checkpoints next time.
    """
    todo = [run for run in runs if results.of(run) is None]
    if not todo:
        return
    processes = Processes()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    console = Console(width=None if sys.stdout.isatty() else 110)
    with Progress(*columns, console=console, speed_estimate_period=600) as bars:
        total = bars.add_task("all steps", total=sum(r.size.iterations for r in todo), note="")

        def one(run: Run) -> None:
            steps = run.size.iterations
            bar = bars.add_task(run.title, total=steps, note="starting")
            done = 0

            def step(iteration: int, loss: float) -> None:
                nonlocal done
                note = f"loss {loss:.3f}" if iteration < steps else "evaluating"
                bars.update(bar, completed=iteration, note=note)
                bars.advance(total, iteration - done)
                done = iteration

            line = carry_out(run, data, output, processes, step)
            results.add(line)
            bars.remove_task(bar)
            # A run that was only evaluated had its steps behind it.
            bars.advance(total, steps - done)
            causal = next(iter(line["evaluation"]["rules"].values()))["loss"]
            bars.console.print(f"{run.title}: validation loss {causal:.4f}", highlight=False)
            if not keep:
                shutil.rmtree(output / run.key)

        with ThreadPoolExecutor(jobs) as pool:
            futures = {pool.submit(one, run): run for run in todo}
            try:
                for future in as_completed(futures):
                    if error := future.exception():
                        raise RunError(f"{futures[future].title}: {error}") from error
            finally:
                # The first to fail is told of; what else ends, ends for that.
                processes.end_all()
                pool.shutdown(cancel_futures=True)
