"""Train the same model under every router, and report which one trains best.

    python tools/study.py --quick                    # ten minutes, to see it work
    python tools/study.py                            # the core study: tuning, then five seeds
    python tools/study.py --purposes tuning ablation # is it the flow or the gates
    python tools/study.py --purposes exploratory     # variants of MaxScore
    python tools/study.py --size long --purposes core --seeds 3    # four times as long
    python tools/study.py --families custom --input my/texts --purposes tuning core

Every arm starts from the same weights and sees the same data in the same order; what differs are
the router's flags. Each arm gets the same tuning, on a seed that does not count later: its own
knob, the learning rate, a factor on its gates, in turn, until all neighbours of the best are worse.
Runs go through the launcher and Megatron's training loop. Results are appended to --results; what
is there is not repeated, and a killed run goes on from its last checkpoint. At the end the report
is written.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_maxscore.commands.processes import RunError  # noqa: E402
from tools import study_data, study_report  # noqa: E402
from tools.study_arms import (  # noqa: E402
    ABLATION,
    ARMS,
    CORE,
    EXPLORATORY,
    FAMILIES,
    FIRST_RATE,
    GAINS,
    LEARNING_RATES,
    SIZES,
    Arm,
    Run,
    Size,
)
from tools.study_results import compared_loss  # noqa: E402
from tools.study_runs import Results, carry_out_all  # noqa: E402

# No seed is used for two purposes.
TUNING_SEED, FIRST_EXPLORATORY_SEED = 100, 11
PURPOSES = ("tuning", "core", "ablation", "exploratory")
# An arm's tuning runs, beside the first values of its knob, if its best is not far.
FURTHER_RUNS = 9
# What a run takes besides its steps: two starts, validation on the way, evaluation at the end.
OVERHEAD_SECONDS = 90.0


class Setting(NamedTuple):
    """What an arm is run with: its knob's value, learning rate, factor on its gates."""

    value: str
    learning_rate: str
    gain: str


@dataclass(frozen=True)
class Study:
    """One family's runs: which there are, and what their results so far decide.

    Attributes:
        family: text.
        size: model and length.
        data: digest of the text's data sets.
        results: so far.
        device: of the runs that are compared; tuning is the CPU's.
    """

    family: str
    size: Size
    data: str
    results: Results
    device: str = "cpu"

    def run(self, arm: Arm, setting: Setting, seed: int, purpose: str) -> Run:
        """Return one run."""
        tuning = purpose == "tuning"
        return Run(
            self.family, SIZES["small"] if tuning else self.size, arm, setting.value,
            setting.learning_rate, seed, purpose, self.data, setting.gain,
            "cpu" if tuning else self.device,
        )  # fmt: skip

    def best(self, runs: list[Run]) -> Run | None:
        """Return the run with the lowest validation loss, None unless all are done."""
        lines = [self.results.of(run) for run in runs]
        if any(line is None for line in lines):
            return None
        return min(zip(runs, lines, strict=True), key=lambda pair: compared_loss(pair[1]))[0]

    def tuning_of(self, arm: Arm) -> tuple[list[Run], Run | None]:
        """Return an arm's tuning runs as far as they are known, and the best when all are done.

        Three values of the knob first. Then along the knob, the learning rate and the factor on the
        gates in turn: the next above the best and the next below, until both are worse; until no
        neighbour of the best is better in any of the three.
        """
        ladders = {
            "value": tuple(arm.values),
            "learning_rate": LEARNING_RATES,
            "gain": GAINS if arm.gate_scale else ("1",),
        }
        runs = [
            self.run(arm, Setting(value, FIRST_RATE, "1"), TUNING_SEED, "tuning")
            for value in arm.values
            if value not in arm.reserve
        ]

        def untried(best: Run, name: str) -> list[Run]:
            ladder = ladders[name]
            place = ladder.index(getattr(best, name))
            beside = [ladder[i] for i in (place + 1, place - 1) if 0 <= i < len(ladder)]
            return [run for each in beside if (run := replace(best, **{name: each})) not in runs]

        names = itertools.cycle(ladders)
        name, best = next(names), self.best(runs)
        while best is not None and any(untried(best, each) for each in ladders):
            while not untried(best, name):
                name = next(names)
            runs.append(untried(best, name)[0])
            best = self.best(runs)
        return runs, best

    def setting(self, arm: Arm) -> Setting | None:
        """Return what an arm is compared at, None if it is not known yet."""
        if self.size.name == "quick":
            return Setting(arm.usual, FIRST_RATE, "1")
        chosen = self.tuning_of(ARMS[arm.follows] if arm.follows else arm)[1]
        if chosen is None:
            return None
        return Setting(chosen.value, chosen.learning_rate, chosen.gain)

    def comparison(self, arms: Sequence[Arm], seeds: Iterable[int], purpose: str) -> list[Run]:
        """Return the runs of all arms, seed by seed.

        Raises:
            ValueError: an arm is not tuned.
        """
        settings = {arm.name: self.setting(arm) for arm in arms}
        missing = {arm.follows or arm.name for arm in arms if settings[arm.name] is None}
        if missing:
            raise ValueError(
                f"{self.family}: {', '.join(sorted(missing))} not tuned yet; add tuning to "
                "--purposes, for these arms too"
            )
        return [
            self.run(arm, found, seed, purpose)
            for seed in seeds
            for arm in arms
            if (found := settings[arm.name]) is not None
        ]


