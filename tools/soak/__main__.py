"""Put everything around the solver under pressure, for hours, and report figures.

    python -m tools.soak --minutes 1                 # every part, briefly
    python -m tools.soak --parts kills --minutes 30  # one part
    python -m tools.soak --full --results docs/evidence/soak.jsonl --report docs/evidence/soak.md

Parts: kills (training is killed and resumed), faults (a rank dies, stalls or differs while ranks
solve together), steps (thousands of steps; memory, files, threads), solves (a million random
problems), models (two models in one process, copies, forks). What is recorded in --results is not
repeated, also where it failed: remove its line to repeat it. Exit status 1 if anything failed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from . import faults, kills, models, report, solves, steps

PARTS = ("solves", "models", "faults", "kills", "steps")
# What a full soak has.
TRIALS, STEPS, SOLVES, MODEL_STEPS = 30, 5000, 1_000_000, 200


class Record:
    """The file of results, a JSON object per line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        self.lines: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]

    def has(self, **wanted: Any) -> bool:
        """Return whether a line with these values is there, failed or not."""
        return any(wanted.items() <= line.items() for line in self.lines)

    def add(self, line: dict[str, Any]) -> None:
        """Append a line."""
        self.lines.append(line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        what = {k: v for k, v in line.items() if k not in ("failures", "phases")}
        words = ", ".join(f"{key} {value}" for key, value in what.items() if key != "part")
        print(f"{line['part']}: {words}{' FAILED' if line['failures'] else ''}", flush=True)
        for failure in line["failures"]:
            print(f"  {failure}", file=sys.stderr, flush=True)


def run_solves(record: Record, is_over: Callable[[], bool], jobs: int) -> None:
    """Solve chunks in several processes until time is up or all are done."""
    chunks = (
        chunk
        for chunk in range(SOLVES // solves.CHUNK)
        if not record.has(part="solves", chunk=chunk)
    )
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        pending: set[Future] = set()
        for chunk in itertools.islice(chunks, jobs):
            pending.add(pool.submit(solves.run_chunk, chunk))
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                record.add(future.result())
                if not is_over() and (chunk := next(chunks, None)) is not None:
                    pending.add(pool.submit(solves.run_chunk, chunk))


def units(
    part: str, record: Record, is_full: bool, minutes: float
) -> Iterator[list[dict[str, Any]]]:
    """Yield the lines of one unit of work after the other, those that are not recorded."""
    if part == "kills":
        references: dict[str, dict[int, set[str]]] = {}
        for number in range(TRIALS):
            if not record.has(part=part, trial=number):
                yield [kills.trial(number, references)]
    elif part == "faults":
        for scope, how, place in faults.cases():
            if not record.has(part=part, scope=scope, how=how, round=place):
                yield [faults.run_case(scope, how, place)]
    elif part == "steps":
        # A tiny step takes about a tenth of a second.
        count = STEPS if is_full else max(int(minutes * 60 * 10 / len(steps.SCOPES)), 60)
        for scope in steps.SCOPES:
            if not record.has(part=part, scope=scope, steps=count):
                yield [steps.watch(scope, count)]
    elif part == "models":
        count = MODEL_STEPS if is_full else max(int(minutes * 20), 4)
        if not record.has(part=part, steps=count):
            yield models.run(count)


def main(command: list[str] | None = None) -> int:
    """Run the parts; write the report."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.soak", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=1.0, help="for each part (default: 1)")
    length.add_argument("--full", action="store_true", help="run all; takes hours, can be resumed")
    parser.add_argument("--results", type=Path, default=Path("runs/soak/soak.jsonl"))
    parser.add_argument("--report", type=Path, help="Markdown file to write")
    parser.add_argument("--jobs", type=int, default=2, help="processes of part solves (default: 2)")
    arguments = parser.parse_args(command)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    record = Record(arguments.results)
    for part in arguments.parts:
        started = time.monotonic()

        def is_over(started: float = started) -> bool:
            elapsed = time.monotonic() - started
            return not arguments.full and elapsed > 60 * arguments.minutes

        if part == "solves":
            run_solves(record, is_over, arguments.jobs)
            continue
        for lines in units(part, record, arguments.full, arguments.minutes):
            for line in lines:
                record.add(line)
            if is_over():
                break
    if arguments.report:
        arguments.report.write_text(report.text_of(record.lines), encoding="utf-8")
    return int(any(line["failures"] for line in record.lines))


if __name__ == "__main__":
    raise SystemExit(main())
