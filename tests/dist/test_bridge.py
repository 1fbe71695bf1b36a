"""Megatron Bridge: its callbacks, and the places in its loop that we rely on."""

from __future__ import annotations

import re

import pytest
import torch

from megatron_maxscore.moe import metrics
from tests.dist import bridge_cases
from tests.dist.pool import Pool
from tools.maintenance.releases import package

VERSION = "0.6.0"
pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def wheel():
    return package("megatron-bridge", VERSION)


@pytest.fixture(scope="module")
def run(wheel):
    pool = Pool(2)  # its ranks have parts of Bridge in their modules
    yield lambda **arguments: pool.run(bridge_cases.trains, wheel=str(wheel), **arguments)
    pool.close()


def test_a_loop_as_bridge_has_it(run):
    results = run()
    for prices, solves, seen, said in results:
        assert said is None and solves == [[bridge_cases.MICROBATCHES] * 2] * 4
        assert all(torch.equal(a, b) for a, b in zip(prices, results[0][0], strict=True))
        assert prices[0].any(), "prices are taken at the end of a step"
        assert not torch.equal(prices[0], prices[1])
        assert torch.equal(prices[1], prices[2]), "a skipped step keeps them"
        assert not torch.equal(prices[2], prices[3])
        assert seen.keys() == set(metrics.NAMES)
        curves = seen[metrics.PREFIX + "load_max"]
        assert list(curves) == [2, 4] and all(abs(value - 1) < 1e-9 for value in curves.values())


def test_bad_scores_end_every_rank(run):
    results = run(bad=1)
    messages = {said for *_, said in results}
    assert len(messages) == 1 and "in iteration 2" in messages.pop()


def test_its_loop_has_our_places(wheel):
    bridge = wheel / "megatron" / "bridge"
    setup = (bridge / "training" / "setup.py").read_text()
    assert "model_config.finalize_model_grads_func = partial(finalize_model_grads" in setup
    train = (bridge / "training" / "train.py").read_text()
    events = [m[1] for m in re.finditer(r'should_fire\(callback_manager, "(\w+)"\)', train)]
    assert events.index("on_train_start") < events.index("on_train_step_start")
    assert events.index("on_train_step_start") < events.index("on_train_step_end")
    # The gradients are ended by what the model's configuration says when the step runs.
    assert "skipped_iter=bool(skipped_iter)" in train
    pretrain = (bridge / "training" / "pretrain.py").read_text()
    assert "callbacks: list[Callback] | CallbackManager | None" in pretrain
