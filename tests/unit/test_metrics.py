"""What routers measure, beside a loop over tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_maxscore.flow import solve
from megatron_maxscore.moe.metrics import NAMES, PREFIX, measured


@pytest.mark.parametrize("with_padding", [False, True])
@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_values_are_those_of_a_loop(with_padding, factor):
    torch.manual_seed(3)
    scores = torch.randn(40, 8)
    scores[:, 0] += 1.0
    valid = torch.arange(40) % 5 != 0 if with_padding else None
    solution = solve(scores, 2, capacity_factor=factor, valid=valid, fill_padding=True)
    values = measured(scores, solution.experts, valid, solution, 0.25)
    assert {PREFIX + name for name in values} == set(NAMES)
    assert float(values["solve_ms"]) == 250.0
    objective = best = firsts = 0.0
    rows = [t for t in range(40) if valid is None or valid[t]]
    for t in rows:
        row = scores[t].double().tolist()
        own = sum(row[e] for e in solution.experts[t].tolist())
        top = sum(sorted(row)[-2:])
        objective, best = objective + own, best + top
        firsts += own == pytest.approx(top)
    assert float(values["objective"]) == pytest.approx(objective / len(rows))
    assert float(values["unconstrained"]) == pytest.approx(best / len(rows))
    assert float(values["score_ratio"]) == pytest.approx(objective / best)
    assert float(values["first_choices"]) == pytest.approx(firsts / len(rows))
    assert 0 < firsts < len(rows)
    loads = np.bincount(solution.experts.ravel().numpy(), minlength=8) / 10.0
    for name, percentile in (("load_p05", 5), ("load_p95", 95), ("load_max", 100)):
        assert float(values[name]) == pytest.approx(np.percentile(loads, percentile))
    prices = solution.prices.tolist()
    assert float(values["price_range"]) == pytest.approx(max(prices) - min(prices))


def test_no_tokens():
    solution = solve(torch.zeros(0, 4), 2)
    values = measured(torch.zeros(0, 4), solution.experts, None, solution, 0.0)
    assert all(torch.isfinite(value) for value in values.values())
