"""A training loop as Megatron Bridge has it, with its own callbacks, on gloo ranks."""

from __future__ import annotations

import sys
from functools import partial
from types import ModuleType, SimpleNamespace

import torch

from tests.dist.cases import EXPERTS, TOPK, groups

VOCABULARY, LENGTH, BATCH, MICROBATCHES = 64, 16, 2, 2


def _without_its_dependencies(wheel):
    """Let ``megatron.bridge.training.callbacks`` be imported, without what its package imports."""
    import megatron

    megatron.__path__.append(f"{wheel}/megatron")
    for name in ("bridge", "bridge.training"):
        module = ModuleType(f"megatron.{name}")
        module.__path__ = [f"{wheel}/megatron/{name.replace('.', '/')}"]
        sys.modules[module.__name__] = module


class _Writer:
    def __init__(self):
        self.seen = {}

    def add_scalar(self, name, value, step):
        self.seen.setdefault(name, {})[step] = value


def _provider(size):
    """Return a model provider: a TransformerConfig that builds its model, as Bridge's are."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    class Provider(TransformerConfig):
        def provide(self):
            return GPTModel(
                self, get_gpt_layer_local_spec(num_experts=EXPERTS, moe_grouped_gemm=False),
                vocab_size=VOCABULARY, max_sequence_length=LENGTH, position_embedding_type="rope",
            )  # fmt: skip

    provider = Provider(
        num_layers=2, hidden_size=32, num_attention_heads=4, num_moe_experts=EXPERTS,
        moe_router_topk=TOPK, moe_ffn_hidden_size=32, moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall", expert_model_parallel_size=size,
        add_bias_linear=False, use_cpu_initialization=True, gradient_accumulation_fusion=False,
        bias_activation_fusion=False, hidden_dropout=0.0, attention_dropout=0.0,
        persist_layer_norm=False,
    )  # fmt: skip
    provider.seq_length = LENGTH
    return provider


def _batch(rank, step, microbatch):
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + microbatch)
    return torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)


def trains(rank, size, wheel, steps=4, skipped=2, bad=None):
    """Train as Bridge does: train step, then its callbacks; one step is skipped.

    Returns prices after each step, loads of each step, the writer's curves, and what was raised.
    """
    _without_its_dependencies(wheel)
    from megatron.bridge.training import callbacks as bridge_callbacks
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_maxscore import bridge
    from megatron_maxscore.moe.step import BadScoresError, maxscore_routers

    collection = groups(ep=size)
    model_parallel_cuda_manual_seed(3)
    provider = _provider(size)
    container = SimpleNamespace(
        model=provider, dataset=SimpleNamespace(), train=SimpleNamespace(micro_batch_size=BATCH),
        logger=SimpleNamespace(log_interval=2, tensorboard_log_interval=None),
    )  # fmt: skip
    callback = bridge.use_maxscore(container)
    manager = bridge_callbacks.normalize_callbacks([callback])
    assert provider.maxscore_fixed_shape == [LENGTH, BATCH]
    model = DistributedDataParallel(provider, DistributedDataParallelConfig(), provider.provide())
    model.train()
    # As its setup does.
    provider.finalize_model_grads_func = partial(finalize_model_grads, pg_collection=collection)
    state = SimpleNamespace(
        train_state=SimpleNamespace(step=0), cfg=container, tensorboard_logger=_Writer(),
        wandb_logger=None,
    )  # fmt: skip

    def fire(event, **values):
        context = bridge_callbacks.CallbackContext(
            state=state, model=[model], user_state=manager.user_state, **values
        )
        manager.fire(event, context)

    positions = torch.arange(LENGTH).expand(BATCH, LENGTH)
    mask = torch.ones(LENGTH, LENGTH).triu(1).bool()[None, None]

    def forward_step(iterator, chunk):
        tokens = next(iterator)
        losses = chunk(tokens, positions, mask, labels=tokens.roll(-1, 1))
        return losses, lambda output: (output.mean(), {"loss": output.mean().detach()})

    routers = maxscore_routers([model])
    fire("on_train_start")
    prices, solves = [], []
    said = None
    for step in range(steps):
        fire("on_train_step_start")
        if step == bad:
            with torch.no_grad():
                routers[0].weight[1, 2] = float("nan")
        try:
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iter([_batch(rank, step, m) for m in range(MICROBATCHES)]),
                model=[model], num_microbatches=MICROBATCHES, seq_length=LENGTH,
                micro_batch_size=BATCH, forward_only=False,
            )  # fmt: skip
        except BadScoresError as error:
            said = str(error)
            break
        model.zero_grad_buffer()
        fire("on_train_step_end", loss_dict={}, skipped_iter=step == skipped)
        state.train_state.step += 1
        prices.append(torch.stack([router.prices.clone() for router in routers]))
        solves.append([int(router.last_statistics.solves) for router in routers])
    fire("on_train_end")
    return prices, solves, state.tensorboard_logger.seen, said
