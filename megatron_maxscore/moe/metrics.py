"""What routers tell Megatron's tracker of MoE metrics, per layer.

The training loop decides when (:attr:`RunContext.is_logging`); without it nothing is computed.
Values stay on the device of the scores, so nothing is synchronised. Each is a mean over the counted
passes of a global batch (:mod:`counting`), and over the ranks that hold replicas of the router.
When a global batch ends, each router hands in the values of the batch's last attempt. They go to
Megatron's tracker when it reports.

Shape letters: see :mod:`megatron_maxscore`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from megatron_maxscore.flow import FlowSolution
from megatron_maxscore.moe.capture import is_capturing
from megatron_maxscore.moe.context import RUN
from megatron_maxscore.moe.counting import SolveStatistics
from megatron_maxscore.moe.plan import RoutingPlan
from megatron_maxscore.releases import has_metrics_tracker

PREFIX = "maxscore/"
# objective: score per token, as routed. unconstrained: the same if every token had its k best
# experts. score_ratio: objective over unconstrained, which shows what balance costs.
# first_choices: share of tokens that have their k best experts. load_p05 to load_max: percentiles
# and maximum of the loads of the problem's experts, divided by the mean load. outside_groups: share
# of assignments outside a token's groups, 0 without group-limited routing.
NAMES = tuple(
    PREFIX + name
    for name in (
        "objective", "unconstrained", "score_ratio", "first_choices", "gap", "rounds",
        "price_range", "load_p05", "load_p95", "load_max", "outside_groups", "solve_ms",
    )
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a router's values belong in Megatron's tracker.

    Attributes:
        number: of the layer, from 1; None for a router without one, which is not reported.
        num_layers: of the model, those of multi-token prediction included.
        group: process group over which values are averaged.
        device: of the values.
    """

    number: int | None
    num_layers: int
    group: Any
    device: torch.device


# What routers have handed in since the last report.
_waiting: WeakKeyDictionary[torch.nn.Module, tuple[Place, SolveStatistics]] = WeakKeyDictionary()


def _are_due() -> bool:
    """Return whether values of the current iteration are logged."""
    return RUN.is_logging is not None and RUN.is_logging()


def hand_in(router: torch.nn.Module, place: Place, statistics: SolveStatistics) -> None:
    """Keep a router's values of a global batch for the next report, if they are due."""
    if _are_due():
        _waiting[router] = place, statistics


def give_to_tracker(loss_scale: float) -> None:
    """Give Megatron's tracker what was handed in; communicates nothing.

    A router without a counted pass gives zeros, since every rank must report the same names.

    Args:
        loss_scale: the tracker multiplies values by this, since it expects sums over microbatches.
            It is divided out here.
    """
    for place, statistics in list(_waiting.values()):
        means_I = statistics.values_I / (statistics.solves.clamp(min=1) * loss_scale)
        means_I = means_I.to(device=place.device, dtype=torch.float32)
        for name, mean in zip(NAMES, means_I.unbind(), strict=True):
            _store(name, mean, place)
    _waiting.clear()


def values_of(
    scores_TE: Tensor,
    plan: RoutingPlan,
    valid_T: Tensor | None,
    solution: FlowSolution,
    seconds: float,
    inside_TE: Tensor | None = None,
) -> Tensor | None:
    """Return the :func:`measured` values of a call with this plan, (I,) float64 by :data:`NAMES`.

    None if the current iteration is not logged. While a CUDA graph is captured they are always
    measured, since it is also replayed in iterations that are logged.
    """
    is_due = RUN.is_logging is not None if is_capturing() else _are_due()
    if not is_due:
        return None
    assert plan.experts_TK is not None
    values = measured(scores_TE, plan.experts_TK, valid_T, solution, seconds, inside_TE)
    return torch.stack(
        [values[name.removeprefix(PREFIX)].to(scores_TE.device, torch.float64) for name in NAMES]
    )


def measured(
    scores_TE: Tensor,
    experts_TK: Tensor,
    valid_T: Tensor | None,
    solution: FlowSolution,
    seconds: float,
    inside_TE: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return the values of one solve.

    Args:
        scores_TE: (T, E) what the flow maximised.
        experts_TK: (T, K) int64, padding rows too.
        valid_T: (T,) bool, False = padding, which does not count.
        solution: of the problem that these tokens are part of.
        seconds: of the host in the solve.
        inside_TE: (T, E) bool, experts of each token's groups; None without group-limited routing.

    Returns:
        0-dim tensors by the names in :data:`NAMES`, without prefix.
    """
    scores_TE = scores_TE.double()
    # Masked rather than picked, which would wait for the device.
    counts_T = torch.ones_like(experts_TK[:, 0], dtype=torch.bool) if valid_T is None else valid_T
    num_tokens = counts_T.sum().clamp(min=1)
    own_TK = scores_TE.gather(1, experts_TK)
    others_TE = scores_TE.scatter(1, experts_TK, float("-inf"))
    is_first_T = own_TK.amin(1) >= others_TE.amax(1)
    objective = own_TK.sum(1).where(counts_T, 0.0).sum()
    best_TK = scores_TE.topk(experts_TK.shape[1], dim=1, sorted=False).values
    best = best_TK.sum(1).where(counts_T, 0.0).sum()
    loads_E = solution.loads.reshape(-1, solution.loads.shape[-1]).sum(0).double()
    loads_E = loads_E / loads_E.mean().clamp(min=1e-30)
    # Numbers and not tensors of the host, whose copies to the device would be waited for.
    low, high = (torch.quantile(loads_E, share) for share in (0.05, 0.95))
    prices = solution.prices.reshape(-1, solution.prices.shape[-1])
    return {
        "objective": objective / num_tokens,
        "unconstrained": best / num_tokens,
        "score_ratio": torch.where(best == 0, 1.0, objective / best),
        "first_choices": (is_first_T & counts_T).sum() / num_tokens,
        "gap": solution.gap.max(),
        "rounds": scores_TE.new_full((), solution.rounds),
        "price_range": (prices.amax(1) - prices.amin(1)).max(),
        "load_p05": low,
        "load_p95": high,
        "load_max": loads_E.max(),
        "outside_groups": _outside(experts_TK, counts_T, inside_TE),
        "solve_ms": scores_TE.new_full((), 1e3 * seconds),
    }


def _outside(experts_TK: Tensor, counts_T: Tensor, inside_TE: Tensor | None) -> Tensor:
    """Return the share of tokens' assignments that are outside of their groups."""
    if inside_TE is None:
        return torch.zeros((), device=experts_TK.device)
    is_outside_TK = ~inside_TE.gather(1, experts_TK) & counts_T[:, None]
    assignments = counts_T.sum().clamp(min=1) * experts_TK.shape[1]
    return is_outside_TK.sum() / assignments


def _store(name: str, value: Tensor, place: Place) -> None:
    """Add to the tracker, however the release calls it; replicas are averaged over its group."""
    if place.number is None:
        return
    if has_metrics_tracker():
        from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

        get_moe_metrics_tracker().record(
            name, value, place.number, place.num_layers, avg_group=place.group, needs_dp_avg=False
        )
    else:
        from megatron.core.transformer.moe.moe_utils import save_to_aux_losses_tracker

        save_to_aux_losses_tracker(
            name,
            value,
            place.number,
            place.num_layers,
            avg_group=place.group,
            reduce_group_has_dp=True,
        )
