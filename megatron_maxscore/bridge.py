"""MaxScore routing in Megatron Bridge, which has a training loop of its own.

    from megatron.bridge.recipes.qwen import qwen3_30b_a3b_pretrain_config
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    from megatron_maxscore import bridge

    config = qwen3_30b_a3b_pretrain_config()
    pretrain(config, forward_step, callbacks=[bridge.use_maxscore(config)])

Bridge never calls the functions that :mod:`megatron_maxscore.training` wraps, so the callback does
their work. In ``finalize_model_grads_func`` it raises an error on every rank if scores were not
finite, and averages the prices of the batch. At the end of the step these become the routers'
prices, unless the optimizer skipped the step. Metrics go to TensorBoard and W&B.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist

from megatron_maxscore._replacements import Replacements
from megatron_maxscore.moe import metrics
from megatron_maxscore.moe.checks import check_transformer_config
from megatron_maxscore.moe.config import MaxScoreConfig
from megatron_maxscore.moe.context import RUN
from megatron_maxscore.moe.layer import install_layer_hook
from megatron_maxscore.moe.router import MaxScoreRouter
from megatron_maxscore.moe.step import (
    begin_batch,
    device_of,
    end_attempt,
    end_batch,
    maxscore_routers,
    raise_on_bad_scores,
)
from megatron_maxscore.releases import graph_of
from megatron_maxscore.training import checkpoints
from megatron_maxscore.training.capacity import shape_on_a_rank

_replacements = Replacements("MaxScore in Megatron Bridge")


def use_maxscore(config: Any, options: MaxScoreConfig | None = None) -> Any:
    """Turn a Bridge configuration into one with MaxScore routing, in place.

    Args:
        config: a ``ConfigContainer``; its model and training settings are final.
        options: MaxScore's; the fixed shape follows from the configuration if it is not given.

    Returns:
        The callback that :func:`megatron.bridge.training.pretrain.pretrain` needs.

    Raises:
        ValueError: the configuration cannot be combined with MaxScore routing.
        ImportError: Megatron Bridge is not installed, or older than 0.6.
    """
    from megatron.bridge.training.callbacks import Callback

    model = config.model
    options = options or MaxScoreConfig()
    if options.fixed_shape is None:
        options = dataclasses.replace(options, fixed_shape=_fixed_shape(config))
    check_transformer_config(model, options)
    if graph_of(model).implementation == "full_iteration":
        raise ValueError(
            "MaxScore routing in Megatron Bridge cannot be in a CUDA graph of the full iteration; "
            "use cuda_graph_impl='transformer_engine' with attn, moe_router and moe_preprocess"
        )
    # Layers find them there, those of multi-token prediction too.
    options.write_to(model)
    install_layer_hook()
    if not _replacements:
        # A checkpoint of a stock run has no prices.
        checkpoints.hook(_replacements, has_our_bias=lambda: True)
    return type("MaxScoreCallback", (_Steps, Callback), {})(config)


def _fixed_shape(config: Any) -> list[int]:
    """Return the [length, batch] that each rank routes in every microbatch; [0, 0] if unknown."""
    model, dataset = config.model, config.dataset
    varies = getattr(model, "variable_seq_lengths", False) or "SFT" in type(dataset).__name__
    length = getattr(model, "seq_length", None)
    if varies or length is None:
        return [0, 0]
    return shape_on_a_rank(model, length, config.train.micro_batch_size)


class _Steps:
    """What happens around Bridge's training steps.

    Args:
        config: the ``ConfigContainer``.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.routers: list[MaxScoreRouter] = []

    def on_train_start(self, context: Any) -> None:
        """Find the routers, and wrap what ends the gradients."""
        self.routers = maxscore_routers(context.model)
        train_state = context.state.train_state
        RUN.iteration = lambda: int(train_state.step) + 1
        RUN.is_logging = lambda: self._interval(int(train_state.step) + 1)
        model_config = self._model_config(context.model)
        model_config.finalize_model_grads_func = self._ending_attempt(
            model_config.finalize_model_grads_func
        )

    def on_train_step_start(self, context: Any) -> None:
        """Begin a global batch."""
        begin_batch(self.routers)
        for router in self.routers:
            router.raises_bad_scores = True

    def on_train_step_end(self, context: Any) -> None:
        """Take the prices, unless the optimizer has skipped its step, and log."""
        for router in self.routers:
            router.raises_bad_scores = False
        end_batch(self.routers, has_stepped=not context.skipped_iter)
        # Bridge counts the step when its callbacks have run.
        self._log(context, int(context.state.train_state.step) + 1)

    def on_train_end(self, context: Any) -> None:
        """Leave the process as it was."""
        RUN.iteration = RUN.is_logging = None

    @staticmethod
    def _model_config(model: Any) -> Any:
        from megatron.core.utils import get_model_config

        return get_model_config(model[0])

    def _ending_attempt(self, original: Any) -> Any:
        def finalize_model_grads(*args: Any, **kwargs: Any) -> Any:
            # Before Megatron's own check of the gradients, which raises on single ranks.
            raise_on_bad_scores(self.routers, RUN.iteration() if RUN.iteration else 0)
            result = original(*args, **kwargs)
            end_attempt(self.routers)
            return result

        return finalize_model_grads

    def _interval(self, step: int) -> bool:
        logger = self.config.logger
        intervals = (logger.log_interval, getattr(logger, "tensorboard_log_interval", None))
        return any(interval and step % interval == 0 for interval in intervals)

    def _log(self, context: Any, step: int) -> None:
        """Write the means over layers and ranks; one all-reduce of M + 1 float64 where due."""
        if not self._interval(step):
            return
        sums = torch.zeros(
            len(metrics.NAMES) + 1, dtype=torch.float64, device=device_of(self.routers)
        )
        for router in self.routers:
            own = router.last_statistics
            sums[:-1] += own.values_I / own.solves.clamp(min=1)
            sums[-1] += 1
        if dist.is_initialized():
            dist.all_reduce(sums)
        means = (sums[:-1] / sums[-1].clamp(min=1)).tolist()
        values = dict(zip(metrics.NAMES, means, strict=True))
        writer = getattr(context.state, "tensorboard_logger", None)
        if writer is not None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)
        wandb = getattr(context.state, "wandb_logger", None)
        if wandb is not None:
            wandb.log(values, step)
