"""What evaluation counts, and which rule the routers follow meanwhile, on made-up routers."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_maxscore.commands import evaluate
from megatron_maxscore.inference import TrainedModel


class MadeUpRouter(torch.nn.Module):
    """Returns what it is given, as a router's gates and map."""

    layer_number = 1

    def forward(self, gates):
        return gates, gates > 0


@pytest.fixture
def trained():
    router = MadeUpRouter().eval()
    args = SimpleNamespace(
        moe_expert_capacity_factor=None, moe_router_load_balancing_type="sinkhorn"
    )
    config = SimpleNamespace(moe_expert_capacity_factor=None)
    return SimpleNamespace(
        router=router, args=args, model=SimpleNamespace(config=config),
        routers=lambda: {1: router}, routed=lambda output: TrainedModel.routed(None, output),
    )  # fmt: skip


def test_counts_are_those_of_a_loop(trained):
    generator = torch.Generator().manual_seed(0)
    tally = evaluate.Tally(loss=1.0, assigned=32 * 2)
    loads, violations, gates = np.zeros(4), [], 0.0
    with evaluate.counting(trained, tally):
        for tokens in (20, 12):
            scores = torch.rand(tokens, 4, generator=generator)
            chosen = torch.where(scores >= scores.topk(2, dim=1).values[:, 1:], scores, 0.0)
            trained.router(chosen)
            tally.tokens += tokens
            tally.batches += 1
            own = np.zeros(4)
            for row in chosen.tolist():
                for expert, gate in enumerate(row):
                    own[expert] += gate > 0
                    gates += gate
            loads += own
            violations.append(own.max() / (tokens * 2 / 4) - 1)
    found = tally.summary()
    assert found["loads"] == [loads.tolist()] and found["dropped"] == 0.0
    np.testing.assert_allclose(found["maxvio"], [loads.max() / 16 - 1])
    np.testing.assert_allclose(found["maxvio_per_batch"], [np.mean(violations)])
    np.testing.assert_allclose(found["gate_sum"], [gates / 32], rtol=1e-6)


def test_sinkhorn_is_also_evaluated_as_in_training(trained):
    assert evaluate.rules_of(trained) == ["own", "as in training"]
    with evaluate.under("own", trained):
        assert not trained.router.training
    with pytest.raises(KeyError), evaluate.under("as in training", trained):
        assert trained.router.training
        raise KeyError
    assert not trained.router.training
