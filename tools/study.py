"""Train the same model under every router, and report which one trains best.

    python tools/study.py --quick                    # ten minutes, to see it work
    python tools/study.py                            # the core study: tuning, then five seeds
    python tools/study.py --purposes exploratory     # variants of MaxScore
    python tools/study.py --families custom --input my/texts --purposes tuning core

Every arm starts from the same weights and sees the same data in the same order; what differs are
the router's flags. Each core arm gets the same tuning: three values of its own knob, then two more
learning rates for the best of them, on a seed that does not count later. Runs go through the
launcher and Megatron's training loop. Results are appended to --results; what is there is not
repeated, and a killed run goes on from its last checkpoint. At the end the report is written.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools import study_data, study_report  # noqa: E402
from tools.study_arms import (  # noqa: E402
    ARMS,
    CORE,
    EXPLORATORY,
    FAMILIES,
    LEARNING_RATES,
    SIZES,
    Arm,
    Run,
    Size,
)
from tools.study_runs import Results, RunError, carry_out_all  # noqa: E402

TUNING_SEED = 100
PURPOSES = ("tuning", "core", "exploratory")
# What a run takes besides its steps: two starts, validation on the way, evaluation at the end.
OVERHEAD_SECONDS = 60.0


def causal_loss(line: dict) -> float:
    """Return a result's validation loss by the router's own causal rule."""
    return next(iter(line["evaluation"]["rules"].values()))["loss"]


def best(runs: list[Run], results: Results) -> Run | None:
    """Return the run with the lowest validation loss, None unless all are done."""
    lines = [results.of(run) for run in runs]
    if any(line is None for line in lines):
        return None
    return min(zip(runs, lines, strict=True), key=lambda pair: causal_loss(pair[1]))[0]


def tuning_of(arm: Arm, family: str, size: Size, results: Results) -> tuple[list[Run], Run | None]:
    """Return an arm's tuning runs as far as they are known, and the best when all are done."""

    def run(value: str, rate: str) -> Run:
        return Run(family, size, arm, value, rate, TUNING_SEED, "tuning")

    runs = [run(value, LEARNING_RATES[0]) for value in arm.values]
    first = best(runs, results)
    if first is None:
        return runs, None
    runs += [run(first.value, rate) for rate in LEARNING_RATES[1:]]
    return runs, best(runs, results)


def settings(arm: Arm, family: str, size: Size, results: Results) -> tuple[str, str] | None:
    """Return the value and the learning rate that an arm is compared with, None if not known."""
    if size.name == "quick":
        return next(iter(arm.values)), LEARNING_RATES[0]
    chosen = tuning_of(ARMS[arm.follows] if arm.follows else arm, family, size, results)[1]
    if chosen is None:
        return None
    return (next(iter(arm.values)) if arm.follows else chosen.value), chosen.learning_rate


def comparison(
    arms: list[Arm], family: str, size: Size, results: Results, seeds: range, purpose: str
) -> list[Run]:
    """Return the runs of arms whose settings are known, seed by seed."""
    found = []
    for seed in seeds:
        for arm in arms:
            setting = settings(arm, family, size, results)
            if setting is not None:
                found.append(Run(family, size, arm, *setting, seed, purpose))
    return found


def minutes(runs: list[Run], results: Results, jobs: int) -> float:
    """Return how long the runs that are still to do will take, by the steps' stated times."""
    todo = [run for run in runs if results.of(run) is None]
    seconds = sum(
        run.size.iterations * run.size.seconds_per_step * run.arm.ranks + OVERHEAD_SECONDS
        for run in todo
    )
    return seconds / jobs / 60


def carry_out(arguments: argparse.Namespace, results: Results) -> None:
    """Carry out what was asked for."""
    size = SIZES["quick" if arguments.quick else "small"]
    options = (arguments.data, arguments.output / "runs", results, arguments.jobs, arguments.keep)
    core = [arm for arm in CORE if not arguments.arms or arm.name in arguments.arms]
    others = [arm for arm in EXPLORATORY if not arguments.arms or arm.name in arguments.arms]
    seeds = range(1, arguments.seeds + 1)
    for family in arguments.families:
        study_data.prepare(family, arguments.data, arguments.input)
        if "tuning" in arguments.purposes and not arguments.quick:
            count = sum(len(arm.values) + len(LEARNING_RATES) - 1 for arm in core)
            print(f"{family}, tuning: {count} runs of {size.iterations} steps", flush=True)
            # The other learning rates are tried when the knob's values are done.
            for _ in range(2):
                runs = [r for arm in core for r in tuning_of(arm, family, size, results)[0]]
                say_how_long(runs, results, arguments.jobs)
                carry_out_all(runs, *options)
        for purpose, arms in (("core", core), ("exploratory", others)):
            if purpose not in arguments.purposes:
                continue
            runs = comparison(arms, family, size, results, seeds, purpose)
            missing = {arm.name for arm in arms} - {run.arm.name for run in runs}
            if missing:
                raise ValueError(
                    f"{family}: {', '.join(sorted(missing))} not tuned yet; add tuning to "
                    "--purposes"
                )
            print(f"{family}, {purpose}: {len(runs)} runs of {size.iterations} steps", flush=True)
            say_how_long(runs, results, arguments.jobs)
            carry_out_all(runs, *options)


def say_how_long(runs: list[Run], results: Results, jobs: int) -> None:
    """Print how many runs are left and how long they will take."""
    left = sum(results.of(run) is None for run in runs)
    if left:
        print(
            f"{len(runs) - left} done before, {left} to do, {jobs} at a time: about "
            f"{minutes(runs, results, jobs):.0f} minutes where a core takes "
            f"{runs[0].size.seconds_per_step:g} s per step",
            flush=True,
        )


def main() -> int:
    """Parse the command line, run, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few steps, two seeds, no tuning")
    parser.add_argument("--families", nargs="+", choices=(*FAMILIES, "custom"), default=None)
    parser.add_argument("--input", nargs="*", default=[], help="texts of family custom")
    parser.add_argument("--purposes", nargs="+", choices=PURPOSES, default=["tuning", "core"])
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=[], metavar="ARM")
    parser.add_argument("--seeds", type=int, default=None, help="default: 5, with --quick 2")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "study")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "study")
    parser.add_argument("--results", type=Path, help="default: results.jsonl in --output")
    parser.add_argument("--report", type=Path, help="directory; default: --output")
    parser.add_argument("--keep", action="store_true", help="keep checkpoints and logs")
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.families = arguments.families or ["code"]
        arguments.purposes = [p for p in arguments.purposes if p != "tuning"]
    arguments.families = arguments.families or ["prose"]
    arguments.seeds = arguments.seeds or (2 if arguments.quick else 5)
    # Runs are started from the repository's root.
    for name in ("data", "output"):
        setattr(arguments, name, getattr(arguments, name).resolve())
    arguments.output.mkdir(parents=True, exist_ok=True)
    default = "quick.jsonl" if arguments.quick else "results.jsonl"
    results = Results(arguments.results or arguments.output / default)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if not arguments.report_only:
            carry_out(arguments, results)
        directory = arguments.report or arguments.output
        study_report.write(results.lines, directory)
    except (ValueError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
