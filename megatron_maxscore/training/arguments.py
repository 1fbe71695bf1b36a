"""Command-line arguments: one-line errors, and checks that need all arguments at once."""

from __future__ import annotations

import argparse
import os
from typing import Any

from megatron_maxscore._patches import PatchSet
from megatron_maxscore.moe.config import (
    MaxScoreConfig,
    check_transformer_config,
    config_fields,
)
from megatron_maxscore.releases import names_bound_early

# What a run writes, and how it evaluates, is not restored from the checkpoint of another.
OF_THIS_RUN = ("maxscore_stats_", "maxscore_record_", "maxscore_export_", "maxscore_eval_")


def hook(patches: PatchSet) -> None:
    """Wrap parsing and validation of arguments, and what ``--use-checkpoint-args`` restores."""
    from megatron.training import arguments, checkpointing

    for name, wrapper in (("parse_args", _with_short_errors), ("validate_args", _with_our_checks)):
        patches.wrap(arguments, name, wrapper)
        for module in names_bound_early(name):
            patches.set(module, name, getattr(arguments, name))
    patches.wrap(checkpointing, "load_args_from_checkpoint", _with_router_type)


def _with_short_errors(original: Any) -> Any:
    """Argparse prints Megatron's several hundred flags before the error; we print the error."""

    def error(self: argparse.ArgumentParser, message: str) -> None:
        raise ValueError(message)

    def expand_help(self: argparse.HelpFormatter, action: argparse.Action) -> str:
        try:
            return expand(self, action)
        except (ValueError, TypeError, KeyError):
            # A per cent sign in one of Megatron's help texts would otherwise end --help.
            return action.help or ""

    expand = argparse.HelpFormatter._expand_help

    def parse_args(*args: Any, **kwargs: Any) -> Any:
        during = PatchSet("argument errors")
        during.set(argparse.ArgumentParser, "error", error)
        during.set(argparse.HelpFormatter, "_expand_help", expand_help)
        try:
            return original(*args, **kwargs)
        finally:
            during.undo()

    return parse_args


def _with_our_checks(original: Any) -> Any:
    def validate_args(args: Any, *rest: Any, **kwargs: Any) -> Any:
        check_arguments(args)
        return original(args, *rest, **kwargs)

    return validate_args


def check_arguments(args: Any) -> None:
    """Refuse arguments that cannot work.

    Raises:
        ValueError: names the flags and what mends it.
    """
    options = MaxScoreConfig.from_transformer_config(args)
    if args.moe_router_type == "maxscore":
        check_transformer_config(args, options)
    if args.num_experts is not None:
        parallel = args.expert_model_parallel_size
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
    _check_data_paths(args)


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
                        "its ending, or make the data with tools/prepare_data.py"
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
