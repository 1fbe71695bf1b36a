"""The soak's report, from its lines of results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

Lines = list[dict[str, Any]]


def _table(headings: list[str], rows: Iterable[list[Any]]) -> list[str]:
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return [*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]


def text_of(lines: Lines) -> str:
    """Return the report as Markdown."""
    of = {part: [li for li in lines if li["part"] == part] for part in
          ("kills", "faults", "steps", "solves", "models")}  # fmt: skip
    failed = sum(bool(line["failures"]) for line in lines)
    parts = [
        "# Soak",
        "",
        "Written by `python -m tools.soak`, which puts what is around the solver under pressure. "
        f"{len(lines):,} units of work are recorded, of which {failed} failed.",
        "",
    ]
    if of["kills"]:
        parts += _kills(of["kills"])
    if of["faults"]:
        parts += _faults(of["faults"])
    if of["steps"]:
        parts += _steps(of["steps"])
    if of["solves"]:
        parts += _solves(of["solves"])
    if of["models"]:
        parts += _models(of["models"])
    if failed:
        parts += ["## Failures", ""]
        parts += [f"- {line['part']}: {f}" for line in lines for f in line["failures"]]
        parts.append("")
    return "\n".join(parts)


def _kills(lines: Lines) -> list[str]:
    counts: dict[str, Counter[str]] = {}
    for line in lines:
        count = counts.setdefault(line["how"].split(",")[0], Counter())
        count["trials"] += 1
        count["killed"] += line["killed"]
        count["from_checkpoint"] += line["from_checkpoint"]
        count["failed"] += bool(line["failures"])
    return [
        "## Killed and resumed",
        "",
        "Two ranks train 12 steps and save after every third. A process, or all of them, is killed "
        "with SIGKILL; the run is started again and goes on from its last checkpoint. All losses, "
        "repeated steps included, must be those of a run that was left alone, bit for bit.",
        "",
        *_table(
            ["killed in", "trials", "were killed before they ended", "resumed from a checkpoint",
             "failed"],
            [[how, c["trials"], c["killed"], c["from_checkpoint"], c["failed"]]
             for how, c in sorted(counts.items())],
        ),
    ]  # fmt: skip


def _faults(lines: Lines) -> list[str]:
    return [
        "## Faults while ranks solve together",
        "",
        "Three ranks solve over gloo with a timeout of 4 s. One of them dies, stalls, or comes "
        "with another k. Every other rank must end with one error that names the exchange.",
        "",
        *_table(
            ["scope", "fault", "at round", "others were told after", "failed"],
            [[li["scope"], li["how"], li["round"], f"{li['told_after']} s",
              "yes" if li["failures"] else "no"] for li in lines],
        ),
    ]  # fmt: skip


def _steps(lines: Lines) -> list[str]:
    rows = []
    for line in lines:
        if "memory_mb" not in line:
            rows.append([line["scope"], line["steps"], "-", "-", "-", "-", "yes"])
            continue
        pairs = [f"{a:g}, {b:g}" for a, b in (line["memory_mb"], line["files"], line["threads"])]
        rows.append(
            [line["scope"], f"{line['steps']:,}", *pairs, f"{line['largest_gap']:.0e}",
             "yes" if line["failures"] else "no"]
        )  # fmt: skip
    return [
        "## Thousands of steps",
        "",
        "A tiny model on two ranks. Memory, open files and threads are sums over both, as means of "
        "the second fifth of the run and of the last. Loads must be even in every step.",
        "",
        *_table(
            ["scope", "steps", "memory, MB", "files", "threads", "largest gap", "failed"], rows
        ),
    ]


def _solves(lines: Lines) -> list[str]:
    total = Counter()
    for line in lines:
        for key in ("solves", "compared", "infeasible"):
            total[key] += line[key]
        total["failures"] += len(line["failures"])
    hours = sum(line["seconds"] for line in lines) / 3600
    gap = max(line["largest_gap"] for line in lines)
    return [
        "## Random solves",
        "",
        f"{total['solves']:,} problems of every kind: all floating dtypes, even and unequal "
        "capacities, warm starts, batches, forbidden arcs, padding with and without experts. Each "
        f"assignment was checked by a plain count; {total['compared']:,} totals were compared with "
        f"OR-tools' optimum and are equal; {total['infeasible']:,} problems have no assignment, by "
        f"OR-tools too. Largest relative gap {gap:.0e}. Failures: {total['failures']}. "
        f"{hours:.1f} hours of one core.",
        "",
    ]


def _models(lines: Lines) -> list[str]:
    return [
        "## Several models in one process",
        "",
        *_table(
            ["case", "steps", "failed"],
            [[li["case"], li["steps"], "yes" if li["failures"] else "no"] for li in lines],
        ),
    ]
