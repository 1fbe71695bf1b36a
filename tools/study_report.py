"""Writes the study's report: tables in Markdown, curves and load maps in PNG, runs in CSV."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from scipy import stats

from tools.study_arms import ARMS, CORE, EXPLORATORY, FAMILIES

matplotlib.use("Agg")
from matplotlib import pyplot as plt

OURS = "maxscore"
# MaxScore's own rule may cost so much against the flow, and leave so much imbalance.
MOST_LOSS, MOST_MAXVIO = 0.01, 0.25
Lines = list[dict[str, Any]]


def own_rule(line: dict[str, Any]) -> dict[str, Any]:
    """Return the evaluation by the router's own causal rule."""
    return next(iter(line["evaluation"]["rules"].values()))


def own_loss(line: dict[str, Any]) -> float:
    """Return the validation loss by the router's own causal rule."""
    return own_rule(line)["loss"]


def standard_error(values: Iterable[float]) -> float:
    """Return the standard error of a mean, NaN for a single value."""
    values = list(values)
    if len(values) < 2:
        return math.nan
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def paired(ours: dict[int, float], theirs: dict[int, float]) -> tuple[float, float, int]:
    """Return mean, half width of the 95 % confidence interval and number of paired differences.

    Args:
        ours: value per seed.
        theirs: value per seed; only common seeds count.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    if not differences:
        return math.nan, math.nan, 0
    mean = float(np.mean(differences))
    if len(differences) < 2:
        return mean, math.nan, 1
    quantile = float(stats.t.ppf(0.975, len(differences) - 1))
    return mean, quantile * standard_error(differences), len(differences)


def verdict(mean: float, half: float) -> str:
    """Say in a word what a paired interval shows."""
    if math.isnan(half):
        return "one seed only"
    if mean + half < 0:
        return "lower"
    if mean - half > 0:
        return "higher"
    return "no difference shown"


def _markdown(headings: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None or math.isnan(value) else format(value, form)


def by_arm(lines: Lines, purpose: str) -> dict[str, Lines]:
    """Return the results of a purpose per arm, in the arms' order, by seed."""
    found: dict[str, Lines] = {}
    for arm in (*CORE, *EXPLORATORY):
        own = [li for li in lines if li["arm"] == arm.name and li["purpose"] == purpose]
        if own:
            found[arm.name] = sorted(own, key=lambda line: line["seed"])
    return found


def losses(lines: Lines) -> dict[int, float]:
    """Return the own rule's validation loss per seed."""
    return {line["seed"]: own_loss(line) for line in lines}


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
        "training loss, last tenth *", "maxvio, mean", "maxvio, max", "dropped",
        "solver's share of the step", "ms per step",
    ]  # fmt: skip
    return _markdown(headings, rows)


def paired_table(arms: dict[str, Lines], ours: Lines, title: str) -> str:
    """Return the table of paired differences between MaxScore and others.

    Args:
        arms: the others.
        ours: MaxScore's results.
        title: heading of the difference.
    """
    rows = []
    for name, lines in arms.items():
        mean, half, count = paired(losses(ours), losses(lines))
        rows.append(
            [
                ARMS[name].title,
                str(count),
                f"{mean:+.4f} ± {_number(half)}",
                verdict(mean, half),
            ]
        )
    return _markdown(["router", "seeds", title, "MaxScore's loss is"], rows)


def tuning_table(lines: Lines) -> str:
    """Return the table of tuning runs, the best of each arm marked."""
    rows = []
    for name, own in by_arm(lines, "tuning").items():
        least = min(map(own_loss, own))
        for line in sorted(own, key=lambda li: (li["learning_rate"], own_loss(li))):
            mark = " **taken**" if own_loss(line) == least else ""
            rows.append(
                [
                    ARMS[name].title,
                    f"{ARMS[name].knob} {line['value']}",
                    line["learning_rate"],
                    f"{own_loss(line):.4f}{mark}",
                ]
            )
    return _markdown(["router", "setting", "learning rate", "validation loss"], rows)


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
            parts = ("loss_one_pass", "loss_token_by_token")
            single, double = (
                abs(decoding[parts[0] + kind] - decoding[parts[1] + kind])
                for kind in ("", "_float64")
            )
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


