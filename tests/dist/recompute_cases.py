"""What the ranks do in the tests of recomputation and of which passes count."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import types
from unittest import mock

import torch
import torch.distributed as dist

from tests.dist.cases import EXPERTS, HIDDEN, TOPK, groups, make_layer, own_input

VOCABULARY, LENGTH = 32, 16


def make_model(recompute, scope="local", mtp=False, size=2, seed=3):
    """Build a GPT of two MoE layers on every rank, with MTP layers if asked for."""
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    from megatron_maxscore.moe import MaxScoreConfig, with_maxscore

    groups(ep=size)
    model_parallel_cuda_manual_seed(5, force_reset_rng=True)
    torch.manual_seed(seed)
    extra = {
        "none": {},
        "selective": dict(recompute_granularity="selective", recompute_modules=["moe"]),
        "full": dict(
            recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
        ),
    }[recompute]
    config = TransformerConfig(
        num_layers=2, hidden_size=HIDDEN, num_attention_heads=4, ffn_hidden_size=24,
        num_moe_experts=EXPERTS, moe_ffn_hidden_size=24, moe_router_topk=TOPK,
        moe_token_dispatcher_type="alltoall", moe_router_load_balancing_type="none",
        expert_model_parallel_size=size, add_bias_linear=False, hidden_dropout=0.0,
        attention_dropout=0.0, use_cpu_initialization=True, gradient_accumulation_fusion=False,
        bias_activation_fusion=False, persist_layer_norm=False,
        mtp_num_layers=2 if mtp else None, **extra,
    )  # fmt: skip
    spec = gpt_layer_specs.get_gpt_layer_local_spec(num_experts=EXPERTS, moe_grouped_gemm=False)
    options = MaxScoreConfig(scope=scope)
    spec = with_maxscore(spec, options)
    mtp_spec = None
    if mtp:
        mtp_spec = gpt_layer_specs.get_gpt_mtp_block_spec(
            config, spec, use_transformer_engine=False
        )
        mtp_spec = with_maxscore(mtp_spec, options)
    model = GPTModel(
        config, spec, VOCABULARY, LENGTH, position_embedding_type="rope", mtp_block_spec=mtp_spec
    )
    return model.train()


def loss_of(model, seed, rank):
    """Return the loss of a microbatch that differs by seed and rank."""
    generator = torch.Generator().manual_seed(1000 * rank + seed)
    tokens = torch.randint(VOCABULARY, (2, LENGTH + 1), generator=generator)
    positions = torch.arange(LENGTH).expand(2, -1)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None]
    return model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:]).mean()


def _in_order(model, rank):
    losses = [loss_of(model, seed, rank) for seed in (1, 2)]
    for loss in losses:
        loss.backward()


def _reverse(model, rank):
    losses = [loss_of(model, seed, rank) for seed in (1, 2, 3)]
    for loss in reversed(losses):
        loss.backward()


def _one_backward(model, rank):
    (loss_of(model, 1, rank) + loss_of(model, 2, rank)).backward()


def _skipped(model, rank):
    loss_of(model, 1, rank)
    loss_of(model, 2, rank).backward()


def _scored_between(model, rank):
    first = loss_of(model, 1, rank)
    with torch.no_grad():
        loss_of(model, 7, rank)
    second = loss_of(model, 2, rank)
    second.backward()
    first.backward()


WAYS = {
    "in order": _in_order,
    "reverse": _reverse,
    "one backward": _one_backward,
    "skipped": _skipped,
    "scored between": _scored_between,
}
# How many of each router's passes count.
COUNTED = {"in order": 2, "reverse": 3, "one backward": 2, "skipped": 1, "scored between": 2}


def gradients(rank, size, way, recompute, scope="local", mtp=False):
    """Return all gradients of a model, and what its routers have counted."""
    from megatron_maxscore.moe.step import maxscore_routers

    model = make_model(recompute, scope, mtp, size)
    WAYS[way](model, rank)
    routers = maxscore_routers([model])
    # A router whose weight gets no gradient has learned nothing.
    assert all(router.weight.grad.abs().sum() > 0 for router in routers)
    return {
        "grads": [p.grad for p in model.parameters() if p.grad is not None],
        "counts": [int(router.price_count) for router in routers],
        "solves": [router.statistics.solves for router in routers],
        "sums": [router.price_sum.clone() for router in routers],
    }


def shared_layer(rank, size, checkpointed, nested=False):
    """A layer that occurs twice in one checkpointed function; return gradients."""
    from megatron.core import tensor_parallel

    layer = make_layer(ep=size)
    layer.train()
    hidden = own_input(rank, 24)

    def twice(h):
        inner = layer(h)[0]
        if nested:
            again = tensor_parallel.checkpoint(lambda x: layer(x)[0], False, torch.sin(3 * inner))
        else:
            again = layer(torch.sin(3 * inner))[0]
        return inner + again

    if checkpointed:
        outputs = [tensor_parallel.checkpoint(twice, False, hidden * k) for k in (1.0, 2.0)]
    else:
        outputs = [twice(hidden * k) for k in (1.0, 2.0)]
    for output in reversed(outputs):
        output.square().sum().backward()
    return {
        "grads": [hidden.grad, layer.router.weight.grad],
        "count": int(layer.router.price_count),
    }


def without_output(rank, size):
    """``CheckpointWithoutOutput`` around a layer, two of them before any backward pass."""
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel import random

    layer = make_layer(ep=size)
    layer.train()
    hidden = own_input(rank, 24)
    found = []
    for checkpointed in (False, True):
        hidden.grad = layer.router.weight.grad = None
        outputs = []
        for factor in (1.0, 2.0):
            run = lambda h: layer(h)[0]  # noqa: E731
            if checkpointed:
                checkpoint = tensor_parallel.CheckpointWithoutOutput(fp8=None)
                inner = checkpoint.checkpoint(run, hidden * factor)
                output = torch.sin(inner)
                checkpoint.discard_output_and_register_recompute(output)
            else:
                output = torch.sin(run(hidden * factor))
            outputs.append(output.square().sum())
        with mock.patch.object(random, "_get_share_storage", lambda: _copy_storage, create=True):
            for output in outputs:
                output.backward()
        found.append([hidden.grad.clone(), layer.router.weight.grad.clone()])
    return found


def _copy_storage(target, source):
    """What Megatron compiles an extension for."""
    target.untyped_storage().resize_(source.untyped_storage().nbytes())
    target.untyped_storage().copy_(source.untyped_storage())


@contextlib.contextmanager
def transformer_engine():
    """A stand-in whose checkpoint is PyTorch's reentrant one, which Megatron knows nothing of."""
    from torch.utils.checkpoint import checkpoint

    from megatron_maxscore.moe import recompute

    def te_checkpoint(function, *args, **kwargs):
        return checkpoint(function, *args, use_reentrant=True)

    names = ("transformer_engine", "transformer_engine.pytorch")
    modules = {name: types.ModuleType(name) for name in names}
    distributed = types.ModuleType("transformer_engine.pytorch.distributed")
    distributed.checkpoint = te_checkpoint
    modules["transformer_engine.pytorch"].distributed = distributed
    modules["transformer_engine.pytorch.distributed"] = distributed
    sys.modules.update(modules)
    recompute.install()
    try:
        yield distributed
    finally:
        recompute._quantised.undo()
        for name in modules:
            del sys.modules[name]


