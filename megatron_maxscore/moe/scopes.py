"""Whose tokens form one flow problem, and which ranks hold them.

- ``local``: the rank's own, with quotas (:mod:`quotas`).
- ``group``: those of all ranks that share one set of experts, expert times expert-tensor parallel
  (``tp_ep``).
- ``sequence``: every sequence alone, over the ranks among which it is split: tensor parallel with
  sequence parallelism, times context parallel (``tp_cp``).

Without sequence parallelism (evaluation and inference only) tensor-parallel ranks hold copies of
the same tokens. One of them takes part, and the others are told its experts.

Shape letters: T tokens of this rank, S its tokens of each sequence, B sequences, E experts, K
experts per token, R ranks of ``tp_ep``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_maxscore.flow import FlowSolution, solve
from megatron_maxscore.flow.exchange import Exchange, exchange_of
from megatron_maxscore.moe.config import MaxScoreConfig
from megatron_maxscore.moe.quotas import capacities


@dataclass(frozen=True)
class Routed:
    """What a solve gave this rank.

    Attributes:
        experts_TK: (T, K) int64.
        loads_RE: (R, E) int64 what every rank of ``tp_ep`` dispatches, None if not known.
        is_static: whether the loads are the quotas on every rank.
    """

    experts_TK: Tensor
    loads_RE: Tensor | None
    is_static: bool


class Scope:
    """Solves a router's problems over the ranks of its scope.

    Args:
        options: MaxScore's options; scope, mode, capacity factor and tolerance count.
        pg_collection: Megatron's process groups ``tp``, ``tp_cp`` and ``tp_ep``.
        sequence_parallel: whether tensor-parallel ranks hold different tokens.
        has_fixed_lengths: whether every rank has the number of tokens that the configuration says.

    Raises:
        ValueError: the collection lacks the group of the scope.
    """

    def __init__(
        self,
        options: MaxScoreConfig,
        pg_collection: Any,
        sequence_parallel: bool,
        has_fixed_lengths: bool,
    ) -> None:
        self.options = options
        self._tp_ep = getattr(pg_collection, "tp_ep", None)
        self.rank = self._tp_ep.rank() if self._tp_ep is not None else 0
        self._has_fixed_lengths = has_fixed_lengths
        self._may_be_static = options.capacity_factor == 1.0 and has_fixed_lengths
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
        is_training: bool,
    ) -> tuple[Routed, FlowSolution]:
        """Assign this rank's tokens; every rank of the scope's group must call it.

        Args:
            scores_TE: (T, E), rows in Megatron's order: position by position, B sequences each.
            batch_size: B.
            topk: K.
            prices: (E,) warm start, the same on all ranks.
            valid_T: (T,) bool, False = padding, which gets experts too.
            is_training: outside of it lengths may differ whatever the configuration says.
        """
        options = self.options
        common: dict[str, Any] = dict(
            prices=prices, fill_padding=True, tolerance=options.tolerance, mode=options.mode
        )
        num_tokens, num_experts = scores_TE.shape
        if options.scope == "local":
            capacity_E = capacities(
                num_tokens, topk, num_experts, self.rank, options.capacity_factor
            )
            solution = solve(scores_TE, topk, capacity=capacity_E, valid=valid_T, **common)
            return Routed(solution.experts, None, self._may_be_static and is_training), solution
        own = self._primary == self.group.rank()
        scores, valid = scores_TE, valid_T
        if options.scope == "sequence":
            scores = scores.reshape(-1, batch_size, num_experts).transpose(0, 1)
            valid = None if valid is None else valid.reshape(-1, batch_size).T
        if not own:
            scores = scores[..., :0, :]
            valid = None if valid is None else valid[..., :0]
        solution = solve(
            scores.contiguous(),
            topk,
            capacity_factor=options.capacity_factor,
            group=self.group,
            equal_rows=self._has_fixed_lengths and is_training and not self._has_copies,
            valid=None if valid is None else valid.contiguous(),
            **common,
        )
        experts_TK = solution.experts
        if options.scope == "sequence":
            experts_TK = experts_TK.transpose(0, 1).reshape(-1, topk)
        if self._has_copies:
            experts_TK = self._of_primary(exchange_of(self.group), experts_TK)
        return Routed(
            experts_TK,
            self._loads(solution),
            is_training and self._is_static(num_tokens // batch_size, topk, num_experts),
        ), solution

    def _is_static(self, length: int, topk: int, num_experts: int) -> bool:
        """Return whether sequences that this rank has to itself are spread evenly."""
        is_whole = self.options.scope == "sequence" and self.group.size() == 1
        return is_whole and self._may_be_static and length * topk % num_experts == 0

    def _loads(self, solution: FlowSolution) -> Tensor | None:
        if self.options.scope == "group" and not self._has_copies:
            return solution.loads
        if self._place_R is None:
            return None
        return solution.loads.sum(0)[self._place_R]

    def _of_primary(self, exchange: Exchange, experts_TK: Tensor) -> Tensor:
        """Return the experts that the rank with this rank's tokens has got; two rounds."""
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
