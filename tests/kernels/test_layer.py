"""From hidden states to tokens in order of dispatch: no operator makes the host wait."""

from __future__ import annotations

import sys
from unittest import mock

import pytest
import torch

import megatron_maxscore.cpu
from megatron_maxscore.flow import device
from megatron_maxscore.moe import counting
from megatron_maxscore.moe import router as router_module
from megatron_maxscore.ops.kernels import soft_topk
from tests.kernels.test_flow import Waits, launches  # noqa: F401
from tests.one_rank_layer import EXPERTS, HIDDEN, TOPK, build, routed, tear_down

TOKENS = 96

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(scope="module")
def layer():
    megatron_maxscore.cpu.enable()
    yield build("gloo", TOKENS)
    tear_down()


def test_routing_and_dispatch_wait_for_nothing(layer, launches):  # noqa: F811
    on_device = lambda tensor: True  # noqa: E731
    hidden = torch.randn(TOKENS, 1, HIDDEN, dtype=torch.bfloat16)
    with (
        mock.patch.object(device, "is_device", on_device),
        mock.patch.object(router_module, "is_device", on_device),
        mock.patch.object(counting, "is_device", on_device),
        # The package's name for it is the function's.
        mock.patch.object(
            sys.modules["megatron_maxscore.ops.soft_topk"], "_kernels", lambda matrix: soft_topk
        ),
    ):
        routed(layer, hidden)
        launches.clear()
        with Waits():
            tokens, _ = routed(layer, hidden)
        probs, routing_map = layer.router(hidden)
        loss = probs.sum()
        with Waits():
            loss.backward()
    assert len(launches) > 12 and tokens.shape == (TOKENS * TOPK, HIDDEN)
    assert (routing_map.sum(0) == TOKENS * TOPK // EXPERTS).all()
    assert layer.router.statistics.solves == 1 == int(layer.router.price_count)
    assert layer.router.statistics.bad_tokens == 0
    assert torch.is_tensor(layer.router.statistics.largest_gap)