def quantised_checkpoint(rank, size, checkpointed):
    """Recompute through Transformer Engine's checkpoint, as the fp8 recipes do."""
    from megatron.core.tensor_parallel.random import is_checkpointing

    layer = make_layer(ep=size)
    layer.train()
    hidden = own_input(rank, 24)
    with transformer_engine() as distributed:
        run = lambda h: layer(h)[0]  # noqa: E731
        outputs = []
        for factor in (1.0, 2.0):
            if checkpointed:
                outputs.append(distributed.checkpoint(run, hidden * factor))
            else:
                outputs.append(run(hidden * factor))
        # Prices that move between the passes must not matter.
        layer.router.expert_prices += torch.linspace(-1, 1, EXPERTS)
        assert not is_checkpointing()
        for output in reversed(outputs):
            output.square().sum().backward()
    return {
        "grads": [hidden.grad, layer.router.weight.grad],
        "count": int(layer.router.price_count),
    }


def memory_is_bounded(rank, size):
    """Scoring loops in training mode, with and without checkpoints, leave nothing behind."""
    import gc

    from megatron_maxscore.moe.recompute import Region

    model = make_model("full", size=size)
    with torch.no_grad():
        for seed in range(5):
            loss_of(model, seed, rank)
    for seed in range(3):
        loss_of(model, seed, rank)  # the loss is thrown away
    gc.collect()
    return sum(isinstance(thing, Region) for thing in gc.get_objects())


def passes_that_do_not_count(rank, size, recompute):
    """Two global batches, with scoring passes and a skipped microbatch in one of two runs."""
    from megatron_maxscore.moe.step import average_prices, maxscore_routers

    found = []
    for disturbed in (False, True):
        model = make_model(recompute, size=size)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        routers = maxscore_routers([model])
        losses = []
        for step in range(3):
            optimizer.zero_grad()
            for microbatch in range(2):
                if disturbed:
                    with torch.no_grad():
                        loss_of(model, 50 + step, rank)
                    loss_of(model, 60 + microbatch, rank)
                loss = loss_of(model, 10 * step + microbatch, rank)
                loss.backward()
                losses.append(float(loss.detach()))
            for parameter in model.parameters():
                if parameter.grad is not None and getattr(parameter, "allreduce", True):
                    dist.all_reduce(parameter.grad)
            average_prices(routers)
            optimizer.step()
        found.append(
            {
                "losses": losses,
                "prices": [router.expert_prices.clone() for router in routers],
                "statistics": [
                    {
                        name: value.tolist()
                        for name, value in dataclasses.asdict(router.last_statistics).items()
                        if name != "seconds"
                    }
                    for router in routers
                ],
            }
        )
    return found
