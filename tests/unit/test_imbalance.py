"""The imbalance workloads, and what routers make of them."""

from __future__ import annotations

import pytest
import torch

from tools.benchmarks.imbalance import BURST_EVERY, ROUTERS, WORKLOADS, Layout, outcome, run

LAYOUT = Layout(tokens=96, experts=32, topk=4, ranks=4)


@pytest.fixture(scope="module")
def outcomes():
    return {name: run(LAYOUT, name, steps=6) for name in WORKLOADS}


@pytest.mark.parametrize("workload", WORKLOADS)
def test_maxscore_drops_nothing_and_keeps_to_its_quotas(outcomes, workload):
    for step in outcomes[workload]["MaxScore"]:
        assert step.dropped == 0.0 and step.over_quota <= 0
        assert step.expert <= 1.01 or workload.startswith("W4"), "ragged ranks round up"
        assert step.expert <= 1.1 and step.rank <= 1.1


def test_workloads_are_what_they_are_named_for(outcomes):
    first = {name: found["expert bias"][0] for name, found in outcomes.items()}
    balanced = first["W0 balanced"]
    assert balanced.expert < 1.5 and balanced.rank < 1.2
    for name in ("W1 hot experts", "W2 hot rank", "W3 spread hot experts", "W6 rotating hot spot"):
        assert first[name].expert > 3
    # The heat is on one rank, or spread.
    assert first["W2 hot rank"].rank > 2 * first["W3 spread hot experts"].rank
    assert first["W3 spread hot experts"].rank < 1.2
    burst = [step.expert for step in outcomes["W7 burst"]["expert bias"]]
    assert burst[BURST_EVERY - 1] > 3 and max(burst[: BURST_EVERY - 1]) < 1.6
    generator = torch.Generator().manual_seed(0)
    scores = WORKLOADS["W5 zero load"](LAYOUT, 0, generator)
    chosen = torch.cat([each.topk(4, dim=1).indices for each in scores])
    loads = chosen.flatten().bincount(minlength=32)
    assert loads[-8:].sum() == 0 and loads[::7].sum() == 0
    ragged = WORKLOADS["W4 ragged source"](LAYOUT, 0, generator)
    assert [len(each) for each in ragged] == [48, 80, 112, 144]


def test_top_k_with_a_capacity_drops(outcomes):
    for name, found in outcomes.items():
        dropped = [step.dropped for step in found["top-k, capacity 1.0"]]
        assert all(value > 0 for value in dropped)
        assert (max(dropped) > 0.3) == (name != "W0 balanced"), (name, dropped)
    # Quantile balancing catches up with what stays, and not with what moves.
    balancing = "quantile balancing, capacity 1.0"
    assert outcomes["W1 hot experts"][balancing][-1].dropped < 0.2
    assert outcomes["W6 rotating hot spot"][balancing][-1].dropped > 0.4


def test_an_outcome_is_counted():
    layout = Layout(tokens=4, experts=4, topk=1, ranks=2)
    experts = [torch.tensor([[0], [0], [0], [1]]), torch.tensor([[0], [2], [3], [1]])]
    dropless = outcome(layout, experts, has_capacity=False)
    assert (dropless.dropped, dropless.expert, dropless.rank) == (0.0, 2.0, 1.5)
    assert dropless.over_quota == 2
    capped = outcome(layout, experts, has_capacity=True)
    assert (capped.dropped, capped.expert, capped.rank) == (0.25, 1.0, 1.0)
    assert len(ROUTERS) == 5
