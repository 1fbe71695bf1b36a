"""Say what MaxScore would do in a launch, without a GPU and without starting ranks.

    python -m megatron_maxscore check -- pretrain_gpt.py --moe-router-type maxscore ...
    python -m megatron_maxscore check -- torchrun --nproc-per-node 8 ... pretrain_gpt.py ...

The script is not run: Megatron parses and validates the arguments, as for a launch with
Transformer Engine, DeepEP and HybridEP in their newest versions. Exit status 1 and one line if the
launch would be refused. Flags that the installed megatron-core does not know are listed and
skipped. Files that the launch reads and writes are not looked for.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

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


@dataclass
class Report:
    """What a launch would do.

    Attributes:
        refusal: why it would be refused, "" if it would not.
        unknown: flags that the installed release does not know.
        notes: (topic, text) in order.
        args: Megatron's arguments, validated unless it was refused.
    """

    refusal: str = ""
    unknown: list[str] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)
    args: Any = None

    def say(self, topic: str, text: str) -> None:
        """Add a note."""
        self.notes.append((topic, text))


@contextlib.contextmanager
def _packages(is_cpu: bool) -> Iterator[None]:
    """Let Megatron find Transformer Engine and the dispatchers' packages in all versions."""
    from megatron.core import utils
    from megatron.core.extensions import transformer_engine
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer.moe import fused_a2a, moe_utils
    from packaging.version import Version

    from megatron_maxscore import cpu

    with contextlib.ExitStack() as stack:
        if not is_cpu:
            stack.enter_context(mock.patch.object(utils, "_te_version", Version("99.0")))
            for mark in ("HAVE_DEEP_EP", "HAVE_HYBRIDEP", "HAVE_TE_EP"):
                stack.enter_context(mock.patch.object(fused_a2a, mark, True, create=True))
            # Fused functions that are None without Transformer Engine, or not there at all.
            for module in (transformer_engine, rope_utils, moe_utils):
                for name in (
                    "permute",
                    "permute_with_probs",
                    "permute_and_pad_with_probs",
                    "unpermute",
                    "sort_chunks_by_index",
                    "sort_chunks_by_index_with_probs",
                    "apply_rotary_pos_emb",
                    "apply_rotary_pos_emb_thd",
                ):
                    fused = f"fused_{name}"
                    if getattr(module, fused, None) is None:
                        stack.enter_context(mock.patch.object(module, fused, print, create=True))
            stack.enter_context(mock.patch.object(cpu, "is_enabled", lambda: False))
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
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

    with _quiet():
        # Megatron asks for devices when it validates arguments.
        cpu.enable()
        training.install()
        if launch.is_cpu:
            cpu.answer_arguments()
    report = Report()
    with _quiet(), _packages(launch.is_cpu):
        try:
            report.args, given = _parse(launch, report)
            _validate(report.args)
        except (ValueError, AssertionError, RuntimeError, ImportError) as error:
            report.refusal = " ".join(str(error).split()) or type(error).__name__
            return report
    _describe(report, given, launch)
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
    if next(iter(args.spec or []), "") != "megatron_maxscore.moe.specs":
        return
    import dataclasses

    from megatron_maxscore.moe.config import PREFIX, MaxScoreConfig
    from megatron_maxscore.moe.environment import options_from_environment

    options = options_from_environment(MaxScoreConfig.from_transformer_config(args))
    args.moe_router_type = "maxscore"
    for item in dataclasses.fields(options):
        setattr(args, PREFIX + item.name, getattr(options, item.name))


def _validate(args: Any) -> None:
    """Check arguments as a launch does, without files; Megatron's own checks come second."""
    from megatron.training import arguments
    from megatron.training.arguments import core_transformer_config_from_args

    from megatron_maxscore.training.arguments import check_configuration

    check_configuration(args)
    # Ours come with it; what they say of files is not asked here.
    arguments.validate_args.__wrapped__(args, {"tokenizer_type": "NullTokenizer"})
    core_transformer_config_from_args(args)


def _describe(report: Report, given: set[str], launch: Launch) -> None:
    """Add notes on flags, shapes, dispatch, solver, graphs and serving."""
    from megatron_maxscore.moe.config import MaxScoreConfig

    args = report.args
    options = MaxScoreConfig.from_transformer_config(args).resolved_for(args)
    _describe_flags(report, given, args, options)
    _describe_shapes(report, args, options)
    _describe_solver(report, args, options, launch.is_cpu)
    _describe_graphs(report, args)
    if getattr(args, "moe_router_enable_expert_bias", False):
        text = "yes: stock Megatron and its converters take the checkpoint as it is"
    elif options.gate == "score" and args.moe_router_score_function != "softmax":
        text = (
            "add --moe-router-enable-expert-bias, and stock Megatron takes the checkpoint as it is"
        )
    else:
        text = "by this package alone: stock routers have no prices with a softmax" + (
            ", and no SoftTopk gates" if options.gate == "soft_topk" else ""
        )
    report.say("serving", text)


