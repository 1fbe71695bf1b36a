"""What a router keeps between its calls: prices, and what its passes have added up.

All of it is in tensors that keep their place, so that a CUDA graph which holds a call adds to them
whenever it is replayed. A training loop says when a global batch begins and ends.

Shape letters: see :mod:`megatron_maxscore`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_maxscore.moe import metrics
from megatron_maxscore.moe.capture import is_capturing
from megatron_maxscore.moe.config import MaxScoreConfig
from megatron_maxscore.moe.context import RUN
from megatron_maxscore.moe.counting import Pass, SolveStatistics
from megatron_maxscore.moe.recording import ScoreRecorder

# Name of the buffer of running average prices, also in checkpoints.
PRICES_NAME = "expert_prices"
# Stock's name for what is added to scores when experts are chosen.
BIAS_NAME = "expert_bias"
# Buffers that are never saved.
_SUMS = ("price_sum", "pending_prices", "anneal_factor")


class PricedRouter(TopKRouter):
    """Megatron's router with prices, and with counts of its passes.

    With ``moe_router_enable_expert_bias`` the prices are kept in Megatron's ``expert_bias``, as the
    largest price minus each, so that checkpoints serve stock routers as they are.

    Args:
        config: TransformerConfig.
        options: MaxScore's.
        pg_collection: Megatron's process groups.
        is_mtp_layer: whether this router belongs to a multi-token-prediction layer.
    """

    expert_prices: Tensor | None
    expert_bias: Tensor | None
    price_sum: Tensor
    pending_prices: Tensor
    anneal_factor: Tensor
    enable_expert_bias: bool

    def __init__(
        self,
        config: Any,
        options: MaxScoreConfig,
        pg_collection: Any = None,
        is_mtp_layer: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, pg_collection, is_mtp_layer, **kwargs)
        self.options = options
        zeros_E = torch.zeros(
            config.num_moe_experts, dtype=torch.float32, device=self.weight.device
        )
        # With Megatron's expert bias the prices live there.
        self.register_buffer(PRICES_NAME, None if self.enable_expert_bias else zeros_E)
        # Sum over the counted passes of the current global batch; never saved.
        self.register_buffer("price_sum", zeros_E.clone(), persistent=False)
        # What the prices become when the optimizer has taken its step.
        self.register_buffer("pending_prices", zeros_E.clone(), persistent=False)
        # Of all gates of a token but the largest.
        self.register_buffer("anneal_factor", zeros_E.new_ones(()), persistent=False)
        # Whether there are no prices to start from; until a global batch has ended.
        self.is_cold = True
        # Of the attempt at a global batch that is under way, and of the last one that has ended.
        self.statistics = SolveStatistics.zeros(self.weight.device, len(metrics.NAMES))
        self.last_statistics = self.statistics.take()
        self._batches = 0
        self._recorder: ScoreRecorder | None = None
        if options.record_dir is not None:
            self._recorder = ScoreRecorder(
                options.record_dir, options.record_layers, options.record_steps
            )

    @property
    def prices(self) -> Tensor:
        """(E,) float32 running averages of the prices, up to a constant."""
        if self.expert_prices is not None:
            return self.expert_prices
        assert self.expert_bias is not None
        return -self.expert_bias

    @property
    def price_count(self) -> Tensor:
        """0-dim int64, how many passes of the current global batch are in ``price_sum``."""
        return self.statistics.solves

    def set_prices(self, prices_E: Tensor) -> None:
        """Set the (E,) float32 prices."""
        if self.expert_prices is not None:
            self.expert_prices.copy_(prices_E)
        else:
            assert self.expert_bias is not None
            # No bias may be negative: converted models give experts of other groups a score of 0.
            self.expert_bias.copy_(prices_E.max() - prices_E)

    def _apply_expert_bias(self, *args: Any, **kwargs: Any) -> None:
        """Count no tokens: Megatron's rule then leaves the bias as it is, and prices set it."""

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Load; where a state has no prices they start at zero."""
        # Prices may be of logits, and a bias is of scores: none is made of the other.
        own, other = PRICES_NAME, BIAS_NAME
        if self.expert_prices is None:
            own, other = other, own
        state_dict.pop(prefix + other, None)
        if prefix + own not in state_dict:
            state_dict[prefix + own] = torch.zeros_like(self.prices)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.is_cold = not bool(self.prices.any())

    def _maintain_float32_expert_bias(self) -> None:
        """Keep prices in float32 when a half-precision wrapper has converted the module."""
        super()._maintain_float32_expert_bias()
        for name in (PRICES_NAME, *_SUMS):
            buffer = getattr(self, name, None)
            if buffer is not None and buffer.dtype != torch.float32:
                buffer.data = buffer.data.float()

    @property
    def is_frozen(self) -> bool:
        """Whether prices stay as they are, as Megatron's expert bias does then."""
        return getattr(self, "frozen_expert_bias", False) or not self.weight.requires_grad

    def begin_batch(self) -> None:
        """Begin a global batch: forget passes that were not part of one, as a graph's warm-up."""
        self.price_sum.zero_()
        self.statistics.clear()
        self.pending_prices.copy_(self.prices)
        self._anneal()

    def end_attempt(self, pending_E: Tensor) -> None:
        """End an attempt at a global batch, in place; the next one starts from the same prices.

        Args:
            pending_E: (E,) float32 what prices become if the optimizer takes its step.
        """
        self.pending_prices.copy_(pending_E)
        self.last_statistics = self.statistics.take()
        self.price_sum.zero_()
        if self._recorder is not None:
            self._recorder.end_attempt()

    def _place(self) -> metrics.Place:
        number = self.layer_number
        num_layers = self.config.num_layers + (self.config.mtp_num_layers or 0)
        if number is not None and self.is_mtp_layer:
            number += self.config.num_layers
        return metrics.Place(number, num_layers, self.tp_dp_cp_group, self.prices.device)

    def end_batch(self, has_stepped: bool = True) -> None:
        """End a global batch: take the pending prices, if the optimizer has taken its step."""
        if has_stepped and not self.is_frozen:
            self.set_prices(self.pending_prices)
        self.is_cold = self.is_cold and not has_stepped
        metrics.hand_in(self, self._place(), self.last_statistics)
        self._batches += 1

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Move statistics with the module; if they were buffers their type would change too."""
        was_on_meta = self.price_sum.is_meta
        result = super()._apply(*args, **kwargs)
        if was_on_meta and not self.price_sum.is_meta:
            # Memory that may hold anything.
            for name in (PRICES_NAME, BIAS_NAME, *_SUMS):
                if getattr(self, name) is not None:
                    getattr(self, name).zero_()
        self.statistics = self.statistics.to(self.weight.device)
        self.last_statistics = self.last_statistics.to(self.weight.device)
        return result

    def _iteration(self) -> int:
        """Return the number of the current global batch, the same on all ranks."""
        return self._batches + 1 if RUN.iteration is None else RUN.iteration()

    def _anneal(self) -> None:
        """Set the annealing factor; a graph reads what was set before it is replayed."""
        if self.options.anneal_steps and not is_capturing():
            factor = max(4.0 - 3.0 * self._step() / self.options.anneal_steps, 1.0)
            self.anneal_factor.fill_(factor)

    def _step(self) -> float:
        """Return how many optimizer steps were taken before this one.

        Without Megatron's training loop this router counts its own global batches, from when it was
        built. In evaluation it then counts as trained to the end.
        """
        if RUN.iteration is not None:
            return RUN.iteration() - 1
        return self._batches if self.training else math.inf

    def _count(self, pass_: Pass, gradient: Tensor) -> None:
        """Add a pass, whose backward pass runs, to prices and statistics, once."""
        if pass_.has_counted:
            return
        pass_.has_counted = True
        self.statistics.add(pass_)
        with torch.no_grad():
            self.price_sum += pass_.prices_E
