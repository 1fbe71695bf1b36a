"""Pretrain a GPT model with the training loop of the installed megatron-core wheel.

The wheel ships ``megatron.training`` but not the launch script of the Megatron-LM repository; this
is a short one, for text (``--data-path``) or random tokens (``--mock-data``). With a Megatron-LM
fork use the fork's own ``pretrain_gpt.py``: the launcher runs either unmodified.

    torchrun --nproc-per-node 4 -m megatron_maxscore.launch examples/pretrain_gpt.py ARGS...
"""

from functools import partial

import torch
from megatron.core import mpu, tensor_parallel
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training import get_args, pretrain, print_rank_0
from megatron.training.utils import get_blend_and_blend_per_split

INT_KEYS = ["tokens", "labels", "position_ids"]


def get_batch(data_iterator, vp_stage):
    """Return this rank's batch: read on tensor-parallel rank 0, broadcast to the others.

    Returns:
        dict of (micro_batch, seq) tensors ``tokens``, ``labels``, ``position_ids`` (int64) and
        ``loss_mask`` (float32); all None on pipeline stages that need no data.
    """
    if not needs_data(vp_stage):
        return dict.fromkeys([*INT_KEYS, "loss_mask"])
    data = next(data_iterator) if mpu.get_tensor_model_parallel_rank() == 0 else None
    batch = tensor_parallel.broadcast_data(INT_KEYS, data, torch.int64)
    batch |= tensor_parallel.broadcast_data(["loss_mask"], data, torch.float32)
    return batch


def loss_func(loss_mask, output):
    """Return the summed loss, the number of tokens, and both for the log."""
    loss_mask = loss_mask.view(-1)
    loss = torch.sum(output.view(-1).float() * loss_mask)
    num_tokens = loss_mask.sum().detach().to(torch.int)
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.float()])}


def forward_step(data_iterator, model, return_schedule_plan=False):
    """Run one microbatch forward, or plan it for ``--overlap-moe-expert-parallel-comm``."""
    vp_stage = getattr(unwrapped(model), "vp_stage", None)
    batch = get_batch(data_iterator, vp_stage)
    run = unwrapped(model).build_schedule_plan if return_schedule_plan else model
    output = run(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, partial(loss_func, batch["loss_mask"])


def unwrapped(model):
    """Return the model inside its data-parallel and precision wrappers."""
    while hasattr(model, "module"):
        model = model.module
    return model


def needs_data(vp_stage=None):
    """Return whether this pipeline stage reads tokens or labels."""
    return mpu.is_pipeline_first_stage(
        ignore_virtual=False, vp_stage=vp_stage
    ) or mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)


def datasets_provider(num_samples, vp_stage=None):
    """Build the train, validation and test data sets with Megatron's builder."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
    )
    print_rank_0("> building train, validation, and test data sets")

    def is_built():
        return mpu.get_tensor_model_parallel_rank() == 0 and needs_data(vp_stage)

    dataset = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(dataset, num_samples, is_built, config).build()


def main():
    """Parse Megatron's arguments and train."""
    # From megatron-core 0.19; with older releases use the script of their tree.
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.arguments import parse_and_validate_args

    datasets_provider.is_distributed = True
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "NullTokenizer"})
    model_config = gpt_config_from_args(args)
    pretrain(
        pretrain_cfg_container_from_args(args, model_config),
        datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
    )


if __name__ == "__main__":
    main()
