"""Measure the figures that the documents quote and no other command prints. On the CPU.

    python -m tools.benchmarks.figures switch    # docs/migrate.md: loss over a change of router
    python -m tools.benchmarks.figures groups    # docs/routing.md: assignments outside groups
    python -m tools.benchmarks.figures serving   # docs/serve.md: exported models in bfloat16

All train the demo's model on the demo's data, prepared where they are missing.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from megatron_maxscore.commands import demo, evaluate, prepare
from megatron_maxscore.commands.processes import Processes, execute
from megatron_maxscore.export.verify import bias_of, gates_of, load_served

ROOT = Path(__file__).resolve().parents[2]
BIAS = "--moe-router-score-function sigmoid --moe-router-enable-expert-bias"
STOCK_BIAS = f"{BIAS} --moe-router-load-balancing-type none"
# The figures in the documents were made without an auxiliary loss.
OURS = f"{demo.MAXSCORE_ROUTER} --moe-router-load-balancing-type none"
OUR_BIAS = f"{OURS} {BIAS}"
# Each training as (router, last iteration) of its phases. One phase starts from the checkpoint of
# the one before it.
SWITCHES = {
    "softmax: top-k, then MaxScore": [(demo.STOCK_ROUTER, 100), (OURS, 150)],
    "softmax: top-k all the time": [(demo.STOCK_ROUTER, 160)],
    "sigmoid with expert bias: stock, MaxScore, stock": [
        (STOCK_BIAS, 100), (OUR_BIAS, 150), (STOCK_BIAS, 160),
    ],
}  # fmt: skip
LAST = 160
WINDOWS = ((91, 100), (101, 110), (141, 150), (151, 160))
GROUPS = "--moe-router-num-groups 4 --moe-router-group-topk 2"
GROUP_STEPS = 40


def train(name: str, router: str, until: int, arguments: argparse.Namespace) -> list[float]:
    """Train up to an iteration, from the checkpoint of that name if there is one.

    Returns:
        The loss of each iteration that was run.
    """
    # Schedules span the whole training in every phase; otherwise Megatron refuses the next one.
    run = demo.Run(name, name, demo.TENSOR_EXPERT, router, LAST)
    saved = str(arguments.output / f"{name}-checkpoint")
    command = demo.command(run, arguments.data, arguments.output)
    command += f"--save {saved} --load {saved} --exit-interval {until}".split()
    command += f"--save-interval {until} --ckpt-format torch_dist --eval-iters 0".split()
    command += f"--tensorboard-dir {arguments.output / name} --tensorboard-log-interval 1".split()
    execute(
        command, arguments.output / f"{name}.log", Processes(), lambda line: demo.follow(line, run)
    )
    return run.losses


def switch(arguments: argparse.Namespace) -> Table:
    """Return the loss before and after each change of the router, as a mean of ten iterations."""
    table = Table("", *(f"{first} to {last}" for first, last in WINDOWS))
    for number, (title, phases) in enumerate(SWITCHES.items()):
        losses: list[float] = []
        for router, until in phases:
            losses += train(f"switch-{number}", router, until, arguments)
        means = [
            f"{np.mean(losses[first - 1 : last]):.2f}" if len(losses) >= last else ""
            for first, last in WINDOWS
        ]
        table.add_row(title, *means)
    return table


def groups(arguments: argparse.Namespace) -> Table:
    """Return the largest share of assignments outside a token's groups, over steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train("groups", f"{OURS} {GROUPS}", GROUP_STEPS, arguments)
    events = EventAccumulator(str(arguments.output / "groups"))
    events.Reload()
    shares = [event.value for event in events.Scalars("maxscore/outside_groups")]
    table = Table("steps", "largest share outside a token's groups", "mean")
    table.add_row(str(len(shares)), f"{max(shares):.1e}", f"{np.mean(shares):.1e}")
    return table


def serving(arguments: argparse.Namespace) -> Table:
    """Return what bfloat16 changes in exported models: other experts, and the loss."""
    table = Table("model", "precision", "tokens with other experts", "loss")
    bfloat16 = torch.bfloat16
    for title, function in (("ERNIE 4.5", "softmax"), ("GLM-4", "sigmoid")):
        router = f"{OURS} --maxscore-preset servable"
        router += f" --moe-router-score-function {function}"
        train(function, router, LAST, arguments)
        served = arguments.output / f"{function}-served"
        command = [sys.executable, "-m", "megatron_maxscore", "export", "--output", str(served)]
        command += ["--checkpoint", str(arguments.output / f"{function}-checkpoint")]
        subprocess.run(command, check=True, cwd=ROOT)
        whole = load_served(served, torch.float32)
        rounded = load_served(served, torch.float32)
        for gate in gates_of(rounded).values():
            bias_of(gate).copy_(bias_of(gate).to(bfloat16))
        models = {
            "float32": whole,
            "float32, bias in bfloat16": rounded,
            "bfloat16, router and bias in float32": load_served(served, bfloat16),
            "bfloat16, all of it": load_served(served, bfloat16).to(bfloat16),
        }
        tokens = evaluate.sequences_of(str(arguments.data / "valid_text_document"), 256)[:64]
        found = {name: served_run(model, tokens) for name, model in models.items()}
        for name, (experts, loss) in found.items():
            other = (experts != found["float32"][0]).any(-1).float().mean()
            table.add_row(title, name, f"{other:.2%}", f"{loss:.4f}")
    return table


def served_run(model: Any, tokens_BS: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return the (layers, tokens, experts) choice of a model, and its loss."""
    chosen: list[torch.Tensor] = []

    def keep(gate: Any, _: Any, output: Any) -> None:
        map_TE = torch.zeros_like(output[0], dtype=torch.bool)
        chosen.append(map_TE.scatter_(1, output[2], True))

    handles = [gate.register_forward_hook(keep) for gate in gates_of(model).values()]
    with torch.no_grad():
        logits = model(tokens_BS[:, :-1]).logits.float()
    for handle in handles:
        handle.remove()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens_BS[:, 1:].flatten())
    return torch.stack(chosen), float(loss)


def main() -> int:
    """Measure one of them and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    measures = {"switch": switch, "groups": groups, "serving": serving}
    parser.add_argument("what", choices=measures)
    parser.add_argument("--data", type=Path, default=Path("data"), help="prepared data")
    parser.add_argument("--output", type=Path, default=Path("runs/figures"), help="results")
    arguments = parser.parse_args()
    arguments.output = arguments.output.absolute()
    shutil.rmtree(arguments.output, ignore_errors=True)
    arguments.output.mkdir(parents=True)
    if prepare.main(["--output", str(arguments.data)]):
        return 1
    Console().print(measures[arguments.what](arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