def curves(arms: dict[str, Lines], path: Path) -> None:
    """Draw validation curves and training losses with bands of one standard deviation."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.6))
    for index, (name, lines) in enumerate(arms.items()):
        style = {"color": f"C{index}", "label": ARMS[name].title}
        steps = [int(step) for step in lines[0]["curve"]]
        values = np.array([list(line["curve"].values()) for line in lines])
        _band(axes[0], np.array(steps), values, style)
        window = max(1, len(lines[0]["train_loss"]) // 30)
        kernel = np.ones(window) / window
        smooth = np.array([np.convolve(li["train_loss"], kernel, "valid") for li in lines])
        _band(axes[1], np.arange(smooth.shape[1]) + window, smooth, style)
    axes[0].set(title="validation, own causal rule (64 sequences a point)", ylabel="loss, nats")
    axes[1].set(title="training; routing may see the batch, so not comparable")
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        low = min(line.get_ydata()[-1] for line in axis.lines)
        axis.set_ylim(low - 0.1, low + 2.0)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def _band(axis: Any, steps: np.ndarray, values: np.ndarray, style: dict) -> None:
    mean, spread = values.mean(0), values.std(0)
    axis.plot(steps, mean, linewidth=1.4, **style)
    axis.fill_between(steps, mean - spread, mean + spread, color=style["color"], alpha=0.15)


def load_maps(arms: dict[str, Lines], path: Path) -> bool:
    """Draw every expert's load over training, in each arm's least balanced layer."""
    maps = {
        name: np.array(line["load_map"])
        for name, lines in arms.items()
        for line in lines
        if "load_map" in line
    }
    if not maps:
        return False
    figure, axes = plt.subplots(1, len(maps), figsize=(3.1 * len(maps), 3.6), squeeze=False)
    for axis, (name, map_SLE) in zip(axes[0], maps.items(), strict=True):
        layer = int(map_SLE.max(2).mean(0).argmax())
        image = axis.imshow(
            map_SLE[:, layer].T, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2,
            interpolation="nearest", extent=(0, 100, map_SLE.shape[2] - 0.5, -0.5),
        )  # fmt: skip
        axis.set_title(f"{ARMS[name].title}\nlayer {layer + 1}", fontsize=8)
        axis.set_xlabel("% of training")
    axes[0][0].set_ylabel("expert")
    figure.colorbar(image, ax=axes[0], label="load / mean load", fraction=0.02)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
    return True


def write_csv(lines: Lines, path: Path) -> None:
    """Write one row per run."""
    names = [
        "family", "size", "purpose", "arm", "value", "learning_rate", "seed", "iterations",
        "tokens", "loss_own_rule", "loss_other_rule", "train_loss_last_tenth", "maxvio_mean",
        "maxvio_mean_late", "maxvio_max", "dropped", "valid_maxvio_own_rule", "kl",
        "top1_agreement", "solve_share", "ms_per_step", "seconds", "flags",
    ]  # fmt: skip
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for line in lines:
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
    """Return what the study set out to show, and whether it does."""
    found = []
    ours = core.get(OURS)
    if ours is None:
        return found
    for name, lines in core.items():
        if name == OURS:
            continue
        mean, half, count = paired(losses(ours), losses(lines))
        strict = name in ("gshard", "sinkhorn")
        passed = mean + half < 0 if strict else mean - half <= 0
        wish = "lower than" if strict else "not higher than"
        found.append(
            f"- {'PASS' if passed else 'MISSED'}: MaxScore {wish} {ARMS[name].title}: "
            f"{mean:+.4f} ± {_number(half)} ({count} seeds)"
        )
    costs = [
        li["evaluation"]["rules"]["price"]["loss"] / li["evaluation"]["rules"]["flow"]["loss"] - 1
        for li in ours
    ]
    worst = max(max(li["evaluation"]["rules"]["price"]["maxvio"]) for li in ours)
    for passed, text in (
        (max(costs) <= MOST_LOSS, f"prices cost at most {MOST_LOSS:.0%} of the loss: "
         f"{max(costs):+.2%} at most"),
        (worst <= MOST_MAXVIO, f"maxvio by prices at most {MOST_MAXVIO} in every layer: "
         f"{worst:.3f} at most"),
    ):  # fmt: skip
        found.append(f"- {'PASS' if passed else 'MISSED'}: {text}")
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
    parts = ["# Which router trains best\n", _explanation()]
    for (family, size), own in sorted(groups.items()):
        parts += _section(family, size, own, directory)
    (directory / "report.md").write_text("\n".join(parts), encoding="utf-8")
    write_csv(lines, directory / "runs.csv")
    print(f"report.md, runs.csv and pictures are in {directory}")


def _explanation() -> str:
    return (
        "Written by `python tools/study.py --report-only`; one row per run is in runs.csv. Within "
        "a family every run of a seed starts from the same weights and sees the same data in the "
        'same order. "Own rule" is what a router does outside training: MaxScore\'s prices, top-k '
        "with or without its capacity or bias. Losses are in nats per token over the whole "
        "validation set; differences are paired by seed, with 95 % confidence intervals "
        "(Student's t).\n\n\\* Training losses are not comparable where routing sees the batch. "
        "Times were taken with other runs beside.\n"
    )


def _section(family: str, size: str, lines: Lines, directory: Path) -> list[str]:
    core, other = by_arm(lines, "core"), by_arm(lines, "exploratory")
    about = lines[0]
    parts = [
        f"## {family}, {size}: {about['iterations']} steps, {about['tokens']:,} tokens\n",
        f"Text: {FAMILIES.get(family, 'the files named with --input')}.\n",
    ]
    stem = f"{family}_{size}"
    if core:
        curves(core, directory / f"{stem}_curves.png")
        parts += [main_table(core), f"![Curves]({stem}_curves.png)\n"]
        if load_maps(core, directory / f"{stem}_loads.png"):
            parts.append(f"![Expert loads in training, seed 1]({stem}_loads.png)\n")
    if OURS in core:
        rivals = {name: own for name, own in core.items() if name != OURS}
        parts += [
            "### Paired differences\n",
            paired_table(rivals, core[OURS], "MaxScore minus it"),
            "\n".join(bars(core)) + "\n",
        ]
        parts += ["### Prices against the flow, after training\n", inference_table(core)]
    if OURS in core and other:
        parts += [
            "### Variants of MaxScore\n",
            main_table(other),
            paired_table(other, core[OURS], "default minus it"),
            inference_table(other),
        ]
    if by_arm(lines, "tuning"):
        parts += ["### Tuning\n", tuning_table(lines)]
    return parts
