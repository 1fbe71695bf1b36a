"""Writes the study's report: tables in Markdown, curves and load maps in PNG, runs in CSV."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from .arms import ARMS, BOUNDED, DROPLESS, FAMILIES
from .pictures import curves, load_maps, price_curve
from .results import (
    Comparison,
    Lines,
    by_arm,
    compare,
    compared_loss,
    decoding_difference,
    factorial,
    losses,
    own_loss,
    own_rule,
    paired,
    standard_error,
    verdict,
)

OURS = "maxscore"
# MaxScore's own rule may cost so much against the flow, leave so much imbalance, and change so much
# when it decodes.
MOST_LOSS, MOST_MAXVIO, MOST_DECODING = 0.01, 0.25, 1e-5
LEAST_SEEDS = 5
# Ends of the spans of training steps for which the dropped share is given.
DROP_STEPS = (5, 20, 50, 100, 200)
# What a router's loss may be higher by and still count as not worse, nats per token: half a percent
# of the first study's mean loss of dropless top-k, 3.864.
MARGIN = 0.019


def _markdown(headings: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None or math.isnan(value) else format(value, form)


def _interval(result: Comparison) -> str:
    """Return mean and 95 % interval."""
    if math.isnan(result.low):
        return f"{result.mean:+.4f} (one seed)"
    return f"{result.mean:+.4f} [{result.low:+.4f}, {result.high:+.4f}]"


def main_table(arms: dict[str, Lines]) -> str:
    """Return the table of what every arm came to."""
    rows = []
    for name, lines in arms.items():
        own = [own_loss(line) for line in lines]
        late = [float(np.mean(li["train_loss"][-len(li["train_loss"]) // 10 :])) for li in lines]
        others = [list(line["evaluation"]["rules"].items())[1:] for line in lines]
        other = "-"
        if others[0]:
            mean = np.mean([each[0][1]["loss"] for each in others])
            other = f"{mean:.4f} ({others[0][0][0]})"
        shares = [line["solve_share"] for line in lines if line["solve_share"] is not None]
        rows.append(
            [
                ARMS[name].title,
                str(len(lines)),
                f"{np.mean(own):.4f} ± {_number(standard_error(own))}",
                other,
                f"{np.mean([max(own_rule(li)['maxvio']) for li in lines]):.2f}",
                f"{np.mean([own_rule(li)['gate_sum'] for li in lines]):.2f}",
                f"{np.mean(late):.4f}",
                f"{np.mean([li['maxvio_mean'] for li in lines]):.3f}",
                f"{np.max([li['maxvio_max'] for li in lines]):.2f}",
                f"{np.mean([li['dropped'] for li in lines]):.2%}",
                f"{np.mean(shares):.1%}" if shares else "-",
                f"{np.median([li['ms_per_step'] for li in lines]):.0f}",
            ]
        )
    headings = [
        "router", "seeds", "validation loss, own rule ± standard error", "other rule",
        "maxvio over the validation text, worst layer", "sum of a token's gates",
        "training loss, last tenth *", "maxvio of a microbatch in training, mean", "and max",
        "dropped in training",
        "solver's share of the step", "ms per step",
    ]  # fmt: skip
    return _markdown(headings, rows)


def paired_table(arms: dict[str, Lines], ours: Lines) -> str:
    """Return the table of paired differences between MaxScore and the other core arms."""
    rows = []
    for name, lines in arms.items():
        mean, half, count = paired(losses(ours), losses(lines))
        together = paired(losses(ours), losses(lines), len(arms))[1]
        rows.append(
            [
                ARMS[name].title,
                str(count),
                f"{mean:+.4f} ± {_number(half)}",
                f"± {_number(together)}",
                verdict(mean, half),
            ]
        )
    headings = [
        "router", "seeds", "MaxScore minus it", "all intervals together", "MaxScore's loss is",
    ]  # fmt: skip
    return _markdown(headings, rows)


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
                f"{_interval(result)}, {result.seeds} seeds; "
                f"equivalent: {'yes' if result.is_equivalent else 'not shown'}"
            )
        which = "every router that bounds the load" if of_bounded else "the best dropless router"
        found.append(
            f"- **{'Better than' if of_bounded else 'Not worse than'} {which}: "
            f"{'yes' if all(passed) else 'not shown'}.**"
        )
    return found


def factorial_table(arms: dict[str, Lines]) -> str:
    """Return the two main effects and their interaction, or why there are none."""
    names = {
        "both": OURS, "first": "flow_plain_gates", "second": "plain_soft_gates",
        "neither": "dropless",
    }  # fmt: skip
    missing = [ARMS[name].title for name in names.values() if name not in arms]
    if missing:
        return f"Not judged: no runs of {', '.join(missing)}.\n"
    effects = factorial({key: losses(arms[name]) for key, name in names.items()})
    rows = [
        [text, str(effects[key][2]), f"{effects[key][0]:+.4f} ± {_number(effects[key][1])}",
         verdict(*effects[key][:2])]
        for key, text in (
            ("first", "the flow in place of top-k and its aux loss"),
            ("second", "SoftTopk gates in place of softmax gates"),
            ("interaction", "the flow's effect with SoftTopk gates, minus that with softmax gates"),
        )
    ]  # fmt: skip
    return _markdown(["effect on the loss", "seeds", "nats per token", "loss is"], rows)


def against_table(arms: dict[str, Lines], reference: str, lines: Lines) -> str:
    """Return the table of arms against one, by the margin of the primary question."""
    rows = []
    for name, own in arms.items():
        if name != reference:
            result = compare(losses(own), losses(lines), MARGIN)
            rows.append(
                [
                    ARMS[name].title,
                    str(result.seeds),
                    _interval(result),
                    "shown" if result.is_not_worse else "not shown",
                ]
            )
    title = ARMS[reference].title
    headings = ["router", "seeds", f"loss minus that of {title}", f"not worse by {MARGIN} nats"]
    return _markdown(headings, rows)


def milestones_table(lines: Lines) -> str:
    """Return the table of losses and maxvio by prices and by the flow, over training."""
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        for step, rules in line["milestones"].items():
            found[int(step)].append(rules)
        found[line["iterations"]].append(line["evaluation"]["rules"])
    rows = []
    for step, every in sorted(found.items()):
        price = [rules["price"]["loss"] for rules in every]
        flow = [rules["flow"]["loss"] for rules in every]
        cost = [p - f for p, f in zip(price, flow, strict=True)]
        maxvio = [max(rules["price"]["maxvio"]) for rules in every]
        rows.append(
            [
                str(step),
                str(len(every)),
                f"{np.mean(price):.4f}",
                f"{np.mean(flow):.4f}",
                f"{np.mean(cost):+.4f} ({min(cost):+.4f} to {max(cost):+.4f})",
                f"{np.mean(maxvio):.2f} (at most {max(maxvio):.2f})",
            ]
        )
    headings = [
        "after steps", "seeds", "loss by prices", "loss by the flow",
        "prices cost, nats: mean (range)", "maxvio by prices, worst layer",
    ]  # fmt: skip
    return _markdown(headings, rows)


def drops_table(arms: dict[str, Lines]) -> str:
    """Return the table of the share of assignments that are dropped, over training."""
    steps = next(iter(arms.values()))[0]["iterations"]
    ends = [*(end for end in DROP_STEPS if end < steps), steps]
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    rows = []
    for name, lines in arms.items():
        if any("dropped_by_step" in line for line in lines):
            shares_SI = np.array([line.get("dropped_by_step", [0.0] * steps) for line in lines])
            found = [f"{shares_SI[:, first:end].mean():.1%}" for first, end in spans]
            rows.append([ARMS[name].title, str(len(lines)), *found])
    headings = [f"steps {first + 1} to {end}" for first, end in spans]
    return _markdown(["router that drops", "seeds", *headings], rows)


def tuning_table(lines: Lines) -> str:
    """Return the table of tuning runs, the lowest loss of each arm marked."""
    rows = []
    for name, own in by_arm(lines, "tuning").items():
        least = min(map(compared_loss, own))
        for line in sorted(own, key=lambda li: (float(li["learning_rate"]), compared_loss(li))):
            mark = " **lowest**" if compared_loss(line) == least else ""
            rows.append(
                [
                    ARMS[name].title,
                    line["learning_rate"],
                    line["factor"],
                    f"{compared_loss(line):.4f}{mark}",
                    f"{max(own_rule(line)['maxvio']):.2f}",
                ]
            )
    headings = [
        "router", "learning rate", "gates times", "validation loss",
        "maxvio over the validation text, worst layer",
    ]  # fmt: skip
    return _markdown(headings, rows)


def inference_table(arms: dict[str, Lines]) -> str:
    """Return the table of price routing against flow routing."""
    rows = []
    for name, lines in arms.items():
        if not all("price" in line["evaluation"]["rules"] for line in lines):
            continue
        for line in lines:
            rules, found = line["evaluation"]["rules"], line["evaluation"]["comparison"]
            price, flow = rules["price"], rules["flow"]
            decoding = line["evaluation"]["decoding"]
            single, double = (decoding_difference(decoding, kind) for kind in ("", "_float64"))
            rows.append(
                [
                    ARMS[name].title,
                    str(line["seed"]),
                    f"{price['loss']:.4f}",
                    f"{flow['loss']:.4f}",
                    f"{price['loss'] / flow['loss'] - 1:+.2%}",
                    f"{found['kl']:.4f}",
                    f"{found['top1_agreement']:.1%}",
                    f"{max(price['maxvio']):.3f}",
                    f"{single:.0e}, {double:.0e}",
                ]
            )
    headings = [
        "router", "seed", "loss, prices", "loss, flow", "prices cost", "KL, nats",
        "same likeliest token", "maxvio by prices, worst layer",
        "token by token differs by, float32 and float64",
    ]  # fmt: skip
    return _markdown(headings, rows)


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
