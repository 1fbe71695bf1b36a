"""What ranks do in the tests of the distributed solver; every case runs on all ranks of a pool."""

from __future__ import annotations

import contextlib
import datetime
import os
import time
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from megatron_maxscore.errors import LostRankError
from megatron_maxscore.flow import exchange, sample, solve, solver
from tests.dist.cases import device
from tools.benchmarks.workloads import as_integers, workload


@contextlib.contextmanager
def small_samples():
    """Let problems of a few dozen rows take the way of large ones."""
    before = sample._MIN_SAMPLE, sample._SAMPLE_LOAD
    sample._MIN_SAMPLE, sample._SAMPLE_LOAD = 5, 1
    try:
        yield
    finally:
        sample._MIN_SAMPLE, sample._SAMPLE_LOAD = before


def shares(total: int, size: int, how: str, seed: int = 0) -> list[slice]:
    """Split rows contiguously over ranks."""
    rng = np.random.default_rng(seed)
    if how == "even":
        cuts = np.linspace(0, total, size + 1).astype(int)
    elif how == "some empty":
        cuts = np.sort(np.concatenate([[0, 0], rng.integers(0, total + 1, size - 2), [total]]))
        if size == 2:
            cuts = np.array([0, 0, total])
    else:
        cuts = np.sort(np.concatenate([[0], rng.integers(0, total + 1, size - 1), [total]]))
    return [slice(a, b) for a, b in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True)]


def problem(family, tokens, experts, topk, integers):
    """Return scores and capacities of a family."""
    work = workload(family, tokens, experts, topk)
    scores = as_integers(work.scores) if integers else work.scores
    return scores, work.capacity


def warm_prices(family, tokens, experts, topk):
    """Return the prices of another batch."""
    other = workload(family, tokens, experts, topk, 1)
    return solve(other.scores, topk, capacity=other.capacity).prices


def solve_family(rank, size, family, tokens, experts, topk, how, integers=False, warm=False):
    """Solve this rank's share of a family's batch together."""
    scores, capacity = problem(family, tokens, experts, topk, integers)
    start = warm_prices(family, tokens, experts, topk) if warm else None
    own = shares(tokens, size, how)[rank]
    made = []

    def making(group):
        made.append(exchange.exchange_of(group))
        return made[-1]

    with mock.patch.object(solver, "exchange_of", making):
        solution = solve(
            scores[own].to(device()), topk, capacity=capacity, prices=start, group=dist.group.WORLD
        )
    return {
        "experts": solution.experts,
        "prices": solution.prices,
        "objective": float(solution.objective),
        "bound": float(solution.bound),
        "gap": float(solution.gap),
        "loads": solution.loads,
        "rounds": solution.rounds,
        "sent": made[0].sent,
    }


