"""The recipes of examples/recipes, scaled down."""

from __future__ import annotations

import pytest

from tests import example_recipes
from tests.dist.training_runs import succeed


@pytest.mark.full
@pytest.mark.parametrize("name", example_recipes.NAMES)
def test_trains_scaled_down(tmp_path, name):
    model = " ".join(example_recipes.small_command_of(name))
    result = succeed(tmp_path, 2, "", model=model)
    losses = [float.fromhex(text) for text in result.losses]
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.1
    for line in result.statistics:
        assert not any(line["dropped"]) and line["solves"] > 0
        for loads in line["loads"]:
            # 512 tokens of each iteration; experts of a microbatch differ by one on each rank.
            assert max(loads) - min(loads) <= 8
