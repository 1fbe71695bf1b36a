"""The study's settings, statistics and report, on made-up results."""

from __future__ import annotations

import csv
import dataclasses
import json
import re

import numpy as np
import pytest
from scipy import stats

from tests import forked
from tests.unit.study_lines import SIZE, result
from tools.study import report as study_report
from tools.study import results as study_results
from tools.study import runs as study_runs
from tools.study.__main__ import Study, tuning_left
from tools.study.arms import ARMS, CORE, FACTORIAL, ONE_FLAG, SERVABLE, SIZES, START, Run, Setting


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


def test_the_powers_on_the_page():
    """Of one test of non-inferiority, at the spread of the first study."""

    def power(difference: float, seeds: int) -> float:
        least = stats.t.ppf(0.025, seeds - 1)
        shift = (difference - 0.019) / (0.035 / np.sqrt(seeds))
        return float(stats.nct.cdf(least, seeds - 1, shift))

    needed = next(seeds for seeds in range(2, 99) if power(0.0, seeds) >= 0.9)
    page = " ".join((study_runs.ROOT / "docs/evidence/study.md").read_text().split())
    for text in (
        f"a power of {power(-0.02, 10):.0%}".replace("%", " %"),
        f"of {power(0.0, 10):.0%} if it is exactly equal".replace("%", " %"),
        f"{needed} seeds (`tests/unit/test_study.py`",
    ):
        assert text in page, text


def test_tuning_climbs_until_the_neighbours_are_worse(tmp_path):
    size = dataclasses.replace(SIZES["small"], iterations=20)
    arm = ARMS["servable_sigmoid"]
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


def test_settings_are_tuned_or_given(tmp_path):
    size = dataclasses.replace(SIZES["small"], iterations=20)
    study = Study("prose", size, "d", study_runs.Results(tmp_path / "results.jsonl"))
    arms = [ARMS["maxscore"], ARMS["servable_sigmoid"], ARMS["gshard"]]
    with pytest.raises(ValueError, match="maxscore, servable_sigmoid not tuned yet"):
        study.comparison(arms, [21], "core")
    tuned(study, ARMS["maxscore"], {"4e-3": -0.1, "x1": -0.2, "x2": -0.1})
    tuned(study, ARMS["servable_sigmoid"], {"2e-3": -0.1, "x4": -0.1})
    ours, sigmoid, gshard = study.comparison(arms, [21], "core")
    assert "--lr 4e-3" in ours.flags and "--moe-router-topk-scaling-factor" not in ours.flags
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


CONFIGURATIONS = """
import argparse, json, sys
from megatron_maxscore import cpu, training
cpu.enable(); training.install(); cpu.answer_arguments()
from megatron.training import arguments
from megatron_maxscore.training.arguments import check_configuration, set_defaults
for name, flags in json.loads(sys.argv[1]).items():
    parser = arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    args = parser.parse_args(flags.split())
    args.rank, args.world_size = 0, 1
    args._is_global_batch_size_explicitly_specified = True
    set_defaults(args); check_configuration(args)
    arguments.validate_args.__wrapped__(args, {"tokenizer_type": "NullTokenizer"})
    arguments.core_transformer_config_from_args(args)
    print("BUILT", name, flush=True)
"""


def test_megatron_takes_every_arm():
    found = {}
    for size in ("small", "fine"):
        for arm in ARMS.values():
            flags = Run("prose", SIZES[size], arm, arm.setting or arm.start, 21, "core").flags
            found[f"{size}/{arm.name}"] = f"{flags} --vocab-size 100 --transformer-impl local"
    done = forked.python("-c", CONFIGURATIONS, json.dumps(found))
    assert re.findall(r"^BUILT (\S+)$", done.stdout, flags=re.MULTILINE) == list(found), done.stderr


def made_up(tmp_path):
    """Return results of all arms at seeds 21 to 25, and of tuning."""
    generator = np.random.default_rng(1)
    lines = []
    arms = [(arm, "core") for arm in CORE] + [(arm, "factorial") for arm in FACTORIAL]
    arms += [(arm, "servable") for arm in SERVABLE] + [(arm, "one_flag") for arm in ONE_FLAG]
    for place, (arm, purpose) in enumerate(arms):
        for seed in range(21, 26):
            run = Run("prose", SIZE, arm, START, seed, purpose)
            base = 4.0 + 0.03 * place + 0.1 * (seed - 20)
            lines.append(result(run, base + generator.normal(0, 0.005)))
    for line in lines:
        # At one seed nothing was dropped.
        if line["arm"] == "gshard" and line["seed"] > 21:
            line["dropped_by_step"] = [0.8] * 5 + [0.1 * (line["seed"] - 21)] * 15
    for name in ("maxscore", "servable_softmax"):
        run = Run("prose", SIZE, ARMS[name], START, 100, "tuning")
        lines.append(result(run, 4.0 + 0.1 * generator.normal()))
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
    one_flag = text[text.index("### One flag") : text.index("### From when on")]
    difference = np.mean([of("one_flag", "one_flag")[s] - of("dropless")[s] for s in range(21, 26)])
    assert f"| dropless top-k's recipe and one flag | 5 | {difference:+.4f} [" in one_flag
    assert "| router that drops | seeds | steps 1 to 5 | steps 6 to 20 |" in text
    assert f"| {ARMS['gshard'].title} | 5 | 64.0% | 20.0% |" in text
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