def minutes(runs: list[Run], results: Results, jobs: int) -> float:
    """Return how long the runs that are still to do will take, by the steps' stated times."""
    todo = [run for run in runs if results.of(run) is None]
    seconds = sum(
        run.size.iterations * run.size.seconds_per_step * run.arm.ranks + OVERHEAD_SECONDS
        for run in todo
    )
    return seconds / jobs / 60


def carry_out(arguments: argparse.Namespace, results: Results) -> None:
    """Carry out what was asked for.

    Raises:
        ValueError: nothing was asked for, or an arm is not tuned.
    """
    size = SIZES[arguments.size]
    options = (arguments.data, arguments.output / "runs", results, arguments.jobs, arguments.keep)
    variants = [arm for arm in EXPLORATORY if not arguments.arms or arm.name in arguments.arms]
    compared_with = {arm.against for arm in variants}
    wanted = {
        "core": [arm for arm in CORE if not arguments.arms or arm.name in arguments.arms],
        "ablation": [arm for arm in ABLATION if not arguments.arms or arm.name in arguments.arms],
        # With what they are variants of, at the exploratory seeds.
        "exploratory": [
            arm for arm in ARMS.values() if arm in variants or arm.name in compared_with
        ],
    }
    compared = [purpose for purpose in ("core", "ablation") if purpose in arguments.purposes]
    wanted["tuning"] = [arm for purpose in compared or ["core"] for arm in wanted[purpose]]
    if not any(wanted[purpose] for purpose in arguments.purposes):
        raise ValueError(
            f"--arms {' '.join(arguments.arms)} has no runs for --purposes "
            f"{' '.join(arguments.purposes)}; variants are exploratory"
        )
    seeds = {
        # Ablations are paired with the core.
        "core": range(1, arguments.seeds + 1),
        "ablation": range(1, arguments.seeds + 1),
        "exploratory": range(FIRST_EXPLORATORY_SEED, FIRST_EXPLORATORY_SEED + arguments.seeds),
    }
    for family in arguments.families:
        directory = study_data.prepare(family, arguments.data, arguments.input)
        study = Study(family, size, study_data.digest(directory), results, arguments.device)
        say_the_plan(study, wanted, arguments)
        if "tuning" in arguments.purposes:
            # What is tried next depends on what was.
            while left := tuning_left(study, wanted["tuning"]):
                say_how_long(f"{family}, tuning", left, results, arguments.jobs)
                carry_out_all(left, *options)
        for purpose in PURPOSES[1:]:
            if purpose in arguments.purposes:
                runs = study.comparison(wanted[purpose], seeds[purpose], purpose)
                say_how_long(f"{family}, {purpose}", runs, results, arguments.jobs)
                carry_out_all(runs, *options)


def tuning_left(study: Study, arms: Sequence[Arm]) -> list[Run]:
    """Return the tuning runs that can be done now."""
    runs = [run for arm in arms for run in study.tuning_of(arm)[0]]
    return [run for run in runs if study.results.of(run) is None]


def say_the_plan(study: Study, wanted: dict, arguments: argparse.Namespace) -> None:
    """Print how long all of it will take, before anything is known of it."""
    count = 0
    for purpose in arguments.purposes:
        for arm in wanted[purpose]:
            values = [value for value in arm.values if value not in arm.reserve]
            tuning = len(values) + FURTHER_RUNS
            count += tuning if purpose == "tuning" else arguments.seeds * arm.ranks
    size = study.size
    hours = count * (size.iterations * size.seconds_per_step + OVERHEAD_SECONDS) / 3600
    print(
        f"{study.family}: {' and '.join(arguments.purposes)}, {count} runs of "
        f"{size.iterations} steps or so, {hours / arguments.jobs:.1f} hours with "
        f"{arguments.jobs} at a time where a core takes {size.seconds_per_step:g} s per step; "
        "less if some are done",
        flush=True,
    )


def say_how_long(what: str, runs: list[Run], results: Results, jobs: int) -> None:
    """Print how many runs are left and how long they will take."""
    left = sum(results.of(run) is None for run in runs)
    if left:
        time = minutes(runs, results, jobs)
        print(f"{what}: {left} runs to do, about {time:.0f} minutes", flush=True)


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
    parser.add_argument("--size", choices=("small", "long"), default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "study")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "study")
    parser.add_argument("--results", type=Path, help="default: results.jsonl in --output")
    parser.add_argument("--report", type=Path, help="directory; default: --output")
    parser.add_argument("--keep", action="store_true", help="keep checkpoints and logs")
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.size = "quick"
        arguments.families = arguments.families or ["code"]
    if arguments.size != "small":
        # What the small runs are tuned to is taken.
        arguments.purposes = [p for p in arguments.purposes if p != "tuning"]
    if arguments.device == "cpu":
        # Evaluation, too, takes a device where it sees one.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    arguments.families = arguments.families or ["prose"]
    arguments.seeds = arguments.seeds or (2 if arguments.quick else 5)
    # Runs are started from the repository's root.
    for name in ("data", "output"):
        setattr(arguments, name, getattr(arguments, name).resolve())
    arguments.output.mkdir(parents=True, exist_ok=True)
    default = "quick.jsonl" if arguments.quick else "results.jsonl"
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        results = Results(arguments.results or arguments.output / default)
        if not arguments.report_only:
            carry_out(arguments, results)
        if not results.lines:
            raise ValueError(f"{results.path} has no results to report")
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
