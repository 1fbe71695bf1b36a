"""MaxScore routing with megatron-core alone: no ``megatron.training``, a loop of one's own.

    torchrun --nproc-per-node 2 examples/mcore_loop.py --steps 50

Experts are spread over all ranks; every rank reads its own batches of a made-up language. With a
CUDA device per rank it runs on NCCL, otherwise on CPU and gloo.
"""

import argparse
import os

import torch
import torch.distributed as dist

from megatron_maxscore import cpu

on_cpu = cpu.enable_if_needed()  # before megatron.core is imported

from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

from megatron_maxscore.moe import MaxScoreConfig, with_maxscore
from megatron_maxscore.moe.step import (
    average_prices,
    maxscore_routers,
    raise_on_bad_scores,
)

VOCABULARY, LENGTH, BATCH, EXPERTS, TOPK = 128, 64, 4, 8, 2


def batches(rank: int, device: torch.device):
    """Yield (BATCH, LENGTH + 1) int64 tokens: each follows from the one before it, mostly."""
    generator = torch.Generator().manual_seed(rank)
    while True:
        tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
        for position in range(1, LENGTH + 1):
            ruled = (3 * tokens[:, position - 1] + 1) % VOCABULARY
            follows = torch.rand(BATCH, generator=generator) < 0.9
            tokens[:, position] = torch.where(follows, ruled, tokens[:, position])
        yield tokens.to(device)


def build(scope: str) -> DistributedDataParallel:
    """Build the model, its MoE layers routed by MaxScore."""
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        num_moe_experts=EXPERTS,
        moe_router_topk=TOPK,
        moe_ffn_hidden_size=64,
        moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=0.1,
        expert_model_parallel_size=dist.get_world_size(),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        add_bias_linear=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        use_cpu_initialization=on_cpu,
    )
    spec = get_gpt_layer_local_spec(num_experts=EXPERTS, moe_grouped_gemm=False)
    spec = with_maxscore(spec, MaxScoreConfig(scope=scope))
    model = GPTModel(
        config, spec, VOCABULARY, LENGTH, position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )  # fmt: skip
    return DistributedDataParallel(config, DistributedDataParallelConfig(), model.cuda())


def main() -> None:
    """Train; print the loss and the largest duality gap."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--scope", choices=("local", "group"), default="group")
    arguments = parser.parse_args()
    dist.init_process_group("gloo" if on_cpu else "nccl")
    rank = dist.get_rank()
    if not on_cpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size())
    model_parallel_cuda_manual_seed(1)

    model = build(arguments.scope)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-2, weight_decay=0.1), [model]
    )
    routers = maxscore_routers([model])
    data = batches(rank, next(model.parameters()).device)
    positions = torch.arange(LENGTH).expand(BATCH, -1).cuda()
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None].cuda()
    largest_gap = 0.0
    for step in range(1, arguments.steps + 1):
        tokens = next(data)
        model.zero_grad_buffer()
        loss = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:]).mean()
        loss.backward()
        # Two calls are all that MaxScore asks of a loop: scores that are not finite become one
        # error on every rank, and prices are averaged over batches and ranks.
        raise_on_bad_scores(routers, step)
        finalize_model_grads([model])
        average_prices(routers)
        optimizer.step()
        largest_gap = max(largest_gap, *(r.last_statistics.largest_gap for r in routers))
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        if rank == 0 and (step == 1 or step % 10 == 0):
            print(f"step {step}: loss {float(mean):.4f}", flush=True)
    if rank == 0:
        print(f"largest relative gap {float(largest_gap):.1e}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
