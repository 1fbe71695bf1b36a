"""Build a MoE layer of every recipe in bfloat16, for its first rank of as many as it has.

Process groups are torch's fake ones. Modules are Megatron's local ones, so what needs Transformer
Engine (eight bits, fused operators, a paged stash) is taken out. Prints what was built as JSON.
"""

from __future__ import annotations

import json
import os
from unittest import mock

os.environ["NVTE_CPU_OFFLOAD_V1"] = "1"  # asked for by Megatron where activations are offloaded

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_maxscore.commands import check
from tests.recipes import RECIPES, command_of, ranks_of

LOCAL = dict(
    fp8=None, fp4=None, moe_router_padding_for_quantization=False,
    use_transformer_engine_op_fuser=False, moe_paged_stash=False, perform_initialization=False,
    use_cpu_initialization=True, gradient_accumulation_fusion=False, delay_wgrad_compute=False,
    bias_activation_fusion=False, moe_mlp_glu_interleave_size=None,
)  # fmt: skip


def build(name):
    """Return a layer of a recipe."""
    command = ["--moe-router-type", "maxscore", *command_of(name)]
    report = check.examine(check.Launch(command, ranks_of(name)))
    assert not report.refusal, report.refusal
    # Later, since CPU mode comes before Megatron.
    from megatron.core import parallel_state
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.spec_utils import build_module
    from megatron.training.arguments import core_transformer_config_from_args

    args = report.args
    with check.quiet(), check.packages(is_cpu=False):
        config = core_transformer_config_from_args(args)
        for key, value in LOCAL.items():
            if hasattr(config, key):
                setattr(config, key, value)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=args.tensor_model_parallel_size,
            expert_model_parallel_size=args.expert_model_parallel_size,
            expert_tensor_parallel_size=args.expert_tensor_parallel_size,
            create_gloo_process_groups=False,
        )
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        spec = get_moe_module_spec(
            use_te=False, num_experts=args.num_experts, moe_grouped_gemm=False
        )
        collection = ProcessGroupCollection.use_mpu_process_groups()
        arguments = dict(config=config, layer_number=3, pg_collection=collection)
        is_plain = callable(spec) and not hasattr(spec, "module")
        layer = spec(**arguments) if is_plain else build_module(spec, **arguments)
        parallel_state.destroy_model_parallel()
    return layer


def main():
    """Build them all."""
    from megatron_maxscore import cpu

    cpu.enable()
    originals = {
        name: getattr(dist, name).__wrapped__
        for name in ("init_process_group", "new_group", "destroy_process_group")
    }
    found = {}
    # CPU mode makes gloo groups, which need all their ranks.
    with mock.patch.multiple(dist, **originals):
        for name in RECIPES:
            ranks = ranks_of(name)
            dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
            layer = build(name)
            found[name] = {
                "router": type(layer.router).__name__,
                "dispatcher": type(layer.token_dispatcher).__name__,
                "experts": len(layer.local_expert_indices),
                "dtype": str(next(layer.experts.parameters()).dtype),
                "options": [layer.router.options.gate, layer.router.options.objective],
                "bias": layer.router.expert_bias is not None,
                "groups": layer.router.groups is not None,
            }
            dist.destroy_process_group()
    print("FOUND " + json.dumps(found))


if __name__ == "__main__":
    main()
