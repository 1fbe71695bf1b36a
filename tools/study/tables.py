"""The tables of the study's report, in Markdown."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import numpy as np

from .arms import ARMS
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

# The arm that is compared with the others.
OURS = "maxscore"
# Ends of the spans of training steps for which the dropped share is given.
DROP_STEPS = (5, 20, 50, 100, 200)
# What a router's loss may be higher by and still count as not worse, nats per token: half a percent
# of the first study's mean loss of dropless top-k, 3.864.
MARGIN = 0.019


def markdown(headings: list[str], rows: list[list[str]]) -> str:
    """Return a table."""
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def number(value: float | None, form: str = ".4f") -> str:
    """Return a number, "-" for one that is not there."""
    return "-" if value is None or math.isnan(value) else format(value, form)


def interval(result: Comparison) -> str:
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
                f"{np.mean(own):.4f} ± {number(standard_error(own))}",
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
    return markdown(headings, rows)


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
                f"{mean:+.4f} ± {number(half)}",
                f"± {number(together)}",
                verdict(mean, half),
            ]
        )
    headings = [
        "router", "seeds", "MaxScore minus it", "all intervals together", "MaxScore's loss is",
    ]  # fmt: skip
    return markdown(headings, rows)


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
        [text, str(effects[key][2]), f"{effects[key][0]:+.4f} ± {number(effects[key][1])}",
         verdict(*effects[key][:2])]
        for key, text in (
            ("first", "the flow in place of top-k and its aux loss"),
            ("second", "SoftTopk gates in place of softmax gates"),
            ("interaction", "the flow's effect with SoftTopk gates, minus that with softmax gates"),
        )
    ]  # fmt: skip
    return markdown(["effect on the loss", "seeds", "nats per token", "loss is"], rows)


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
                    interval(result),
                    "shown" if result.is_not_worse else "not shown",
                ]
            )
    title = ARMS[reference].title
    headings = ["router", "seeds", f"loss minus that of {title}", f"not worse by {MARGIN} nats"]
    return markdown(headings, rows)


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
    return markdown(headings, rows)


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
    return markdown(["router that drops", "seeds", *headings], rows)


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
    return markdown(headings, rows)


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
    return markdown(headings, rows)
