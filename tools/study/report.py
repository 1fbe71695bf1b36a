"""Writes the study's report: answers and tables in Markdown, pictures in PNG, runs in CSV."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import numpy as np

from .arms import ARMS, BOUNDED, DROPLESS, FAMILIES
from .pictures import curves, load_maps, price_curve
from .results import (
    Lines,
    by_arm,
    compare,
    decoding_difference,
    losses,
)
from .tables import (
    MARGIN,
    OURS,
    against_table,
    drops_table,
    factorial_table,
    inference_table,
    interval,
    main_table,
    milestones_table,
    paired_table,
    tuning_table,
)

# MaxScore's own rule may cost so much against the flow, leave so much imbalance, and change so much
# when it decodes.
MOST_LOSS, MOST_MAXVIO, MOST_DECODING = 0.01, 0.25, 1e-5
LEAST_SEEDS = 5


def primary(core: dict[str, Lines]) -> list[str]:
    """Return the answers to the primary question, part by part, as lines of Markdown."""
    ours = core.get(OURS, [])
    if len(ours) < LEAST_SEEDS:
        return [f"- not judged: {len(ours)} seeds of MaxScore, {LEAST_SEEDS} are the least"]
    found = []
    for names, of_bounded in ((DROPLESS, False), (BOUNDED, True)):
        passed = []
        for name in names:
            if name not in core:
                found.append(f"- not judged: {ARMS[name].title} has no runs")
                passed.append(False)
                continue
            result = compare(losses(ours), losses(core[name]), MARGIN)
            shown = result.is_better if of_bounded else result.is_not_worse
            passed.append(shown and result.seeds >= LEAST_SEEDS)
            what = "better than" if of_bounded else f"not worse, by {MARGIN} nats, than"
            found.append(
                f"- {'shown' if passed[-1] else 'NOT SHOWN'}: {what} {ARMS[name].title}: "
                f"{interval(result)}, {result.seeds} seeds; "
                f"equivalent: {'yes' if result.is_equivalent else 'not shown'}"
            )
        which = "every router that bounds the load" if of_bounded else "the best dropless router"
        found.append(
            f"- **{'Better than' if of_bounded else 'Not worse than'} {which}: "
            f"{'yes' if all(passed) else 'not shown'}.**"
        )
    return found


def write_csv(lines: Lines, path: Path) -> None:
    """Write one row per run."""
    names = [
        "family", "size", "data", "purpose", "arm", "learning_rate", "factor", "seed",
        "iterations", "tokens", "loss_own_rule", "loss_other_rule", "train_loss_last_tenth",
        "maxvio_mean", "maxvio_mean_late", "maxvio_max", "dropped", "valid_maxvio_own_rule", "kl",
        "top1_agreement", "solve_share", "ms_per_step", "seconds", "flags",
    ]  # fmt: skip
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for line in lines:
            if "diverged" in line:
                writer.writerow(line | {"loss_own_rule": "diverged"})
                continue
            rules = list(line["evaluation"]["rules"].values())
            found = line["evaluation"]["comparison"]
            late = line["train_loss"][-len(line["train_loss"]) // 10 :]
            writer.writerow(
                line
                | {
                    "loss_own_rule": rules[0]["loss"],
                    "loss_other_rule": rules[1]["loss"] if len(rules) > 1 else "",
                    "train_loss_last_tenth": float(np.mean(late)),
                    "valid_maxvio_own_rule": max(rules[0]["maxvio"]),
                    "kl": found.get("kl", ""),
                    "top1_agreement": found.get("top1_agreement", ""),
                }
            )


def bars(core: dict[str, Lines]) -> list[str]:
    """Return what price routing must keep to, and whether it does."""
    ours = core.get(OURS, [])
    if len(ours) < LEAST_SEEDS:
        return [f"- not judged: {len(ours)} seeds of MaxScore, {LEAST_SEEDS} are the least"]
    found = []

    def judge(passed: bool, text: str) -> None:
        found.append(f"- {'PASS' if passed else 'MISSED'}: {text}")

    evaluations = [line["evaluation"] for line in ours]
    costs = [e["rules"]["price"]["loss"] / e["rules"]["flow"]["loss"] - 1 for e in evaluations]
    judge(
        max(costs) <= MOST_LOSS,
        f"prices cost at most {MOST_LOSS:.0%} of the loss: {max(costs):+.2%} at most",
    )
    worst = max(max(e["rules"]["price"]["maxvio"]) for e in evaluations)
    judge(
        worst <= MOST_MAXVIO,
        f"maxvio by prices at most {MOST_MAXVIO} in every layer: {worst:.3f} at most",
    )
    for kind, name in (("", "float32"), ("_float64", "float64")):
        largest = max(decoding_difference(e["decoding"], kind) for e in evaluations)
        judge(
            largest <= MOST_DECODING,
            f"token by token as in one pass to {MOST_DECODING:g}, in {name}: {largest:.0e}",
        )
    return found


def write(lines: Lines, directory: Path) -> None:
    """Write report.md, runs.csv and the pictures.

    Args:
        lines: results, as in the file of results.
        directory: made if it is not there.
    """
    if not lines:
        print("there are no results to report yet")
        return
    directory.mkdir(parents=True, exist_ok=True)
    groups: dict[tuple[str, str], Lines] = defaultdict(list)
    for line in lines:
        groups[line["family"], line["size"]].append(line)
    for key, own in groups.items():
        # Of a family whose text has changed, what was done with the last one.
        groups[key] = [line for line in own if line.get("data") == own[-1].get("data")]
    parts = ["# Which router trains best\n", _explanation()]
    for (family, size), own in sorted(groups.items()):
        parts += _section(family, size, own, directory)
    (directory / "report.md").write_text("\n".join(parts), encoding="utf-8")
    write_csv(lines, directory / "runs.csv")
    print(f"report.md, runs.csv and pictures are in {directory}")


def _explanation() -> str:
    return (
        "Written by `python -m tools.study --report-only`; one row per run is in runs.csv. Within "
        "a family every run of a seed starts from the same weights and sees the same data in the "
        'same order. "Own rule" is what a router does outside training: MaxScore\'s prices, which '
        "are causal; top-k with or without its capacity, which is not, or its bias. Losses are in "
        "nats per token over the whole validation set. Differences are paired by seed, with 95 % "
        "confidence intervals (Student's t), and also so that all of a table hold together "
        "(Bonferroni); of a baseline with two rules the lower loss is compared.\n\n"
        "\\* Training losses are not comparable where routing sees the batch. Loads in training "
        "are counted after dropping. Times were taken with other runs beside.\n"
    )


def _section(family: str, size: str, lines: Lines, directory: Path) -> list[str]:
    about = lines[-1]
    parts = [
        f"## {family}, {size}: {about['iterations']} steps, {about['tokens']:,} tokens\n",
        f"Text: {FAMILIES.get(family, 'the files named with --input')}.\n",
    ]
    lost = [line for line in lines if "diverged" in line]
    if lost:
        names = ", ".join(f"{li['arm']} lr {li['learning_rate']} seed {li['seed']}" for li in lost)
        parts.append(f"Diverged, and not in the tables: {names}.\n")
    core = by_arm(lines, "core")
    if core:
        parts += _core(core, f"{family}_{size}", directory)
    if found := by_arm(lines, "factorial"):
        parts += ["### The flow or the gates\n", main_table(found), factorial_table(core | found)]
    if found := by_arm(lines, "servable"):
        parts += ["### What serving anywhere costs\n", main_table(found)]
        if OURS in core:
            parts.append(against_table(found, OURS, core[OURS]))
        parts.append(inference_table(found))
    if found := by_arm(lines, "one_flag"):
        parts += ["### One flag in a recipe that was tuned for top-k\n", main_table(found)]
        if "dropless" in core:
            parts.append(against_table(found, "dropless", core["dropless"]))
    if found := by_arm(lines, "prices"):
        (own,) = found.values()
        price_curve(own, directory / f"{family}_{size}_prices.png")
        parts += [
            "### From when on prices serve\n",
            milestones_table(own),
            f"![Loss and maxvio by prices over training]({family}_{size}_prices.png)\n",
        ]
    if found := by_arm(lines, "tuning"):
        parts += ["### Tuning\n", tuning_table(lines)]
    revisions = sorted({f"{li['revision']} (sources {li['code']})" for li in lines})
    parts += ["### Revisions\n", "\n".join(f"- {each}" for each in revisions) + "\n"]
    return parts


def _core(core: dict[str, Lines], stem: str, directory: Path) -> list[str]:
    """Return the primary question's part of a section; draws its pictures."""
    parts = []
    if OURS in core:
        parts += ["### The primary question\n", "\n".join(primary(core)) + "\n"]
    curves(core, directory / f"{stem}_curves.png")
    parts += ["### All routers\n", main_table(core), f"![Curves]({stem}_curves.png)\n"]
    if any("dropped_by_step" in line for own in core.values() for line in own):
        parts += ["### Share of assignments dropped in training\n", drops_table(core)]
    if load_maps(core, directory / f"{stem}_loads.png"):
        parts.append(f"![Expert loads in training, one seed]({stem}_loads.png)\n")
    if OURS in core:
        rivals = {name: own for name, own in core.items() if name != OURS}
        parts += [
            "### Paired differences\n",
            paired_table(rivals, core[OURS]),
            "### Prices against the flow, after training\n",
            "\n".join(bars(core)) + "\n",
            inference_table(core),
        ]
    return parts
