"""What the study's lines of results say: losses, paired differences, which belong together."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy import stats

from tools.study_arms import ABLATION, CORE, EXPLORATORY

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
    for arm in (*CORE, *ABLATION, *EXPLORATORY):
        own = [
            li
            for li in lines
            if li["arm"] == arm.name and li["purpose"] == purpose and "diverged" not in li
        ]
        if own and purpose != "tuning":
            last = _setting(own[-1])
            own = [line for line in own if _setting(line) == last]
        if own:
            found[arm.name] = sorted(own, key=lambda line: line["seed"])
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