def _describe_flags(report: Report, given: set[str], args: Any, options: Any) -> None:
    notes = {
        "moe_router_fusion": "MaxScore's own kernels take its place",
        "moe_router_force_load_balancing": (
            "remove it to train: it replaces the router's logits by random ones"
        ),
        "moe_router_enable_expert_bias": "the bias holds MaxScore's prices",
        "moe_router_bias_update_rate": "ignored: prices set the bias",
        "moe_router_num_groups": "each token's groups are chosen by a flow, so that they balance",
        "moe_router_load_balancing_type": (
            "kept, and not needed for balance; it shapes what the router prefers"
        ),
    }
    for name, text in notes.items():
        value = getattr(args, name, None)
        if name in given and value not in (None, False, "none", ["none"]):
            report.say("--" + name.replace("_", "-"), text)
    function = getattr(args, "moe_router_score_function", "softmax")
    gate = "SoftTopk of the logits" if options.gate == "soft_topk" else f"those of {function}"
    report.say("gates", f"{gate} (--maxscore-gate {options.gate})")
    report.say("objective", f"the flow maximises {options.objective}, in scope {options.scope}")


def _describe_shapes(report: Report, args: Any, options: Any) -> None:
    from megatron_maxscore.training.capacity import least_factor

    length, batch = args.maxscore_fixed_shape
    tokens = length * batch
    if not tokens:
        report.say("tokens", "vary: loads are gathered for every dispatch")
        return
    experts, topk = args.num_experts, args.moe_router_topk
    share, rest = divmod(tokens * topk, experts)
    report.say("tokens", f"{tokens:,} on each rank in a microbatch, {topk} experts each")
    if options.capacity_factor != 1.0:
        most = math.ceil(tokens * topk * options.capacity_factor / experts)
        quota = f"at most {most:,} of a rank's tokens (factor {options.capacity_factor})"
    elif not share:
        quota = f"at most 1 of a rank's {tokens * topk:,} assignments"
    else:
        quota = f"{share:,} of a rank's tokens" + (f", {rest} experts one more" if rest else "")
    report.say("each expert", quota)
    ranks = args.expert_model_parallel_size
    width = args.hidden_size * (4 if args.params_dtype.itemsize == 4 else 2)
    sent = tokens * topk * width * (ranks - 1) // max(ranks, 1)
    report.say(
        "dispatch",
        f"--moe-token-dispatcher-type {_dispatcher(args)}, {sent / 2**20:,.1f} MiB from a rank to "
        "others in a layer and microbatch, and as much back"
        + (
            ", less where a rank holds several experts of a token"
            if "flex" in _dispatcher(args)
            else ""
        ),
    )
    report.say("splits", _splits(args, options, share, rest))
    least = least_factor(args, options)
    if getattr(args, "moe_expert_rank_capacity_factor", None) is not None and least is not None:
        report.say(
            "--moe-expert-rank-capacity-factor",
            f"{args.moe_expert_rank_capacity_factor} is enough; the least safe one is "
            f"{math.ceil(least * 1e4) / 1e4:g}, since loads in training are bounded"
            + (" and rows are padded" if least > 1 and options.capacity_factor == 1.0 else ""),
        )


def _dispatcher(args: Any) -> str:
    name = str(args.moe_token_dispatcher_type)
    return f"flex ({args.moe_flex_dispatcher_backend})" if name == "flex" else name


def _splits(args: Any, options: Any, share: int, rest: int) -> str:
    if args.moe_token_dispatcher_type != "alltoall":
        return f"Megatron's {_dispatcher(args)} finds them"
    if options.scope == "group":
        return "known from the solve, which tells every rank's loads"
    if options.scope == "sequence" or options.capacity_factor != 1.0:
        return "gathered and copied to the host, as with top-k"
    if not share:
        return "gathered and copied to the host: a rank has fewer assignments than experts"
    return "known in advance: nothing is gathered or copied to the host" + (
        "; remainders rotate" if rest else ""
    )


def _describe_solver(report: Report, args: Any, options: Any, is_cpu: bool) -> None:
    from megatron_maxscore.flow.certified import MAX_EXPERTS

    reasons = (
        (is_cpu, "CPU mode"),
        (options.mode == "exact", "--maxscore-mode exact"),
        (args.moe_router_dtype == "fp64", "--moe-router-dtype fp64"),
        (args.num_experts > MAX_EXPERTS, f"more than {MAX_EXPERTS} experts"),
        (
            options.scope == "sequence" and args.context_parallel_size > 1,
            "sequences are split over ranks",
        ),
    )
    why = next((text for applies, text in reasons if applies), None)
    if why:
        report.say("solver", f"exact, on the host, because of {why}")
    else:
        report.say("solver", "on the GPU, with a certified gap")


def _describe_graphs(report: Report, args: Any) -> None:
    from megatron_maxscore.moe.capture import holds_router
    from megatron_maxscore.releases import graph_of

    graph = graph_of(args)
    if graph.implementation == "none":
        return
    what = ", ".join(sorted(graph.modules)) or "the whole iteration; validation runs outside"
    report.say(
        "CUDA graphs",
        f"{graph.implementation}: {what}" + ("" if holds_router(args) else "; not the router"),
    )


def show(report: Report, ranks: int) -> None:
    """Print a report."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=int(os.environ.get("COLUMNS", "100")), highlight=False)
    if report.unknown:
        console.print(
            "not known to the installed megatron-core, skipped: " + " ".join(report.unknown)
        )
    if report.refusal:
        print(f"refused: {report.refusal}")
        return
    table = Table(title=f"MaxScore in this launch, {ranks} ranks", show_header=False)
    for topic, text in report.notes:
        table.add_row(topic, text)
    console.print(table)


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
