"""Table and picture of the solver's benchmark, from its rows."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from .workloads import FAMILIES, GENERIC

OURS = ("cold", "warm")
SOLVERS = (
    "OR-tools",
    "HiGHS",
    *OURS,
    "topk",
    "sinkhorn",
    "quantile balancing",
    "greedy+Hungarian",
)


@dataclass
class Row:
    """One solver on one case; times in ms."""

    size: str
    family: str
    solver: str
    median: float
    p20: float
    p80: float
    feasible: bool
    share: float  # score / optimum
    maxvio: float
    gap: float | None = None
    equals_ortools: bool | None = None


def cell(row: Row, ortools: float | None) -> str:
    """Two lines of a table cell."""
    first = f"{row.median:.2f} ({row.p20:.2f}-{row.p80:.2f})"
    if not row.feasible:
        speed = "infeasible"
    elif ortools is None or row.solver == "OR-tools":
        speed = ""
    else:
        speed = f"x{ortools / row.median:.1f}"
    wrong = " UNEQUAL" if row.equals_ortools is False else ""
    return f"{first}\n{speed} {row.share:.4f} {row.maxvio:.2f}{wrong}".replace("\n ", "\n")


def table_of(size: str, rows: list[Row]) -> Table:
    """Return the table of one size: a line per family, a column per solver."""
    solvers = [name for name in SOLVERS if any(row.solver == name for row in rows)]
    table = Table(
        title=f"{size} (tokens x experts x k): median ms (p20-p80); speed-up over OR-tools if "
        "feasible, score/optimum, maxvio",
        show_lines=True,
    )
    table.add_column("family")
    for name in solvers:
        table.add_column(name, justify="right")
    for family in dict.fromkeys(row.family for row in rows):
        own = {row.solver: row for row in rows if row.family == family}
        ortools = own["OR-tools"].median if "OR-tools" in own else None
        table.add_row(
            family, *(cell(own[name], ortools) if name in own else "" for name in solvers)
        )
    return table


def picture(rows: list[Row], path: Path) -> None:
    """Draw time against tokens, log-log: median over the generic families of each size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12.5, 5), sharey=True)
    for axis, families, title in (
        (axes[0], GENERIC, "generic families"),
        (axes[1], [f for f in FAMILIES if f not in GENERIC], "other families"),
    ):
        for number, solver in enumerate(SOLVERS):
            points = []
            for size in dict.fromkeys(row.size for row in rows):
                times = [
                    row.median
                    for row in rows
                    if row.size == size and row.solver == solver and row.family in families
                ]
                if times:
                    points.append((int(size.split("x")[0]), statistics.median(times), size))
            # Sizes of many experts are points beside the curve through the others.
            curve = sorted(point for point in points if int(point[2].split("x")[1]) <= 128)
            beside = [point for point in points if point not in curve]
            style = "-" if solver in OURS else "--"
            for part, line, marker in ((curve, style, "o"), (beside, "", "s")):
                if part:
                    x, y, _ = zip(*part, strict=True)
                    label = solver if part is curve else None
                    axis.loglog(
                        x, y, line, marker=marker, markersize=4, label=label, color=f"C{number}"
                    )
        axis.set(xlabel="tokens", title=f"{title}: median over them")
        axis.grid(alpha=0.3, which="both")
    note = ", ".join(dict.fromkeys(row.size for row in rows))
    axes[0].set_ylabel("ms")
    axes[0].legend(fontsize=8)
    figure.suptitle(
        f"Time per solve at {note} (tokens x experts x k; squares: 256 experts)", fontsize=10
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
