"""Measure the figures that the documents quote and no other command prints. On the CPU.

    python tools/document_figures.py switch    # docs/operations.md: loss over a change of router
    python tools/document_figures.py groups    # docs/routing.md: assignments outside groups
    python tools/document_figures.py rollouts  # docs/rl.md: log-probabilities by flow, by prices

The first two train the demo's model on the demo's data, which are prepared where they are missing.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_maxscore.commands import demo, prepare
from megatron_maxscore.commands.processes import Processes, execute

BIAS = "--moe-router-score-function sigmoid --moe-router-enable-expert-bias"
STOCK_BIAS = f"{BIAS} --moe-router-load-balancing-type none"
OUR_BIAS = f"{demo.MAXSCORE_ROUTER} {BIAS}"
# Each training as (router, last iteration) of its phases. One phase starts from the checkpoint of
# the one before it.
SWITCHES = {
    "softmax: top-k, then MaxScore": [(demo.STOCK_ROUTER, 100), (demo.MAXSCORE_ROUTER, 150)],
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
    # The schedules are those of the whole training, or Megatron refuses the next phase.
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

    train("groups", f"{demo.MAXSCORE_ROUTER} {GROUPS}", GROUP_STEPS, arguments)
    events = EventAccumulator(str(arguments.output / "groups"))
    events.Reload()
    shares = [event.value for event in events.Scalars("maxscore/outside_groups")]
    table = Table("steps", "largest share outside a token's groups", "mean")
    table.add_row(str(len(shares)), f"{max(shares):.1e}", f"{np.mean(shares):.1e}")
    return table


def rollouts(arguments: argparse.Namespace) -> Table:
    """Return how far log-probabilities of training and of rollouts are apart, per token."""
    from tests.dist import rl_cases
    from tests.dist.pool import Pool

    table = Table("gates", "nats apart, by flow and by prices", "with replay")
    bias = dict(moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True)
    cases: dict[str, dict[str, Any]] = {"softmax": {}, "sigmoid with expert bias": bias}
    ranks = Pool(2)
    for title, settings in cases.items():
        apart, replayed, _ = ranks.run(rl_cases.rollouts, **settings)[0]
        table.add_row(title, f"{apart:.3f}", f"{replayed:.3f}")
    ranks.close()
    return table


def main() -> int:
    """Measure one of them and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    measures = {"switch": switch, "groups": groups, "rollouts": rollouts}
    parser.add_argument("what", choices=measures)
    parser.add_argument("--data", type=Path, default=Path("data"), help="prepared data")
    parser.add_argument("--output", type=Path, default=Path("runs/figures"), help="results")
    arguments = parser.parse_args()
    arguments.output = arguments.output.absolute()
    shutil.rmtree(arguments.output, ignore_errors=True)
    arguments.output.mkdir(parents=True)
    if arguments.what != "rollouts" and prepare.main(["--output", str(arguments.data)]):
        return 1
    Console().print(measures[arguments.what](arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
