"""Inference: price routing with a KV cache, in Megatron's engine, and by stock's biased router."""

from __future__ import annotations

from unittest import mock

import torch

from tests.dist.cases import EXPERTS, TOPK, groups

VOCABULARY, LENGTH, BATCH = 64, 16, 2


def build(size, ours):
    """Build a GPT model whose MoE layers are ours, or stock's with an expert bias."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    from megatron_maxscore.moe import MaxScoreConfig, with_maxscore

    model_parallel_cuda_manual_seed(3)
    config = TransformerConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, num_moe_experts=EXPERTS,
        moe_router_topk=TOPK, moe_ffn_hidden_size=32, moe_router_score_function="sigmoid",
        moe_router_load_balancing_type="none", moe_token_dispatcher_type="alltoall",
        moe_router_enable_expert_bias=True, expert_model_parallel_size=size,
        add_bias_linear=False, use_cpu_initialization=True, gradient_accumulation_fusion=False,
        bias_activation_fusion=False, persist_layer_norm=False,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(num_experts=EXPERTS, moe_grouped_gemm=False)
    if ours:
        spec = with_maxscore(spec, MaxScoreConfig())
    model = GPTModel(
        config, spec, vocab_size=VOCABULARY, max_sequence_length=2 * LENGTH,
        position_embedding_type="rope",
    )  # fmt: skip
    return model.eval()


def pair(size):
    """Return our model and stock's with the weights and the bias of ours."""
    groups(ep=size)
    ours, stock = build(size, True), build(size, False)
    for layer in ours.decoder.layers:
        layer.mlp.router.set_prices(torch.linspace(-0.1, 0.1, EXPERTS))
    stock.load_state_dict(ours.state_dict())
    return ours, stock


def with_cache(rank, size):
    """Return logits of ours and stock: of one pass over all tokens, and decoded one by one."""
    from megatron.core.inference.contexts import StaticInferenceContext

    models = pair(size)
    tokens = torch.randint(
        VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(rank)
    )
    positions = torch.arange(LENGTH).expand(BATCH, LENGTH)
    mask = torch.ones(LENGTH, LENGTH).triu(1).bool()[None, None]
    whole, decoded = [], []
    with torch.no_grad():
        for model in models:
            whole.append(model(tokens, positions, mask))
            context = StaticInferenceContext(max_batch_size=BATCH, max_sequence_length=LENGTH)
            parts = []
            half = LENGTH // 2
            for first, last in [(0, half), *((i, i + 1) for i in range(half, LENGTH))]:
                piece = slice(first, last)
                parts.append(
                    model(
                        tokens[:, piece], positions[:, piece], mask[..., piece, :last],
                        inference_context=context, runtime_gather_output=True,
                    )[:, -1]
                )  # fmt: skip
                context.sequence_len_offset += last - first
            decoded.append(torch.stack(parts, dim=1))
    return whole, decoded


def in_engine(rank, size):
    """Megatron's static engine generates the same from both models."""
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.engines import StaticInferenceEngine
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
        GPTInferenceWrapper,
    )
    from megatron.core.inference.sampling_params import SamplingParams
    from megatron.core.inference.text_generation_controllers.text_generation_controller import (
        TextGenerationController,
    )

    answers = []
    for model in pair(size):
        tokenizer = mock.Mock(vocab_size=VOCABULARY, eod=VOCABULARY - 1, bos=None)
        tokenizer.tokenize = lambda text: [int(word) for word in text.split()]
        tokenizer.detokenize = lambda ids, **kwargs: " ".join(map(str, ids))
        tokenizer.offsets = lambda *args: [0]
        context = StaticInferenceContext(max_batch_size=BATCH, max_sequence_length=2 * LENGTH)
        controller = TextGenerationController(GPTInferenceWrapper(model, context), tokenizer)
        engine = StaticInferenceEngine(controller, max_batch_size=BATCH, legacy=True)
        requests = engine.generate(
            prompts=["1 2 3 4", "9 8 7 6"],
            sampling_params=SamplingParams(num_tokens_to_generate=8, top_k=1),
        )
        answers.append([list(map(int, request.generated_tokens)) for request in requests])
    assert answers[0] == answers[1]
    return answers[0]
