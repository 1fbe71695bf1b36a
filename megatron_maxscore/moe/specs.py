r"""MaxScore routing in stock scripts, by ``--spec megatron_maxscore.moe.specs gpt_layer``.

Options are read from the environment variable ``MEGATRON_MAXSCORE``, a JSON object with the fields
of :class:`MaxScoreConfig`::

    MEGATRON_MAXSCORE='{"scope": "group"}' torchrun ... pretrain_gpt.py \
        --spec megatron_maxscore.moe.specs gpt_layer ...

After this module is imported, every MoE layer that is built becomes ours, also those of multi-token
prediction. If Megatron's arguments have been parsed, the import also installs the hooks of the
training loop. ``gpt_layer`` is the spec that the script would have made itself. From megatron-core
0.19 on it is a function that makes the spec, before that the spec.
"""

from __future__ import annotations

from typing import Any

from megatron_maxscore._run import exit_with_error
from megatron_maxscore.moe.config import MaxScoreConfig
from megatron_maxscore.moe.environment import options_from_environment
from megatron_maxscore.moe.layer import install_layer_hook
from megatron_maxscore.releases import has_callable_specs


def _arguments() -> Any:
    """Return Megatron's parsed arguments, None without."""
    try:
        from megatron.training import get_args

        return get_args()
    except (ImportError, AssertionError):
        return None


def _block_spec(config: Any, args: Any) -> Any:
    """Return what scripts of releases before 0.19 make of their arguments, for any stage."""
    from megatron.core.models.gpt import gpt_layer_specs

    common = dict(
        use_transformer_engine=config.transformer_impl == "transformer_engine",
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
    )
    frequency = config.moe_layer_freq
    if frequency == 1 or (isinstance(frequency, list) and all(frequency)):
        # All layers are alike; the block repeats this one wherever it is.
        return gpt_layer_specs.get_gpt_decoder_layer_specs(config, **common)[0]
    if args.virtual_pipeline_model_parallel_size is not None:
        raise ValueError(
            "--spec megatron_maxscore.moe.specs cannot be combined with --moe-layer-freq and a "
            "virtual pipeline before megatron-core 0.19, where a spec does not know its stage; use "
            "the launcher (python -m megatron_maxscore.launch)"
        )
    return gpt_layer_specs.get_gpt_decoder_block_spec(config, **common)


def _callable_spec(model_config: Any, vp_stage: int | None = None) -> Any:
    """Return the stock spec of a model; the layer hook makes its MoE layers ours."""
    from megatron.training.models.gpt import default_layer_spec

    return default_layer_spec(model_config, vp_stage)


def _begin() -> Any:
    """Install the hooks with the options of the environment; return the spec."""
    args = _arguments()
    if args is None:
        install_layer_hook(options_from_environment())
        return _callable_spec
    from megatron_maxscore.training import begin

    try:
        options = options_from_environment(MaxScoreConfig.from_transformer_config(args))
        # So the rest of the plugin, and checkpoints, see what they see with the launcher.
        options.write_to(args)
        begin(args, is_validated=True)
        # With what follows from the arguments.
        install_layer_hook(MaxScoreConfig.from_transformer_config(args))
        if has_callable_specs():
            return _callable_spec
        from megatron.training.arguments import core_transformer_config_from_args

        return _block_spec(core_transformer_config_from_args(args), args)
    except ValueError as error:
        exit_with_error(str(error))


gpt_layer = _begin()
