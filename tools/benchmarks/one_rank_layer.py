"""A Megatron MoE layer of one rank with our router and dispatcher, in scope local."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

HIDDEN, EXPERTS, TOPK = 256, 16, 2


def set_up(backend: str) -> None:
    """Make a process group of one rank."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    # A store of its own, not a port that another run may hold.
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)


def make_layer(
    hidden: int = HIDDEN,
    expert_hidden: int = HIDDEN,
    experts: int = EXPERTS,
    topk: int = TOPK,
    is_ours: bool = True,
    tokens: int = 0,
    mode: str = "auto",
    is_forced: bool = False,
    options: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """Build the layer, bfloat16 on the CPU; with Megatron's top-k router if it is not ours.

    ``tokens`` is the number of tokens that the layer is told to expect in every microbatch; with 0
    it is told none. With ``is_forced``, Megatron's router replaces its logits by random ones, which
    balances loads and learns nothing. ``options`` are further options of MaxScore, ``settings``
    those of the TransformerConfig.
    """
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.spec_utils import build_module

    from megatron_maxscore.moe import MaxScoreConfig, with_maxscore

    config = TransformerConfig(
        num_layers=1, hidden_size=hidden, num_attention_heads=4, ffn_hidden_size=expert_hidden,
        moe_ffn_hidden_size=expert_hidden, num_moe_experts=experts, moe_router_topk=topk,
        moe_token_dispatcher_type="alltoall", moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0, add_bias_linear=False, bias_activation_fusion=False,
        gradient_accumulation_fusion=False, bf16=True, params_dtype=torch.bfloat16,
        moe_router_force_load_balancing=is_forced, **settings,
    )  # fmt: skip
    spec = get_moe_module_spec(use_te=False, num_experts=experts, moe_grouped_gemm=False)
    if is_ours:
        own = MaxScoreConfig(mode=mode, fixed_shape=[tokens, 1], **(options or {}))
        spec = with_maxscore(spec, own)
    collection = ProcessGroupCollection.use_mpu_process_groups()
    arguments = {"config": config, "layer_number": 1, "pg_collection": collection}
    is_plain = callable(spec) and not hasattr(spec, "module")
    built = spec(**arguments) if is_plain else build_module(spec, **arguments)
    built.set_layer_number(1)
    if is_ours:
        built.router.is_cold = False  # as when the first batch has ended
    return built


def build(backend: str, tokens: int = 0, mode: str = "auto") -> Any:
    """Set up one rank and build the layer, on the CPU."""
    set_up(backend)
    return make_layer(tokens=tokens, mode=mode)


def tear_down() -> None:
    """Undo :func:`build`."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def routed(layer: Any, hidden: torch.Tensor) -> Any:
    """Route, and permute for dispatch."""
    probs, routing_map = layer.router(hidden)
    return layer.token_dispatcher.dispatch_preprocess(hidden, routing_map, probs)
