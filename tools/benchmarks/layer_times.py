"""Time the MoE layer with stock and our routers in turn, for :mod:`tools.benchmarks.distributed`.

Every rank of the process group calls :func:`layer_rows`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

LAYER_TOPK = 2
# Steps of the layer before the ones that are timed: prices have to find their level.
_FIRST_STEPS = 2


def make_layer(router: str, scope: str, size: int, hidden: int, experts: int, tokens: int) -> Any:
    """Build a Megatron MoE layer over all ranks."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.spec_utils import build_module

    from megatron_maxscore.moe import MaxScoreConfig, with_maxscore

    config = TransformerConfig(
        num_layers=1, hidden_size=hidden, num_attention_heads=4, moe_ffn_hidden_size=2 * hidden,
        num_moe_experts=experts, moe_router_topk=LAYER_TOPK, add_bias_linear=False,
        moe_token_dispatcher_type="alltoall", moe_router_load_balancing_type="none",
        expert_model_parallel_size=size, use_cpu_initialization=True,
        bias_activation_fusion=False, gradient_accumulation_fusion=False,
    )  # fmt: skip
    spec = get_moe_module_spec(use_te=False, num_experts=experts, moe_grouped_gemm=False)
    if router == "maxscore":
        spec = with_maxscore(spec, MaxScoreConfig(scope=scope, fixed_shape=[tokens, 1]))
    collection = ProcessGroupCollection.use_mpu_process_groups()
    if callable(spec) and not hasattr(spec, "module"):
        layer = spec(config=config, layer_number=1, pg_collection=collection)
    else:
        layer = build_module(spec, config=config, layer_number=1, pg_collection=collection)
    layer.set_layer_number(1)
    layer.train()
    return layer


def lifted(router: Any, lift: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a router's gating, scaled so that scores differ, with some experts preferred."""
    return lambda hidden: 4 * type(router).gating(router, hidden) + lift


def layer_rows(lifts: list[float], tokens: int, hidden: int, repeats: int) -> list[dict[str, Any]]:
    """Time the layer, forward and backward, with stock and our routers in turn.

    As in training, every step brings other tokens and prices are averaged after it; the first two
    steps are not counted.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_maxscore.moe.step import average_prices

    size, rank, experts = dist.get_world_size(), dist.get_rank(), 16
    parallel_state.initialize_model_parallel(expert_model_parallel_size=size)
    model_parallel_cuda_manual_seed(7)
    routers = {
        "top-k": ("topk", "local"),
        "local": ("maxscore", "local"),
        "group": ("maxscore", "group"),
    }
    layers = {
        name: make_layer(*router, size, hidden, experts, tokens) for name, router in routers.items()
    }
    # All layers share one set of weights, so that its place in memory cannot favour one of them.
    for layer in layers.values():
        layer.experts = layers["top-k"].experts
    generator = torch.Generator().manual_seed(rank)
    rows = []
    for lift_of_first in lifts:
        lift = torch.zeros(experts)
        lift[: experts // size] = lift_of_first
        times: dict[str, list[float]] = {name: [] for name in layers}
        for layer in layers.values():
            layer.router.gating = lifted(layer.router, lift)
        order = list(layers.items())
        # Without preferred experts the difference is small beside the noise: take more steps.
        steps = repeats if lift_of_first or repeats == 1 else 3 * repeats
        for step in range(_FIRST_STEPS + steps):
            x = torch.randn(tokens, 1, hidden, generator=generator)
            order.append(order.pop(0))
            for name, layer in order:
                hidden_states = x.clone().requires_grad_()
                dist.barrier()
                started = time.perf_counter()
                output, _ = layer(hidden_states)
                output.sum().backward()
                dist.barrier()
                if step >= _FIRST_STEPS:
                    times[name].append(1e3 * (time.perf_counter() - started))
                if name != "top-k":
                    average_prices([layer.router])
        loads = layers["top-k"].router(x)[1].sum(0)
        dist.all_reduce(loads)
        share = float(loads.reshape(size, -1).sum(1).max() / loads.sum())
        middle = {name: statistics.median(values) for name, values in times.items()}
        rows.append(
            {
                "ranks": size,
                "lift": lift_of_first,
                "top-k: hottest rank's share": share,
                "MaxScore: hottest rank's share": 1 / size,
                **{f"{name} ms": value for name, value in middle.items()},
                # Ratios within one step, because the machine's speed changes between steps.
                **{
                    f"{name} / top-k": statistics.median(
                        own / stock for own, stock in zip(times[name], times["top-k"], strict=True)
                    )
                    for name in ("local", "group")
                },
            }
        )
    return rows
