"""Features of Megatron's training loop that replay, skip or resize work, beside stock's behaviour.

Recomputation under every pipeline schedule, and resuming in another layout, are in
``test_training.py``.
"""

from __future__ import annotations

import pytest
import torch

from tests.dist.training_runs import MAXSCORE, MODEL, TOPK, succeed

EP2 = "--expert-model-parallel-size 2"
# Assignments of a sequence: 64 tokens, 2 experts, 2 layers.
PER_SEQUENCE = 64 * 2 * 2


def sequences(result):
    """Return how many sequences every step has routed."""
    totals = [torch.tensor(line["loads"]).sum().item() for line in result.statistics]
    return [total / PER_SEQUENCE for total in totals]


@pytest.mark.full
def test_batches_that_grow(tmp_path):
    """``--step-batch-size-schedule``; 0.19 accepts ``--rampup-batch-size`` and does not read it."""
    # In tokens: four sequences a step up to 768 tokens, then eight.
    flags = f"{EP2} --train-samples 44 --step-batch-size-schedule '0:4 768:8'"
    model = MODEL.replace("--global-batch-size 8", "")

    def train(name, router, more=""):
        return succeed(tmp_path / name, 2, f"{router} {flags} {more}", model=model)

    ours, stock = train("ours", MAXSCORE), train("stock", TOPK)
    assert sequences(ours) == sequences(stock) == [4, 4, 4, 8, 8, 8, 8]
    for line in ours.statistics:
        assert line["maxvio"] == [0.0, 0.0] and line["largest_gap"] <= 1e-9
    checkpoint = tmp_path / "checkpoint"
    first = train("first", MAXSCORE, f"--save {checkpoint} --save-interval 2 --exit-interval 2")
    second = train("second", MAXSCORE, f"--load {checkpoint}")
    assert first.losses + second.losses == ours.losses
    assert second.validation == ours.validation


def test_evaluation_in_other_microbatches(tmp_path):
    flags = f"{EP2} --train-iters 2"
    as_trained = succeed(tmp_path / "2", 2, f"{MAXSCORE} {flags}")
    other = "--eval-micro-batch-size 4 --eval-global-batch-size 8"
    found = succeed(tmp_path / "4", 2, f"{MAXSCORE} {flags} {other}")
    assert found.losses == as_trained.losses
    price, flow = "(price routing)", "(flow routing)"
    # By prices no token depends on another one; by the flow the microbatch is the problem.
    assert found.validation[price] == pytest.approx(as_trained.validation[price], rel=1e-6)
    assert found.validation[flow] != as_trained.validation[flow]
    assert found.validation[flow] == pytest.approx(as_trained.validation[flow], rel=1e-3)


@pytest.mark.full
def test_skipped_training_evaluates_what_was_saved(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    flags = f"{EP2} --train-iters 4"
    for router in (MAXSCORE, TOPK):
        where = f"{checkpoint}-{'ours' if router == MAXSCORE else 'stock'}"
        trained = succeed(tmp_path / "train", 2, f"{router} {flags} --save {where}")
        skipped = succeed(tmp_path / "skip", 2, f"{router} {flags} --skip-train --load {where}")
        assert len(trained.losses) == 4 and skipped.losses == [] == skipped.statistics
        assert skipped.validation == trained.validation


@pytest.mark.full
def test_deterministic_mode_changes_nothing(tmp_path):
    flags = f"{MAXSCORE} {EP2} --train-iters 4"
    plain = succeed(tmp_path / "plain", 2, flags)
    for name in ("one", "two"):
        found = succeed(tmp_path / name, 2, f"{flags} --deterministic-mode")
        assert found.losses == plain.losses and found.validation == plain.validation


@pytest.mark.full
def test_frozen_routers_train_the_rest(tmp_path):
    """As adapters of other weights do: the router has no gradient, and its prices stay."""
    for router in (MAXSCORE, TOPK):
        found = succeed(
            tmp_path / ("ours" if router == MAXSCORE else "stock"), 2,
            f"{router} {EP2} --train-iters 6", environment={"FREEZE_ROUTERS": "1"},
        )  # fmt: skip
        losses = [float.fromhex(text) for text in found.losses]
        assert losses[-1] < losses[0] - 0.1
        if router == MAXSCORE:
            assert all(line["maxvio"] == [0.0, 0.0] for line in found.statistics)
