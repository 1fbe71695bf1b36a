"""What the study's lines of results say: losses, paired differences, which belong together."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from .arms import ARMS

Lines = list[dict[str, Any]]


def own_rule(line: dict[str, Any]) -> dict[str, Any]:
    """Return the evaluation by the router's own rule, which MaxScore's prices are."""
    return next(iter(line["evaluation"]["rules"].values()))


def own_loss(line: dict[str, Any]) -> float:
    """Return the validation loss by the router's own rule."""
    return own_rule(line)["loss"]


def compared_loss(line: dict[str, Any]) -> float:
    """Return the loss that is compared: a baseline's lower one, of MaxScore that by prices."""
    rules = line["evaluation"]["rules"]
    if "price" in rules:
        return rules["price"]["loss"]
    return min(rule["loss"] for rule in rules.values())


def standard_error(values: Iterable[float]) -> float:
    """Return the standard error of a mean, NaN for a single value."""
    values = list(values)
    if len(values) < 2:
        return math.nan
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def paired(
    ours: dict[int, float], theirs: dict[int, float], intervals: int = 1
) -> tuple[float, float, int]:
    """Return mean, half width of the 95 % confidence interval and number of paired differences.

    Args:
        ours: value per seed.
        theirs: value per seed; only common seeds count.
        intervals: how many hold together with 95 % confidence (Bonferroni).
    """
    seeds = sorted(ours.keys() & theirs.keys())
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    if not differences:
        return math.nan, math.nan, 0
    mean = float(np.mean(differences))
    if len(differences) < 2:
        return mean, math.nan, 1
    quantile = float(stats.t.ppf(1 - 0.025 / intervals, len(differences) - 1))
    return mean, quantile * standard_error(differences), len(differences)


class Comparison(NamedTuple):
    """What paired differences say of a margin; ours minus theirs, in nats per token.

    Attributes:
        mean: of the differences.
        low: lower end of the 95 % confidence interval.
        high: its upper end.
        seeds: how many.
        is_not_worse: whether the whole interval is below the margin.
        is_better: whether it is below 0.
        is_equivalent: whether two one-sided tests of 5 % each put the difference within the margin
            on either side, that is the 90 % interval.
    """

    mean: float
    low: float
    high: float
    seeds: int
    is_not_worse: bool
    is_better: bool
    is_equivalent: bool


def compare(ours: dict[int, float], theirs: dict[int, float], margin: float) -> Comparison:
    """Return what the common seeds say; nothing is shown by fewer than two.

    Args:
        ours: loss per seed.
        theirs: loss per seed.
        margin: nats per token, positive.
    """
    mean, half, count = paired(ours, theirs)
    if count < 2:
        return Comparison(mean, math.nan, math.nan, count, False, False, False)
    quantiles = stats.t.ppf([0.975, 0.95], count - 1)
    narrow = half * quantiles[1] / quantiles[0]
    low, high = mean - half, mean + half
    equivalent = -margin < mean - narrow and mean + narrow < margin
    return Comparison(mean, low, high, count, high < margin, high < 0, bool(equivalent))


def factorial(arms: dict[str, dict[int, float]]) -> dict[str, tuple[float, float, int]]:
    """Return the main effects and the interaction of two factors with two levels each.

    Args:
        arms: loss per seed of "both", "first", "second", "neither".

    Returns:
        For "first", "second" and "interaction": mean, half width of the 95 % confidence interval
        and seeds. A main effect is the mean over the other factor's levels; the interaction is what
        the first factor does with the second minus what it does without.
    """
    seeds = set.intersection(*(set(losses) for losses in arms.values()))
    both, first, second, neither = (
        {seed: arms[name][seed] for seed in seeds}
        for name in ("both", "first", "second", "neither")
    )
    with_second = {seed: both[seed] - second[seed] for seed in seeds}
    without_second = {seed: first[seed] - neither[seed] for seed in seeds}
    zero = dict.fromkeys(seeds, 0.0)
    return {
        "first": paired({s: (with_second[s] + without_second[s]) / 2 for s in seeds}, zero),
        "second": paired(
            {s: (both[s] - first[s] + second[s] - neither[s]) / 2 for s in seeds}, zero
        ),
        "interaction": paired(with_second, without_second),
    }


def verdict(mean: float, half: float) -> str:
    """Say in a word what a paired interval shows."""
    if math.isnan(half):
        return "one seed only"
    if mean + half < 0:
        return "lower"
    if mean - half > 0:
        return "higher"
    return "no difference shown"


def by_arm(lines: Lines, purpose: str) -> dict[str, Lines]:
    """Return the results of a purpose per arm, in the arms' order, by seed.

    Of an arm's results at several settings those at the last one count; of tuning all do. Runs
    that diverged are left out.
    """
    found: dict[str, Lines] = {}
    for name in ARMS:
        of_arm = [li for li in lines if li["arm"] == name and "diverged" not in li]
        own = [line for line in of_arm if line["purpose"] == purpose]
        if own and purpose != "tuning":
            last = _setting(own[-1])
            own = [line for line in own if _setting(line) == last]
        if own:
            found[name] = sorted(own, key=lambda line: line["seed"])
    return found


def _setting(line: dict[str, Any]) -> tuple[str, str, str]:
    """Return what must be equal for results of several seeds to be of one thing."""
    flags = line["flags"].replace(f"--seed {line['seed']} ", "")
    return line.get("data", ""), line.get("device", "cpu"), flags


def losses(lines: Lines) -> dict[int, float]:
    """Return the compared validation loss per seed."""
    return {line["seed"]: compared_loss(line) for line in lines}


def decoding_difference(decoding: dict[str, float], kind: str) -> float:
    """Return by how much the loss token by token differs from that in one pass."""
    return abs(decoding["loss_one_pass" + kind] - decoding["loss_token_by_token" + kind])
