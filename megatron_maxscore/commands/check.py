"""Say what MaxScore would do in a launch, without a GPU and without starting ranks.

    python -m megatron_maxscore check -- pretrain_gpt.py --moe-router-type maxscore ...
    python -m megatron_maxscore check -- torchrun --nproc-per-node 8 ... pretrain_gpt.py ...

The script is not run. Megatron parses and validates its arguments as if Transformer Engine, DeepEP
and HybridEP were installed in their newest versions. If the launch would be refused, one line says
why, and the exit status is 1. Flags that the installed megatron-core does not know are listed and
skipped. Files that the launch reads and writes are not checked.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import math
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_maxscore._replacements import Replacements
from megatron_maxscore.commands.check_report import Report, describe, show
from megatron_maxscore.commands.parsing import parser_of

# Of torchrun: what says how many ranks there are.
_RANKS = re.compile(r"--(nproc[-_]per[-_]node|nnodes)(?:=(\S+))?$")


class NoScriptError(ValueError):
    """A command names no Python script."""


@dataclass
class Launch:
    """A command line.

    Attributes:
        arguments: of the script.
        ranks: processes, None if the command does not say.
        is_cpu: whether it trains on the CPU.
    """

    arguments: list[str]
    ranks: int | None = None
    is_cpu: bool = False

    @classmethod
    def of(cls, command: list[str]) -> Launch:
        """Return the launch of a command: a script, or a launcher and a script.

        Raises:
            NoScriptError: there is no script in it.
        """
        place = next((i for i, part in enumerate(command) if _is_script(part)), None)
        if place is None:
            raise NoScriptError(
                f"{' '.join(command[:3])} ... names no Python script; give the command that starts "
                "one, as python -m megatron_maxscore check -- pretrain_gpt.py ARGS"
            )
        before = command[:place]
        sizes = {}
        for i, part in enumerate(before):
            if match := _RANKS.match(part):
                value = match[2] or (before[i + 1] if i + 1 < len(before) else "")
                sizes[match[1].replace("_", "-")] = value
        ranks = None
        if sizes and all(value.isdigit() for value in sizes.values()):
            ranks = math.prod(map(int, sizes.values()))
        is_cpu = "--cpu" in before or "megatron_maxscore.cpu" in before
        return cls(command[place + 1 :], ranks, is_cpu)


def _is_script(part: str) -> bool:
    return part.endswith(".py") or part == "pretrain_gpt"


# Of Transformer Engine; None without it, or not there at all.
_FUSED = (
    "fused_permute", "fused_permute_with_probs", "fused_permute_and_pad_with_probs",
    "fused_unpermute", "fused_sort_chunks_by_index", "fused_sort_chunks_by_index_with_probs",
    "fused_apply_rotary_pos_emb", "fused_apply_rotary_pos_emb_thd",
)  # fmt: skip


@contextlib.contextmanager
def packages(is_cpu: bool) -> Iterator[None]:
    """Make Megatron believe that Transformer Engine and the dispatchers' packages are installed.

    Args:
        is_cpu: whether the launch is on the CPU. Then nothing is pretended.
    """
    from megatron.core import utils
    from megatron.core.extensions import transformer_engine
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer.moe import fused_a2a, moe_utils
    from packaging.version import Version

    from megatron_maxscore import cpu

    declared = Replacements("a dry run")
    if not is_cpu:
        declared.set(utils, "_te_version", Version("99.0"))
        declared.set(cpu, "is_enabled", lambda: False)
        for mark in ("HAVE_DEEP_EP", "HAVE_HYBRIDEP", "HAVE_TE_EP"):
            declared.set(fused_a2a, mark, True)
        for module in (transformer_engine, rope_utils, moe_utils):
            for name in _FUSED:
                if getattr(module, name, None) is None:
                    declared.set(module, name, _never_called)
    try:
        yield
    finally:
        declared.undo()


def _never_called(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("a dry run computes nothing")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what Megatron prints and warns of to ourselves."""
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def examine(launch: Launch) -> Report:
    """Return what a launch would do.

    Args:
        launch: the command line.
    """
    from megatron_maxscore import cpu, training

    with quiet():
        # Megatron asks for devices when it validates arguments.
        cpu.enable()
        training.install()
        if launch.is_cpu:
            cpu.answer_arguments()
    report = Report()
    with quiet(), packages(launch.is_cpu):
        try:
            report.args, given = _parse(launch, report)
            _validate(report.args)
        except (ValueError, AssertionError, RuntimeError, ImportError) as error:
            report.refusal = " ".join(str(error).split()) or type(error).__name__
            return report
    describe(report, given, launch.is_cpu)
    return report


def _parse(launch: Launch, report: Report) -> tuple[Any, set[str]]:
    """Return Megatron's arguments, not validated, and the names of those that were given."""
    from megatron.training import arguments

    parser = arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    args, unknown = parser.parse_known_args(launch.arguments)
    report.unknown = [part for part in unknown if part.startswith("--")]
    given = {
        action.dest
        for action in parser._actions
        if any(part.split("=")[0] in action.option_strings for part in launch.arguments)
    }
    args._is_global_batch_size_explicitly_specified = args.global_batch_size is not None
    args.rank = 0
    least = math.lcm(
        args.tensor_model_parallel_size
        * args.pipeline_model_parallel_size
        * args.context_parallel_size,
        (args.expert_tensor_parallel_size or args.tensor_model_parallel_size)
        * args.expert_model_parallel_size
        * args.pipeline_model_parallel_size,
    )
    args.world_size = launch.ranks or least
    _take_spec(args)
    if args.moe_router_type != "maxscore":
        report.say(
            "router",
            "--moe-router-type is topk: without --moe-router-type maxscore nothing of this applies",
        )
        args.moe_router_type = "maxscore"
    return args, given


def _take_spec(args: Any) -> None:
    """Take the options of the environment, where the spec reads them."""
    from megatron_maxscore.training.arguments import has_our_spec

    if not has_our_spec(args):
        return
    from megatron_maxscore.moe.config import MaxScoreConfig
    from megatron_maxscore.moe.environment import options_from_environment

    options_from_environment(MaxScoreConfig.from_transformer_config(args)).write_to(args)


def _validate(args: Any) -> None:
    """Check arguments as a launch does, without files; Megatron's own checks come second."""
    from megatron.training import arguments
    from megatron.training.arguments import core_transformer_config_from_args

    from megatron_maxscore.training.arguments import (
        check_configuration,
        has_our_spec,
        set_defaults,
    )

    if not has_our_spec(args):
        set_defaults(args)
    check_configuration(args)
    # Megatron's own function: our wrapper around it would also check files.
    arguments.validate_args.__wrapped__(args, {"tokenizer_type": "NullTokenizer"})
    core_transformer_config_from_args(args)


def main(arguments: list[str] | None = None) -> int:
    """Examine a launch; return 1 if it would be refused.

    Args:
        arguments: of this command; None takes those of the process.
    """
    parser = parser_of("check", __doc__)
    parser.add_argument(
        "--ranks", type=int, help="processes (default: torchrun's, or the fewest that do)"
    )
    parser.add_argument(
        "command",
        nargs=argparse.REMAINDER,
        help="after --: the script, or a launcher and the script",
    )
    own = parser.parse_args(arguments)
    command = own.command[1:] if own.command[:1] == ["--"] else own.command
    try:
        launch = Launch.of(command)
    except NoScriptError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    launch.ranks = own.ranks or launch.ranks
    report = examine(launch)
    show(report, report.args.world_size if report.args is not None else 0)
    return 1 if report.refusal else 0
