"""The study's statistics, bookkeeping and report, on made-up results."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys

import numpy as np
import pytest
from scipy import stats

from tools import study_report, study_results, study_runs
from tools.study import Setting, Study, minutes, tuning_left
from tools.study_arms import ABLATION, ARMS, CORE, EXPLORATORY, FIRST_RATE, SIZES, Run

SIZE = dataclasses.replace(SIZES["quick"], iterations=20)


def result(run: Run, loss: float, **changes) -> dict:
    """Return a line of results as a run would leave it."""
    rules = {"price": loss, "flow": loss * 1.001} if "maxscore" in run.flags else {"own": loss}
    two = len(rules) == 2
    line = {
        "key": run.key, "purpose": run.purpose, "family": run.family, "size": run.size.name,
        "arm": run.arm.name, "value": run.value, "learning_rate": run.learning_rate,
        "gain": run.gain, "code": "c0de",
        "seed": run.seed, "iterations": 20, "tokens": 20 * 4096, "flags": run.flags,
        "train_loss": list(np.linspace(9, loss, 20)), "curve": {5: 8.0, 10: 7.0, 20: loss},
        "maxvio_mean": 0.5, "maxvio_mean_late": 0.4, "maxvio_max": 2.0, "dropped": 0.25,
        "solve_share": 0.03 if two else None, "ms_per_step": 1000.0, "seconds": 60.0,
        "evaluation": {
            "rules": {
                rule: {"loss": value, "tokens": 1000, "loads": [[10] * 16] * 4,
                       "maxvio": [0.1, 0.2, 0.05, 0.1], "dropped": 0.0, "gate_sum": [1.0] * 4}
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
    for intervals in (1, 5):
        mean, half, count = study_results.paired(ours, theirs, intervals)
        differences = [ours[seed] - theirs[seed] for seed in range(6)]
        test = stats.ttest_1samp(differences, 0.0)
        expected = test.confidence_interval(1 - 0.05 / intervals)
        assert count == 6
        np.testing.assert_allclose([mean - half, mean + half], [expected.low, expected.high])
    half = study_results.paired(ours, theirs)[1]
    assert study_results.verdict(mean, half) == "lower"
    assert study_results.verdict(-mean, half) == "higher"
    assert study_results.verdict(0.0, half) == "no difference shown"
    assert np.isnan(study_results.paired({1: 2.0}, {1: 3.0})[1])


def tuned(study: Study, arm, losses: dict) -> list[str]:
    """Give an arm made-up tuning results until it is tuned; return the settings in order.

    Args:
        study: without results.
        arm: an arm.
        losses: what a value, a learning rate ("lr " before it) or a factor ("x") adds to the loss.
    """
    tried = []
    while left := tuning_left(study, [arm]):
        for run in left:
            loss = 4.0 + losses.get(run.value, 0.0)
            loss += losses.get("lr " + run.learning_rate, 0.0) + losses.get("x" + run.gain, 0.0)
            study.results.add(result(run, loss))
            tried.append(f"{run.value} {run.learning_rate} {run.gain}")
    return tried


@pytest.mark.parametrize("arm", [*CORE, *ABLATION], ids=lambda arm: arm.name)
def test_tuning_climbs_until_the_neighbours_are_worse(tmp_path, arm):
    size = dataclasses.replace(SIZES["small"], iterations=20)
    values = [value for value in arm.values if value not in arm.reserve]
    assert len(values) == 3 and arm.usual in values
    for place, value in enumerate(values):
        study = Study("prose", size, "d", study_runs.Results(tmp_path / f"{place}.jsonl"))
        assert [run.value for run in study.tuning_of(arm)[0]] == values
        assert study.setting(arm) is None
        better = {value: -0.5, "lr 4e-3": -0.1, "x2": -0.1, "x4": -0.3, "x8": -0.2}
        tried = tuned(study, arm, better)
        # The value beyond an end is tried; half the rate is not once twice is better.
        ladder = list(arm.values)
        at = ladder.index(value) + {0: -1, 1: 0, 2: 1}[place]
        beyond = ladder[at] if 0 <= at < len(ladder) and ladder[at] in arm.reserve else None
        first = [*values, *([beyond] if beyond else [])]
        expected = [f"{v} 2e-3 1" for v in first] + [f"{value} 4e-3 1", f"{value} 8e-3 1"]
        if arm.gate_scale:
            expected += [f"{value} 4e-3 {gain}" for gain in ("2", "4", "8")]
        assert tried[: len(expected)] == expected
        best = study.tuning_of(arm)[1]
        assert study.setting(arm) == (value, "4e-3", "4" if arm.gate_scale else "1")
        # Every neighbour of the best was tried, along each of the three.
        beside = {f"{value} 2e-3 {best.gain}", f"{value} 8e-3 {best.gain}"}
        at = ladder.index(value)
        beside |= {f"{v} 4e-3 {best.gain}" for v in ladder[max(at - 1, 0) : at + 2]}
        assert beside <= set(tried) and len(tried) == len(set(tried))
        assert {run.seed for run in study.tuning_of(arm)[0]} == {100}
    study = Study("prose", size, "d", study_runs.Results(tmp_path / "slow.jsonl"))
    slow = {arm.usual: -0.5, "lr 4e-3": 0.1, "lr 1e-3": -0.1, "x2": 0.1, "x0.5": 0.1}
    tuned(study, arm, slow)
    assert study.setting(arm) == (arm.usual, "1e-3", "1")


def test_variants_take_the_tuned_setting_of_what_they_follow(tmp_path):
    size = dataclasses.replace(SIZES["small"], iterations=20)
    study = Study("prose", size, "d", study_runs.Results(tmp_path / "results.jsonl"))
    variants = [ARMS["softmax"], ARMS["by_prices"], ARMS["dropless"]]
    with pytest.raises(ValueError, match="dropless, maxscore, no_aux not tuned yet"):
        study.comparison(variants, [1], "exploratory")
    tuned(study, ARMS["maxscore"], {"1e-2": -0.1, "lr 4e-3": -0.1, "x2": -0.1})
    tuned(study, ARMS["no_aux"], {"0.25": -0.1, "x0.5": -0.1})
    tuned(study, ARMS["dropless"], {"1": -0.1, "x2": -0.1})
    softmax, by_prices, dropless = study.comparison(variants, [1], "exploratory")
    assert "--moe-aux-loss-coeff 1e-2 " in softmax.flags and "--maxscore-variant" in softmax.flags
    assert "--lr 4e-3" in softmax.flags and "--moe-aux-loss-coeff 1 " in dropless.flags
    assert "--maxscore-temperature 0.25" in by_prices.flags and "--moe-aux" not in by_prices.flags
    for run, scale in ((softmax, 8), (by_prices, 2), (dropless, 2)):
        assert run.flags.endswith(f"--moe-router-topk-scaling-factor {scale}")
    # Long runs on a device take what the CPU's small ones were tuned to.
    long = dataclasses.replace(study, size=SIZES["long"], device="cuda")
    assert long.setting(ARMS["maxscore"]) == study.setting(ARMS["maxscore"])
    (run,) = long.comparison([ARMS["maxscore"]], [1], "core")
    assert run.device == "cuda" and "--train-iters 1200" in run.flags
    quick = dataclasses.replace(study, size=SIZES["quick"])
    assert quick.setting(ARMS["dropless"]) == Setting("1e-2", FIRST_RATE, "1")


def test_a_run_is_known_by_what_decides_its_result(tmp_path):
    run = Run("prose", SIZE, ARMS["maxscore"], "1", "2e-3", 1, "core")
    path = tmp_path / "results.jsonl"
    study_runs.Results(path).add(result(run, 4.0))
    results = study_runs.Results(path)
    assert results.of(run) is not None
    slower = dataclasses.replace(SIZE, seconds_per_step=9.0)
    assert results.of(dataclasses.replace(run, size=slower)) is not None
    for change in (
        dict(seed=2), dict(family="code"), dict(learning_rate="1e-3"), dict(value="1e-1"),
        dict(arm=ARMS["gshard"], value="1e-2"), dict(arm=ARMS["softmax"]), dict(data="other"),
        dict(gain="2"), dict(device="cuda"),
        dict(size=dataclasses.replace(SIZE, iterations=21)),
    ):  # fmt: skip
        assert results.of(dataclasses.replace(run, **change)) is None, change
    assert minutes([run], results, jobs=2) == 0
    assert minutes([dataclasses.replace(run, seed=2)], results, jobs=2) > 0


def test_results_of_several_processes_and_of_others(tmp_path):
    run = Run("prose", SIZE, ARMS["maxscore"], "1", "2e-3", 1, "core")
    path = tmp_path / "made" / "results.jsonl"
    one, other = study_runs.Results(path), study_runs.Results(path)
    one.add(result(run, 4.0))
    other.add(result(dataclasses.replace(run, seed=2), 4.1))
    assert len(study_runs.Results(path).lines) == 2 == len(other.lines)
    path.write_text(path.read_text() + '{"key": "abc"}\n')
    with pytest.raises(ValueError, match="line 3, is no result of this study"):
        study_runs.Results(path)


def test_every_arm_has_its_own_flags():
    flags = {}
    for arm in (*CORE, *ABLATION, *EXPLORATORY):
        for value in arm.values:
            run = Run("code", SIZES["small"], arm, value, "2e-3", 1, "core")
            # What is given last counts.
            words, given = run.flags.split(), {}
            for place, word in enumerate(words):
                if word.startswith("--"):
                    given[word] = words[place + 1 : place + 2]
            key = (str(sorted(given.items())), arm.script, arm.ranks)
            if flags.setdefault(key, arm.name) != arm.name:
                raise AssertionError((arm.name, flags[key]))
            assert "ITERATIONS" not in run.flags


def made_up(tmp_path):
    """Return results of all core arms and others, five seeds, and one tuning run."""
    generator = np.random.default_rng(1)
    lines = []
    variants = [(arm, "exploratory") for arm in (CORE[0], ARMS["softmax"], ARMS["sequence"])]
    variants += [(arm, "ablation") for arm in ABLATION]
    for place, (arm, purpose) in enumerate([*((arm, "core") for arm in CORE), *variants]):
        for seed in range(1, 6):
            run = Run("prose", SIZE, arm, arm.usual, "2e-3", seed, purpose)
            base = 4.0 + 0.03 * place + 0.1 * seed
            lines.append(result(run, base + generator.normal(0, 0.005)))
    run = Run("prose", SIZE, ARMS["gshard"], "1e-2", "2e-3", 100, "tuning")
    return [*lines, result(run, 4.5)]


def test_report_says_what_the_results_say(tmp_path):
    lines = made_up(tmp_path)
    study_report.write(lines, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert text.count("PASS") == 8 and "MISSED" not in text
    gshard = [
        study_results.own_loss(li) for li in lines if li["arm"] == "gshard" and li["seed"] < 9
    ]
    assert f"{np.mean(gshard):.4f} ± {stats.sem(gshard):.4f}" in text
    assert text.index("Tuning") > text.index("Variants")
    assert "| softmax variant | MaxScore | 5 |" in text
    ours, plain = (
        {li["seed"]: study_results.own_loss(li) for li in lines
         if (li["arm"], li["purpose"]) == which}
        for which in (("maxscore", "core"), ("flow_plain_gates", "ablation"))
    )  # fmt: skip
    gates = np.mean([ours[seed] - plain[seed] for seed in range(1, 6)])
    assert f"MaxScore - flow, top-k's softmax gates | 5 | {gates:+.4f}" in text
    with (tmp_path / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(lines) and float(rows[0]["loss_own_rule"]) == pytest.approx(
        study_results.own_loss(lines[0])
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
    bars = study_report.bars(study_results.by_arm(lines, "core"))
    missed = [bar for bar in bars if bar.startswith("- MISSED")]
    assert len(missed) == 3 and "best of the others, top-k, expert bias" in missed[0]
    assert "4 of 5" in missed[1] and "maxvio" in missed[2]
    few = [line for line in lines if line["seed"] < 5]
    assert "not judged" in study_report.bars(study_results.by_arm(few, "core"))[0]


def test_only_the_last_text_of_a_family_is_reported(tmp_path):
    lines = made_up(tmp_path)
    older = Run("prose", SIZE, ARMS["bias"], "1e-3", "2e-3", 7, "core", data="older")
    study_report.write([result(older, 1.0) | {"data": "older"}, *lines], tmp_path)
    text = (tmp_path / "report.md").read_text()
    study_report.write(lines, tmp_path)
    assert text == (tmp_path / "report.md").read_text()


def test_results_at_another_setting_and_diverged_runs_do_not_count(tmp_path):
    lines = made_up(tmp_path)
    older = Run("prose", SIZE, ARMS["bias"], "1e-2", "4e-3", 1, "core")
    lost = Run("prose", SIZE, ARMS["quantile"], "0.5", "4e-3", 100, "tuning")
    lines.insert(0, result(older, 9.0))
    lines.append(
        {"key": lost.key, "purpose": "tuning", "family": "prose", "size": "quick", "seed": 100,
         "arm": "quantile", "value": "0.5", "learning_rate": "4e-3", "iterations": 20, "tokens": 1,
         "code": "c0de",
         "flags": lost.flags, "diverged": "loss is NaN",
         "evaluation": {"rules": {"own": {"loss": float("inf")}}, "comparison": {}}}
    )  # fmt: skip
    assert [line["seed"] for line in study_results.by_arm(lines, "core")["bias"]] == [1, 2, 3, 4, 5]
    study_report.write(lines, tmp_path)
    assert (
        "Diverged, and not in the tables: quantile lr 4e-3" in (tmp_path / "report.md").read_text()
    )


@pytest.mark.parametrize(
    ("words", "diverged"),
    [
        ("ValueError: Unexpected result nan (message='found NaN in local forward loss')", True),
        ("error: router scores were NaN or infinite in iteration 7", True),
        ("RuntimeError: out of memory", False),
    ],
)
def test_only_a_run_that_diverged_counts_as_such(tmp_path, monkeypatch, words, diverged):
    run = Run("code", SIZE, ARMS["gshard"], "1e-2", "2e-3", 1, "core")
    # Every step's line has a nan in it.
    text = f"iteration 6/ 20 | lm loss: 5.0 | number of nan iterations: 0 |\n{words}"

    # Torchrun says a lot more, after a rank has failed.
    said = tmp_path / "said"
    said.write_text(text + 40 * "\nerror: a rank has failed" + "\n")
    command = [sys.executable, "-c", f"print(open({str(said)!r}).read()); raise SystemExit(1)"]
    monkeypatch.setattr(study_runs, "training_command", lambda *_: command)
    arguments = (run, tmp_path, tmp_path, study_runs.Processes(), lambda *step: None)
    if diverged:
        assert words in study_runs.carry_out(*arguments)["diverged"]
    else:
        with pytest.raises(study_runs.RunError, match="a rank has failed"):
            study_runs.carry_out(*arguments)


def test_what_other_sources_began_is_begun_anew(tmp_path, monkeypatch):
    run = Run("code", SIZE, ARMS["gshard"], "1e-2", "2e-3", 1, "core")
    command = [sys.executable, "-c", "raise SystemExit(1)"]
    monkeypatch.setattr(study_runs, "training_command", lambda *_: command)
    left = tmp_path / run.key / "checkpoint"
    left.parent.mkdir()
    for code, kept in (
        (None, False),
        ("of others", False),
        (study_runs.code_digest(run.arm.script), True),
    ):
        left.write_text("a model")
        if code is not None:
            (left.parent / "code").write_text(code)
        with pytest.raises(study_runs.RunError, match="exit status 1"):
            study_runs.carry_out(run, tmp_path, tmp_path, study_runs.Processes(), print)
        assert left.exists() == kept


def test_of_drops_the_lower_loss_is_compared():
    run = Run("prose", SIZE, ARMS["gshard"], "1e-2", "2e-3", 1, "core")
    line = result(run, 4.0)
    line["evaluation"]["rules"]["no drops"] = {"loss": 3.9}
    assert study_results.compared_loss(line) == 3.9 and study_results.own_loss(line) == 4.0
    line = result(Run("prose", SIZE, ARMS["maxscore"], "1", "2e-3", 1, "core"), 4.0)
    line["evaluation"]["rules"]["flow"]["loss"] = 3.0
    assert study_results.compared_loss(line) == 4.0, "MaxScore by prices"


def test_summary_keeps_the_last_of_steps_that_a_resumed_run_repeats(tmp_path):
    run = Run("code", SIZE, ARMS["gshard"], "1e-2", "2e-3", 1, "core")
    log, lines = [], []
    for iteration in [*range(1, 13), *range(9, 21)]:
        loss = 5.0 + iteration + (100 if iteration < 13 and len(lines) < 12 else 0)
        log.append(
            f" [2026-01-01] iteration {iteration:8}/      20 | consumed samples: 1 | elapsed time "
            f"per iteration (ms): 10.0 | lm loss: {loss:.6E} | grad norm: 1.0"
        )
        if iteration % 10 == 0:
            log.append(
                f" validation loss at iteration {iteration} | lm loss value: 6.5E+00 | lm PPL"
            )
        lines.append(
            {"iteration": iteration, "loads": [[4] * 16] * 4, "dropped": [0] * 4,
             "maxvio": [0.5] * 4, "largest_gap": 0.0, "solves": 0, "solve_seconds": 0.0,
             "step_seconds": 1.0}
        )  # fmt: skip
    log.append(
        " validation loss at iteration 20 on validation set | lm loss value: 9.9E+00 | lm PPL"
    )
    (tmp_path / "log").write_text("\n".join(log))
    (tmp_path / "stats.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "evaluation.json").write_text("{}")
    line = study_runs.summary(run, tmp_path, 5.0)
    expected = [105.0 + i if i < 9 else 5.0 + i for i in range(1, 21)]
    assert line["train_loss"] == expected and line["solve_share"] is None
    assert line["curve"] == {10: 6.5, 20: 6.5}
    (tmp_path / "log").write_text("\n".join(log[:-3]))
    with pytest.raises(study_runs.RunError, match="lacks steps"):
        study_runs.summary(run, tmp_path, 5.0)
