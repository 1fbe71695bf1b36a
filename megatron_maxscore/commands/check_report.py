"""What ``check`` says of a launch."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any


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


def describe(report: Report, given: set[str], is_cpu: bool) -> None:
    """Add notes on flags, shapes, dispatch, solver, graphs and serving.

    Args:
        report: with validated arguments.
        given: names of the arguments that the command gives.
        is_cpu: whether the launch is on the CPU.
    """
    from megatron_maxscore.moe.config import MaxScoreConfig

    args = report.args
    options = MaxScoreConfig.from_transformer_config(args).resolved_for(args)
    _describe_flags(report, given, args, options)
    _describe_shapes(report, args, options)
    _describe_solver(report, args, options, is_cpu)
    _describe_graphs(report, args)
    _describe_serving(report, args, options)


def _describe_flags(report: Report, given: set[str], args: Any, options: Any) -> None:
    from megatron_maxscore.training.arguments import shown_aux_loss

    notes = {
        "moe_router_fusion": "MaxScore's own kernels take its place",
        "moe_router_force_load_balancing": (
            "remove it to train: it replaces the router's logits by random ones"
        ),
        "moe_router_enable_expert_bias": "the bias holds MaxScore's prices",
        "moe_router_bias_update_rate": "ignored: prices set the bias",
        "moe_router_num_groups": "each token's groups are chosen by a flow, so that they balance",
    }
    for name, text in notes.items():
        value = getattr(args, name, None)
        if name in given and value not in (None, False, "none", ["none"]):
            report.say("--" + name.replace("_", "-"), text)
    aux_loss = shown_aux_loss(args)
    if not given & {"moe_aux_loss_coeff", "moe_router_load_balancing_type"}:
        if args.use_checkpoint_args:
            aux_loss = (
                "that of the checkpoint's run, if it ran with MaxScore; otherwise " + aux_loss
            )
    if "moe_aux_loss_coeff" not in given and args.moe_aux_loss_coeff != 0:
        aux_loss += ", MaxScore's default; --moe-aux-loss-coeff changes it"
    report.say("auxiliary loss", aux_loss)
    function = getattr(args, "moe_router_score_function", "softmax")
    gate = "SoftTopk of the logits" if options.gate == "soft_topk" else f"those of {function}"
    report.say("gates", f"{gate} (--maxscore-gate {options.gate})")
    report.say("objective", f"the flow maximises {options.objective}, in scope {options.scope}")


def _describe_shapes(report: Report, args: Any, options: Any) -> None:
    from megatron_maxscore.training.capacity import least_factor, shown_factor

    length, batch = args.maxscore_fixed_shape
    tokens = length * batch
    if not tokens:
        report.say("tokens", "vary: loads are gathered for every dispatch")
        return
    experts, topk = args.num_experts, args.moe_router_topk
    share, rest = divmod(tokens * topk, experts)
    report.say("tokens", f"{tokens:,} on each rank in a microbatch, {topk} experts each")
    report.say("each expert", _room(args, options, tokens))
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
            f"{shown_factor(least)}, since loads in training are bounded"
            + (" and rows are padded" if least > 1 and options.capacity_factor == 1.0 else ""),
        )


def _room(args: Any, options: Any, tokens: int) -> str:
    """Return what an expert may get of a problem's tokens."""
    experts, topk, factor = args.num_experts, args.moe_router_topk, options.capacity_factor
    whose = "a rank's tokens"
    if options.scope == "group":
        tensor = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
        tokens, whose = tokens * args.expert_model_parallel_size * tensor, "its group's tokens"
    elif options.scope == "sequence":
        tokens, whose = args.seq_length, "a sequence's tokens"
    share, rest = divmod(tokens * topk, experts)
    if options.scope == "local" and factor == 1.0 and share:
        return f"{share:,} of {whose}" + (f", {rest} experts one more" if rest else "")
    if options.scope == "local" and factor == 1.0:
        return f"at most 1 of a rank's {tokens * topk:,} assignments"
    most = math.ceil(tokens * topk * factor / experts)
    return f"at most {most:,} of {whose}" + (f" (factor {factor})" if factor != 1.0 else "")


def _dispatcher(args: Any) -> str:
    name = str(args.moe_token_dispatcher_type)
    return f"flex ({args.moe_flex_dispatcher_backend})" if name == "flex" else name


def _splits(args: Any, options: Any, share: int, rest: int) -> str:
    if args.moe_token_dispatcher_type != "alltoall":
        return f"Megatron's {_dispatcher(args)} finds them"
    gathered = "gathered and copied to the host"
    if args.moe_router_padding_for_quantization and not _needs_no_padding(args, options):
        return f"{gathered}: Megatron pads rows, since quotas are no multiples of the padding"
    if options.scope == "group":
        return "known from the solve, which tells every rank's loads"
    if options.scope == "sequence":
        split = args.context_parallel_size * args.tensor_model_parallel_size
        if split == 1 and args.seq_length * args.moe_router_topk % args.num_experts == 0:
            return "known in advance: a sequence's assignments divide evenly"
        if split > 1:
            return "known from the solve where its ranks are all that share the experts"
        return f"{gathered}, as with top-k"
    if options.capacity_factor != 1.0:
        return f"{gathered}, as with top-k"
    if not share:
        return f"{gathered}: a rank has fewer assignments than experts"
    return "known in advance: nothing is gathered or copied to the host" + (
        "; remainders rotate" if rest else ""
    )


def _needs_no_padding(args: Any, options: Any) -> bool:
    """Return whether all quotas are multiples of what Megatron pads experts' rows to."""
    from types import SimpleNamespace

    from megatron_maxscore.moe.dispatcher import knows_splits

    config = SimpleNamespace(**{**vars(args), "num_moe_experts": args.num_experts})
    return knows_splits(config, options)


def _describe_solver(report: Report, args: Any, options: Any, is_cpu: bool) -> None:
    from megatron_maxscore.moe.checks import why_on_host

    why = "CPU mode" if is_cpu else why_on_host(args, options)
    if why:
        report.say("solver", f"exact, on the host, because of {why}")
    else:
        report.say("solver", "on the GPU, with a certified gap")


def _describe_serving(report: Report, args: Any, options: Any) -> None:
    from megatron_maxscore.export.choice import described, refusals

    if getattr(args, "moe_router_enable_expert_bias", False):
        text = "yes: stock Megatron and its converters take the checkpoint as it is"
    elif options.gate == "score" and args.moe_router_score_function != "softmax":
        text = "add --moe-router-enable-expert-bias, and it takes the checkpoint as it is"
    else:
        text = "no: stock routers have no prices with a softmax"
    report.say("stock Megatron", text)
    found = refusals(args)
    fitting = [name for name, reasons in found.items() if not reasons]
    report.say(
        "export to Hugging Face",
        f"as {', '.join(fitting)}" if fitting else f"none can hold it; {described(found)}",
    )


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
