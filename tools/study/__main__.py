"""Train the same model under every router, and report which one trains best.

    python -m tools.study --quick               # ten minutes, to see it work
    python -m tools.study                       # tuning, then ten seeds of the core arms
    python -m tools.study --purposes factorial  # is it the flow or the gates
    python -m tools.study --purposes servable   # what serving anywhere costs
    python -m tools.study --purposes one_flag   # MaxScore in a recipe that was tuned for top-k
    python -m tools.study --purposes prices     # from when on prices serve
    python -m tools.study --size long --families prose_large --purposes core --seeds 5
    python -m tools.study --families custom --input my/texts --purposes tuning core
    python -m tools.study --results docs/evidence/study/results.jsonl --repeat KEY  # one run again

Every arm starts from the same weights and sees the same data in the same order; what differs are
the router's flags, the learning rate and a factor on the gates. Runs go through the launcher and
Megatron's training loop. Results are appended to --results; what is there is not repeated, and a
killed run goes on from its last checkpoint. At the end the report is written.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_maxscore.commands.processes import RunError, alone_in

from . import data, report
from .arms import (
    ARMS,
    CORE,
    FACTORIAL,
    FAMILIES,
    LEARNING_RATES,
    ONE_FLAG,
    SERVABLE,
    SIZES,
    Arm,
    Run,
    Setting,
    Size,
)
from .results import compared_loss
from .runs import ROOT, Results, carry_out_all, code_digest

# No seed is used for two purposes. The seeds 101 to 104 decided MaxScore's defaults, and the first
# study used 1 to 5 and 11; both tuned on 100.
TUNING_SEED, FIRST_SEED, SEEDS = 100, 21, 10
COMPARED = {
    "core": CORE, "factorial": FACTORIAL, "servable": SERVABLE, "one_flag": ONE_FLAG,
    "prices": CORE[:1],
}  # fmt: skip
PURPOSES = ("tuning", *COMPARED)
# From when on prices serve: seeds of their own, evaluated on the way too.
PRICES_SEED, PRICES_SEEDS, MILESTONES = 31, 3, (20, 50, 100, 300)
# A run that is made again on the same kind of machine has the same loss, to this many nats.
SAME_LOSS = 1e-6
# An arm's tuning runs, if its best is not far.
TUNING_RUNS = 7
# What a run takes besides its steps: two starts, validation on the way, evaluation at the end.
OVERHEAD_SECONDS = 90.0


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
            self.family, SIZES["small"] if tuning else self.size, arm, setting, seed, purpose,
            self.data, "cpu" if tuning else self.device,
            tuple(step for step in MILESTONES if step < self.size.iterations)
            if purpose == "prices"
            else (),
        )  # fmt: skip

    def best(self, runs: list[Run]) -> Run | None:
        """Return the run with the lowest validation loss, None unless all are done."""
        lines = [self.results.of(run) for run in runs]
        if any(line is None for line in lines):
            return None
        return min(zip(runs, lines, strict=True), key=lambda pair: compared_loss(pair[1]))[0]

    def tuning_of(self, arm: Arm) -> tuple[list[Run], Run | None]:
        """Return an arm's tuning runs as far as they are known, and the best when all are done.

        From the arm's start along the learning rate, then along the factor, in turn: the next above
        the best and the next below, until no neighbour of the best is better in either.
        """
        ladders = {"learning_rate": LEARNING_RATES, "factor": arm.factors}
        runs = [self.run(arm, arm.start, TUNING_SEED, "tuning")]

        def untried(best: Run, name: str) -> list[Run]:
            ladder = ladders[name]
            place = ladder.index(getattr(best.setting, name))
            beside = [ladder[i] for i in (place + 1, place - 1) if 0 <= i < len(ladder)]
            found = [replace(best, setting=best.setting._replace(**{name: x})) for x in beside]
            return [run for run in found if run not in runs]

        name, best = "learning_rate", self.best(runs)
        while best is not None and any(untried(best, each) for each in ladders):
            if not untried(best, name):
                name = next(each for each in ladders if each != name)
            runs.append(untried(best, name)[0])
            best = self.best(runs)
        return runs, best

    def setting(self, arm: Arm) -> Setting | None:
        """Return what an arm is compared at, None if it is not known yet.

        Other sizes and texts than those that were tuned on take the best setting on record.
        """
        if arm.setting is not None:
            return arm.setting
        if self.size.name == "quick":
            return arm.start
        if chosen := self.tuning_of(arm)[1]:
            return chosen.setting
        recorded = [
            line
            for line in self.results.lines
            if line["arm"] == arm.name and line["purpose"] == "tuning"
        ]
        if self.has_tuning or not recorded:
            return None
        best = min(recorded, key=compared_loss)
        return Setting(best["learning_rate"], best["factor"])

    @property
    def has_tuning(self) -> bool:
        """Return whether this text and size are what arms are tuned on."""
        return self.size.name == "small" and self.family != "prose_large"

    def comparison(self, arms: Sequence[Arm], seeds: Iterable[int], purpose: str) -> list[Run]:
        """Return the runs of all arms, seed by seed.

        Raises:
            ValueError: an arm is not tuned.
        """
        settings = {arm.name: self.setting(arm) for arm in arms}
        missing = {arm.name for arm in arms if settings[arm.name] is None}
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
    seconds = sum(
        run.size.iterations * run.size.seconds_per_step + OVERHEAD_SECONDS
        for run in runs
        if results.of(run) is None
    )
    return seconds / jobs / 60


def carry_out(arguments: argparse.Namespace, results: Results) -> None:
    """Carry out what was asked for.

    Raises:
        ValueError: nothing was asked for, or an arm is not tuned.
    """
    options = (arguments.data, arguments.output / "runs", results, arguments.jobs, arguments.keep)

    def wanted(arms: Iterable[Arm]) -> list[Arm]:
        return [arm for arm in arms if not arguments.arms or arm.name in arguments.arms]

    compared = {name: wanted(COMPARED[name]) for name in COMPARED if name in arguments.purposes}
    arms = [arm for each in compared.values() for arm in each] or wanted(ARMS.values())
    tuned = [arm for arm in arms if arm.setting is None]
    if not (any(compared.values()) or (tuned and "tuning" in arguments.purposes)):
        raise ValueError(
            f"--arms {' '.join(arguments.arms)} has no runs for --purposes "
            f"{' '.join(arguments.purposes)}"
        )
    for family in arguments.families:
        directory = data.prepare(family, arguments.data, arguments.input)
        size = SIZES[arguments.size]
        study = Study(family, size, data.digest(directory), results, arguments.device)
        if "tuning" in arguments.purposes:
            print(f"{family}: tuning {len(tuned)} arms, about {TUNING_RUNS} runs each", flush=True)
            # What is tried next depends on what was.
            while left := tuning_left(study, tuned):
                say_how_long(f"{family}, tuning", left, results, arguments.jobs)
                carry_out_all(left, *options)
        for purpose, own in compared.items():
            first, count = FIRST_SEED, arguments.seeds
            if purpose == "prices":
                first, count = PRICES_SEED, min(arguments.seeds, PRICES_SEEDS)
            seeds = range(first, first + count)
            runs = study.comparison(own, seeds, purpose)
            say_how_long(f"{family}, {purpose}", runs, results, arguments.jobs)
            carry_out_all(runs, *options)


def repeat(key: str, arguments: argparse.Namespace, results: Results) -> bool:
    """Make a recorded run again, say what came of it, and return whether it is the same.

    Args:
        key: of the recorded run.
        arguments: of the command; what follows from the record is taken from there.
        results: with the record; they stay as they are.

    Raises:
        ValueError: there is no such record, or this checkout or text would make another run of it.
    """
    record = next((line for line in results.lines if line["key"] == key), None)
    if record is None:
        raise ValueError(
            f"{results.path} has no run with the key {key!r}; each line begins with one"
        )
    if record["arm"] not in ARMS:
        raise ValueError(
            f"there is no arm {record['arm']!r} any more; check out {record['revision']}"
        )
    if record["device"] == "cuda":
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    directory = data.prepare(record["family"], arguments.data, arguments.input)
    path = arguments.output / f"repeat-{key}.jsonl"
    path.unlink(missing_ok=True)
    again = Results(path)
    study = Study(
        record["family"], SIZES[record["size"]], data.digest(directory), again, record["device"]
    )
    setting = Setting(record["learning_rate"], record["factor"])
    run = study.run(ARMS[record["arm"]], setting, record["seed"], record["purpose"])
    if run.key != key:
        raise ValueError(
            f"here the run {run.title} has the key {run.key}, not {key}: the text or the flags are "
            f"others (text {study.data}, recorded {record['data']}); check out {record['revision']}"
        )
    if record["code"] != code_digest():
        print(
            f"recorded with other sources; git checkout {record['revision'].rstrip('+')} -- "
            "megatron_maxscore examples takes them",
            flush=True,
        )
    # Nothing of an earlier run may be gone on with: it would be compared with itself.
    shutil.rmtree(arguments.output / "repeats", ignore_errors=True)
    carry_out_all([run], arguments.data, arguments.output / "repeats", again, 1, arguments.keep)
    before, now = compared_loss(record), compared_loss(again.lines[-1])
    print(f"validation loss: recorded {before:.9f}, now {now:.9f}")
    return before == now or abs(now - before) <= SAME_LOSS


def tuning_left(study: Study, arms: Sequence[Arm]) -> list[Run]:
    """Return the tuning runs that can be done now."""
    runs = [run for arm in arms for run in study.tuning_of(arm)[0]]
    return [run for run in runs if study.results.of(run) is None]


def say_how_long(what: str, runs: list[Run], results: Results, jobs: int) -> None:
    """Print how many runs are left and how long they will take."""
    left = sum(results.of(run) is None for run in runs)
    if left:
        time = minutes(runs, results, jobs)
        print(f"{what}: {left} runs to do, about {time:.0f} minutes", flush=True)


def main() -> int:
    """Parse the command line, run, report."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="few steps, two seeds, no tuning")
    parser.add_argument("--families", nargs="+", choices=(*FAMILIES, "custom"), default=None)
    parser.add_argument("--input", nargs="*", default=[], help="texts of family custom")
    parser.add_argument("--purposes", nargs="+", choices=PURPOSES, default=["tuning", "core"])
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=[], metavar="ARM")
    parser.add_argument("--seeds", type=int, help=f"default: {SEEDS}, with --quick 2")
    parser.add_argument("--size", choices=("small", "long", "fine"), default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "study")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "study")
    parser.add_argument("--results", type=Path, help="default: results.jsonl in --output")
    parser.add_argument("--report", type=Path, help="directory; default: --output")
    parser.add_argument("--keep", action="store_true", help="keep checkpoints and logs")
    parser.add_argument("--repeat", metavar="KEY", help="make one recorded run again, and compare")
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.size = "quick"
    arguments.families = arguments.families or ["code" if arguments.quick else "prose"]
    arguments.seeds = arguments.seeds or (2 if arguments.quick else SEEDS)
    if arguments.size != "small" or arguments.families == ["prose_large"]:
        # What the small runs are tuned to is taken.
        arguments.purposes = [each for each in arguments.purposes if each != "tuning"]
    if arguments.device == "cpu":
        # Evaluation, too, takes a device where it sees one.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Runs are started from the repository's root.
    for name in ("data", "output"):
        setattr(arguments, name, getattr(arguments, name).resolve())
    arguments.output.mkdir(parents=True, exist_ok=True)
    default = "quick.jsonl" if arguments.quick else "results.jsonl"
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        results = Results(arguments.results or arguments.output / default)
        if arguments.repeat:
            with alone_in(arguments.output, "study"):
                return 0 if repeat(arguments.repeat, arguments, results) else 1
        if not arguments.report_only:
            with alone_in(arguments.output, "study"):
                carry_out(arguments, results)
        if not results.lines:
            raise ValueError(f"{results.path} has no results to report")
        report.write(results.lines, arguments.report or arguments.output)
    except (ValueError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
