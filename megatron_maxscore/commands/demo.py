"""Pretrain small mixture-of-experts models and compare routers.

Trains the same model on the same data with MaxScore and with Megatron's top-k router on 4 ranks as
TP 2 x EP 2, then with MaxScore as PP 2 x EP 2, all through Megatron's own training loop on CPU.
Prints a table and draws a picture. Loads and dropped assignments are counted from the tokens that
reach the experts.

    python -m megatron_maxscore demo
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from megatron_maxscore import _resources
from megatron_maxscore.commands import prepare
from megatron_maxscore.commands.parsing import parser_of
from megatron_maxscore.commands.processes import STEP, Processes, RunError, alone_in, execute

MODEL = """
    --num-layers 4 --hidden-size 128 --num-attention-heads 4 --seq-length 256
    --max-position-embeddings 256 --position-embedding-type rope --normalization RMSNorm --swiglu
    --disable-bias-linear --attention-dropout 0 --hidden-dropout 0
    --num-experts 16 --moe-router-topk 2 --moe-ffn-hidden-size 128
    --moe-token-dispatcher-type alltoall
"""
TENSOR_EXPERT = (
    "--tensor-model-parallel-size 2 --sequence-parallel "
    "--expert-model-parallel-size 2 --expert-tensor-parallel-size 1"
)
PIPELINE_EXPERT = "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2"
TRAINING = """
    --micro-batch-size 4 --global-batch-size 8 --lr 2e-3 --min-lr 2e-4 --lr-decay-style cosine
    --lr-warmup-fraction 0.1 --weight-decay 0.1 --clip-grad 1.0 --seed 1234
    --log-interval 1 --eval-interval 100000 --eval-iters 20
"""
# Top-k needs an auxiliary loss to balance; this is its usual coefficient.
STOCK_ROUTER = "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2"
MAXSCORE_ROUTER = "--moe-router-type maxscore"

# Of the first run, in the output directory: for the commands that use a trained model.
CHECKPOINT = "checkpoint"
# The loss has to fall by a fifth in a run of so many iterations.
SETTLED = 60


@dataclass
class Run:
    """One training run: what to start, and what came out of it."""

    name: str
    title: str
    layout: str
    router: str
    iterations: int
    is_kept: bool = False
    losses: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    validation: dict[str, float] = field(default_factory=dict)
    statistics: list[dict] = field(default_factory=list)

    def moe_layers(self, key: str) -> np.ndarray:
        """Return a statistic per iteration and layer."""
        return np.array([line[key] for line in self.statistics])


def command(run: Run, data: Path, output: Path) -> list[str]:
    """Return the torchrun command line of a run."""
    flags = f"{MODEL} {TRAINING} --num-workers 0 {run.layout} {run.router}".split()
    if run.is_kept:
        flags += ["--save", str(output / CHECKPOINT), "--save-interval", str(run.iterations)]
        flags += "--ckpt-format torch_dist --no-save-optim --no-save-rng".split()
    script = _resources.folder("examples") / "pretrain_gpt.py"
    return [
        *f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 4".split(),
        *("-m", "megatron_maxscore.launch", "--cpu", str(script)),
        *flags,
        *("--train-iters", str(run.iterations), "--lr-decay-iters", str(run.iterations)),
        *("--tokenizer-type", "SentencePieceTokenizer"),
        *("--tokenizer-model", str(data.absolute() / "tokenizer.model")),
        *("--train-data-path", str(data / "train_text_document")),
        *("--valid-data-path", str(data / "valid_text_document")),
        *("--data-cache-path", str(output / "cache")),
        *("--maxscore-stats-file", str(output / f"{run.name}.jsonl")),
    ]


_VALID = re.compile(r"validation loss at .* on validation set(.*?) \| lm loss value: (\S+)")


def follow(line: str, run: Run) -> int | None:
    """Read a line of a run's log, keep losses and times; return the iteration it ends."""
    if match := STEP.search(line):
        run.step_ms.append(float(match[2]))
        run.losses.append(float(match[3]))
        return int(match[1])
    if match := _VALID.search(line):
        rule = match[1].strip(" ()").removesuffix(" routing") or "price"
        run.validation[rule] = float(match[2])
    return None