def random_instance(seed: int):
    """Return the arguments of a small solve, and a share of padding rows."""
    rng = np.random.default_rng(seed)
    experts = int(rng.integers(2, 10))
    topk = int(rng.integers(1, experts + 1))
    problems = int(rng.integers(1, 4))
    tokens = int(rng.integers(0, 70))
    high = int(rng.choice([1, 2, 8, 1000]))
    scores = torch.from_numpy(rng.integers(0, high, (problems, tokens, experts)).astype(np.float32))
    if rng.random() < 0.3:
        scores[torch.from_numpy(rng.random(scores.shape) < 0.2)] = -torch.inf
    arguments = {"topk": topk}
    if rng.random() < 0.5:
        arguments["capacity_factor"] = float(rng.choice([1.0, 1.1, 2.0]))
    else:
        need = -(-tokens * topk // experts)
        extra = torch.from_numpy(rng.integers(0, 3, experts))
        arguments["capacity"] = extra + need
    if rng.random() < 0.5:
        wide = float(rng.choice([1.0, 1e6]))
        arguments["prices"] = torch.from_numpy(wide * rng.standard_normal(experts)).float()
    valid = None
    if rng.random() < 0.4:
        valid = torch.from_numpy(rng.random((problems, tokens)) < 0.8)
        arguments["fill_padding"] = bool(rng.random() < 0.5)
    if problems == 1 and rng.random() < 0.5:
        scores = scores[0]
        valid = None if valid is None else valid[0]
    return scores, valid, arguments


def outcome(scores, valid, arguments, group=None):
    """Return a solution's fields, or the error's text."""
    try:
        solution = solve(scores, valid=valid, group=group, **arguments)
    except ValueError as error:
        return str(error)
    return {
        "experts": solution.experts,
        "prices": solution.prices,
        "loads": solution.loads,
        "objective": solution.objective,
        "gap": solution.gap,
        "rounds": solution.rounds,
    }


def solve_random(rank, size, first, count, split_rows):
    """Solve random instances, their rows split at random."""
    results = []
    with small_samples() if split_rows else contextlib.nullcontext():
        for seed in range(first, first + count):
            scores, valid, arguments = random_instance(seed)
            own = shares(scores.shape[-2], size, "random", seed)[rank]
            part = None if valid is None else valid[..., own].contiguous()
            results.append(
                outcome(scores[..., own, :].to(device()), part, arguments, dist.group.WORLD)
            )
    return results


def wrong_on_one_rank(rank, size, what):
    """Rank 1 passes something else; returns the error of every rank."""
    scores = torch.randn(16, 4, generator=torch.Generator().manual_seed(rank))
    arguments: dict = {"topk": 2, "capacity_factor": 1.5}
    odd = rank == 1
    changes = {
        "topk": {"topk": 3},
        "capacity": {"capacity": torch.tensor([20, 30, 40, 50])},
        "capacity_factor": {"capacity_factor": 2.0},
        "mode": {"mode": "bounded"},
        "prices": {"prices": torch.ones(4)},
        "fill_padding": {"fill_padding": True},
        "bad argument": {"topk": 9},
    }
    if odd and what in changes:
        arguments |= changes[what]
    if odd and what == "dtype":
        scores = scores.double()
    if odd and what == "number of experts":
        scores = scores[:, :3].contiguous()
    if odd and what == "number of problems":
        scores = scores.reshape(2, 8, 4)
    if odd and what == "nan":
        scores[5, 1] = torch.nan
    if odd and what == "few allowed":
        scores[7, 1:] = -torch.inf
    if what == "too little capacity":
        arguments = {"topk": 2, "capacity": 3}
    try:
        solve(scores, group=dist.group.WORLD, **arguments)
    except ValueError as error:
        message = str(error)
    else:
        message = None
    # The group still works.
    dist.all_reduce(torch.ones(1))
    return message


def extreme_scales(rank, size):
    """Scores near the ends of float64 on one rank only."""
    results = []
    for exponents in ((-1000, 0), (1000, 0), (-1000, -990), (-1000, None), (0, 0)):
        z = torch.randn(24, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        scores = z * 2.0 ** exponents[0]
        scores[12:] = 0.0 if exponents[1] is None else z[12:] * 2.0 ** exponents[1]
        own = shares(24, size, "even")[rank]
        with small_samples():
            together = outcome(scores[own].contiguous(), None, {"topk": 2}, dist.group.WORLD)
            alone = outcome(scores, None, {"topk": 2})
        results.append((exponents, together["experts"], alone["experts"][own]))
    return results


def lost_rank(rank, size, how):
    """Rank 1 is stuck or dies before a solve; returns what the others are told, and how soon."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=3))
    if rank == 1:
        if how == "dies":
            os._exit(17)
        time.sleep(12)
        return None
    started = time.monotonic()
    try:
        solve(torch.randn(16, 4), 2, group=group)
    except LostRankError as error:
        return str(error), time.monotonic() - started
    return None


def outliers_in_parts(rank, size, sizes):
    """Solve scores with outliers in parts; return this rank's answer and the whole's."""
    scores = torch.randn(64, 8, generator=torch.Generator().manual_seed(3))
    scores[17] *= 1e11
    scores[60] *= 1e20
    own = scores.split(sizes)[rank]
    # Several problems at once, one of them without outliers.
    batch = torch.stack([scores, scores.clamp(-3, 3)])
    parts = torch.stack([part.split(sizes)[rank] for part in batch])
    found = []
    for mine, whole in ((own, scores), (parts, batch)):
        together, alone = solve(mine, 2, group=dist.group.WORLD), solve(whole, 2)
        first = sum(sizes[:rank])
        wanted = alone.experts[..., first : first + sizes[rank], :]
        found.append(
            (
                torch.equal(together.experts, wanted),
                together.scaled,
                alone.scaled,
                torch.allclose(together.gap, alone.gap, atol=1e-15),
                torch.equal(together.prices, alone.prices),
            )
        )
    return found
