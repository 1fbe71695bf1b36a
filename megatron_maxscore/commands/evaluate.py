"""Evaluate a checkpoint on a whole data set, under each rule that its router knows.

    python -m megatron_maxscore evaluate --checkpoint runs/model --data data/valid_text_document
    python -m megatron_maxscore evaluate --data data/valid_text_document -- FLAGS --load runs/model

A MaxScore router is evaluated under two rules: by prices, which is causal, and by the flow, which
sees the whole micro-batch (as many sequences as in training, unless ``--micro-batch-size`` says
otherwise). Both rules see the same batches. So their next-token distributions are compared too:
the mean KL divergence (flow from price), and how often the likeliest token is the same.
``--decode N`` feeds N sequences token by token through the key-value cache and compares the result
with one pass. A stock router is evaluated under its own rule. With a capacity factor there is also
"no drops", and with sinkhorn, which Megatron does not use in evaluation, also "as in training".
Expert loads, maxvio and dropped assignments are counted from the routing map, over the whole data
set. The table also has the mean of the batches' maxvio, and of the sum of a token's gates.

``--checkpoint`` may also be a directory that ``export`` has written. Then transformers runs the
model, which routes by prices.

Prints a table; ``--output`` writes all of it as JSON. Under torchrun, data-parallel ranks share the
batches.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from megatron_maxscore.commands.evaluate_report import report
from megatron_maxscore.commands.outputs import check_output, write_whole
from megatron_maxscore.commands.parsing import parser_of
from megatron_maxscore.export.directory import is_exported
from megatron_maxscore.inference import (
    Decoder,
    NotFiniteError,
    TrainedModel,
    add_arguments,
    restore,
)
from megatron_maxscore.inference.served import ServedModel, check_no_arguments, open_served


@dataclass
class Tally:
    """Sums over the batches of one rule.

    Attributes:
        loss: sum of the tokens' losses, in nats.
        tokens: how many.
        loads: (E,) int64 per MoE layer.
        maxvio: sum over the batches, per MoE layer.
        gates: sum of all gates, per MoE layer.
        batches: how many.
        assigned: what was to be assigned per layer: tokens times k.
    """

    loss: float = 0.0
    tokens: int = 0
    loads: dict[int, torch.Tensor] = field(default_factory=dict)
    maxvio: dict[int, float] = field(default_factory=dict)
    gates: dict[int, float] = field(default_factory=dict)
    batches: int = 0
    assigned: int = 0

    def summary(self) -> dict[str, Any]:
        """Return means, loads and what follows from them."""
        layers = sorted(self.loads)
        loads_LE = torch.stack([self.loads[layer] for layer in layers]).double()
        return {
            "loss": self.loss / self.tokens,
            "tokens": self.tokens,
            "loads": loads_LE.long().tolist(),
            "maxvio": [maxvio(loads_E) for loads_E in loads_LE],
            "maxvio_per_batch": [self.maxvio[layer] / self.batches for layer in layers],
            "gate_sum": [self.gates[layer] / self.tokens for layer in layers],
            "dropped": 1.0 - float(loads_LE.sum()) / (self.assigned * len(self.loads)),
        }


def maxvio(loads_E: torch.Tensor) -> float:
    """Return by how much the most loaded expert is above the mean, 0 where nothing is routed."""
    loads_E = loads_E.double()
    return float(loads_E.max() / loads_E.mean().clamp(min=1e-9)) - 1.0 if loads_E.any() else 0.0


def sequences_of(path: str, length: int) -> torch.Tensor:
    """Return the (N, length + 1) int64 sequences of a data set, one after the other.

    Each begins with the last token of the one before, so that every token but the first is
    predicted once.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    for suffix in (".idx", ".bin"):
        if not os.path.exists(path + suffix):
            raise ValueError(f"--data {path}: {path + suffix} does not exist")
    documents = IndexedDataset(path)
    tokens = np.concatenate([documents[i] for i in range(len(documents))]).astype(np.int64)
    count = (len(tokens) - 1) // length
    if count < 1:
        raise ValueError(f"--data {path} has {len(tokens)} tokens, less than one sequence")
    starts = length * np.arange(count)
    return torch.from_numpy(tokens[starts[:, None] + np.arange(length + 1)])


def rules_of(trained: TrainedModel | ServedModel) -> list[str]:
    """Return the rules that a model's routers know, the causal or own one first."""
    if isinstance(trained, ServedModel):
        return ["price"]
    if getattr(trained.args, "moe_router_type", "topk") == "maxscore":
        return ["price", "flow"]
    if trained.args.moe_expert_capacity_factor is not None:
        return ["own", "no drops"]
    if trained.args.moe_router_load_balancing_type == "sinkhorn":
        return ["own", "as in training"]
    return ["own"]


