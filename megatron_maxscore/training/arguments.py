"""Command-line arguments: one-line errors, and checks that need all arguments at once."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import math
import os
import sys
from typing import Any

from megatron_maxscore import cpu
from megatron_maxscore._replacements import Replacements
from megatron_maxscore._run import is_rank_zero
from megatron_maxscore.flow.places import is_interpreted
from megatron_maxscore.moe.budgets import least_rank_factor, most_rows_of_an_expert
from megatron_maxscore.moe.config import (
    VARIABLE_LENGTHS,
    MaxScoreConfig,
    check_transformer_config,
)
from megatron_maxscore.moe.fields import config_fields
from megatron_maxscore.releases import names_bound_early, pads_for_operators

# What a run writes, and how it evaluates, is not restored from the checkpoint of another.
OF_THIS_RUN = (
    "maxscore_stats_", "maxscore_record_", "maxscore_eval_", "maxscore_fixed_",
)  # fmt: skip
# What Megatron says of the packages of its flex dispatcher, and their names.
_BACKENDS = {
    "deepep": ("HAVE_DEEP_EP", "DeepEP (the package deep_ep)"),
    "hybridep": ("HAVE_HYBRIDEP", "HybridEP (the package deep_ep of DeepEP's branch hybrid-ep)"),
    "ncclep": ("HAVE_TE_EP", "Transformer Engine built with NVTE_BUILD_WITH_NCCL_EP=1"),
}
# Options with which the number of tokens of a microbatch is not known in advance.
_VARYING = (*VARIABLE_LENGTHS, "sft", "perform_rl_step", "rl_use_sequence_packing")


def hook(replacements: Replacements) -> None:
    """Wrap parsing and validation of arguments, and what ``--use-checkpoint-args`` restores."""
    from megatron.training import arguments, checkpointing

    replacements.wrap(arguments, "add_megatron_arguments", _with_short_errors)
    replacements.wrap(arguments, "validate_args", _with_our_checks)
    for module in names_bound_early("validate_args"):
        replacements.set(module, "validate_args", arguments.validate_args)
    replacements.wrap(checkpointing, "load_args_from_checkpoint", _with_router_type)


def _with_short_errors(original: Any) -> Any:
    """Argparse prints Megatron's several hundred flags before the error; we print the error."""

    def add_megatron_arguments(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        result = original(parser, *args, **kwargs)

        def error(message: str) -> None:
            raise ValueError(message)

        parser.error = error  # type: ignore[method-assign, assignment]
        parser.formatter_class = _type_of_formatter(parser.formatter_class)
        return result

    return add_megatron_arguments


def _type_of_formatter(base: Any) -> Any:
    class Formatter(base):
        def _expand_help(self, action: argparse.Action) -> str:
            try:
                return str(super()._expand_help(action))
            except (ValueError, TypeError, KeyError):
                # A per cent sign in one of Megatron's help texts would otherwise end --help.
                return action.help or ""

    return Formatter


def _with_our_checks(original: Any) -> Any:
    def validate_args(args: Any, *rest: Any, **kwargs: Any) -> Any:
        _check_environment(args)
        check_arguments(args)
        if args.moe_router_type == "maxscore":
            say_once(args)
        return original(args, *rest, **kwargs)

    return validate_args


@functools.cache
def _say(text: str) -> None:
    if is_rank_zero():
        print(f"megatron_maxscore: {text}", file=sys.stderr, flush=True)


def say_once(args: Any) -> None:
    """Say on rank 0 what routes, which solver runs, and which flags do less than they say."""
    where = "on the CPU"
    if args.maxscore_mode != "exact" and not cpu.is_enabled():
        where = "on the GPU"
    _say(
        f"MaxScore routing, scope {args.maxscore_scope}, mode {args.maxscore_mode}, solved {where}"
    )
    if getattr(args, "moe_router_fusion", False):
        _say("--moe-router-fusion: MaxScore's own kernels take the place of the fused router")
    if getattr(args, "moe_router_enable_expert_bias", False):
        _say(
            "--moe-router-enable-expert-bias: the bias holds MaxScore's prices; "
            "--moe-router-bias-update-rate is ignored"
        )
    if getattr(args, "moe_router_force_load_balancing", False):
        _say(
            "warning: --moe-router-force-load-balancing replaces the router's logits by random "
            "ones, so the router learns nothing; it is for benchmarks, leave it out to train"
        )


def check_arguments(args: Any) -> None:
    """Refuse arguments that cannot work, on this machine too.

    Raises:
        ValueError: names the flags and what mends it.
    """
    check_configuration(args)
    _check_dispatcher(args)
    _check_data_paths(args)
    _check_written_paths(MaxScoreConfig.from_transformer_config(args))
    _check_asynchronous_saving(args)


def check_configuration(args: Any) -> None:
    """Refuse arguments that cannot work on any machine, and set what follows from them.

    Raises:
        ValueError: names the flags and what mends it.
    """
    is_ours = args.moe_router_type == "maxscore"
    if is_ours and args.maxscore_fixed_shape is None:
        args.maxscore_fixed_shape = _fixed_shape(args)
    options = MaxScoreConfig.from_transformer_config(args)
    if is_ours:
        check_transformer_config(args, options)
        if options.mode == "bounded" and cpu.is_enabled() and not is_interpreted():
            raise ValueError(
                "--maxscore-mode bounded runs on GPUs, and this is CPU mode; leave it out"
            )
    else:
        _check_no_options(args)
    if args.num_experts is not None:
        parallel = args.expert_model_parallel_size
        if parallel < 1:
            raise ValueError(f"--expert-model-parallel-size must be at least 1, got {parallel}")
        if args.num_experts % parallel:
            raise ValueError(
                f"--num-experts {args.num_experts} is not divisible by "
                f"--expert-model-parallel-size {parallel}; change one of them"
            )
        if args.moe_router_topk > args.num_experts:
            raise ValueError(
                f"--moe-router-topk {args.moe_router_topk} is more than --num-experts "
                f"{args.num_experts}; lower --moe-router-topk"
            )
    if is_ours:
        _check_rank_capacity(args, options)
        if options.resolved_for(args).gate == "soft_topk" and args.moe_router_topk == 1:
            # Megatron asks for it with a softmax over one expert, which SoftTopk is not.
            args.moe_router_pre_softmax = True


def _check_environment(args: Any) -> None:
    """Refuse options in the environment that nothing reads."""
    spec = next(iter(getattr(args, "spec", None) or []), "")
    is_read = spec == "megatron_maxscore.moe.specs"
    if args.moe_router_type == "maxscore" and "MEGATRON_MAXSCORE" in os.environ and not is_read:
        raise ValueError(
            "MEGATRON_MAXSCORE is read by --spec megatron_maxscore.moe.specs alone; give its "
            "options as --maxscore- flags, and unset it"
        )


def _check_no_options(args: Any) -> None:
    """Refuse options of ours that the run would ignore."""
    for name, field in config_fields().items():
        # Statistics are written for Megatron's own router too.
        if name in ("moe_router_type", "maxscore_stats_file"):
            continue
        if getattr(args, name, field.default) != field.default:
            given = "--" + name.replace("_", "-")
            raise ValueError(
                f"{given} is an option of --moe-router-type maxscore, but --moe-router-type is "
                f"{args.moe_router_type}; add --moe-router-type maxscore, or leave {given} out"
            )


def _fixed_shape(args: Any) -> list[int]:
    """Return what every rank routes in every microbatch, as Megatron's own loaders make them.

    A script may cut batches shorter; the dispatcher then adds rows of zeros.
    """
    varies = any(getattr(args, name, False) for name in _VARYING)
    # Scripts with a loader of their own, and layers that are given a part of the tokens at a time.
    varies = varies or getattr(args, "dataloader_type", None) == "external"
    varies = varies or (getattr(args, "mlp_chunks_for_training", None) or 1) > 1
    if varies or args.seq_length is None or args.micro_batch_size is None:
        return [0, 0]
    split = args.context_parallel_size
    if args.sequence_parallel:
        split *= args.tensor_model_parallel_size
    return [args.seq_length // split, args.micro_batch_size]


def _check_dispatcher(args: Any) -> None:
    """Refuse a flex dispatcher whose package is missing, before ranks meet."""
    if getattr(args, "moe_token_dispatcher_type", None) != "flex" or args.num_experts is None:
        return
    from megatron.core.transformer.moe import fused_a2a

    backend = "deepep" if args.moe_enable_deepep else args.moe_flex_dispatcher_backend
    mark, package = _BACKENDS[backend]
    if getattr(fused_a2a, mark, False):
        return
    fix = f"needs {package}, which is not installed; install it, or use another backend or"
    if backend == "ncclep" and cpu.is_enabled():
        fix = "runs on GPUs, and this is CPU mode; use hybridep or"
    raise ValueError(
        f"--moe-flex-dispatcher-backend {backend} {fix} --moe-token-dispatcher-type alltoall"
    )


def _check_rank_capacity(args: Any, options: MaxScoreConfig) -> None:
    """Refuse a budget of rows in which a step's rows do not fit."""
    factor = getattr(args, "moe_expert_rank_capacity_factor", None)
    if factor is None:
        return
    backend = args.moe_flex_dispatcher_backend
    least = least_factor(args, options)
    if least is not None and factor < least:
        raise ValueError(
            f"--moe-expert-rank-capacity-factor {factor} is too small for what a rank receives; "
            f"make it at least {math.ceil(least * 1e4) / 1e4:g}"
        )
    local = args.num_experts // args.expert_model_parallel_size
    # All tokens may go to the experts of one rank.
    worst = _tp_ep_ranks(args) * min(1.0, local / args.moe_router_topk)
    if backend == "ncclep" and options.eval_routing != "flow" and factor < worst:
        raise ValueError(
            f"--moe-expert-rank-capacity-factor {factor} bounds what a rank receives, and "
            f"--maxscore-eval-routing {options.eval_routing} routes by prices, which do not; use "
            "--maxscore-eval-routing flow, or --moe-flex-dispatcher-backend hybridep"
        )


def _tp_ep_ranks(args: Any) -> int:
    """Return how many ranks share one set of experts."""
    expert_tensor = args.expert_tensor_parallel_size
    if expert_tensor is None:
        expert_tensor = args.tensor_model_parallel_size
    return int(args.expert_model_parallel_size * expert_tensor)


def least_factor(args: Any, options: MaxScoreConfig) -> float | None:
    """Return the least safe ``--moe-expert-rank-capacity-factor`` of a launch, None if unknown.

    Args:
        args: parsed arguments.
        options: MaxScore's own options.
    """
    from megatron.core.transformer.moe.moe_utils import get_align_size_for_quantization

    shape = args.maxscore_fixed_shape or _fixed_shape(args)
    if not math.prod(shape):
        return None
    num_tokens = math.prod(shape)
    most = most_rows_of_an_expert(
        options,
        num_tokens,
        args.seq_length,
        args.moe_router_topk,
        args.num_experts,
        _tp_ep_ranks(args),
    )
    is_quantised = getattr(args, "fp8", None) or getattr(args, "fp4", None)
    align = 0
    if is_quantised or pads_for_operators() or args.moe_flex_dispatcher_backend == "ncclep":
        align = get_align_size_for_quantization(args)
    local = args.num_experts // args.expert_model_parallel_size
    return least_rank_factor(most, local, align, num_tokens * args.moe_router_topk)


def _check_data_paths(args: Any) -> None:
    """Only some ranks open the data; a missing file would leave the others waiting."""
    for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        for item in getattr(args, name, None) or []:
            if _is_number(item) or "://" in item:
                continue
            for suffix in (".idx", ".bin"):
                if not os.path.exists(item + suffix):
                    flag = "--" + name.replace("_", "-")
                    raise ValueError(
                        f"{flag} {item}: {item + suffix} does not exist; give the path without "
                        "its ending, or make the data with python -m megatron_maxscore prepare"
                    )


def _check_written_paths(options: MaxScoreConfig) -> None:
    """Refuse files that could not be written, before the first step is computed."""
    # Only the first node writes statistics; torchrun numbers nodes.
    if options.stats_file is not None and os.environ.get("GROUP_RANK", "0") == "0":
        path = os.path.abspath(options.stats_file)
        above = os.path.dirname(path)
        reason = ""
        if os.path.isdir(path):
            reason = "it is a directory; name a file in it"
        elif not os.path.isdir(above):
            reason = f"{above} is no directory; make it, or name another file"
        elif not os.access(path if os.path.exists(path) else above, os.W_OK):
            reason = "no permission to write there; name another file"
        if reason:
            raise ValueError(f"--maxscore-stats-file {path} cannot be written: {reason}")
    if options.record_dir is not None:
        path = above = os.path.abspath(options.record_dir)
        # It is made if need be, with the directories above it.
        while not os.path.exists(above):
            above = os.path.dirname(above)
        reason = ""
        if not os.path.isdir(above):
            reason = f"{above} is no directory; name another one"
        elif not os.access(above, os.W_OK):
            reason = f"no permission to write in {above}; name another directory"
        if reason:
            raise ValueError(f"--maxscore-record-dir {path} cannot be written: {reason}")


def _check_asynchronous_saving(args: Any) -> None:
    """Refuse a way of writing checkpoints whose package is missing, before ranks meet."""
    # Without the persistent worker Megatron saves synchronously.
    asked = getattr(args, "async_save", False) and getattr(
        args, "use_persistent_ckpt_worker", False
    )
    strategy = getattr(args, "async_strategy", None)
    if asked and strategy == "nvrx" and importlib.util.find_spec("nvidia_resiliency_ext") is None:
        raise ValueError(
            "--async-save with --async-strategy nvrx needs the package nvidia-resiliency-ext; "
            "install it, or add --async-strategy mcore"
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def restore_options(args: Any, saved: Any) -> None:
    """Take the router type and our options from a checkpoint's arguments.

    What is not at its default stays, since it was asked for. A patched fork calls this from its
    ``load_args_from_checkpoint``.

    Args:
        args: parsed arguments, changed in place.
        saved: those in the checkpoint.
    """
    for name, field in config_fields().items():
        if hasattr(saved, name) and not name.startswith(OF_THIS_RUN):
            if getattr(args, name, field.default) == field.default:
                setattr(args, name, getattr(saved, name))
    if args.moe_router_type == "maxscore" == getattr(saved, "moe_router_type", None):
        # Megatron restores it only where the default is None, which it is not.
        args.moe_token_dispatcher_type = saved.moe_token_dispatcher_type


def _with_router_type(original: Any) -> Any:
    """Let ``--use-checkpoint-args`` restore the router type and our options."""

    def load_args_from_checkpoint(args: Any, *rest: Any, **kwargs: Any) -> Any:
        result = original(args, *rest, **kwargs)
        if isinstance(result, tuple):
            restore_options(args, result[1])
        return result

    return load_args_from_checkpoint
