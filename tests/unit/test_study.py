"""The study's statistics, bookkeeping and report, on made-up results."""

from __future__ import annotations

import csv
import dataclasses
import json

import numpy as np
import pytest
from scipy import stats

from tools import study, study_report, study_runs
from tools.study_arms import ARMS, CORE, EXPLORATORY, LEARNING_RATES, SIZES, Run

SIZE = dataclasses.replace(SIZES["quick"], iterations=20)


def result(run: Run, loss: float, **changes) -> dict:
    """Return a line of results as a run would leave it."""
    rules = {"price": loss, "flow": loss * 1.001} if "maxscore" in run.flags else {"own": loss}
    two = len(rules) == 2
    line = {
        "key": run.key, "purpose": run.purpose, "family": run.family, "size": run.size.name,
        "arm": run.arm.name, "value": run.value, "learning_rate": run.learning_rate,
        "seed": run.seed, "iterations": 20, "tokens": 20 * 4096, "flags": run.flags,
        "train_loss": list(np.linspace(9, loss, 20)), "curve": {5: 8.0, 10: 7.0, 20: loss},
        "maxvio_mean": 0.5, "maxvio_mean_late": 0.4, "maxvio_max": 2.0, "dropped": 0.25,
        "solve_share": 0.03 if two else None, "ms_per_step": 1000.0, "seconds": 60.0,
        "evaluation": {
            "rules": {
                rule: {"loss": value, "tokens": 1000, "loads": [[10] * 16] * 4,
                       "maxvio": [0.1, 0.2, 0.05, 0.1], "dropped": 0.0}
                for rule, value in rules.items()
            },
            "comparison": {"rules": list(rules), "kl": 0.01, "top1_agreement": 0.9} if two else {},
            "decoding": {
                "sequences": 4, "loss_one_pass": loss, "loss_token_by_token": loss + 1e-7,
                "loss_one_pass_float64": loss, "loss_token_by_token_float64": loss,
                "largest_difference": 1e-6, "largest_difference_float64": 1e-15,
            },
        },
    }  # fmt: skip
    if run.seed == 1:
        line["load_map"] = np.ones((30, 4, 16)).tolist()
    return line | changes


def test_paired_interval_is_students():
    generator = np.random.default_rng(0)
    ours = {seed: 4.0 + generator.normal(0, 0.1) for seed in range(6)}
    theirs = {seed: value + 0.05 + generator.normal(0, 0.02) for seed, value in ours.items()}
    theirs[99] = 1.0  # a seed that only one side has does not count
    mean, half, count = study_report.paired(ours, theirs)
    differences = [ours[seed] - theirs[seed] for seed in range(6)]
    expected = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
    assert count == 6
    np.testing.assert_allclose([mean - half, mean + half], [expected.low, expected.high])
    assert study_report.verdict(mean, half) == "lower"
    assert study_report.verdict(-mean, half) == "higher"
    assert study_report.verdict(0.0, half) == "no difference shown"
    assert np.isnan(study_report.paired({1: 2.0}, {1: 3.0})[1])


def test_tuning_gives_every_core_arm_as_many_runs_and_takes_the_best(tmp_path):
    counts = set()
    for arm in CORE:
        results = study_runs.Results(tmp_path / f"{arm.name}.jsonl")
        first, best = study.tuning_of(arm, "prose", SIZE, results)
        assert best is None and study.settings(arm, "prose", SIZE, results) is not None
        lost = dict(zip(arm.values, (4.2, 4.0, 4.1), strict=True))
        for run in first:
            results.add(result(run, lost[run.value]))
        both, best = study.tuning_of(arm, "prose", SIZE, results)
        assert best is None and {run.learning_rate for run in both} == set(LEARNING_RATES)
        value = list(arm.values)[1]
        for run in both[len(first) :]:
            assert run.value == value, "other learning rates are tried for the best value"
            results.add(result(run, 3.9 if run.learning_rate == "4e-3" else 5.0))
        both, best = study.tuning_of(arm, "prose", SIZE, results)
        assert (best.value, best.learning_rate) == (value, "4e-3")
        counts.add(len(both))
    assert len(counts) == 1, "the same budget for every arm"


def test_exploratory_arms_take_the_default_and_the_tuned_learning_rate(tmp_path):
    size = dataclasses.replace(SIZES["small"], iterations=20)
    results = study_runs.Results(tmp_path / "results.jsonl")
    arm = next(arm for arm in EXPLORATORY if arm.name == "softmax")
    assert study.settings(arm, "prose", size, results) is None
    for _ in range(2):
        for run in study.tuning_of(ARMS["maxscore"], "prose", size, results)[0]:
            if results.of(run) is None:
                good = run.value == "0.5" and run.learning_rate == "1e-3"
                results.add(result(run, 3.0 if good else 4.0 - 0.1 * (run.value == "0.5")))
    assert study.settings(arm, "prose", size, results) == ("", "1e-3")
    assert study.settings(ARMS["maxscore"], "prose", size, results) == ("0.5", "1e-3")


