"""Which rows and arcs the finish looks at; see :mod:`megatron_maxscore.flow.finish`.

A swap lets a row give one expert and take another; it costs the difference of their reduced scores.
``limit`` says up to which cost swaps from one expert to another take part.

Arguments that kernels share, besides those of :mod:`rows`: ``slot_B`` (B,) int64 place of each
problem in the arrays of a stage, -1 for those to leave out; ``limit_FEP`` (F, E, P) int64;
``widest_FE`` (F, E) int64 largest limit of each expert; ``gap_limit_B`` (B,) int64, rows with a
larger gap do not take part; ``stride_B`` (B,) int64, rows whose index is no multiple of it have
only swaps that cost less than the limit, none that cost just as much; ``count_N`` (N,) int64 and
``arcs_NW`` (N, W) int64, how many experts of a row take part and which.

Example: a row has experts 0 and 1 at reduced scores 9 and 7, and lacks expert 2 at 6. With a limit
of 2 for all pairs only the swap from 1 to 2, of cost 1, takes part: two experts, bits 1 and 2.

Shape letters: see :mod:`megatron_maxscore`.
"""

from __future__ import annotations

import numpy as np

from megatron_maxscore.flow.kernels.compiler import jit
from megatron_maxscore.flow.kernels.rows import integer, reduced_row
from megatron_maxscore.flow.kernels.vectors import (
    LANES,
    aligned,
    count_bits,
    exceeding,
    lowest_bit,
    padded,
)
from megatron_maxscore.flow.problem import FORBIDDEN

_HUGE = 1 << 62


@jit
def cheapest(
    scores_NE, low_N, factor_B, prices_BE, x_NE, slot_B, origin_B,
    first_problem, last_problem, first_row_B, last_row_B, least_FGEE,
):  # fmt: skip
    """Lower ``least`` to the cost of the cheapest swap from each expert to each other, by group.

    A row's group is its index in the problem modulo the number of groups.
    """
    num_experts = scores_NE.shape[1]
    r_E, other_E, price_E = aligned(num_experts), aligned(num_experts), aligned(num_experts)
    for problem in range(first_problem, last_problem):
        slot = slot_B[problem]
        if slot < 0:
            continue
        price_E[:] = prices_BE[problem]
        for row in range(first_row_B[problem], last_row_B[problem]):
            reduced_row(scores_NE, low_N[row], factor_B[problem], price_E, row, r_E)
            for expert in range(num_experts):
                other_E[expert] = FORBIDDEN if x_NE[row, expert] else r_E[expert]
            least_EE = least_FGEE[slot, (row - origin_B[problem]) % least_FGEE.shape[1]]
            for gives in range(num_experts):
                if x_NE[row, gives]:
                    value, least_E = r_E[gives], least_EE[gives]
                    for takes in range(num_experts):
                        least_E[takes] = min(least_E[takes], value - other_E[takes])


@jit
def find_contested(
    scores_NE, low_N, factor_B, prices_BE, x_NE, slot_B, limit_FEP, widest_FE, gap_N, gap_limit_B,
    stride_B, origin_B, first_problem, last_problem, first_row_B, last_row_B, count_N, arcs_NW,
):  # fmt: skip
    """Find the experts of each row that swaps within their limits can give or take.

    Writes how many, and which as bits of one int64 for every 64 experts.
    """
    num_experts, num_words = scores_NE.shape[1], arcs_NW.shape[1]
    r_P = aligned(padded(num_experts))
    r_P[:] = 2 * FORBIDDEN
    r_E, price_E = r_P[:num_experts], aligned(num_experts)
    held_W = np.empty(num_words, np.int64)
    for problem in range(first_problem, last_problem):
        price_E[:] = prices_BE[problem]
        slot, stride, gap_limit = slot_B[problem], stride_B[problem], gap_limit_B[problem]
        for row in range(first_row_B[problem], last_row_B[problem]):
            count_N[row] = 0
            # 1 for a row that has only swaps below the limits.
            below = np.int64((row - origin_B[problem]) % stride != 0)
            if slot < 0 or gap_N[row] > gap_limit - below:
                continue
            reduced_row(scores_NE, low_N[row], factor_B[problem], price_E, row, r_E)
            limit_EP, widest_E, arcs_W = limit_FEP[slot], widest_FE[slot], arcs_NW[row]
            most = np.int64(-_HUGE)
            for expert in range(num_experts):
                most = max(most, np.int64(-_HUGE) if x_NE[row, expert] else r_E[expert])
            for word in range(num_words):
                held = np.int64(0)
                for expert in range(64 * word, min(64 * word + 64, num_experts)):
                    held |= np.int64(x_NE[row, expert]) << (expert & 63)
                held_W[word], arcs_W[word] = held, 0
            for held_word in range(num_words):
                held = held_W[held_word]
                while held:
                    gives = 64 * held_word + lowest_bit(held)
                    held &= held - 1
                    value = r_E[gives]
                    if value - most > widest_E[gives] - below:
                        continue
                    found = np.int64(0)
                    for word in range(num_words):
                        takers = np.int64(0)
                        for place in range(64 * word, min(64 * word + 64, r_P.shape[0]), LANES):
                            near = exceeding(r_P, limit_EP[gives], place, value - 1 + below)
                            takers |= near << (place - 64 * word)
                        takers &= ~held_W[word]
                        found |= takers
                        arcs_W[word] |= takers
                    arcs_W[held_word] |= np.int64(found != 0) << (gives & 63)
            for word in range(num_words):
                count_N[row] += count_bits(arcs_W[word])


@jit
def extract(
    scores_NE, low_N, factor_B, prices_BE, x_NE, arcs_NW, problem_C, row_C, first_C, first, last,
    expert_A, value_A, held_A,
):  # fmt: skip
    """Write down the arcs of contested rows."""
    for index in range(first, last):
        row, problem = row_C[index], problem_C[index]
        low, factor = low_N[row], factor_B[problem]
        arc = first_C[index]
        for word in range(arcs_NW.shape[1]):
            arcs = arcs_NW[row, word]
            while arcs:
                expert = 64 * word + lowest_bit(arcs)
                arcs &= arcs - 1
                expert_A[arc] = expert
                value_A[arc] = integer(scores_NE[row, expert], low, factor)
                value_A[arc] -= prices_BE[problem, expert]
                held_A[arc] = x_NE[row, expert]
                arc += 1


@jit
def count_swaps(first_B, first_C, held_A):
    """Return (B,) int64 how many swaps rows have: pairs of an arc they hold and one they do not."""
    swaps_B = np.zeros(first_B.shape[0] - 1, np.int64)
    for problem in range(swaps_B.shape[0]):
        for row in range(first_B[problem], first_B[problem + 1]):
            held = 0
            for arc in range(first_C[row], first_C[row + 1]):
                held += np.int64(held_A[arc])
            swaps_B[problem] += held * (first_C[row + 1] - first_C[row] - held)
    return swaps_B


@jit
def apply(row_C, first_C, expert_A, held_A, first, last, x_NE):
    """Write what contested rows have into the assignment."""
    for index in range(first, last):
        row = row_C[index]
        for arc in range(first_C[index], first_C[index + 1]):
            x_NE[row, expert_A[arc]] = held_A[arc]
