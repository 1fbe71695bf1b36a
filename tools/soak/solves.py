"""Part solves: random problems of every kind, each checked, every tenth against OR-tools.

A chunk is a thousand problems drawn from one seed, so a chunk that is recorded is not repeated.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_maxscore.flow import FlowSolution, solve
from tools.benchmarks.oracles import ortools_objective

CHUNK = 1000
# Every so many problems have integer scores, whose optimum OR-tools finds exactly.
EVERY = 10
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FAMILIES = ("normal", "ties", "repeated", "softmax", "constant", "scales", "skewed")
# Relative gap that rounding may leave, by the dtype in which scores are evaluated.
LARGEST_GAP = 1e-9


@dataclass
class Problem:
    """Arguments of one solve.

    Attributes:
        kind: what was drawn, for messages.
        scores: (B, S, E), or (S, E) if it is not a batch.
        topk: k.
        capacity: None, an int, or (E,) int64.
        factor: capacity factor, used without a capacity.
        prices: warm start, or None.
        valid: (B, S) or (S,) bool, or None.
        fill: whether padding gets experts.
        is_whole: whether scores are integers.
    """

    kind: str
    scores: Tensor
    topk: int
    capacity: Any
    factor: float
    prices: Tensor | None
    valid: Tensor | None
    fill: bool
    is_whole: bool


def draw(generator: np.random.Generator, is_whole: bool) -> Problem:
    """Draw one problem."""
    pick = generator.choice
    experts = int(
        pick([2, 3, 4, 7, 8, 16, 24, 33, 64], p=[0.1, 0.1, 0.15, 0.1, 0.2, 0.15, 0.1, 0.05, 0.05])
    )
    topk = int(generator.integers(1, min(experts, 8) + 1))
    rows = int(pick([1, 2, 5, 12, 40, 96, 300], p=[0.05, 0.05, 0.15, 0.25, 0.25, 0.2, 0.05]))
    batch = int(generator.integers(2, 5)) if generator.random() < 0.2 else 0
    dtype = DTYPES[generator.integers(len(DTYPES))]
    family = str(pick(FAMILIES))
    shape = (max(batch, 1), rows, experts)
    z = generator.normal(size=shape)
    if family == "ties":
        z = generator.integers(-3, 4, shape).astype(float)
    elif family == "repeated":
        z = z[:, generator.integers(0, max(rows // 5, 1), rows)]
    elif family == "softmax":
        z = np.exp(6 * z)
        z /= z.sum(-1, keepdims=True)
    elif family == "constant":
        z = np.full(shape, 0.25)
    elif family == "scales":
        z = z * 10.0 ** generator.uniform(-3, 3, (shape[0], rows, 1))
    elif family == "skewed":
        z = z + 4 * generator.normal(size=experts)
    if is_whole:
        # All of these dtypes hold integers up to 128 exactly.
        z = np.clip(np.round(z * (1 if family in ("ties", "scales") else 20)), -128, 128)
    forbids = generator.random() < 0.15
    if forbids:
        keep = generator.permuted(np.broadcast_to(np.arange(experts), shape), axis=-1) < topk
        z = np.where(keep | (generator.random(shape) < 0.7), z, -np.inf)
    scores = torch.from_numpy(z).to(dtype)
    valid, fill = None, False
    if generator.random() < 0.25:
        valid = torch.from_numpy(generator.random(shape[:2]) < 0.8)
        fill = bool(generator.random() < 0.5)
    capacity, factor = None, float(pick([1.0, 1.02, 1.25, 2.0]))
    choice = generator.random()
    if choice < 0.2:
        capacity = int(generator.integers(1, rows + 2))
    elif choice < 0.5:
        # Enough for the largest problem, exactly so half of the time.
        demand, drawn = rows * topk, generator.integers(0, rows + 1, experts)
        while drawn.sum() < demand:
            drawn[generator.integers(experts)] = rows
        while generator.random() < 0.95 and drawn.sum() > demand:
            expert = generator.integers(experts)
            drawn[expert] = max(drawn[expert] - (drawn.sum() - demand), 0)
        capacity = torch.from_numpy(drawn.astype(np.int64))
    prices = None
    if generator.random() < 0.4:
        size = (experts,) if not batch or generator.random() < 0.5 else (batch, experts)
        prices = torch.from_numpy(generator.normal(size=size) * 10.0 ** generator.uniform(-3, 3))
        prices = prices.float()
    kind = f"{family} {shape} k {topk} {dtype} forbids {forbids} fill {fill} factor {factor}"
    if not batch:
        scores, valid = scores[0], None if valid is None else valid[0]
    return Problem(kind, scores, topk, capacity, factor, prices, valid, fill, is_whole)


def capacities(problem: Problem, tokens: int) -> np.ndarray:
    """Return the (E,) capacities that a problem of so many tokens has."""
    experts = problem.scores.shape[-1]
    if problem.capacity is None:
        each = int(np.ceil(tokens * problem.topk * problem.factor / experts - 1e-12))
        return np.full(experts, each)
    if isinstance(problem.capacity, int):
        return np.full(experts, problem.capacity)
    return np.asarray(problem.capacity)


def check_feasible(
    problem: Problem, scores_SE: Tensor, valid_S: Tensor | None, experts_SK: Tensor
) -> float:
    """Check one problem's assignment; return its total score.

    Raises:
        AssertionError: a row has other than k distinct experts, an expert is over its capacity, a
            forbidden arc is used, or padding is not as asked for.
    """
    values = scores_SE.double().numpy()
    chosen, real = experts_SK.numpy(), np.ones(len(values), bool)
    if valid_S is not None:
        real = valid_S.numpy()
        if not problem.fill:
            assert (chosen[~real] == -1).all(), "padding without experts"
    used = chosen if problem.fill else chosen[real]
    assert (used >= 0).all() and (used < values.shape[1]).all(), "every row has experts"
    in_order = np.sort(used, axis=1)
    assert (in_order[:, 1:] != in_order[:, :-1]).all(), "experts of a row are distinct"
    loads = np.bincount(used.ravel(), minlength=values.shape[1])
    tokens = len(values) if problem.fill else int(real.sum())
    assert (loads <= capacities(problem, tokens)).all(), "no expert is over its capacity"
    taken = np.take_along_axis(values[real], chosen[real], axis=1)
    assert np.isfinite(taken).all(), "no forbidden arc is used"
    return float(taken.sum())


def optimum(problem: Problem, scores_SE: Tensor, valid_S: Tensor | None) -> int | None:
    """Return OR-tools' optimum of integer scores, None if there is no assignment."""
    values = scores_SE.double().numpy().copy()
    if valid_S is not None:
        real = valid_S.numpy()
        if problem.fill:
            values[~real] = 0.0
        else:
            values = values[real]
    room = np.minimum(capacities(problem, len(values)), max(len(values), 0))
    return ortools_objective(values, problem.topk, room)


