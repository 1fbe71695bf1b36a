"""Exact maximum-score assignment of tokens to experts under capacities."""

from megatron_maxscore.flow.problem import MAX_EXPERTS
from megatron_maxscore.flow.solution import FlowSolution
from megatron_maxscore.flow.solver import solve

__all__ = ["MAX_EXPERTS", "FlowSolution", "solve"]
