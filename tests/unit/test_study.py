"""The study's statistics, bookkeeping and report, on made-up results."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys

import numpy as np
import pytest
from scipy import stats

from tools.study import report as study_report
from tools.study import results as study_results
from tools.study import runs as study_runs
from tools.study.__main__ import Study, minutes, tuning_left
from tools.study.arms import ARMS, CORE, FACTORIAL, SERVABLE, SIZES, START, Run, Setting

SIZE = dataclasses.replace(SIZES["quick"], iterations=20)


def result(run: Run, loss: float, **changes) -> dict:
    """Return a line of results as a run would leave it."""
    rules = {"price": loss, "flow": loss * 1.001} if "maxscore" in run.flags else {"own": loss}
    two = len(rules) == 2
    line = {
        "key": run.key, "purpose": run.purpose, "family": run.family, "size": run.size.name,
        "arm": run.arm.name, "learning_rate": run.setting.learning_rate,
        "factor": run.setting.factor, "code": "c0de", "revision": "1a2b",
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
    if run.seed == study_runs.LOAD_MAP_SEED:
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


def tuned(study: Study, arm, losses: dict) -> list[Setting]:
    """Give an arm made-up tuning results until it is tuned; return the settings in order.

    Args:
        study: without results.
        arm: an arm.
        losses: what a learning rate or a factor ("x" before it) adds to the loss.
    """
    tried = []
    while left := tuning_left(study, [arm]):
        for run in left:
            rate, factor = run.setting
            loss = 4.0 + losses.get(rate, 0.0) + losses.get("x" + factor, 0.0)
            study.results.add(result(run, loss))
            tried.append(run.setting)
    return tried


def test_tuning_climbs_until_the_neighbours_are_worse(tmp_path):
    size = dataclasses.replace(SIZES["small"], iterations=20)
    arm = ARMS["maxscore"]
    study = Study("prose", size, "d", study_runs.Results(tmp_path / "results.jsonl"))
    assert [run.setting for run in study.tuning_of(arm)[0]] == [START] == [("2e-3", "4")]
    assert study.setting(arm) is None
    tried = tuned(study, arm, {"4e-3": -0.2, "2e-3": -0.1, "x1": -0.3, "x2": -0.2, "x4": -0.1})
    # Half the rate is not tried once twice is better, nor the factor 8 once 2 is.
    assert tried == [
        ("2e-3", "4"), ("4e-3", "4"), ("8e-3", "4"), ("4e-3", "8"), ("4e-3", "2"), ("4e-3", "1"),
        ("4e-3", "0.5"), ("8e-3", "1"), ("2e-3", "1"),
    ]  # fmt: skip
    assert study.setting(arm) == ("4e-3", "1")
    assert {run.seed for run in study.tuning_of(arm)[0]} == {100}
    study = Study("prose", size, "d", study_runs.Results(tmp_path / "slow.jsonl"))
    tried = tuned(study, arm, {"2e-3": -0.1, "1e-3": -0.2, "x4": -0.1})
    assert study.setting(arm) == ("1e-3", "4")
    # Both ends of the ladder were reached or have a worse neighbour.
    assert tried == [
        ("2e-3", "4"), ("4e-3", "4"), ("1e-3", "4"), ("1e-3", "8"), ("1e-3", "2"),
    ]  # fmt: skip


def test_settings_are_tuned_given_or_of_another_arm(tmp_path):
    size = dataclasses.replace(SIZES["small"], iterations=20)
    study = Study("prose", size, "d", study_runs.Results(tmp_path / "results.jsonl"))
    arms = [ARMS["aux"], ARMS["servable_sigmoid"], ARMS["gshard"]]
    with pytest.raises(ValueError, match="maxscore, servable_sigmoid not tuned yet"):
        study.comparison(arms, [21], "core")
    tuned(study, ARMS["maxscore"], {"4e-3": -0.1, "x1": -0.2, "x2": -0.1})
    tuned(study, ARMS["servable_sigmoid"], {"2e-3": -0.1, "x4": -0.1})
    aux, sigmoid, gshard = study.comparison(arms, [21], "core")
    assert "--lr 4e-3" in aux.flags and "--moe-router-topk-scaling-factor" not in aux.flags
    assert "--moe-aux-loss-coeff 1e-1" in aux.flags
    assert sigmoid.flags.endswith("--moe-router-topk-scaling-factor 4")
    assert "--lr 2e-3" in gshard.flags and gshard.flags.endswith("-factor 2")
    on_device = dataclasses.replace(study, device="cuda")
    assert on_device.setting(ARMS["maxscore"]) == study.setting(ARMS["maxscore"])
    (run,) = on_device.comparison([ARMS["maxscore"]], [21], "core")
    assert run.device == "cuda"
    quick = dataclasses.replace(study, size=SIZES["quick"])
    # No factor, where the served model has no place for one.
    tried = tuned(study, ARMS["servable_softmax"], {"4e-3": -0.1})
    assert tried == [(rate, "1") for rate in ("2e-3", "4e-3", "8e-3")]
    assert quick.setting(ARMS["servable_softmax"]) == ("2e-3", "1")


def test_other_sizes_and_texts_take_the_best_setting_on_record(tmp_path):
    size = dataclasses.replace(SIZES["small"], iterations=20)
    study = Study("prose", size, "d", study_runs.Results(tmp_path / "results.jsonl"))
    long = dataclasses.replace(study, family="prose_large", size=SIZES["long"], data="e")
    with pytest.raises(ValueError, match="maxscore not tuned yet"):
        long.comparison([ARMS["maxscore"]], [21], "core")
    tuned(study, ARMS["maxscore"], {"4e-3": -0.1, "x1": -0.2, "x2": -0.1})
    (run,) = long.comparison([ARMS["maxscore"]], [31], "prices")
    assert run.setting == ("4e-3", "1") == study.setting(ARMS["maxscore"])
    assert run.milestones == (20, 50, 100, 300) and "--train-iters 1200" in run.flags
    fine = dataclasses.replace(study, size=SIZES["fine"])
    (run,) = fine.comparison([ARMS["maxscore"]], [21], "core")
    assert "--num-experts 64 --moe-router-topk 6" in run.flags and "--lr 4e-3" in run.flags
    # Tuning that is under way on this text is waited for.
    other = dataclasses.replace(study, data="another digest")
    assert other.setting(ARMS["maxscore"]) is None


def test_maxscores_arm_is_the_flag_and_nothing_else():
    assert ARMS["maxscore"].flags == "--moe-router-type maxscore"
    assert ARMS["one_flag"].flags == f"{ARMS['dropless'].flags} --moe-router-type maxscore"
    assert ARMS["one_flag"].setting == ARMS["dropless"].setting


def test_comparison_is_that_of_scipys_tests():
    generator = np.random.default_rng(3)
    for mean, spread in ((-0.02, 0.02), (0.0, 0.02), (0.0, 0.005), (0.03, 0.01)):
        theirs = {seed: 4.0 + generator.normal(0, 0.1) for seed in range(10)}
        ours = {seed: x + generator.normal(mean, spread) for seed, x in theirs.items()}
        differences = np.array([ours[seed] - theirs[seed] for seed in range(10)])
        found = study_results.compare(ours, theirs, 0.019)

        def p_value(against: float, side: str, differences=differences) -> float:
            return stats.ttest_1samp(differences, against, alternative=side).pvalue

        assert found.is_not_worse == (p_value(0.019, "less") < 0.025)
        assert found.is_better == (p_value(0.0, "less") < 0.025)
        both = max(p_value(0.019, "less"), p_value(-0.019, "greater"))
        assert found.is_equivalent == (both < 0.05)
    lone = study_results.compare({1: 1.0}, {1: 2.0}, 0.019)
    assert lone.seeds == 1 and not (lone.is_better or lone.is_not_worse or lone.is_equivalent)


def test_main_effects_and_interaction_are_least_squares():
    generator = np.random.default_rng(4)
    names = ("both", "first", "second", "neither")
    arms = {name: {s: generator.normal(4, 0.1) for s in range(8)} for name in names}
    found = study_results.factorial(arms)
    levels = {"both": (1, 1), "first": (1, 0), "second": (0, 1), "neither": (0, 0)}
    design = np.array([[1, a, b, a * b] for a, b in levels.values()], dtype=float)
    per_seed = [np.linalg.solve(design, [arms[name][s] for name in names]) for s in range(8)]
    fitted = np.array(per_seed)
    expected = {
        "first": fitted[:, 1] + fitted[:, 3] / 2,
        "second": fitted[:, 2] + fitted[:, 3] / 2,
        "interaction": fitted[:, 3],
    }
    for name, values in expected.items():
        mean, half, count = found[name]
        interval = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
        np.testing.assert_allclose([mean - half, mean + half], [interval.low, interval.high])
        assert count == 8


def test_a_run_is_known_by_what_decides_its_result(tmp_path):
    run = Run("prose", SIZE, ARMS["maxscore"], START, 1, "core")
    path = tmp_path / "results.jsonl"
    study_runs.Results(path).add(result(run, 4.0))
    results = study_runs.Results(path)
    assert results.of(run) is not None
    slower = dataclasses.replace(SIZE, seconds_per_step=9.0)
    assert results.of(dataclasses.replace(run, size=slower)) is not None
    for change in (
        dict(seed=2), dict(family="code"), dict(setting=Setting("1e-3", "4")),
        dict(arm=ARMS["gshard"]), dict(arm=ARMS["one_flag"]), dict(data="other"),
        dict(setting=Setting("2e-3", "2")), dict(device="cuda"),
        dict(size=dataclasses.replace(SIZE, iterations=21)),
    ):  # fmt: skip
        assert results.of(dataclasses.replace(run, **change)) is None, change
    assert minutes([run], results, jobs=2) == 0
    assert minutes([dataclasses.replace(run, seed=2)], results, jobs=2) > 0


def test_results_of_several_processes_and_of_others(tmp_path):
    run = Run("prose", SIZE, ARMS["maxscore"], START, 1, "core")
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
    for arm in ARMS.values():
        words, given = Run("code", SIZE, arm, START, 21, "core").flags.split(), {}
        # What is given last counts.
        for place, word in enumerate(words):
            if word.startswith("--"):
                given[word] = words[place + 1 : place + 2]
        key = str((sorted(given.items()), arm.setting))
        assert flags.setdefault(key, arm.name) == arm.name


def made_up(tmp_path):
    """Return results of all arms at seeds 21 to 25, and of tuning and the choice of defaults."""
    generator = np.random.default_rng(1)
    lines = []
    arms = [(arm, "core") for arm in CORE] + [(arm, "factorial") for arm in FACTORIAL]
    arms += [(arm, "servable") for arm in SERVABLE]
    for place, (arm, purpose) in enumerate(arms):
        for seed in range(21, 26):
            run = Run("prose", SIZE, arm, START, seed, purpose)
            base = 4.0 + 0.03 * place + 0.1 * (seed - 20)
            lines.append(result(run, base + generator.normal(0, 0.005)))
    for name in ("maxscore", "servable_softmax", "aux"):
        for seed in (100, 101, 102):
            purpose = "tuning" if seed == 100 and name != "aux" else "defaults"
            run = Run("prose", SIZE, ARMS[name], START, seed, purpose)
            lines.append(result(run, 4.0 + 0.1 * generator.normal() + (name == "aux")))
    for seed in (31, 32):
        run = Run("prose", SIZE, ARMS["maxscore"], START, seed, "prices", milestones=(5, 10))
        line = result(run, 4.0)
        worse = json.loads(json.dumps(line["evaluation"]["rules"]))
        worse["price"]["loss"] = worse["flow"]["loss"] + 0.11 * (seed - 30)
        worse["price"]["maxvio"] = [3.5, 1.0, 1.0, 1.0]
        lines.append(line | {"milestones": {"5": worse, "10": line["evaluation"]["rules"]}})
    other = Run("prose", SIZE, ARMS["maxscore"], Setting("4e-3", "4"), 100, "tuning")
    return [*lines, result(other, 4.5)]


def test_report_says_what_the_results_say(tmp_path):
    lines = made_up(tmp_path)
    study_report.write(lines, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert text.count("PASS") == 4 and "MISSED" not in text and "not judged" not in text
    assert "**Not worse than the best dropless router: yes.**" in text
    assert "**Better than every router that bounds the load: yes.**" in text

    def of(name: str, purpose: str = "core") -> dict[int, float]:
        return study_results.losses(study_results.by_arm(lines, purpose)[name])

    gshard = [*of("gshard").values()]
    assert f"{np.mean(gshard):.4f} ± {stats.sem(gshard):.4f}" in text
    gates = [
        (of("maxscore")[s] - of("flow_plain_gates", "factorial")[s]
         + of("plain_soft_gates", "factorial")[s] - of("dropless")[s]) / 2
        for s in range(21, 26)
    ]  # fmt: skip
    assert f"| SoftTopk gates in place of softmax gates | 5 | {np.mean(gates):+.4f} ±" in text
    defaults = text[text.index("What the default") : text.index("### Tuning")]
    assert "| MaxScore, servable, softmax gates | 3 |" in defaults, "tuning's seed counts"
    aux = np.mean(
        [of("aux", "defaults")[s] - of("maxscore", "defaults")[s] for s in range(100, 103)]
    )
    assert f"| MaxScore, aux loss 1e-1 | 3 | {aux:+.4f} [" in defaults
    with (tmp_path / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(lines) and float(rows[0]["loss_own_rule"]) == pytest.approx(
        study_results.own_loss(lines[0])
    )
    assert (
        "| 5 | 2 | 4.1690 | 4.0040 | +0.1650 (+0.1100 to +0.2200) | 3.50 (at most 3.50) |" in text
    )
    for name in ("prose_quick_curves.png", "prose_quick_loads.png", "prose_quick_prices.png"):
        assert (tmp_path / name).stat().st_size > 10_000
        assert f"({name})" in text


def test_report_says_so_where_the_claim_does_not_hold(tmp_path):
    lines = made_up(tmp_path)
    for line in lines:
        if line["arm"] == "bias":
            line["evaluation"]["rules"]["own"]["loss"] -= 0.5
        if line["arm"] == "maxscore":
            line["evaluation"]["rules"]["price"]["maxvio"][2] = 0.4
    core = study_results.by_arm(lines, "core")
    said = study_report.primary(core)
    assert [li for li in said if "NOT SHOWN" in li] == [li for li in said if "expert bias: +" in li]
    assert said[3] == "- **Not worse than the best dropless router: not shown.**"
    assert said[-1] == "- **Better than every router that bounds the load: yes.**"
    (missed,) = [bar for bar in study_report.bars(core) if bar.startswith("- MISSED")]
    assert "maxvio" in missed
    del core["gshard"]
    said = study_report.primary(core)
    assert said[-1] == "- **Better than every router that bounds the load: not shown.**"
    few = study_results.by_arm([line for line in lines if line["seed"] < 25], "core")
    assert (
        "not judged" in study_report.bars(few)[0] and "not judged" in study_report.primary(few)[0]
    )


def test_only_the_last_text_of_a_family_is_reported(tmp_path):
    lines = made_up(tmp_path)
    older = Run("prose", SIZE, ARMS["bias"], START, 7, "core", data="older")
    study_report.write([result(older, 1.0) | {"data": "older"}, *lines], tmp_path)
    text = (tmp_path / "report.md").read_text()
    study_report.write(lines, tmp_path)
    assert text == (tmp_path / "report.md").read_text()


def test_results_at_another_setting_and_diverged_runs_do_not_count(tmp_path):
    lines = made_up(tmp_path)
    older = Run("prose", SIZE, ARMS["bias"], Setting("4e-3", "4"), 21, "core")
    lost = Run("prose", SIZE, ARMS["maxscore"], Setting("8e-3", "4"), 100, "tuning")
    lines.insert(0, result(older, 9.0))
    lines.append(
        {"key": lost.key, "purpose": "tuning", "family": "prose", "size": "quick", "seed": 100,
         "arm": "maxscore", "learning_rate": "8e-3", "factor": "4", "iterations": 20, "tokens": 1,
         "code": "c0de", "revision": "1a2b",
         "flags": lost.flags, "diverged": "loss is NaN",
         "evaluation": {"rules": {"own": {"loss": float("inf")}}, "comparison": {}}}
    )  # fmt: skip
    seeds = [line["seed"] for line in study_results.by_arm(lines, "core")["bias"]]
    assert seeds == [21, 22, 23, 24, 25]
    study_report.write(lines, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "Diverged, and not in the tables: maxscore lr 8e-3" in text


@pytest.mark.parametrize(
    ("words", "diverged"),
    [
        ("ValueError: Unexpected result nan (message='found NaN in local forward loss')", True),
        ("error: router scores were NaN or infinite in iteration 7", True),
        ("RuntimeError: out of memory", False),
    ],
)
def test_only_a_run_that_diverged_counts_as_such(tmp_path, monkeypatch, words, diverged):
    run = Run("code", SIZE, ARMS["gshard"], START, 1, "core")
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
    run = Run("code", SIZE, ARMS["gshard"], START, 1, "core")
    command = [sys.executable, "-c", "raise SystemExit(1)"]
    monkeypatch.setattr(study_runs, "training_command", lambda *_: command)
    left = tmp_path / run.key / "checkpoint"
    left.parent.mkdir()
    for code, kept in (
        (None, False),
        ("of others", False),
        (study_runs.code_digest(), True),
    ):
        left.write_text("a model")
        if code is not None:
            (left.parent / "code").write_text(code)
        with pytest.raises(study_runs.RunError, match="exit status 1"):
            study_runs.carry_out(run, tmp_path, tmp_path, study_runs.Processes(), print)
        assert left.exists() == kept


def test_milestones_are_evaluated_at_their_step(tmp_path, monkeypatch):
    run = Run("code", SIZE, ARMS["maxscore"], START, 31, "prices", milestones=(4, 10))
    directory = tmp_path / run.key
    tracker = directory / "checkpoint" / "latest_checkpointed_iteration.txt"
    tracker.parent.mkdir(parents=True)
    (directory / "code").write_text(study_runs.code_digest())
    done = []

    def execute(command, log, processes, follow=None):
        step = int(command[-1]) if "--exit-interval" in command else SIZE.iterations
        if "evaluate" in command:
            done.append(f"evaluate {tracker.read_text()}")
            (directory / "evaluation.json").write_text(json.dumps({"rules": tracker.read_text()}))
        else:
            done.append(f"train to {step}")
            tracker.write_text(str(step))

    monkeypatch.setattr(study_runs, "execute", execute)
    monkeypatch.setattr(study_runs, "summary", lambda *_: {})
    arguments = (run, tmp_path, tmp_path, study_runs.Processes(), print)
    study_runs.carry_out(*arguments)
    assert done == [
        "train to 4", "evaluate 4", "train to 10", "evaluate 10", "train to 20", "evaluate 20",
    ]  # fmt: skip
    assert json.loads((directory / "evaluation-4.json").read_text())["rules"] == "4"
    # A run that was killed between training and evaluation is not trained on.
    (directory / "evaluation-10.json").unlink()
    tracker.write_text("10")
    done.clear()
    study_runs.carry_out(*arguments)
    assert done[0] == "evaluate 10"
    (directory / "evaluation-10.json").unlink()
    tracker.write_text("20")
    with pytest.raises(study_runs.RunError, match="checkpoint of step 20, not 10"):
        study_runs.carry_out(*arguments)


def test_of_drops_the_lower_loss_is_compared():
    run = Run("prose", SIZE, ARMS["gshard"], START, 1, "core")
    line = result(run, 4.0)
    line["evaluation"]["rules"]["no drops"] = {"loss": 3.9}
    assert study_results.compared_loss(line) == 3.9 and study_results.own_loss(line) == 4.0
    line = result(Run("prose", SIZE, ARMS["maxscore"], START, 1, "core"), 4.0)
    line["evaluation"]["rules"]["flow"]["loss"] = 3.0
    assert study_results.compared_loss(line) == 4.0, "MaxScore by prices"


def test_summary_keeps_the_last_of_steps_that_a_resumed_run_repeats(tmp_path):
    run = Run("code", SIZE, ARMS["gshard"], START, 1, "core")
    log, lines = [], []
    for iteration in [*range(1, 13), *range(9, 21)]:
        loss = 5.0 + iteration + (100 if iteration < 13 and len(lines) < 12 else 0)
        log.append(
            f" [2026-01-01] iteration {iteration:8}/      20 | consumed samples: 1 | elapsed time "
            f"per iteration (ms): 10.0 | lm loss: {loss:.6E} | grad norm: 1.0"
        )
        if iteration % 10 == 0:
            # With two rules that by prices is kept.
            rule = " (price routing)" if iteration == 10 else ""
            log.append(
                f" validation loss at iteration {iteration}{rule} | lm loss value: 6.5E+00 | lm PPL"
            )
            if rule:
                log.append(" validation loss at iteration 10 (flow routing) | lm loss value: 7.5 |")
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