def train(run: Run, data: Path, output: Path, console: Console) -> None:
    """Run one training.

    Raises:
        RunError: it failed; with the end of its log.
    """
    log_path, stats_path = output / f"{run.name}.log", output / f"{run.name}.jsonl"
    for path in (log_path, stats_path):
        path.unlink(missing_ok=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} loss {task.fields[loss]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(run.title, total=run.iterations, loss="")

        def show(line: str) -> None:
            if iteration := follow(line, run):
                bar.update(task, completed=iteration, loss=f"{run.losses[-1]:.3f}")

        try:
            execute(command(run, data, output), log_path, Processes(), show)
            if len(run.losses) != run.iterations or not run.validation:
                raise RunError(f"steps or validation are missing in {log_path}")
        except RunError as error:
            raise RunError(f"{run.title} failed: {error}") from None
    run.statistics = [json.loads(line) for line in stats_path.read_text().splitlines()]


def table_of(runs: list[Run]) -> Table:
    """Return the comparison of all runs."""
    table = Table(title="MaxScore and stock top-k through Megatron's training loop, on CPU")
    table.add_column("")
    for run in runs:
        table.add_column(run.title, justify="right")

    def row(label: str, values: list[str]) -> None:
        table.add_row(label, *values)

    def validation(run: Run, rule: str) -> str:
        if rule not in run.validation:
            return "-"
        return f"{run.validation[rule]:.4f}"

    row("iterations", [str(run.iterations) for run in runs])
    # The third run has another schedule, so its losses are not compared.
    compared = [run.iterations == runs[0].iterations for run in runs]

    def losses(cells: list[str]) -> list[str]:
        return [cell if ok else "-" for cell, ok in zip(cells, compared, strict=True)]

    row("training loss, first", losses([f"{run.losses[0]:.4f}" for run in runs]))
    row("training loss, last", losses([f"{np.mean(run.losses[-5:]):.4f}" for run in runs]))
    row("validation loss by prices, or top-k", losses([validation(r, "price") for r in runs]))
    row("validation loss by the flow", losses([validation(r, "flow") for r in runs]))
    for label, reduce in (("min", np.min), ("mean", np.mean), ("max", np.max)):
        values = [f"{reduce(run.moe_layers('loads')):,.0f}" for run in runs]
        row(f"tokens per expert and step, {label}", values)
    row("maxvio, mean", [f"{run.moe_layers('maxvio').mean():.4f}" for run in runs])
    row("maxvio, max", [f"{run.moe_layers('maxvio').max():.4f}" for run in runs])
    row("dropped assignments", [f"{run.moe_layers('dropped').sum():,}" for run in runs])
    gaps = [max(line["largest_gap"] for line in run.statistics) for run in runs]
    solves = [sum(line["solves"] for line in run.statistics) for run in runs]
    row(
        "largest relative gap",
        [f"{gap:.1e}" if n else "-" for gap, n in zip(gaps, solves, strict=True)],
    )
    shares = []
    for run, count in zip(runs, solves, strict=True):
        steps = run.statistics[1:]  # the first step warms up
        share = sum(s["solve_seconds"] for s in steps) / sum(s["step_seconds"] for s in steps)
        shares.append(f"{share:.1%}" if count else "-")
    row("time inside solve, share of the step", shares)
    row("ms per step, median", [f"{np.median(run.step_ms[1:]):.0f}" for run in runs])
    return table


def picture(runs: list[Run], path: Path) -> None:
    """Draw loss curves, and the expert loads of the first two runs over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2))
    # The third run has another schedule, so its losses are not compared.
    for run in runs[:2]:
        smooth = np.convolve(run.losses, np.ones(5) / 5, mode="valid")
        axes[0].plot(np.arange(len(smooth)) + 5, smooth, label=run.title, linewidth=1.6)
    axes[0].set(xlabel="iteration", ylabel="training loss, nats (mean of 5)", title="Loss")
    axes[0].grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    # The layer where stock top-k is least balanced, the same one for both.
    layer = int(runs[1].moe_layers("maxvio").mean(0).argmax())
    highest = 1.0
    for axis, run in zip(axes[1:], runs[:2], strict=True):
        loads = run.moe_layers("loads")[:, layer]
        relative = loads / loads.mean(1, keepdims=True)
        highest = max(highest, float(relative.max()))
        steps = np.arange(1, len(loads) + 1)
        axis.plot(steps, relative, linewidth=0.6, alpha=0.6)
        axis.plot(steps, relative.max(1), color="black", linewidth=1.0, label="busiest expert")
        axis.axhline(1.0, color="black", linestyle=":", linewidth=1.2, label="equal share")
        axis.set(xlabel="iteration", title=f"{run.title}: loads in layer {layer + 1}")
        axis.legend(fontsize=8, loc="upper right")
        if (loads == loads[0, 0]).all():
            count, tokens = loads.shape[1], int(loads[0, 0])
            axis.text(
                0.5, 0.5, f"all {count} experts: exactly {tokens:,} tokens\nin every iteration",
                ha="center", va="center", transform=axis.transAxes,
            )  # fmt: skip
    for axis in axes[1:]:
        axis.set(ylabel="load / mean load", ylim=(0, highest * 1.05))
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def main(command: list[str] | None = None) -> int:
    """Prepare data, train, report."""
    parser = parser_of("demo", __doc__)
    parser.add_argument("--data", type=Path, default=Path("data"), help="prepared data")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="results")
    parser.add_argument("--iterations", type=int, default=200, help="of the first two runs")
    parser.add_argument("--pipeline-iterations", type=int, default=60, help="of the third")
    arguments = parser.parse_args(command)
    for name in ("iterations", "pipeline_iterations"):
        if getattr(arguments, name) < 6:
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag} must be at least 6, got {getattr(arguments, name)}")
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("matplotlib is not installed; pip install 'megatron-maxscore[demo]'")
    # A terminated run ends its processes like an interrupted one.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
        with alone_in(arguments.output, "demo"):
            return demonstrate(arguments)
    except OSError as error:
        print(f"error: --output {arguments.output} cannot be written: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the command again to begin anew", file=sys.stderr)
        return 130


def demonstrate(arguments: argparse.Namespace) -> int:
    """Prepare data, train, report; return the exit status."""
    console = Console(width=118 if not sys.stdout.isatty() else None)
    started = time.monotonic()
    if status := prepare.main(["--output", str(arguments.data)]):
        return status
    shutil.rmtree(arguments.output / CHECKPOINT, ignore_errors=True)
    runs = [
        Run(
            "maxscore",
            "MaxScore TP2xEP2",
            TENSOR_EXPERT,
            MAXSCORE_ROUTER,
            arguments.iterations,
            is_kept=True,
        ),
        Run("topk", "top-k TP2xEP2", TENSOR_EXPERT, STOCK_ROUTER, arguments.iterations),
        Run(
            "pipeline",
            "MaxScore PP2xEP2",
            PIPELINE_EXPERT,
            MAXSCORE_ROUTER,
            arguments.pipeline_iterations,
        ),
    ]
    for run in runs:
        train(run, arguments.data, arguments.output.absolute(), console)
    shutil.rmtree(arguments.output / "cache", ignore_errors=True)
    table = table_of(runs)
    console.print(table)
    with (arguments.output / "table.txt").open("w", encoding="utf-8") as file:
        Console(file=file, width=118).print(table)
    picture(runs, arguments.output / "demo.png")
    minutes = (time.monotonic() - started) / 60
    console.print(
        f"{minutes:.1f} minutes; table, picture, logs and a checkpoint are in {arguments.output}"
    )
    checkpoint, data = arguments.output / CHECKPOINT, arguments.data / "valid_text_document"
    console.print(
        f"next: python -m megatron_maxscore evaluate --checkpoint {checkpoint} --data {data}",
        soft_wrap=True,
        highlight=False,
    )
    unbalanced = [r.title for r in (runs[0], runs[2]) if r.moe_layers("dropped").any()]
    rising = [
        r.title
        for r in runs
        if r.iterations >= SETTLED and np.mean(r.losses[-5:]) > 0.8 * r.losses[0]
    ]
    for title in unbalanced:
        console.print(f"error: {title} dropped assignments")
    for title in rising:
        console.print(f"error: the training loss of {title} did not fall by a fifth")
    return 1 if unbalanced or rising else 0
