"""Part steps: thousands of training steps of a tiny model; memory, files, threads stay as they are.

The processes of the two ranks are watched from outside.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from .runs import start

SCOPES = ("local", "group", "sequence")
# How much memory may grow between the second fifth and the last, in MB and as a share.
MOST_MB, MOST_SHARE = 8.0, 0.02
SECONDS = 1.0


def watch(scope: str, steps: int) -> dict[str, Any]:
    """Train so many steps in a scope; return its line of results."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        stats = directory / "stats.jsonl"
        flags = (
            f"--maxscore-scope {scope} --global-batch-size 4 --train-iters {steps} "
            f"--maxscore-stats-file {stats}"
        )
        started = time.monotonic()
        process = start(directory, flags)
        samples: list[tuple[float, int, int]] = []
        try:
            while process.poll() is None:
                time.sleep(SECONDS)
                if stats.exists():
                    samples += _sample(process.pid)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        if process.returncode:
            log = (directory / "log").read_text(encoding="utf-8")
            return {"part": "steps", "scope": scope, "steps": steps, "failures": [log[-3000:]]}
        lines = [json.loads(line) for line in stats.read_text().splitlines()]
    return judge(scope, steps, samples, lines, time.monotonic() - started)


def _sample(parent: int) -> list[tuple[float, int, int]]:
    """Return memory in MB, files and threads, summed over the ranks."""
    try:
        ranks = psutil.Process(parent).children()
        values = [(r.memory_info().rss / 1e6, r.num_fds(), r.num_threads()) for r in ranks]
    except psutil.Error:
        return []
    return [(sum(v[0] for v in values), sum(v[1] for v in values), sum(v[2] for v in values))]


def judge(
    scope: str, steps: int, samples: list[tuple[float, int, int]], lines: list[Any], seconds: float
) -> dict[str, Any]:
    """Return a line of results: what there was early and late, and what is wrong with it."""
    failures = []
    # The last samples may be of ranks that end.
    values = np.array(samples[: max(len(samples) - 3, 1)], dtype=float).reshape(-1, 3)
    fifth = max(len(values) // 5, 1)
    early, late = values[fifth : 2 * fifth], values[-fifth:]
    early = early if len(early) else values
    (memory, files, threads), (memory_late, files_late, threads_late) = early.mean(0), late.mean(0)
    growth = memory_late - memory
    if growth > max(MOST_MB, MOST_SHARE * memory):
        failures.append(f"memory grew by {growth:.1f} MB, from {memory:.0f}")
    if late[:, 1].max() > early[:, 1].max():
        failures.append(f"files grew from {early[:, 1].max():.0f} to {late[:, 1].max():.0f}")
    if late[:, 2].max() > early[:, 2].max():
        failures.append(f"threads grew from {early[:, 2].max():.0f} to {late[:, 2].max():.0f}")
    if len(lines) != steps:
        failures.append(f"statistics have {len(lines)} steps")
    gap = max(line["largest_gap"] for line in lines)
    loads = np.array([line["loads"] for line in lines])
    dropped = sum(sum(line["dropped"]) for line in lines)
    uneven = int((loads.max(-1) - loads.min(-1)).max())
    if dropped or gap > 1e-9 or uneven:
        failures.append(f"dropped {dropped}, gap {gap:.1e}, loads differ by {uneven}")
    return {
        "part": "steps", "scope": scope, "steps": steps, "seconds": round(seconds, 1),
        "memory_mb": [round(float(memory), 1), round(float(memory_late), 1)],
        "files": [round(float(files), 1), round(float(files_late), 1)],
        "threads": [round(float(threads), 1), round(float(threads_late), 1)],
        "largest_gap": gap, "dropped": dropped, "failures": failures,
    }  # fmt: skip