def test_a_run_is_known_by_what_decides_its_result(tmp_path):
    run = Run("prose", SIZE, ARMS["maxscore"], "1.0", "2e-3", 1, "core")
    path = tmp_path / "results.jsonl"
    study_runs.Results(path).add(result(run, 4.0))
    results = study_runs.Results(path)
    assert results.of(run) is not None
    slower = dataclasses.replace(SIZE, seconds_per_step=9.0)
    assert results.of(dataclasses.replace(run, size=slower)) is not None
    for change in (
        dict(seed=2), dict(family="code"), dict(learning_rate="1e-3"), dict(value="0.5"),
        dict(arm=ARMS["gshard"], value="1e-2"), dict(arm=ARMS["softmax"], value=""),
        dict(size=dataclasses.replace(SIZE, iterations=21)),
    ):  # fmt: skip
        assert results.of(dataclasses.replace(run, **change)) is None, change
    assert study.minutes([run], results, jobs=2) == 0
    assert study.minutes([dataclasses.replace(run, seed=2)], results, jobs=2) > 0


def test_every_arm_has_its_own_flags():
    flags = {}
    for arm in (*CORE, *EXPLORATORY):
        for value in arm.values:
            run = Run("code", SIZES["small"], arm, value, "2e-3", 1, "core")
            key = (run.flags, arm.script, arm.ranks)
            assert key not in flags, (arm.name, flags[key])
            flags[key] = arm.name
            assert "ITERATIONS" not in run.flags


def made_up(tmp_path):
    """Return results of all core arms and two others, five seeds, and one tuning run."""
    generator = np.random.default_rng(1)
    lines = []
    for place, arm in enumerate((*CORE, ARMS["softmax"], ARMS["sequence"])):
        purpose = "core" if arm in CORE else "exploratory"
        for seed in range(1, 6):
            run = Run("prose", SIZE, arm, next(iter(arm.values)), "2e-3", seed, purpose)
            base = 4.0 + 0.03 * place + 0.1 * seed
            lines.append(result(run, base + generator.normal(0, 0.005)))
    run = Run("prose", SIZE, ARMS["gshard"], "1e-2", "2e-3", 100, "tuning")
    return [*lines, result(run, 4.5)]


def test_report_says_what_the_results_say(tmp_path):
    lines = made_up(tmp_path)
    study_report.write(lines, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert text.count("PASS") == 7 and "MISSED" not in text
    gshard = [study_report.own_loss(li) for li in lines if li["arm"] == "gshard" and li["seed"] < 9]
    assert f"{np.mean(gshard):.4f} ± {stats.sem(gshard):.4f}" in text
    assert text.index("Tuning") > text.index("Variants of MaxScore")
    with (tmp_path / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(lines) and float(rows[0]["loss_own_rule"]) == pytest.approx(
        study_report.own_loss(lines[0])
    )
    for name in ("prose_quick_curves.png", "prose_quick_loads.png"):
        assert (tmp_path / name).stat().st_size > 10_000
        assert f"({name})" in text


def test_report_says_so_where_a_baseline_is_better(tmp_path):
    lines = made_up(tmp_path)
    for line in lines:
        if line["arm"] == "bias":
            line["evaluation"]["rules"]["own"]["loss"] -= 0.5
        if line["arm"] == "maxscore":
            line["evaluation"]["rules"]["price"]["maxvio"][2] = 0.4
    core = study_report.by_arm(lines, "core")
    bars = study_report.bars(core)
    missed = [bar for bar in bars if bar.startswith("- MISSED")]
    assert len(missed) == 2 and "expert bias" in missed[0] and "maxvio" in missed[1]


def test_summary_keeps_the_last_of_steps_that_a_resumed_run_repeats(tmp_path):
    run = Run("code", SIZE, ARMS["gshard"], "1e-2", "2e-3", 1, "core")
    log, lines = [], []
    for iteration in [*range(1, 13), *range(9, 21)]:
        loss = 5.0 + iteration + (100 if iteration < 13 and len(log) < 12 else 0)
        log.append(
            f" [2026-01-01] iteration {iteration:8}/      20 | consumed samples: 1 | elapsed time "
            f"per iteration (ms): 10.0 | lm loss: {loss:.6E} | grad norm: 1.0"
        )
        lines.append(
            {"iteration": iteration, "loads": [[4] * 16] * 4, "dropped": [0] * 4,
             "maxvio": [0.5] * 4, "largest_gap": 0.0, "solves": 0, "solve_seconds": 0.0,
             "step_seconds": 1.0}
        )  # fmt: skip
    (tmp_path / "log").write_text("\n".join(log))
    (tmp_path / "stats.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "evaluation.json").write_text("{}")
    line = study_runs.summary(run, tmp_path, 5.0)
    expected = [105.0 + i if i < 9 else 5.0 + i for i in range(1, 21)]
    assert line["train_loss"] == expected and line["solve_share"] is None
    (tmp_path / "log").write_text("\n".join(log[:-1]))
    with pytest.raises(study_runs.RunError, match="lacks steps"):
        study_runs.summary(run, tmp_path, 5.0)