@contextmanager
def under(rule: str, trained: TrainedModel | ServedModel) -> Iterator[None]:
    """Make the model's routers follow a rule inside the ``with`` block."""
    if isinstance(trained, ServedModel):
        yield
        return
    from megatron_maxscore.moe.evaluation import evaluation_routing

    config = trained.model.config
    factor = config.moe_expert_capacity_factor
    is_ours = rule in ("price", "flow")
    with evaluation_routing(cast(Any, rule)) if is_ours else nullcontext():
        if rule == "no drops":
            config.moe_expert_capacity_factor = None
        for router in trained.routers().values() if rule == "as in training" else ():
            router.train()
        try:
            yield
        finally:
            config.moe_expert_capacity_factor = factor
            for router in trained.routers().values():
                router.eval()


@contextmanager
def counting(trained: TrainedModel | ServedModel, tally: Tally) -> Iterator[None]:
    """Add up what the routers route inside the ``with`` block."""

    def count(layer: int, router: Any, _: Any, output: Any) -> None:
        loads, gates = trained.routed(output)
        tally.loads[layer] = tally.loads.get(layer, 0) + loads
        tally.maxvio[layer] = tally.maxvio.get(layer, 0.0) + maxvio(loads)
        tally.gates[layer] = tally.gates.get(layer, 0.0) + gates

    handles = [
        router.register_forward_hook(functools.partial(count, layer))
        for layer, router in trained.routers().items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def evaluate(
    trained: TrainedModel | ServedModel, sequences: torch.Tensor, batch_size: int
) -> tuple[dict[str, Tally], dict[str, Any]]:
    """Return a tally per rule, and how much two rules' predictions differ.

    Args:
        trained: the model.
        sequences: (N, S + 1) int64.
        batch_size: sequences per batch.
    """
    group = data_parallel_group()
    rank, ranks = (0, 1) if group is None else (group.rank(), group.size())
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(1))
    batches = order.split(batch_size)
    # All ranks route the same number of batches; what is left over is left out.
    batches = batches[rank : len(batches) // ranks * ranks : ranks]
    rules = rules_of(trained)
    tallies = {rule: Tally() for rule in rules}
    divergence, same = 0.0, 0
    failure = ""
    for batch in tqdm(batches, desc="evaluating", unit="batch", disable=None):
        if failure:
            break
        tokens, labels = sequences[batch, :-1], sequences[batch, 1:]
        found = []
        for rule in rules:
            tally = tallies[rule]
            with under(rule, trained), counting(trained, tally):
                try:
                    logits = trained.logits(tokens).cpu().log_softmax(-1)
                except NotFiniteError as error:
                    # Raised below, on all ranks together.
                    failure = str(error)
                    break
            tally.loss -= float(logits.gather(2, labels[..., None]).double().sum())
            tally.tokens += labels.numel()
            tally.batches += 1
            tally.assigned += labels.numel() * trained.args.moe_router_topk
            found.append(logits)
        if len(found) == 2:
            divergence += float((found[1].exp() * (found[1] - found[0])).double().sum())
            same += int((found[1].argmax(-1) == found[0].argmax(-1)).sum())
    comparison = {"divergence": divergence, "same": float(same)}
    failures: list[Any] = [failure]
    if ranks > 1:
        failures = [None] * ranks
        dist.all_gather_object(failures, failure, group=group)
    if any(failures):
        raise NotFiniteError(next(filter(None, failures)))
    if ranks > 1:
        _add_up(tallies, comparison, group)
    total = tallies[rules[0]].tokens
    if len(rules) < 2:
        return tallies, {}
    return tallies, {
        "rules": rules,
        "kl": comparison["divergence"] / total,
        "top1_agreement": comparison["same"] / total,
    }


def data_parallel_group() -> Any:
    """Return the ranks that share the batches, None without Megatron."""
    if not dist.is_initialized():
        return None
    from megatron.core import mpu

    return mpu.get_data_parallel_group()


def _add_up(tallies: dict[str, Tally], comparison: dict[str, float], group: Any) -> None:
    """Sum over data-parallel ranks."""
    gathered: list[Any] = [None] * group.size()
    dist.all_gather_object(gathered, (tallies, comparison), group=group)
    for rule, tally in tallies.items():
        others = [theirs[0][rule] for theirs in gathered]
        tally.loss = sum(other.loss for other in others)
        tally.tokens = sum(other.tokens for other in others)
        tally.assigned = sum(other.assigned for other in others)
        tally.batches = sum(other.batches for other in others)
        for name in ("loads", "maxvio", "gates"):
            sums = {k: sum(getattr(other, name)[k] for other in others) for k in tally.loads}
            setattr(tally, name, sums)
    for key in comparison:
        comparison[key] = sum(theirs[1][key] for theirs in gathered)


def decode(trained: TrainedModel, sequences: torch.Tensor) -> dict[str, float]:
    """Compare token by token decoding with one pass, by the causal rule.

    In the model's precision a token whose k-th and next expert are nearly equal may choose
    differently, since attention over one token rounds differently than over all; in float64 the two
    must agree. The model is in float64 afterwards.

    Args:
        trained: the model.
        sequences: (N, S + 1) int64.
    """
    tokens, labels = sequences[:, :-1], sequences[:, 1:]
    rule = rules_of(trained)[0]
    found: dict[str, float] = {"sequences": len(tokens)}
    for suffix in ("", "_float64"):
        if suffix:
            trained.widen(torch.float64)
        with under(rule, trained):
            whole = trained.logits(tokens).cpu().log_softmax(-1)
            decoder = Decoder(trained, len(tokens), tokens.shape[1])
            steps = [decoder.feed(tokens[:, i : i + 1]).cpu() for i in range(tokens.shape[1])]
        parts = torch.stack(steps, dim=1).log_softmax(-1)
        for name, logprobs in (("one_pass", whole), ("token_by_token", parts)):
            loss = -float(logprobs.gather(2, labels[..., None]).double().mean())
            found[f"loss_{name}{suffix}"] = loss
        found[f"largest_difference{suffix}"] = float((whole - parts).abs().max())
    return found


def main(command: list[str] | None = None) -> int:
    """Restore, evaluate, report."""
    parser = parser_of("evaluate", __doc__)
    add_arguments(parser, required=False)
    parser.add_argument("--data", required=True, help="a data set's path without its ending")
    parser.add_argument("--sequences", type=int, help="so many, evenly spaced (default: all)")
    parser.add_argument(
        "--length", type=int,
        help="tokens of a sequence (default: as in training; of an exported model, its longest)",
    )  # fmt: skip
    parser.add_argument("--decode", type=int, default=4, metavar="N", help="default: 4")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args(command)
    if arguments.checkpoint is None and "--load" not in arguments.megatron:
        parser.error("give --checkpoint, or all of Megatron's arguments with --load after --")
    if arguments.sequences is not None and arguments.sequences < 1:
        parser.error(f"--sequences must be at least 1, got {arguments.sequences}")
    if arguments.length is not None and arguments.length < 1:
        parser.error(f"--length must be at least 1, got {arguments.length}")
    if arguments.decode < 0:
        parser.error(f"--decode must be at least 0, got {arguments.decode}")
    if arguments.output is not None:
        check_output(parser, arguments.output)
    try:
        result = evaluated(arguments)
    except ImportError as error:
        print(f"error: {error}; pip install 'megatron-maxscore[export]'", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if result is not None:
        report(result)
        if arguments.output is not None:
            write_whole(arguments.output, json.dumps(result))
    return 0


def evaluated(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Restore the checkpoint and evaluate it; return the results on rank 0, None elsewhere."""
    trained: TrainedModel | ServedModel
    if is_exported(arguments.checkpoint):
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"{arguments.checkpoint} is an exported model, which one process evaluates; start "
                "it without torchrun"
            )
        check_no_arguments(arguments.checkpoint, arguments.megatron)
        trained = open_served(arguments.checkpoint)
    else:
        trained = restore(arguments.checkpoint, arguments.megatron)
    sequences = sequences_of(arguments.data, arguments.length or trained.args.seq_length)
    if arguments.sequences is not None and arguments.sequences < len(sequences):
        # From everywhere: neighbours are of one document.
        places = torch.linspace(0, len(sequences) - 1, arguments.sequences).long()
        sequences = sequences[places]
    tallies, comparison = evaluate(trained, sequences, trained.args.micro_batch_size)
    rules = {rule: tally.summary() for rule, tally in tallies.items()}
    result = {
        "data": arguments.data,
        "tokens": next(iter(rules.values()))["tokens"],
        "rules": rules,
        "comparison": comparison,
    }
    # Where tokens compete for capacity, decoding is another rule.
    if arguments.decode and "no drops" not in rules and isinstance(trained, TrainedModel):
        result["decoding"] = decode(trained, sequences[: arguments.decode])
    return result if not dist.is_initialized() or dist.get_rank() == 0 else None
