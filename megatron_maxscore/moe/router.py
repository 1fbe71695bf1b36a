"""``MaxScoreRouter``: Megatron's top-k router with its choice of experts replaced by the flow.

The choice enters at one seam: Megatron's routing function asks ``router_replay`` for indices and
gates, if the router has one. Everything else, the losses, jitter, dtypes, metrics and genuine
replay, stays Megatron's.

Shape letters: T tokens of this rank, E experts, K experts per token.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel.random import is_checkpointing
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_maxscore.flow.device import is_device
from megatron_maxscore.moe import metrics, recording
from megatron_maxscore.moe.config import (
    VARIABLE_LENGTHS,
    MaxScoreConfig,
    check_transformer_config,
)
from megatron_maxscore.moe.evaluation import uses_flow
from megatron_maxscore.moe.plan import RoutingPlan
from megatron_maxscore.moe.quotas import capacities
from megatron_maxscore.moe.recording import ScoreRecorder
from megatron_maxscore.moe.scopes import Routed, Scope
from megatron_maxscore.ops import soft_topk

# Name of the buffer of running average prices, also in checkpoints.
PRICES_NAME = "expert_prices"
# Stock's name for what is added to scores when experts are chosen.
BIAS_NAME = "expert_bias"


@dataclass
class SolveStatistics:
    """What a router's solves did since the last reset.

    Attributes:
        solves: how many.
        seconds: of the host in them.
        largest_gap: a 0-dim tensor where it is still on the device.
        bad_tokens: likewise.
    """

    solves: int = 0
    seconds: float = 0.0
    largest_gap: float | Tensor = 0.0
    bad_tokens: int | Tensor = 0

    def see_gap(self, gap: Tensor) -> None:
        """Take a solve's gap into account; in place, since a captured graph keeps the place."""
        if not is_device(gap):
            self.largest_gap = max(float(self.largest_gap), float(gap))
        elif isinstance(self.largest_gap, Tensor):
            torch.maximum(self.largest_gap, gap, out=self.largest_gap)
        else:
            self.largest_gap = gap.clamp(min=self.largest_gap)

    def see_bad(self, count: Tensor) -> None:
        """Add a number of bad tokens, likewise."""
        if not is_device(count):
            self.bad_tokens += int(count)
        elif isinstance(self.bad_tokens, Tensor):
            self.bad_tokens.add_(count)
        else:
            self.bad_tokens = count + self.bad_tokens

    def forget_solves(self) -> None:
        """Begin to count solves anew."""
        self.solves, self.seconds = 0, 0.0
        if isinstance(self.largest_gap, Tensor):
            self.largest_gap.zero_()
        else:
            self.largest_gap = 0.0

    def forget_bad(self) -> None:
        """Begin to count bad tokens anew."""
        if isinstance(self.bad_tokens, Tensor):
            self.bad_tokens.zero_()
        else:
            self.bad_tokens = 0


def _with_pre_softmax(config: Any) -> Any:
    """Return the same config seen with ``moe_router_pre_softmax``.

    The config is shared by all layers and by whoever changes it later (an annealed loss
    coefficient, padding in decoding): so not a copy, but an object with the same attributes.
    """
    name = "moe_router_pre_softmax"
    # A property comes before the attribute of the same name.
    seen = property(lambda self: True, lambda self, value: self.__dict__.update({name: value}))
    # Copies and pickles are views again, of the copied config.
    again = lambda self: (_with_pre_softmax, (config,))  # noqa: E731
    members = {name: seen, "__reduce__": again, "__reduce_ex__": lambda self, _: again(self)}
    view_class = type(type(config).__name__, (type(config),), members)
    view = object.__new__(view_class)
    view.__dict__ = config.__dict__
    return view


