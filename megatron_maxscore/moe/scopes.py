"""Whose tokens form one flow problem, and which ranks hold them.

- ``local``: the rank's own, with quotas (:mod:`quotas`).
- ``group``: those of all ranks that share one set of experts, expert times expert-tensor parallel
  (``tp_ep``).
- ``sequence``: every sequence alone, over the ranks among which it is split: tensor parallel with
  sequence parallelism, times context parallel (``tp_cp``).

Without sequence parallelism (evaluation and inference only) tensor-parallel ranks hold copies of
the same tokens. One of them takes part, and the others are told its experts.

Shape letters: see :mod:`megatron_maxscore`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_maxscore.flow import FlowSolution, solve
from megatron_maxscore.flow.exchange import Exchange, exchange_of
from megatron_maxscore.moe.config import MaxScoreConfig
from megatron_maxscore.moe.plan import RoutingPlan, StaticLoads
from megatron_maxscore.moe.quotas import (
    capacities,
    has_quotas,
    own_quotas,
    quotas,
    turns_until_repeat,
)


class Scope:
    """Solves a router's problems over the ranks of its scope.

    Args:
        options: MaxScore's options; scope, mode and capacity factor count.
        pg_collection: Megatron's process groups ``tp``, ``tp_cp`` and ``tp_ep``.
        sequence_parallel: whether tensor-parallel ranks hold different tokens.
        knows_splits: whether the dispatcher is ours. It expects every rank to send what the
            configuration says.
        is_graphed: whether a CUDA graph holds the solves of training. Then nothing in a solve may
            depend on the number of the microbatch.

    Raises:
        ValueError: the collection lacks the group of the scope.
    """

    def __init__(
        self,
        options: MaxScoreConfig,
        pg_collection: Any,
        sequence_parallel: bool,
        knows_splits: bool,
        is_graphed: bool = False,
    ) -> None:
        self.options = options
        self._is_graphed = is_graphed
        self._knows_splits = knows_splits
        self._tp_ep = getattr(pg_collection, "tp_ep", None)
        self.rank = self._tp_ep.rank() if self._tp_ep is not None else 0
        self.ranks = self._tp_ep.size() if self._tp_ep is not None else 1
        self.group: Any = None
        if options.scope == "local":
            return
        name = {"group": "tp_ep", "sequence": "tp_cp"}[options.scope]
        self.group = getattr(pg_collection, name, None)
        if self.group is None:
            raise ValueError(
                f"--maxscore-scope {options.scope} needs the process group {name} in "
                "pg_collection; build the layer with Megatron's whole collection, or use "
                "--maxscore-scope local"
            )
        tp = pg_collection.tp
        self._primary = self.group.rank()
        if tp.size() > 1 and not sequence_parallel:
            ranks = dist.get_process_group_ranks(self.group)
            copies = set(dist.get_process_group_ranks(tp)) & set(ranks)
            self._primary = min(ranks.index(rank) for rank in copies)
        self._has_copies = tp.size() > 1 and not sequence_parallel and self.group.size() > 1
        # Where in the scope's group each rank of tp_ep is, if all of them are in it.
        self._place_R: list[int] | None = None
        if not self._has_copies and self.group.size() > 1 and self._tp_ep is not None:
            ranks = dist.get_process_group_ranks(self.group)
            others = dist.get_process_group_ranks(self._tp_ep)
            if set(others) <= set(ranks):
                self._place_R = [ranks.index(rank) for rank in others]

    def solve(
        self,
        scores_TE: Tensor,
        batch_size: int,
        topk: int,
        prices: Tensor,
        valid_T: Tensor | None,
        turn: int | None,
    ) -> tuple[RoutingPlan, FlowSolution]:
        """Assign this rank's tokens; every rank of the scope's group must call it.

        Args:
            scores_TE: (T, E), rows in Megatron's order: position by position, B sequences each.
            batch_size: B.
            topk: K.
            prices: (E,) warm start, the same on all ranks.
            valid_T: (T,) bool, False = padding, which gets experts too.
            turn: number of the microbatch, the same on all ranks; None outside of training, where
                lengths may differ whatever the configuration says.

        Returns:
            The plan for the dispatcher, and the solution of the problem with these tokens.
        """
        num_tokens, num_experts = scores_TE.shape
        static = self._static(topk, num_experts, turn)
        common: dict[str, Any] = dict(
            prices=prices,
            fill_padding=True,
            mode=self.options.mode,
        )
        if self.options.scope == "local":
            capacity_E = self.capacity(scores_TE, topk, turn)
            solution = solve(scores_TE, topk, capacity=capacity_E, valid=valid_T, **common)
            fits = static is None or num_tokens <= static.num_tokens
            return self._plan(solution.experts, static, None, fits, solution.order), solution
        solution = self._solve_together(scores_TE, batch_size, topk, valid_T, common)
        experts_TK = solution.experts
        if self.options.scope == "sequence":
            experts_TK = experts_TK.transpose(0, 1).reshape(-1, topk)
        if self._has_copies:
            experts_TK = self._of_primary(exchange_of(self.group), experts_TK)
        fits = True
        if static is not None:
            length = num_tokens // batch_size
            most = batch_size * math.ceil(length * topk / num_experts)
            fits = most <= static.num_tokens * topk // num_experts
        order = None if self._has_copies else solution.order
        return self._plan(experts_TK, static, self._loads(solution), fits, order), solution

    def _plan(
        self,
        experts_TK: Tensor,
        static: StaticLoads | None,
        loads_RE: Tensor | None,
        fits: bool,
        order: Tensor | None,
    ) -> RoutingPlan:
        if not self._knows_splits:
            return RoutingPlan(experts_TK)
        num_tokens = None if static is None else static.num_tokens
        return RoutingPlan(experts_TK, order, static, loads_RE, num_tokens, fits)

    def capacity(self, scores_TE: Tensor, topk: int, turn: int | None) -> Tensor:
        """Return the (E,) int64 capacities of this rank's own problem.

        Args:
            scores_TE: (T, E).
            topk: K.
            turn: as for :meth:`solve`.
        """
        num_tokens, num_experts = scores_TE.shape
        static = self._static(topk, num_experts, turn)
        factor = self.options.capacity_factor
        if static is not None and num_tokens <= static.num_tokens:
            return quotas(static.num_tokens, topk, num_experts, self.rank, self.ranks, static.turn)
        if factor == 1.0 and has_quotas(num_tokens, topk, num_experts):
            return own_quotas(topk, scores_TE)
        return capacities(num_tokens, topk, num_experts, self.rank, factor)

    @property
    def _fixed_tokens(self) -> int:
        """Tokens of every microbatch on every rank, 0 if that is not known."""
        return math.prod(self.options.fixed_shape or (0, 0))

    def _static(self, topk: int, num_experts: int, turn: int | None) -> StaticLoads | None:
        """Return the loads that every rank knows in advance, by the configuration alone."""
        if turn is None or self._fixed_tokens == 0 or self.options.capacity_factor != 1.0:
            return None
        assert self.options.fixed_shape is not None
        turns = turns_until_repeat(self._fixed_tokens, topk, num_experts, self.ranks)
        if self._is_graphed:
            is_static = turns == 1
        elif self.options.scope == "local":
            is_static = has_quotas(self._fixed_tokens, topk, num_experts)
        else:
            # Each sequence must be on one rank, and its assignments must divide evenly.
            is_whole = self.options.scope == "sequence" and self.group.size() == 1
            is_static = is_whole and self.options.fixed_shape[0] * topk % num_experts == 0
        # Equal loads have equal names, so that the dispatcher works each out once.
        return StaticLoads(self._fixed_tokens, turn % turns) if is_static else None

    def _solve_together(
        self,
        scores_TE: Tensor,
        batch_size: int,
        topk: int,
        valid_T: Tensor | None,
        common: dict[str, Any],
    ) -> FlowSolution:
        """Solve over the ranks of the scope's group."""
        own = self._primary == self.group.rank()
        scores, valid = scores_TE, valid_T
        if self.options.scope == "sequence":
            scores = scores.reshape(-1, batch_size, scores.shape[1]).transpose(0, 1)
            valid = None if valid is None else valid.reshape(-1, batch_size).T
        if not own:
            scores = scores[..., :0, :]
            valid = None if valid is None else valid[..., :0]
        return solve(
            scores.contiguous(),
            topk,
            capacity_factor=self.options.capacity_factor,
            group=self.group,
            valid=None if valid is None else valid.contiguous(),
            **common,
        )

    def _loads(self, solution: FlowSolution) -> Tensor | None:
        if self.options.scope == "group" and not self._has_copies:
            return solution.loads
        if self._place_R is None:
            return None
        return solution.loads.sum(0)[self._place_R]

    def _of_primary(self, exchange: Exchange, experts_TK: Tensor) -> Tensor:
        """Return the experts from the rank that solved for this rank's tokens; two rounds."""
        experts = experts_TK.cpu().numpy().astype(np.int16)
        sizes = [
            int.from_bytes(data, "little")
            for data in exchange.gather(
                experts.nbytes.to_bytes(8, "little"), phase="numbers of tokens"
            )
        ]
        data = exchange.gather(experts.tobytes(), sizes, phase="experts of copies")[self._primary]
        found = np.frombuffer(data, np.int16).reshape(-1, experts.shape[1])
        return torch.from_numpy(found.astype(np.int64)).to(experts_TK.device)
