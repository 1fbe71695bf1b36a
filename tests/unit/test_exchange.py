"""Packing of counts, and the solver over many simulated ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from megatron_maxscore.flow import solve
from megatron_maxscore.flow.exchange import pack, split_like, unpack
from tests.dist.flow_cases import small_samples
from tools.benchmarks.oracles import ortools_objective
from tools.benchmarks.scale import collective_seconds, solve_together
from tools.benchmarks.workloads import as_integers, workload


@given(
    st.integers(1, 5),
    arrays(np.int64, st.integers(0, 9), elements=st.integers(0, 2**14 - 1)),
    st.sampled_from([1 << 16, 1 << 20, 1 << 40]),
)
def test_packed_counts_add_up(ranks, counts, below):
    if counts.size and int(counts.max()) * ranks >= below:
        counts = counts // ranks
    sent = pack(counts, below - 1)
    total = np.zeros_like(sent)
    for _ in range(ranks):
        total = total + sent
    assert (unpack(total, counts.size, below - 1) == ranks * counts).all()
    size = 2 if below == 1 << 16 else 4 if below == 1 << 20 else 8
    assert sent.nbytes in (size * counts.size, size * counts.size + 2)


def test_counts_are_cut_into_their_shapes():
    counts = [np.ones((2, 3), np.int64), np.ones((4,), np.int32)]
    parts = split_like(np.arange(10), counts)
    assert parts[0].tolist() == [[0, 1, 2], [3, 4, 5]] and parts[1].tolist() == [6, 7, 8, 9]
    assert parts[1].dtype == np.int32


@pytest.mark.parametrize("family", ["skewed, sigma 1", "40 clusters"])
def test_many_simulated_ranks_give_the_same_bits(family):
    work = workload(family, 4608, 32, 4)
    scores = as_integers(work.scores)
    alone = solve(scores, 4, capacity=work.capacity)
    sizes = [*range(4, 64), 0]
    parts = scores.split([*sizes, 4608 - sum(sizes)])
    solutions, cluster, exchanges = solve_together(
        len(parts), lambda rank: parts[rank], 4, capacity=work.capacity
    )
    assert torch.equal(torch.cat([solution.experts for solution in solutions]), alone.experts)
    assert {solution.rounds for solution in solutions} == {len(cluster.rounds)}
    assert {exchange.sent for exchange in exchanges} == {sum(sent for _, sent in cluster.rounds)}
    best = ortools_objective(scores.double().numpy(), 4, work.capacity.numpy())
    assert float(solutions[0].objective) == best


def test_simulated_ranks_fail_together():
    def scores(rank):
        return torch.full((4, 4), torch.nan if rank == 2 else 1.0)

    with pytest.raises(
        ValueError, match="NaN or \\+inf in 4 tokens, first in token 0 \\(on rank 2"
    ):
        solve_together(4, scores, 2)


def test_modelled_collectives():
    assert collective_seconds("gather", 1, 0) == 0.0
    # Three stages over NVLink, eight ranks' bytes.
    assert collective_seconds("gather", 8, 300_000) == pytest.approx(9e-6 + 8e-6)
    assert collective_seconds("sum", 16, 45_000) == pytest.approx(2 * (9e-6 + 8e-6) + 2e-6)


def test_problems_of_a_batch_do_not_wait_for_each_other():
    """Each problem of a batch takes the attempts that it takes alone, however rows are split."""
    generator = torch.Generator().manual_seed(5)
    centres = torch.randn(40, 4, 17, generator=generator)
    kind = torch.randint(4, (40, 60, 1), generator=generator).expand(-1, -1, 17)
    scores = centres.gather(1, kind) + 0.01 * torch.randn(40, 60, 17, generator=generator)
    prices = torch.randn(40, 17, generator=generator)
    cuts = (0, 41, 58, 60)
    arguments = {"prices": prices}
    with small_samples():
        alone = solve(scores, 5, **arguments)
        solutions, _, _ = solve_together(
            3, lambda rank: scores[:, cuts[rank] : cuts[rank + 1]].contiguous(), 5, **arguments
        )
    assert torch.equal(torch.cat([part.experts for part in solutions], 1), alone.experts)
    assert torch.equal(solutions[0].prices, alone.prices)
