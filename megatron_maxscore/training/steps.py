"""The end of a global batch: between the gradients and the optimizer step, and after it.

Megatron may run a step's forward and backward passes several times before the optimizer takes its
step (the rerun state machine, the retry of the paged stash). Every attempt ends in
``finalize_model_grads``, where prices are averaged; what an earlier attempt has left is replaced.
After ``train_step`` they become the routers' prices, if the optimizer has taken its step.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_maxscore._replacements import Replacements
from megatron_maxscore._run import is_rank_zero
from megatron_maxscore.moe.capture import is_capturing
from megatron_maxscore.moe.context import RUN
from megatron_maxscore.moe.router import MaxScoreRouter
from megatron_maxscore.moe.step import (
    BadScoresError,
    begin_batch,
    end_attempt,
    end_batch,
    maxscore_routers,
    raise_on_bad_scores,
)


def hook(replacements: Replacements) -> None:
    """Wrap the function that finalizes gradients and the one that takes a step."""
    from megatron.core import full_cuda_graph
    from megatron.training import training

    replacements.wrap(training, "finalize_model_grads", _ending_attempt)
    replacements.wrap(training, "train_step", _ending_batch)
    replacements.wrap(full_cuda_graph.FullCudaGraphWrapper, "__call__", _graphed)
    replacements.set(RUN, "iteration", _iteration)


def _iteration() -> int:
    """Return the number of the current iteration, from 1."""
    from megatron.training import get_args

    args = get_args()
    current = getattr(args, "curr_iteration", None)
    if current is not None:
        return int(current) + 1
    # Without the loop: the last one that the checkpoint has seen.
    return max(1, int(getattr(args, "iteration", None) or 0))


def uses_maxscore() -> bool:
    """Return whether Megatron's arguments ask for MaxScore routing."""
    from megatron.training import get_args

    try:
        return bool(get_args().moe_router_type == "maxscore")
    except AssertionError:  # a script that parses none
        return False


def _ending_batch(original: Any) -> Any:
    def train_step(*args: Any, **kwargs: Any) -> Any:
        if not uses_maxscore():
            return original(*args, **kwargs)
        # The third argument in every release; a script may have wrapped the function before us.
        routers = maxscore_routers(kwargs["model"] if "model" in kwargs else args[2])
        begin_batch(routers)
        for router in routers:
            router.raises_bad_scores = True
        try:
            result = original(*args, **kwargs)
        finally:
            for router in routers:
                router.raises_bad_scores = False
        # The losses, and whether the optimizer has skipped its step.
        end_batch(routers, has_stepped=not result[1])
        return result

    return train_step


def _ending_attempt(original: Any) -> Any:
    def finalize_model_grads(model: Any, *args: Any, **kwargs: Any) -> Any:
        if not uses_maxscore():
            return original(model, *args, **kwargs)
        routers = maxscore_routers(model)
        # During capture the host cannot read counts; :func:`_graphed` reads them after a replay.
        is_captured = is_capturing()
        # Before Megatron's own check of the gradients, which raises on single ranks.
        skip = not is_captured and _meets_bad_scores(routers)
        result = original(model, *args, **kwargs)
        if skip:
            _overflow(model)
        end_attempt(routers)
        return result

    return finalize_model_grads


def _meets_bad_scores(routers: list[MaxScoreRouter], has_ended: bool = False) -> bool:
    """Return whether the step is to be skipped for bad scores, as for any overflow.

    A dynamic loss scaler skips the step and lowers the scale.

    Args:
        routers: this rank's routers.
        has_ended: whether the attempt has ended already.

    Raises:
        BadScoresError: without a dynamic loss scaler.
        LengthError: a microbatch had more tokens than was declared.
    """
    try:
        raise_on_bad_scores(routers, _iteration(), has_ended)
    except BadScoresError as error:
        if not _has_dynamic_loss_scale():
            raise
        if is_rank_zero():
            print(f"megatron_maxscore: {error.where}; the step is skipped", flush=True)
        return True
    return False


def _graphed(original: Any) -> Any:
    """Ask for bad scores after a graph of the whole iteration; keep evaluation out of graphs.

    Megatron captures one graph for evaluation. It would repeat the routing rule that was in force
    during capture, even if another rule is asked for.
    """

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not uses_maxscore():
            return original(self, *args, **kwargs)
        if kwargs.get("forward_only"):
            return self.forward_backward_func(*args, **kwargs)
        result = original(self, *args, **kwargs)
        if type(self).cuda_graph["training"] is not None:
            model = kwargs["model"]
            model = model if isinstance(model, list) else [model]
            if _meets_bad_scores(maxscore_routers(model), has_ended=True):
                _overflow(model)
        return result

    return call


def _has_dynamic_loss_scale() -> bool:
    from megatron.training import get_args

    args = get_args()
    return bool(args.fp16) and args.loss_scale is None


def _overflow(model: Any) -> None:
    """Make the loss scaler see an overflow on every rank."""
    for chunk in model:
        for parameter in chunk.parameters():
            gradient = getattr(parameter, "main_grad", None)
            if gradient is not None:
                with torch.no_grad():
                    gradient.fill_(float("inf"))
                return
