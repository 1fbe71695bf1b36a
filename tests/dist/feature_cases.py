"""Features of Megatron's that meet our layer: fused permutation, upcycling."""

from __future__ import annotations

from unittest import mock

import torch

from tests.dist.cases import EXPERTS, HIDDEN, TOPK, groups, make_layer, own_input


def permute_fusion(rank, size, **layout):
    """Run a layer without and with fused permutation, which Transformer Engine has, not we.

    Stand-ins note whether it was asked for, and do it unfused. Returns for both the output, the
    gradient of the input, and the calls.
    """
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    asked = []

    def unfused(name):
        original = getattr(token_dispatcher, name)

        def stand_in(*args, fused=False, **kwargs):
            asked.append((name, fused))
            return original(*args, fused=False, **kwargs)

        return mock.patch.object(token_dispatcher, name, stand_in)

    names = [name for name in vars(moe_utils) if name.startswith("fused_")]
    outputs = []
    for fusion in (False, True):
        with mock.patch.multiple(moe_utils, **{name: object() for name in names}):
            layer = make_layer(moe_permute_fusion=fusion, **layout)
        for parameter in layer.parameters():
            with torch.no_grad():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
        hidden = own_input(rank, 24)
        with unfused("permute"), unfused("unpermute"), unfused("sort_chunks_by_idxs"):
            asked.clear()
            output, _ = layer(hidden)
            output.sum().backward()
        outputs.append((output.detach(), hidden.grad, list(asked)))
    return outputs


def upcycling(rank, size, scope):
    """Upcycle a dense model; return both outputs, the router's prices, and its counted solves."""
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe.upcycling_utils import load_and_upcycle_model

    from megatron_maxscore.moe import MaxScoreConfig, with_maxscore

    groups(ep=size)
    model_parallel_cuda_manual_seed(5)
    common = dict(
        num_layers=2, hidden_size=HIDDEN, num_attention_heads=4, ffn_hidden_size=24,
        add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0,
        use_cpu_initialization=True, gradient_accumulation_fusion=False,
        bias_activation_fusion=False, persist_layer_norm=False,
    )  # fmt: skip
    models = []
    for experts in (None, EXPERTS):
        config = TransformerConfig(
            **common,
            num_moe_experts=experts,
            moe_ffn_hidden_size=24 if experts else None,
            moe_router_topk=TOPK,
            moe_token_dispatcher_type="alltoall",
            moe_router_load_balancing_type="none",
            expert_model_parallel_size=size if experts else 1,
        )
        spec = gpt_layer_specs.get_gpt_layer_local_spec(num_experts=experts, moe_grouped_gemm=False)
        if experts:
            spec = with_maxscore(spec, MaxScoreConfig(scope=scope, gate="score"))
        models.append(GPTModel(config, spec, vocab_size=32, max_sequence_length=16))
    dense, moe = models
    load_and_upcycle_model(lambda: (0, 0), [moe], [dense])
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randint(32, (2, 16), generator=generator)
    positions = torch.arange(16).expand(2, 16)
    mask = torch.ones(16, 16).triu(1).bool()[None, None]
    outputs = [model.train()(tokens, positions, mask) for model in (dense, moe)]
    outputs[1].sum().backward()
    router = moe.decoder.layers[0].mlp.router
    outputs = [output.detach() for output in outputs]
    return outputs, router.expert_prices, router.statistics.solves
