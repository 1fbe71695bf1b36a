"""``MaxScoreRouter``: Megatron's top-k router with its choice of experts replaced by the flow.

The choice enters at one seam: Megatron's routing function asks ``router_replay`` for indices and
gates, if the router has one. Everything else, the losses, jitter, dtypes, metrics and genuine
replay, stays Megatron's.

Shape letters: see :mod:`megatron_maxscore`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_maxscore.flow import FlowSolution
from megatron_maxscore.flow.places import is_device
from megatron_maxscore.moe import metrics, microbatches, plan, recompute
from megatron_maxscore.moe.capture import holds_router, is_capturing
from megatron_maxscore.moe.checks import check_transformer_config
from megatron_maxscore.moe.config import MaxScoreConfig
from megatron_maxscore.moe.context import RUN
from megatron_maxscore.moe.counting import Pass
from megatron_maxscore.moe.dispatcher import knows_splits
from megatron_maxscore.moe.evaluation import check_no_cache, uses_flow
from megatron_maxscore.moe.groups import Groups
from megatron_maxscore.moe.plan import RoutingPlan
from megatron_maxscore.moe.ranges import nvtx
from megatron_maxscore.moe.scopes import Scope
from megatron_maxscore.moe.seam import Selector, seen_with, without_bad_scores
from megatron_maxscore.moe.state import PricedRouter
from megatron_maxscore.ops import soft_topk, soft_topk_at

# How often a solve on a GPU is made where there are no prices to start from.
COLD_SOLVES = 3


@dataclass(frozen=True)
class RoutingCall:
    """One call of :meth:`MaxScoreRouter.routing`.

    Attributes:
        padding_T: (T,) bool, True = padding.
        batch_size: B.
        bad_T: (T,) bool, tokens other than padding whose logits are not finite; None if none is.
        may_count: whether a backward pass may follow.
        is_reported: whether someone will raise an error if there are bad tokens. Otherwise their
            gates are NaN, so that they are seen in the output.
    """

    padding_T: Tensor | None
    batch_size: int
    bad_T: Tensor | None
    may_count: bool
    is_reported: bool

    @property
    def valid_T(self) -> Tensor | None:
        """(T,) bool, False = padding."""
        return None if self.padding_T is None else ~self.padding_T


@dataclass(frozen=True)
class Decision:
    """What was chosen in a routing call.

    Attributes:
        plan: for the dispatcher, with the experts.
        pass_: what the call adds to prices and statistics; None outside of training.
    """

    plan: RoutingPlan
    pass_: Pass | None = None

    def small(self) -> Decision:
        """Return it as it is kept until the pass is recomputed."""
        return Decision(self.plan.small(), self.pass_)

    def whole(self) -> Decision:
        """Return what was kept as it is used."""
        return Decision(self.plan.whole(), self.pass_)


@dataclass
class _UnderWay:
    """State of a routing call, which Megatron's routing function cannot pass on.

    Attributes:
        call: the call.
        logits_TE: (T, E) with the z-loss in its graph.
        decision: what was chosen, None if a replay has chosen.
    """

    call: RoutingCall
    logits_TE: Tensor | None = None
    decision: Decision | None = None


_local = threading.local()


class MaxScoreRouter(PricedRouter):
    """Router whose assignment is the maximum-score flow.

    In training every token gets exactly k experts and no expert more than its capacity. In
    evaluation each token takes the k largest of score minus price on its own, with prices averaged
    over training (:attr:`prices`); gates are never changed by prices.

    In scope ``local`` it communicates nothing. In scopes ``group`` and ``sequence`` every solve
    exchanges counts and a few rows between the ranks of ``tp_ep`` or ``tp_cp``, which must route
    together.

    Args:
        config: TransformerConfig.
        pg_collection: Megatron's process groups; ``tp_ep`` gives the rank that rotates quotas.
        is_mtp_layer: whether this router belongs to a multi-token-prediction layer.
        maxscore: options; None reads the ``maxscore_*`` fields of ``config``.

    Raises:
        ValueError: the configuration cannot be combined with MaxScore routing.
    """

    router_replay: Any  # Megatron's, which has no types

    def __init__(
        self,
        config: Any,
        pg_collection: Any = None,
        is_mtp_layer: bool = False,
        *,
        maxscore: MaxScoreConfig | None = None,
        **kwargs: Any,
    ) -> None:
        options = maxscore or MaxScoreConfig.from_transformer_config(config)
        check_transformer_config(config, options)
        options = options.resolved_for(config)
        # Transformer Engine's fused routing asks nobody for the experts.
        values = {"moe_router_fusion": False}
        if options.gate == "soft_topk":
            # With softmax before the selection Megatron passes gates on as they are; otherwise it
            # renormalises them over the chosen experts.
            values["moe_router_pre_softmax"] = True
        config = seen_with(config, values)
        super().__init__(config, options, pg_collection, is_mtp_layer, **kwargs)
        self.temperature = options.temperature_for(config)
        self.scope = Scope(
            options,
            pg_collection,
            config.sequence_parallel,
            knows_splits=knows_splits(config, options),
            is_graphed=holds_router(config),
        )
        self.groups = Groups.of(config)
        # DeepEP and NCCL EP find the experts by a top-k over the gates, and statistics tell padding
        # by gates of 0.
        self._needs_positive_gates = (
            config.moe_token_dispatcher_type == "flex" or config.moe_router_padding_for_quantization
        )
        # Tokens in evaluation whose logits were not finite.
        self.evaluated_bad_tokens: int | Tensor = 0
        self.router_replay = Selector(self.select, self.router_replay)
        # Set while a training step is under way that raises an error if tokens were bad or lost.
        self.raises_bad_scores = False
        recompute.install()
        microbatches.install()

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Route (S, B, E) logits; see the base class.

        1. Note what is known of the call, and replace logits that are not finite.
        2. Let Megatron route. It applies jitter and losses, asks :meth:`select` for the experts and
           their gates, and makes probs and map. ``select`` gets the experts from :meth:`assign`.
           Gates of 0 become tiny positive numbers if a dispatcher finds experts by their gates.
        3. Attach the plan to the map, for the dispatcher.
        4. Count the call towards prices and statistics when its backward pass runs.

        Returns:
            probs (T, E) of the logits' dtype, 0 where not routed, and routing_map (T, E) bool with
            exactly k per row. Probabilities of tokens whose logits are not finite are NaN, unless
            the training step raises an error for them.
        """
        # 1. A pass without gradients ends in no training step: no error reports its bad tokens.
        if padding_mask is not None:
            padding_mask = self._own_part(padding_mask, logits.shape[0] * logits.shape[1])
        padding_T = None if padding_mask is None else padding_mask.reshape(-1)
        may_count = recompute.is_first_run() or (torch.is_grad_enabled() and logits.requires_grad)
        logits, bad_T = without_bad_scores(logits, padding_T)
        if bad_T is not None and not self.training:
            self.evaluated_bad_tokens = self.evaluated_bad_tokens + bad_T.sum()
        # Graphs are captured before a step, and replayed in steps.
        raises_error = self.raises_bad_scores or is_capturing()
        is_reported = self.training and raises_error and may_count
        call = RoutingCall(padding_T, logits.shape[1], bad_T, may_count, is_reported)
        # 2.
        before, _local.under_way = getattr(_local, "under_way", None), _UnderWay(call)
        try:
            probs, routing_map = super().routing(logits, padding_mask=padding_mask, **kwargs)
            decision = _local.under_way.decision
        finally:
            _local.under_way = before
        if call.bad_T is not None and not call.is_reported:
            probs = probs.masked_fill(call.bad_T[:, None] & routing_map, math.nan)
        if self._needs_positive_gates:
            tiny = torch.finfo(probs.dtype).tiny
            probs = probs.masked_fill(routing_map & (probs == 0), tiny)
        if decision is None:
            return probs, routing_map
        # 3. Megatron's dropping, which inference may switch on, changes the map.
        if self.config.moe_expert_capacity_factor is None:
            plan.attach(routing_map, decision.plan)
        # 4.
        if decision.pass_ is not None and torch.is_grad_enabled() and probs.requires_grad:
            probs.register_hook(functools.partial(self._count, decision.pass_))
        return probs, routing_map

    def apply_z_loss(self, logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Note the logits that carry the z-loss: gates must be made of them, or it is lost."""
        logits = super().apply_z_loss(logits, *args, **kwargs)
        under_way: _UnderWay | None = getattr(_local, "under_way", None)
        if under_way is not None:
            under_way.logits_TE = logits
        return logits

    def select(self, scores_TE: Tensor, replay: Any) -> tuple[Tensor, Tensor]:
        """Return gates (T, K) and experts (T, K) int64 when Megatron's routing function asks.

        1. Choose the experts: by the flow of the objective, or by a replay.
        2. Make their gates of the logits, or of Megatron's scores. With an expert bias Megatron
           makes the gates itself, since the scores that it passes here include the bias.

        Args:
            scores_TE: Megatron's scores, plus the expert bias if there is one. With a softmax and
                ``moe_router_pre_softmax`` off, these are the logits.
            replay: Megatron's, None if there is none.
        """
        under_way: _UnderWay = _local.under_way
        call, logits_TE = under_way.call, under_way.logits_TE
        assert logits_TE is not None
        # Kernels on a device read narrow logits as they are.
        is_wide = logits_TE.dtype == torch.float64 or is_device(logits_TE)
        wide_TE = logits_TE if is_wide else logits_TE.float()

        def choose(*_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                with nvtx("scores"):
                    objective_TE = self._objective(wide_TE, scores_TE)
                biased_TE = scores_TE if self.enable_expert_bias else None
                under_way.decision = recompute.decide_once(
                    self, lambda: self.assign(objective_TE, call, biased_TE)
                )
            experts_TK = under_way.decision.plan.experts_TK
            assert experts_TK is not None
            return scores_TE, experts_TK  # gates are made below

        # 1. Replayed experts need not meet the quotas. Only choose() sets a decision, so there is
        # no plan if the replay gives the experts.
        if replay is None:
            _, experts_TK = choose()
        else:
            _, experts_TK = replay.get_replay_topk(scores_TE, self.topk, None, None, choose)
        # 2.
        if self.enable_expert_bias:
            return scores_TE, experts_TK
        with nvtx("gates"):
            return self._gates(wide_TE, scores_TE, experts_TK), experts_TK

    def _gates(self, logits_TE: Tensor, scores_TE: Tensor, experts_TK: Tensor) -> Tensor:
        """Return the (T, K) gates of chosen experts."""
        if self.options.gate == "soft_topk":
            gates_TK = soft_topk_at(logits_TE, experts_TK, self.temperature, self.options.variant)
            # Up to 0.17 gates are scattered into a tensor of the logits' dtype.
            if scores_TE.dtype in (torch.bfloat16, torch.float16):
                gates_TK = gates_TK.to(scores_TE.dtype)
        else:
            gates_TK = scores_TE.gather(1, experts_TK)
        return self._shaped(gates_TK)

    def assign(
        self, scores_TE: Tensor, call: RoutingCall, biased_TE: Tensor | None = None
    ) -> Decision:
        """Return the experts by the rule in force: prices, or the flow.

        By the flow in scopes ``group`` and ``sequence`` every rank of the scope must call it; the
        solve communicates as :func:`megatron_maxscore.flow.solve` does.

        Args:
            scores_TE: (T, E) what the flow maximises.
            call: the routing call.
            biased_TE: (T, E) Megatron's scores plus its expert bias, if there is one: what stock
                routers choose by.

        Raises:
            ValueError: flow routing in evaluation while a key-value cache is in use.
        """
        started = time.perf_counter()
        inside_TE = None
        is_by_price = not self.training and not uses_flow(self.options.eval_routing)
        if not self.training and not is_by_price:
            check_no_cache()
        if biased_TE is None and (self.groups or is_by_price):
            biased_TE = scores_TE - self.prices.to(scores_TE.dtype)
        if self.groups:
            assert biased_TE is not None
            inside_TE = self._inside(self.groups, biased_TE, call, is_by_price)
            biased_TE = self.groups.only(biased_TE, inside_TE)
            scores_TE = self.groups.preferred(scores_TE, inside_TE)
        if is_by_price:
            assert biased_TE is not None
            return Decision(RoutingPlan(biased_TE.topk(self.topk, dim=1).indices))
        turn = self._iteration() + RUN.microbatch if self.training else None
        if turn is not None and self._recorder is not None and call.may_count:
            self._recorder.record(
                self.layer_number or 0, self._iteration(), scores_TE, self.topk,
                self.scope.capacity(scores_TE, self.topk, turn), self.prices, call.valid_T,
            )  # fmt: skip
        with nvtx("solve"):
            routed, solution = self._solve(scores_TE, call, turn)
        seconds = 0.0 if is_capturing() else time.perf_counter() - started
        routed = dataclasses.replace(routed, is_reported=call.is_reported)
        if not self.training:
            return Decision(routed)
        values_I = metrics.values_of(scores_TE, routed, call.valid_T, solution, seconds, inside_TE)
        return Decision(routed, Pass.of(solution, seconds, call.bad_T, routed, values_I))

    def _solve(
        self, scores_TE: Tensor, call: RoutingCall, turn: int | None
    ) -> tuple[RoutingPlan, FlowSolution]:
        """Solve, warm from the prices.

        The gap of a solve on a GPU depends on the prices that it starts from. If there are none, as
        after a checkpoint without prices, it is repeated from the prices that it has found.
        """
        prices_E = self.prices
        is_approximate = is_device(scores_TE) and self.options.mode != "exact"
        solves = COLD_SOLVES if self.is_cold and is_approximate and not is_capturing() else 1
        for _ in range(solves):
            routed, solution = self.scope.solve(
                scores_TE, call.batch_size, self.topk, prices_E, call.valid_T, turn
            )
            prices_E = solution.prices if solution.prices.dim() == 1 else solution.prices.mean(0)
        return routed, solution

    def _inside(
        self, groups: Groups, biased_TE: Tensor, call: RoutingCall, is_by_price: bool
    ) -> Tensor:
        """Return (T, E) bool, the experts of the groups that each token chooses or gets."""
        scores_TG = groups.scores(biased_TE)
        if is_by_price or groups.chosen == groups.number:
            chosen = groups.best(scores_TG)
        else:
            no_prices = self.price_sum.new_zeros(groups.number)
            plan, _ = self.scope.solve(
                scores_TG, call.batch_size, groups.chosen, no_prices, call.valid_T, None
            )
            assert plan.experts_TK is not None
            chosen = plan.experts_TK
        return groups.inside(chosen, biased_TE.shape[1])

    def _own_part(self, padding_mask: Tensor, num_tokens: int) -> Tensor:
        """Return the mask of this rank's tokens.

        Under sequence parallelism the first pipeline stage slices the mask. Other stages get the
        whole mask.
        """
        ranks = self.tp_group.size()
        if padding_mask.numel() not in (num_tokens, num_tokens * ranks):
            raise ValueError(
                f"padding_mask has {padding_mask.numel()} tokens, the router {num_tokens}"
            )
        if padding_mask.numel() == num_tokens:
            return padding_mask
        return padding_mask.chunk(ranks, dim=0)[self.tp_group.rank()]

    def _shaped(self, gates_TK: Tensor) -> Tensor:
        """Return the chosen experts' gates, annealed and normalised if that is asked for."""
        if self.options.anneal_steps:
            self._anneal()
            is_largest_TK = torch.zeros_like(gates_TK, dtype=torch.bool).scatter_(
                1, gates_TK.detach().argmax(1, keepdim=True), True
            )
            # A copy, since the backward pass reads it, and the next forward pass may set another.
            factor = self.anneal_factor.clone()
            gates_TK = torch.where(is_largest_TK, gates_TK, gates_TK * factor)
        if self.options.normalize_gates:
            tiny = torch.finfo(gates_TK.dtype).tiny
            gates_TK = gates_TK / gates_TK.sum(1, keepdim=True).clamp(min=tiny)
        return gates_TK

    def _objective(self, logits_TE: Tensor, scores_TE: Tensor) -> Tensor:
        """Return what the flow maximises, (T, E)."""
        if self.options.objective == "logits":
            return logits_TE
        if self.options.gate == "soft_topk":
            return soft_topk(logits_TE, self.topk, self.temperature, self.options.variant)
        if self.score_function == "softmax":
            # Without pre-softmax the seam hands over logits.
            return torch.softmax(logits_TE, dim=-1)
        if not self.enable_expert_bias:
            return scores_TE
        if self.score_function == "sigmoid":
            return torch.sigmoid(logits_TE.float())
        return torch.nn.functional.softplus(logits_TE.float()).sqrt()
