"""Command-line arguments: one-line errors, and checks that need all arguments at once."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from typing import Any

from megatron_maxscore import cpu
from megatron_maxscore._replacements import Replacements
from megatron_maxscore._run import is_rank_zero
from megatron_maxscore.export import choose
from megatron_maxscore.flow import places
from megatron_maxscore.moe.checks import check_transformer_config, why_on_host
from megatron_maxscore.moe.config import MaxScoreConfig
from megatron_maxscore.moe.fields import config_fields
from megatron_maxscore.releases import names_bound_early
from megatron_maxscore.training.capacity import check_rank_capacity, fixed_shape
from megatron_maxscore.training.machine import check_machine

# Coefficient of Megatron's auxiliary loss where a command with MaxScore gives none. Loads are even
# without it. It keeps the scores near balance too, so that the flow moves fewer tokens away from
# the experts that they prefer; the study (docs/evidence/study.md) says what that is worth.
AUX_LOSS_COEFFICIENT = 0.1
# What a run writes, and how it evaluates, is not restored from the checkpoint of another.
OF_THIS_RUN = (
    "maxscore_stats_", "maxscore_record_", "maxscore_eval_", "maxscore_fixed_",
)  # fmt: skip


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
        set_defaults(args)
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
    where = "on the GPU"
    if cpu.is_enabled() or not places.has_triton():
        where = "on the CPU"
    elif why := why_on_host(args, MaxScoreConfig.from_transformer_config(args)):
        where = f"on the CPU ({why})"
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
    _say(f"auxiliary loss: {shown_aux_loss(args)}")
    if getattr(args, "moe_router_force_load_balancing", False):
        _say(
            "warning: --moe-router-force-load-balancing replaces the router's logits by random "
            "ones, so the router learns nothing; it is for benchmarks, leave it out to train"
        )


def set_defaults(args: Any) -> None:
    """Set the auxiliary loss where a command with MaxScore does not.

    Args:
        args: parsed and not yet validated by Megatron, whose validation makes a coefficient of 0
            that was given look like one that was not.
    """
    if args.moe_router_type != "maxscore":
        return
    if args.moe_router_load_balancing_type not in ("aux_loss", ["aux_loss"]):
        return
    # Megatron's default is the number 0.0; its parser makes a list of what the command gives.
    if args.moe_aux_loss_coeff == 0.0:
        args.moe_aux_loss_coeff = AUX_LOSS_COEFFICIENT
    elif args.moe_aux_loss_coeff == [0.0]:
        # Validated, and saved in a checkpoint, the two could not be told apart.
        args.moe_router_load_balancing_type = ["none"]


def shown_aux_loss(args: Any) -> str:
    """Return the auxiliary losses in force and their coefficients, as text."""

    def listed(value: Any) -> list[Any]:
        return value if isinstance(value, list) else [value]

    kinds = listed(args.moe_router_load_balancing_type)
    coefficients = listed(args.moe_aux_loss_coeff)
    used = [
        f"{kind} times {coefficient:g}"
        for kind, coefficient in zip(kinds, coefficients, strict=False)
        if kind != "none" and coefficient
    ]
    return " and ".join(used) or "none"


def check_arguments(args: Any) -> None:
    """Refuse arguments that cannot work, on this machine too.

    Raises:
        ValueError: names the flags and what mends it.
    """
    check_configuration(args)
    check_machine(args)


def check_configuration(args: Any) -> None:
    """Refuse arguments that cannot work on any machine, and set what follows from them.

    Raises:
        ValueError: names the flags and what mends it.
    """
    is_ours = args.moe_router_type == "maxscore"
    if is_ours and args.maxscore_fixed_shape is None:
        args.maxscore_fixed_shape = fixed_shape(args)
    options = MaxScoreConfig.from_transformer_config(args)
    if is_ours:
        check_transformer_config(args, options)
        if options.preset == "servable":
            _check_servable(args)
        if options.mode == "bounded" and cpu.is_enabled() and not places.is_interpreted():
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
        check_rank_capacity(args, options)
        if options.resolved_for(args).gate == "soft_topk" and args.moe_router_topk == 1:
            # With one expert per token Megatron refuses softmax without it. SoftTopk needs no such
            # rule.
            args.moe_router_pre_softmax = True


def _check_servable(args: Any) -> None:
    """Refuse a model that no format can hold, where one that can be served is asked for."""
    try:
        choose(args)
    except ValueError as error:
        raise ValueError(f"--maxscore-preset servable: {error}") from None


def has_our_spec(args: Any) -> bool:
    """Return whether ``--spec`` names this package's spec, which reads the environment."""
    return next(iter(getattr(args, "spec", None) or []), "") == "megatron_maxscore.moe.specs"


def _check_environment(args: Any) -> None:
    """Refuse options in the environment that nothing reads."""
    is_given = "MEGATRON_MAXSCORE" in os.environ
    if args.moe_router_type == "maxscore" and is_given and not has_our_spec(args):
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
        # Megatron restores only arguments whose default is None; this one has another.
        args.moe_token_dispatcher_type = saved.moe_token_dispatcher_type
        # Nor these two, of which the parser makes lists where a command gives one. Otherwise our
        # default would switch on a loss that the run had switched off.
        pair = ("moe_router_load_balancing_type", "moe_aux_loss_coeff")
        if not any(isinstance(getattr(args, name), list) for name in pair):
            for name in pair:
                value = getattr(saved, name)
                setattr(args, name, value if isinstance(value, list) else [value])


def _with_router_type(original: Any) -> Any:
    """Let ``--use-checkpoint-args`` restore the router type and our options."""

    def load_args_from_checkpoint(args: Any, *rest: Any, **kwargs: Any) -> Any:
        result = original(args, *rest, **kwargs)
        if isinstance(result, tuple):
            restore_options(args, result[1])
        return result

    return load_args_from_checkpoint