class _Selector:
    """Stands in ``router_replay``'s place and answers Megatron's question for the top k.

    A genuine replay, if configured, is asked first and falls back on the flow.
    """

    def __init__(self, router: MaxScoreRouter, replay: Any) -> None:
        self._select = router._select
        self.replay = replay
        self._layer_number: int | None = None

    @property
    def layer_number(self) -> int | None:
        return self._layer_number

    @layer_number.setter
    def layer_number(self, value: int) -> None:
        self._layer_number = value
        if self.replay is not None:
            self.replay.layer_number = value

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the gates (T, K) and the experts (T, K) int64 for Megatron's scores (T, E)."""
        return self._select(scores, self.replay)


class MaxScoreRouter(TopKRouter):
    """Router whose assignment is the maximum-score flow.

    In training every token gets exactly k experts and no expert more than its capacity. In
    evaluation each token takes the k largest of score minus price on its own, with prices averaged
    over training (:attr:`expert_prices`); gates are never changed by prices.

    In scope ``local`` it communicates nothing. In scopes ``group`` and ``sequence`` every solve
    exchanges counts and a few rows between the ranks of ``tp_ep`` or ``tp_cp``, which must route
    together.

    Args:
        config: TransformerConfig.
        pg_collection: Megatron's process groups; ``tp_ep`` gives the rank that rotates quotas.
        is_mtp_layer: whether this router belongs to a multi-token-prediction layer.
        maxscore: options; None reads the ``maxscore_*`` fields of ``config``.
        plan: shared with the layer's dispatcher.

    Raises:
        ValueError: the configuration cannot be combined with MaxScore routing.
    """

    expert_prices: Tensor

    def __init__(
        self,
        config: Any,
        pg_collection: Any = None,
        is_mtp_layer: bool = False,
        *,
        maxscore: MaxScoreConfig | None = None,
        plan: RoutingPlan | None = None,
        **kwargs: Any,
    ) -> None:
        options = maxscore or MaxScoreConfig.from_transformer_config(config)
        check_transformer_config(config, options)
        if options.gate == "soft_topk":
            # With softmax before the selection Megatron passes gates on as they are; otherwise it
            # renormalises them over the chosen experts.
            config = _with_pre_softmax(config)
        super().__init__(config, pg_collection, is_mtp_layer, **kwargs)
        self.options = options
        self.temperature = options.temperature_for(config)
        self.plan = plan or RoutingPlan()
        has_fixed_lengths = not any(getattr(config, name, False) for name in VARIABLE_LENGTHS)
        self.scope = Scope(options, pg_collection, config.sequence_parallel, has_fixed_lengths)
        self.statistics = SolveStatistics()
        self.router_replay = _Selector(self, self.router_replay)
        self.register_buffer(
            PRICES_NAME,
            torch.zeros(config.num_moe_experts, dtype=torch.float32, device=self.weight.device),
        )
        # Sum over the solves of the current global batch, and their number; never saved.
        self.register_buffer("price_sum", torch.zeros_like(self.expert_prices), persistent=False)
        self.price_count = 0
        # Assignments of checkpointed forward passes, one per microbatch, for their recomputation.
        self._forwarded: deque[Routed] = deque()
        self._logits: Tensor | None = None
        self._padding: Tensor | None = None
        self._batch_size = 1
        self._batches = 0
        self._recorder: ScoreRecorder | None = None
        if self.options.record_dir is not None:
            self._recorder = ScoreRecorder(
                self.options.record_dir, self.options.record_layers, self.options.record_steps
            )

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Route (S, B, E) logits; see the base class.

        Returns:
            probs (T, E) of the logits' dtype, 0 where not routed, and routing_map (T, E) bool with
            exactly k per row.
        """
        # The first pipeline stage slices the mask for sequence parallelism, others get it whole.
        num_tokens = logits.shape[0] * logits.shape[1]
        if padding_mask is not None and padding_mask.numel() != num_tokens:
            padding_mask = self._own_part(padding_mask, num_tokens)
        self._padding = None if padding_mask is None else padding_mask.reshape(-1)
        self._batch_size = logits.shape[1]
        logits = self._without_bad_scores(logits)
        probs, routing_map = super().routing(logits, padding_mask=padding_mask, **kwargs)
        self._logits = self._padding = None
        self.plan.routing_map = routing_map
        return probs, routing_map

    def apply_z_loss(self, logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Note the logits that carry the z-loss: gates must be made of them, or it is lost."""
        self._logits = super().apply_z_loss(logits, *args, **kwargs)
        return self._logits

    def _own_part(self, padding_mask: Tensor, num_tokens: int) -> Tensor:
        ranks = self.tp_group.size()
        if padding_mask.numel() != num_tokens * ranks:
            raise ValueError(
                f"padding_mask has {padding_mask.numel()} tokens, the router {num_tokens}"
            )
        return padding_mask.chunk(ranks, dim=0)[self.tp_group.rank()]

    def _without_bad_scores(self, logits: Tensor) -> Tensor:
        """Replace non-finite logits by 0 and count their tokens.

        Raising here would leave the other ranks waiting in the all-to-all; the count is reduced
        over all ranks before the optimizer step, which then fails everywhere.
        """
        finite = torch.isfinite(logits.detach())
        # On a device the answer stays there: waiting for it would hold up every layer.
        if not is_device(finite) and bool(finite.all()):
            return logits
        # Evaluation takes no step, and recomputation sees the same scores a second time.
        if self.training and self._recompute_pass() != "again":
            bad_T = ~finite.all(-1).reshape(-1)
            if self._padding is not None:
                bad_T = bad_T & ~self._padding
            self.statistics.see_bad(bad_T.sum())
        return torch.where(finite, logits, 0.0)

    def _select(self, scores_TE: Tensor, replay: Any) -> tuple[Tensor, Tensor]:
        assert self._logits is not None
        logits_TE = self._logits
        wide_TE = logits_TE if logits_TE.dtype == torch.float64 else logits_TE.float()
        if self.options.gate == "soft_topk":
            gates_TE = soft_topk(wide_TE, self.topk, self.temperature, self.options.variant)
            if scores_TE.dtype in (torch.bfloat16, torch.float16):
                # Up to 0.17 gates are scattered into a tensor of the logits' dtype.
                gates_TE = gates_TE.to(scores_TE.dtype)
        else:
            gates_TE = scores_TE

        pass_ = self._recompute_pass()

        def choose(
            scores: Tensor, topk: int, num_groups: int | None = None, group_topk: int | None = None
        ) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                experts_TK = self._experts(self._objective(wide_TE, gates_TE), pass_)
            return scores.gather(1, experts_TK), experts_TK

        if replay is None:
            gates_TK, experts_TK = choose(gates_TE, self.topk)
        else:
            # Replayed experts need not meet the quotas; choose() says so when it is asked instead.
            self.plan.forget()
            gates_TK, experts_TK = replay.get_replay_topk(gates_TE, self.topk, None, None, choose)
        return self._shaped(gates_TK), experts_TK

    def _shaped(self, gates_TK: Tensor) -> Tensor:
        """Return the chosen experts' gates, annealed and normalised if that is asked for."""
        if self.options.anneal_steps:
            factor = max(4.0 - 3.0 * self._step() / self.options.anneal_steps, 1.0)
            is_largest_TK = torch.zeros_like(gates_TK, dtype=torch.bool).scatter_(
                1, gates_TK.detach().argmax(1, keepdim=True), True
            )
            gates_TK = torch.where(is_largest_TK, gates_TK, gates_TK * factor)
        if self.options.normalize_gates:
            tiny = torch.finfo(gates_TK.dtype).tiny
            gates_TK = gates_TK / gates_TK.sum(1, keepdim=True).clamp(min=tiny)
        return gates_TK

    def _step(self) -> float:
        """Return how many optimizer steps were taken before this one.

        Without Megatron's training loop nobody keeps count but this router, since it was built; in
        evaluation it then counts as trained to the end.
        """
        if recording.iteration_source is not None:
            return recording.iteration_source() - 1
        return self._batches if self.training else math.inf

    def _recompute_pass(self) -> str | None:
        """Return "first" or "again" inside activation recomputation, else None."""
        # A repeated MTP layer recomputes its calls in reverse order, so it solves again.
        if not self.training or not is_checkpointing() or self.is_mtp_layer:
            return None
        return "again" if torch.is_grad_enabled() else "first"

    def _objective(self, logits_TE: Tensor, gates_TE: Tensor) -> Tensor:
        """Return what the flow maximises, (T, E)."""
        if self.options.objective == "logits":
            return logits_TE
        if self.options.gate == "score" and self.score_function == "softmax":
            # Without pre-softmax the seam hands over logits.
            return torch.softmax(logits_TE, dim=-1)
        return gates_TE

    def _experts(self, scores_TE: Tensor, recompute_pass: str | None) -> Tensor:
        """Return the (T, K) int64 experts by the rule in force."""
        if not self.training and not uses_flow(self.options.eval_routing):
            self.plan.forget()
            biased_TE = scores_TE - self.expert_prices.to(scores_TE.dtype)
            return biased_TE.topk(self.topk, dim=1).indices
        if recompute_pass == "again" and self._forwarded:
            routed = self._forwarded.popleft()
        else:
            routed = self._solve(scores_TE)
            if recompute_pass == "first":
                self._forwarded.append(routed)
        self.plan.has_static_quotas, self.plan.loads_RE = routed.is_static, routed.loads_RE
        self.plan.experts_TK = routed.experts_TK
        return routed.experts_TK

    def _solve(self, scores_TE: Tensor) -> Routed:
        valid_T = None if self._padding is None else ~self._padding
        if self._recorder is not None and self.training:
            source = recording.iteration_source
            iteration = self._batches + 1 if source is None else source()
            num_tokens, num_experts = scores_TE.shape
            capacity_E = capacities(
                num_tokens, self.topk, num_experts, self.scope.rank, self.options.capacity_factor
            )
            self._recorder.record(
                self.layer_number or 0, iteration, scores_TE, self.topk, capacity_E,
                self.expert_prices, valid_T,
            )  # fmt: skip
        started = time.perf_counter()
        routed, solution = self.scope.solve(
            scores_TE, self._batch_size, self.topk, self.expert_prices, valid_T, self.training
        )
        if self.training:
            seconds = time.perf_counter() - started
            metrics.record(self, scores_TE, routed.experts_TK, valid_T, solution, seconds)
            self.statistics.seconds += seconds
            self.statistics.solves += 1
            self.statistics.see_gap(solution.gap.max())
            self.price_sum += solution.prices.reshape(-1, self.price_sum.numel()).mean(0)
            self.price_count += 1
        return routed

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save; minus the prices too, as a stock router's bias, if that is asked for."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.options.export_bias:
            destination[prefix + BIAS_NAME] = -self.expert_prices.detach()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Load; a state of a stock router has no prices, they then start at zero."""
        if prefix + PRICES_NAME not in state_dict:
            state_dict[prefix + PRICES_NAME] = torch.zeros_like(self.expert_prices)
        # Written for stock routers; the prices say the same.
        state_dict.pop(prefix + BIAS_NAME, None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _maintain_float32_expert_bias(self) -> None:
        """Keep prices in float32 when a half-precision wrapper has converted the module."""
        super()._maintain_float32_expert_bias()
        for name in (PRICES_NAME, "price_sum"):
            buffer = getattr(self, name, None)
            if buffer is not None and buffer.dtype != torch.float32:
                buffer.data = buffer.data.float()

    def begin_batch(self) -> None:
        """Drop assignments kept for recomputation; a new global batch begins."""
        self._forwarded.clear()
        self._batches += 1