def check(problem: Problem) -> dict[str, Any]:
    """Solve one problem and check it; return what is counted.

    Raises:
        AssertionError: something does not hold; has what was drawn.
    """
    parts = [problem.scores] if problem.scores.dim() == 2 else list(problem.scores)
    masks: list[Tensor | None] = [None] * len(parts)
    if problem.valid is not None:
        masks = [problem.valid] if problem.scores.dim() == 2 else list(problem.valid)
    try:
        solution: FlowSolution | None = solve(
            problem.scores, problem.topk, problem.capacity, problem.factor, problem.prices,
            valid=problem.valid, fill_padding=problem.fill,
        )  # fmt: skip
    except ValueError as error:
        if "assignment" not in str(error):
            raise AssertionError(f"{problem.kind}: {error}") from error
        solution = None
    pairs = list(zip(parts, masks, strict=True))
    if solution is None:
        # OR-tools must find no assignment either. That does not depend on scores, so they become 0.
        whole = [torch.nan_to_num(part * 0, nan=-torch.inf) for part, _ in pairs]
        found = [optimum(problem, z, m) for z, (_, m) in zip(whole, pairs, strict=True)]
        assert None in found, f"{problem.kind}: refused, and there is an assignment"
        return {"infeasible": 1}
    experts = [solution.experts] if problem.scores.dim() == 2 else list(solution.experts)
    objective = torch.atleast_1d(solution.objective).tolist()
    gap = torch.atleast_1d(solution.gap).tolist()
    try:
        for (part, mask), chosen, total in zip(pairs, experts, objective, strict=True):
            own = check_feasible(problem, part, mask, chosen)
            scale = max(abs(own), 1.0)
            if problem.valid is None or not problem.fill:
                assert abs(own - total) <= 1e-9 * scale, f"objective {total}, the sum is {own}"
            if problem.is_whole:
                best = optimum(problem, part, mask)
                assert best is not None and own == best, f"total {own}, OR-tools has {best}"
        assert max(gap) <= LARGEST_GAP, f"gap {max(gap)}"
    except AssertionError as error:
        raise AssertionError(f"{problem.kind}: {error}") from error
    return {"optimal": int(problem.is_whole), "gap": max(gap)}


def run_chunk(chunk: int, count: int = CHUNK) -> dict[str, Any]:
    """Solve and check a chunk's problems; return its line of results."""
    generator = np.random.default_rng([27, chunk])
    started = time.monotonic()
    line: dict[str, Any] = {
        "part": "solves", "chunk": chunk, "solves": count, "compared": 0, "infeasible": 0,
        "largest_gap": 0.0, "failures": [],
    }  # fmt: skip
    for number in range(count):
        problem = draw(generator, number % EVERY == 0)
        try:
            found = check(problem)
        except AssertionError as error:
            line["failures"].append(f"{number}: {error}")
            continue
        line["compared"] += found.get("optimal", 0)
        line["infeasible"] += found.get("infeasible", 0)
        line["largest_gap"] = max(line["largest_gap"], found.get("gap", 0.0))
    line["seconds"] = round(time.monotonic() - started, 1)
    return line
