"""Steps that are run again or skipped, frozen routers, bad scores, threads."""

from __future__ import annotations

import json
import re

import pytest
import torch

from tests.dist import step_cases as cases
from tests.dist.training_runs import MAXSCORE, run, succeed

EP2 = f"{MAXSCORE} --expert-model-parallel-size 2 --moe-router-dtype fp32"
SCRIPT = "tests/dist/repeating_script.py"
# What differs between runs: times.
TIMES = ("solve_seconds", "step_seconds")


def trained(directory, flags, **environment):
    """Train; return losses, prices after every step, statistics, validation and logged metrics."""
    result = succeed(directory, 2, flags, script=SCRIPT, environment=environment)
    prices = [json.loads(line) for line in (directory / "losses.prices").read_text().splitlines()]
    lines = [{k: v for k, v in s.items() if k not in TIMES} for s in result.statistics]
    logged = re.findall(
        r"maxscore/(score_ratio|first_choices|price_range): ([\d.E+-]+)", result.output
    )
    return (result.losses, prices, lines, result.validation, logged), result.output


@pytest.mark.parametrize("scope", [pytest.param("local", marks=pytest.mark.full), "group"])
def test_a_step_that_is_run_again_leaves_what_one_run_leaves(tmp_path, scope):
    # Without dropout, whose random numbers go on from one attempt to the next.
    flags = (
        f"{EP2} --maxscore-scope {scope} --train-iters 6 --no-check-for-nan-in-loss-and-grad "
        "--hidden-dropout 0 --attention-dropout 0"
    )
    once, _ = trained(tmp_path / "once", flags)
    assert len(once[0]) == 6 and any(map(any, once[1][-1]["prices"])) and len(once[4]) > 0
    for name, environment in (
        ("rerun", {"RERUN": "3,5"}),
        ("retry", {"RETRY": "2,4"}),
        ("scored", {"SCORED": "1"}),
    ):
        found, output = trained(tmp_path / name, flags, **environment)
        assert found == once, name
        assert "not reproducible" not in output
        assert ("unexpected loss" in output) == (name == "rerun"), "the step was run again"


def test_a_skipped_optimizer_step_leaves_prices(tmp_path):
    # The first loss scale overflows, so the optimizer skips steps until it is small enough.
    scale = "--fp16 --initial-loss-scale 1e6 --loss-scale-window 100 --hysteresis 1"
    flags = f"{EP2} --train-iters 8 {scale}"
    (_, steps, *_), _ = trained(tmp_path, flags)
    assert {step["skipped"] for step in steps} == {False, True}
    before = [[0.0] * 8] * 2
    for step in steps:
        assert (step["prices"] == before) == step["skipped"]
        before = step["prices"]


@pytest.mark.parametrize("how", ["weight", "bias", "not"])
def test_frozen_routers_keep_their_prices(ranks, how):
    for unchanged, solves in ranks(2, cases.frozen_routers, how=how):
        assert unchanged == (how != "not") and solves == 1


def test_layers_with_different_numbers_of_experts(ranks):
    for together, one_by_one in ranks(2, cases.different_numbers_of_experts):
        assert [prices.numel() for prices in together] == [8, 6]
        for prices, alone in zip(together, one_by_one, strict=True):
            assert torch.equal(prices, alone) and prices.any()


def test_statistics_of_stages_with_different_numbers_of_experts(ranks):
    assert ranks(2, cases.loads_of_different_widths) == [([2, 6], 8), ([2, 6], 12)]


@pytest.mark.parametrize("gate", ["soft_topk", "score"])
@pytest.mark.parametrize("scope", ["local", "group"])
@pytest.mark.parametrize("training", [False, True])
def test_a_bad_weight_is_seen_in_the_output_as_in_stocks(ranks, training, scope, gate):
    for found, counted in ranks(2, cases.bad_weight, training=training, scope=scope, gate=gate):
        assert found == {"maxscore": 1.0, "topk": 1.0}
        assert counted == (0 if training else 24)


def test_a_bad_frozen_weight_is_seen_in_the_output(ranks):
    for found, _ in ranks(2, cases.bad_weight, training=True, frozen=True):
        assert found == {"maxscore": 1.0, "topk": 1.0}


def test_bad_scores_in_validation_are_reported(tmp_path):
    flags = f"{EP2} --train-iters 2 --no-check-for-nan-in-loss-and-grad"
    result = run(tmp_path, 2, flags, environment={"BAD_RANK": "1", "BAD_ITERATION": "evaluation"})
    assert result.status == 0, result.output[-3000:]
    assert len(result.losses) == 2, "training goes on"
    losses = re.findall(r"on validation set \([a-z ]+\) \| lm loss value: (\S+)", result.output)
    assert [loss.lower() for loss in losses] == ["nan", "nan"], "as stock's"
    # Both layers, both rules, four batches of rank 1: the first position of two sequences at least.
    lines = re.findall(r"megatron_maxscore: router scores were NaN .*", result.output)
    assert len(lines) >= 1 and "validation set" in lines[0]


def test_layers_run_in_threads(ranks):
    for wrong, errors, is_as_before in ranks(2, cases.two_layers_in_threads):
        assert wrong == [0, 0] and errors == [] and is_as_before


def test_layers_built_in_threads(ranks):
    stock = ("topk", "TopKRouter", "MoEAlltoAllTokenDispatcher")
    ours = ("maxscore", "MaxScoreRouter", "MaxScoreTokenDispatcher")
    for found in ranks(2, cases.layers_built_in_threads):
        assert found == [ours] * 3 + [stock] * 3


@pytest.mark.parametrize("declared", [False, True])
def test_remainders_go_to_all_experts_in_turn(ranks, declared):
    # 130 tokens of each of two ranks, 8 experts each, over 256: four experts for each and 16 over.
    results = ranks(
        2, cases.shares_over_time, num_tokens=130, topk=8, experts=256, declared=declared
    )
    for loads, _ in results:
        assert loads.sum() == 200 * 130 * 8
        spread = float(loads.max()) / float(loads.float().mean()) - 1
        # 0.23 if the same experts always got them.
        assert spread < (0.02 if declared else 0.05)
    total = sum(loads for loads, _ in results)
    assert float(total.max()) / float(total.float().mean()) - 1 < 0.04


@pytest.mark.parametrize("with_gradients", [False, True])
def test_few_tokens_choose_among_all_experts(ranks, with_gradients):
    results = ranks(
        2, cases.shares_over_time, num_tokens=8, topk=2, experts=64, declared=with_gradients,
        with_gradients=with_gradients,
    )  # fmt: skip
    for loads, kept in results:
        assert loads.min() > 0, "every expert gets tokens"
        assert kept > 0.9, "of the score that routing without capacities has"
    assert not torch.equal(results[0][0], results[1][0])


def test_a_router_that_is_built_on_meta_starts_from_zero(ranks):
    for prices, count, solves in ranks(2, cases.built_on_meta):
        assert not prices.any() and count == solves == 1
