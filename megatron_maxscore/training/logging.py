"""MaxScore's metrics in Megatron's log, TensorBoard and W&B, at every logging interval.

Megatron's own tracker of MoE metrics carries them, so they are part of its report. They cost the
same collectives there as any other metric, and none in the iterations between reports.
"""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any

from megatron_maxscore._replacements import Replacements
from megatron_maxscore.moe import metrics
from megatron_maxscore.moe.context import RUN
from megatron_maxscore.releases import has_metrics_tracker

# What the console shows; writers get everything.
_CONSOLE = ("score_ratio", "first_choices", "price_range")
# Percentiles over layers, for the writers.
_ACROSS_LAYERS = {metrics.PREFIX + "load_max": [0.5, 0.95]}


def hook(replacements: Replacements) -> None:
    """Wrap the report of MoE metrics and tell routers when values are due."""
    replacements.set(RUN, "is_logging", functools.partial(_is_due, 1))
    if has_metrics_tracker():
        from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker

        replacements.wrap(MoEMetricsTracker, "report", _with_ours)
    else:
        from megatron.training import training

        replacements.wrap(training, "track_moe_metrics", _cleared)
        replacements.wrap(training, "track_moe_metrics", _with_ours)


def _is_due(steps_ahead: int = 0) -> bool:
    """Return whether values of the iteration ``curr_iteration`` + ``steps_ahead`` are logged.

    ``curr_iteration`` counts finished steps, so it does not include the step whose routers run.
    """
    from megatron.training import get_args

    try:
        args = get_args()
    except AssertionError:
        return False
    if getattr(args, "moe_router_type", "topk") != "maxscore":
        return False
    iteration = int(getattr(args, "curr_iteration", 0) or 0) + steps_ahead
    intervals = [args.log_interval]
    if getattr(args, "tensorboard_dir", None):
        intervals.append(args.tensorboard_log_interval)
    return any(interval and iteration % interval == 0 for interval in intervals)


def _with_ours(original: Any) -> Any:
    signature = inspect.signature(original)

    def report(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        arguments = call.arguments
        from megatron.training import get_args

        # The report names the iteration that is just done.
        ahead = arguments["iteration"] - int(getattr(get_args(), "curr_iteration", 0) or 0)
        if not _is_due(ahead):
            return original(*args, **kwargs)
        metrics.give_to_tracker(float(arguments["loss_scale"]))
        names = arguments.get("track_names")
        if names is not None:
            arguments["track_names"] = [*([names] if isinstance(names, str) else names)]
            arguments["track_names"] += metrics.NAMES
        if "percentiles" in signature.parameters:
            arguments["percentiles"] = {**_ACROSS_LAYERS, **(arguments.get("percentiles") or {})}
        return _shortened(original(*call.args, **call.kwargs))

    return report


def _cleared(original: Any) -> Any:
    """Up to 0.17 the report takes all that it finds, and the console averages it as losses."""
    signature = inspect.signature(original)

    def track_moe_metrics(*args: Any, **kwargs: Any) -> Any:
        from megatron.core.transformer.moe import moe_utils

        result = original(*args, **kwargs)
        losses = signature.bind(*args, **kwargs).arguments.get("total_loss_dict")
        for name in metrics.NAMES:
            moe_utils.get_moe_layer_wise_logging_tracker().pop(name, None)
            if losses is not None:
                losses.pop(name, None)
        return result

    return track_moe_metrics


def _shortened(text: Any) -> Any:
    """Leave in the log's line what tells most."""
    if not isinstance(text, str):
        return text
    kept = "|".join(_CONSOLE)
    return re.sub(rf" *{metrics.PREFIX}(?!(?:{kept}):)[^|]*\|", "", text)
