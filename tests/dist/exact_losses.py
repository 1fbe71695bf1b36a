"""``examples/pretrain_gpt.py`` that also writes every global batch's training loss exactly.

With BAD_RANK and BAD_ITERATION set, that rank's routers meet NaN in that iteration, or with
BAD_ITERATION=evaluation in evaluation. With FREEZE_ROUTERS set, no router learns.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import pretrain_gpt
import torch
from megatron.training import get_args, training

_train_step = training.train_step


def _recording_step(*args, **kwargs):
    result = _train_step(*args, **kwargs)
    # The loss is reduced over data-parallel ranks, and the last pipeline stage has it.
    is_last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    for loss in result[0].values() if is_last else ():
        with open(os.environ["EXACT_LOSSES"], "a") as file:
            file.write(float(loss).hex() + "\n")
    return result


training.train_step = _recording_step

if "FREEZE_ROUTERS" in os.environ:
    from megatron.core.transformer.moe.router import TopKRouter

    _init = TopKRouter.__init__

    def _frozen_init(self, *args, **kwargs):
        _init(self, *args, **kwargs)
        self.weight.requires_grad_(False)

    TopKRouter.__init__ = _frozen_init

if "BAD_RANK" in os.environ:
    from megatron.core.transformer.moe.router import Router

    _gating = Router.gating

    def _bad_gating(self, hidden):
        logits = _gating(self, hidden)
        wanted = os.environ["BAD_ITERATION"]
        now = str(get_args().curr_iteration + 1) if self.training else "evaluation"
        if now == wanted and os.environ["RANK"] == os.environ["BAD_RANK"]:
            logits = torch.cat([torch.full_like(logits[:1], float("nan")), logits[1:]])
        return logits

    Router.gating = _bad_gating


def _build(pre_process=True, post_process=True, vp_stage=None, config=None, pg_collection=None):
    """Build the model as the scripts of releases before 0.19 do."""
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs
    from megatron.core.transformer.spec_utils import import_module
    from megatron.training.arguments import core_transformer_config_from_args

    args = get_args()
    config = config or core_transformer_config_from_args(args)
    if args.spec is not None:
        spec = import_module(args.spec)
    else:
        spec = gpt_layer_specs.get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization=args.normalization,
            vp_stage=vp_stage,
        )  # fmt: skip
    mtp_spec = None
    if args.mtp_num_layers is not None:
        layers = gpt_layer_specs.get_gpt_decoder_layer_specs(
            config, use_transformer_engine=False, normalization=args.normalization,
            vp_stage=vp_stage,
        )  # fmt: skip
        mtp_spec = gpt_layer_specs.get_gpt_mtp_block_spec(
            config, layers[-1], use_transformer_engine=False, vp_stage=vp_stage
        )
    return GPTModel(
        config,
        spec,
        args.padded_vocab_size,
        args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        mtp_block_spec=mtp_spec,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


def _main_before_019():
    from megatron.core.enums import ModelType
    from megatron.training import arguments, initialize

    pretrain_gpt.datasets_provider.is_distributed = True
    common = (
        pretrain_gpt.datasets_provider, _build, ModelType.encoder_or_decoder,
        pretrain_gpt.forward_step,
    )  # fmt: skip
    defaults = {"tokenizer_type": "NullTokenizer"}
    if hasattr(initialize, "parse_args"):
        training.pretrain(*common, args_defaults=defaults)
        return
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    args = arguments.parse_and_validate_args(args_defaults=defaults)
    training.pretrain(pretrain_cfg_container_from_args(args), *common)


if __name__ == "__main__":
    from megatron.training import argument_utils

    if hasattr(argument_utils, "gpt_config_from_args"):
        pretrain_gpt.main()
    else:
        _main_before_019()
