"""Independent answers to the routing flow: OR-tools, HiGHS and plain loops."""

from __future__ import annotations

import numpy as np
from ortools.graph.python import min_cost_flow
from scipy import sparse
from scipy.optimize import linprog


def ortools_flow(
    scores_TE: np.ndarray, topk: int, capacity_E: np.ndarray
) -> min_cost_flow.SimpleMinCostFlow:
    """Return the flow problem of integer-valued scores, ready to solve; -inf forbids."""
    num_tokens, num_experts = scores_TE.shape
    rows, columns = np.nonzero(np.isfinite(scores_TE))
    source = num_tokens + num_experts
    sink = source + 1
    experts = num_tokens + np.arange(num_experts)
    tails = np.concatenate([np.full(num_tokens, source), rows, experts])
    heads = np.concatenate(
        [np.arange(num_tokens), num_tokens + columns, np.full(num_experts, sink)]
    )
    capacities = np.concatenate([np.full(num_tokens, topk), np.ones(len(rows)), capacity_E])
    costs = np.concatenate([np.zeros(num_tokens), -scores_TE[rows, columns], np.zeros(num_experts)])
    flow = min_cost_flow.SimpleMinCostFlow()
    flow.add_arcs_with_capacity_and_unit_cost(
        tails, heads, capacities.astype(np.int64), costs.astype(np.int64)
    )
    demand = num_tokens * topk
    flow.set_nodes_supplies(np.array([source, sink]), np.array([demand, -demand]))
    return flow


def ortools_objective(scores_TE: np.ndarray, topk: int, capacity_E: np.ndarray) -> int | None:
    """Return the optimal total of integer-valued scores, None if infeasible; -inf forbids."""
    if scores_TE.shape[0] == 0:
        return 0
    flow = ortools_flow(scores_TE, topk, capacity_E)
    return -flow.optimal_cost() if flow.solve() == flow.OPTIMAL else None


def highs_objective(scores_TE: np.ndarray, topk: int, capacity_E: np.ndarray) -> float:
    """Return the optimum of the linear relaxation, which is integral."""
    num_tokens, num_experts = scores_TE.shape
    index = np.arange(num_tokens * num_experts)
    ones = np.ones(index.size)
    per_token = sparse.csr_matrix((ones, (index // num_experts, index)))
    per_expert = sparse.csr_matrix((ones, (index % num_experts, index)))
    result = linprog(
        -scores_TE.ravel(),
        A_eq=per_token,
        b_eq=np.full(num_tokens, topk),
        A_ub=per_expert,
        b_ub=capacity_E,
        bounds=(0, 1),
        method="highs",
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    assert result.status == 0, result.message
    return -float(result.fun)


def check_assignment(
    experts_TK: np.ndarray, scores_TE: np.ndarray, topk: int, capacity_E: np.ndarray
) -> float:
    """Assert feasibility with a plain loop and return the total score in float64."""
    loads = [0] * scores_TE.shape[1]
    total = 0.0
    for token, chosen in enumerate(experts_TK.tolist()):
        assert len(chosen) == topk and len(set(chosen)) == topk
        values = [float(scores_TE[token, expert]) for expert in chosen]
        assert all(np.isfinite(values)), f"token {token} uses a forbidden arc"
        ranked = [(-value, expert) for value, expert in zip(values, chosen, strict=True)]
        assert ranked == sorted(ranked), "best score first, ties by expert index"
        for expert in chosen:
            loads[expert] += 1
        total += sum(values)
    assert all(load <= cap for load, cap in zip(loads, capacity_E.tolist(), strict=True))
    return total


def bucket_of(bid: int, window: int, num_buckets: int) -> int:
    """Return the bucket of a bid within a window: quarter octaves up to the window's, by loops."""

    def level(size: int) -> int:
        octave = size.bit_length() - 1
        return 4 * octave + int(4 * (size - 2**octave) // 2**octave)

    half = num_buckets // 2
    base = max(level(window + 1) - (half - 1), 0)
    bid = min(bid, window)
    size = bid if bid > 0 else 1 - bid
    step = max(1, min(level(size) - base, half - 1)) if size > 1 else 0
    return half + step if bid > 0 else half - 1 - step
