"""The end of a global batch: between the gradients and the optimizer step."""

from __future__ import annotations

from typing import Any

import torch

from megatron_maxscore._patches import PatchSet
from megatron_maxscore._run import is_rank_zero
from megatron_maxscore.moe import recording
from megatron_maxscore.moe.step import (
    BadScoresError,
    average_prices,
    maxscore_routers,
    raise_on_bad_scores,
)


def hook(patches: PatchSet) -> None:
    """Wrap the function that finalizes gradients; the training loop reads it once, as a global."""
    from megatron.training import training

    patches.wrap(training, "finalize_model_grads", _ending_batch)
    patches.set(recording, "iteration_source", _iteration)


def _iteration() -> int:
    """Return the number of the current iteration, from 1."""
    from megatron.training import get_args

    args = get_args()
    current = getattr(args, "curr_iteration", None)
    if current is not None:
        return int(current) + 1
    # Without the loop: the last one that the checkpoint has seen.
    return max(1, int(getattr(args, "iteration", None) or 0))


def _ending_batch(original: Any) -> Any:
    def finalize_model_grads(model: Any, *args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args

        arguments = get_args()
        if arguments.moe_router_type != "maxscore":
            return original(model, *args, **kwargs)
        routers = maxscore_routers(model)
        skip = False
        try:
            # Before Megatron's own check of the gradients, which raises on single ranks.
            raise_on_bad_scores(routers, _iteration())
        except BadScoresError as error:
            # A dynamic loss scaler skips the step and lowers the scale, as for any overflow.
            skip = bool(arguments.fp16) and arguments.loss_scale is None
            if not skip:
                raise
            if is_rank_zero():
                print(f"megatron_maxscore: {error.where}; the step is skipped", flush=True)
        result = original(model, *args, **kwargs)
        if skip:
            _overflow(model)
        average_prices(routers)
        return result

    return finalize_model_grads


def _overflow(model: Any) -> None:
    """Make the loss scaler see an overflow on every rank."""
    for chunk in model:
        for parameter in chunk.parameters():
            gradient = getattr(parameter, "main_grad", None)
            if gradient is not None:
                with torch.no_grad():
                    gradient.fill_(float("inf"))
                return
