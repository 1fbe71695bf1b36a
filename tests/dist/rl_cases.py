"""Reinforcement learning: log-probabilities of training and of rollouts, with recorded routing."""

from __future__ import annotations

import torch

from tests.dist.cases import EXPERTS, TOPK, groups

VOCABULARY, LENGTH, BATCH = 64, 32, 4


def _build(size, **settings):
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    from megatron_maxscore.moe import MaxScoreConfig, with_maxscore

    groups(ep=size)
    model_parallel_cuda_manual_seed(3)
    config = TransformerConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, num_moe_experts=EXPERTS,
        moe_router_topk=TOPK, moe_ffn_hidden_size=32, moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall", expert_model_parallel_size=size,
        moe_enable_routing_replay=True, add_bias_linear=False, use_cpu_initialization=True,
        gradient_accumulation_fusion=False, bias_activation_fusion=False, hidden_dropout=0.0,
        attention_dropout=0.0, persist_layer_norm=False, **settings,
    )  # fmt: skip
    spec = with_maxscore(
        get_gpt_layer_local_spec(num_experts=EXPERTS, moe_grouped_gemm=False), MaxScoreConfig()
    )
    return GPTModel(
        config, spec, vocab_size=VOCABULARY, max_sequence_length=LENGTH,
        position_embedding_type="rope",
    )  # fmt: skip


def _log_probabilities(model, tokens):
    positions = torch.arange(LENGTH).expand(BATCH, LENGTH)
    mask = torch.ones(LENGTH, LENGTH).triu(1).bool()[None, None]
    logits = model(tokens, positions, mask)
    return logits.log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]


def rollouts(rank, size, steps=60, **settings):
    """Train a model, then compare training's log-probabilities with those of rollouts.

    Returns the mean difference with the flow in training, and with the rollouts' routing replayed;
    and checks that a replay moves no price and counts no solve.
    """
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    from megatron_maxscore.moe.step import average_prices, maxscore_routers

    RouterReplay.global_router_replay_instances.clear()
    model = _build(size, **settings).train()
    routers = maxscore_routers([model])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(5)  # sequences that go up by one of few steps
    for _ in range(steps):
        first = torch.randint(VOCABULARY, (BATCH, 1), generator=generator)
        stride = torch.randint(1, 5, (BATCH, 1), generator=generator)
        tokens = (first + stride * torch.arange(LENGTH)) % VOCABULARY
        loss = -_log_probabilities(model, tokens).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average_prices(routers)
    with torch.no_grad():
        flow = _log_probabilities(model, tokens)
        RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
        rollout = _log_probabilities(model.eval(), tokens)
    recorded = [index.clone() for index in RouterReplay.get_recorded_data()]
    prices = [router.prices.clone() for router in routers]
    RouterReplay.set_replay_data(recorded)
    RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    replayed = _log_probabilities(model.train(), tokens)
    (-replayed.mean()).backward()
    average_prices(routers)
    for router, before in zip(routers, prices, strict=True):
        assert torch.equal(router.prices, before), "a replay has moved prices"
        assert router.last_statistics.solves == 0
    RouterReplay.clear_global_router_replay_action()
    RouterReplay.global_router_replay_instances.clear()
    return (
        float((flow - rollout).abs().mean()),
        float((replayed - rollout).abs().mean()),
        float(loss),
    )
