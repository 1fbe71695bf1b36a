"""Zero-shot evaluation of a checkpoint with EleutherAI's lm-evaluation-harness.

    pip install 'megatron-maxscore[harness]'
    python -m megatron_maxscore harness --checkpoint runs/model --tasks paper
    python -m megatron_maxscore harness --checkpoint runs/model --tasks my_task --include tasks/

``paper`` stands for the ten benchmarks of the MaxScore paper: ARC-Challenge, ARC-Easy, BoolQ,
HellaSwag, LAMBADA, PIQA, RACE, SciQ, ReCoRD, OpenBookQA. The harness downloads their data the
first time, under their own licences. Own tasks are YAML files in the harness's format, in
--include.

``--checkpoint`` may also be a directory that ``export`` has written. The harness's own Hugging Face
model runs it then.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from megatron_maxscore.commands.outputs import check_output, write_whole
from megatron_maxscore.commands.parsing import parser_of
from megatron_maxscore.export.directory import is_exported
from megatron_maxscore.inference import add_arguments, restore
from megatron_maxscore.inference.served import check_no_arguments

PAPER = (
    "arc_challenge", "arc_easy", "boolq", "hellaswag", "lambada_openai", "piqa", "race", "sciq",
    "record", "openbookqa",
)  # fmt: skip


def table_of(results: dict[str, Any]) -> Table:
    """Return the table of every task's metrics."""
    table = Table("task", "metric", "value", "standard error", title="lm-evaluation-harness")
    for task, metrics in sorted(results.items()):
        for name, value in metrics.items():
            metric, _, kind = name.partition(",")
            if not isinstance(value, float) or metric.endswith("_stderr"):
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            shown = f"{error:.4f}" if isinstance(error, float) else "-"
            table.add_row(task, metric, f"{value:.4f}", shown)
    return table


def main(command: list[str] | None = None) -> int:
    """Restore a checkpoint and let the harness evaluate it."""
    parser = parser_of("harness", __doc__)
    add_arguments(parser)
    parser.add_argument("--tasks", nargs="+", required=True, help="names, or paper")
    parser.add_argument("--include", help="directory with further tasks")
    parser.add_argument("--limit", type=int, help="items of each task at most")
    parser.add_argument("--fewshot", type=int, default=0, help="examples (default: 0)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args(command)
    if arguments.output is not None:
        check_output(parser, arguments.output)
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        from megatron_maxscore.inference.harness import MaxScoreLM
    except ImportError as error:
        print(f"error: {error}; pip install 'megatron-maxscore[harness]'", file=sys.stderr)
        return 2
    tasks = [name for task in arguments.tasks for name in (PAPER if task == "paper" else (task,))]
    manager = TaskManager(include_path=arguments.include)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        print(
            f"error: the harness knows no task {', '.join(unknown)}; lm_eval ls tasks lists them, "
            "--include adds a directory",
            file=sys.stderr,
        )
        return 2
    try:
        if is_exported(arguments.checkpoint):
            check_no_arguments(arguments.checkpoint, arguments.megatron)
            # The harness's own model, which shows what others get.
            from lm_eval.models.huggingface import HFLM

            model: Any = HFLM(
                arguments.checkpoint,
                batch_size=arguments.batch_size,
                device="cuda" if torch.cuda.is_available() else "cpu",
            )
        else:
            trained = restore(arguments.checkpoint, arguments.megatron)
            model = MaxScoreLM(trained, arguments.batch_size)
        found = simple_evaluate(
            model=model,
            tasks=tasks,
            num_fewshot=arguments.fewshot,
            limit=arguments.limit,
            task_manager=manager,
            bootstrap_iters=1000,
        )
    except ImportError as error:
        print(f"error: {error}; pip install 'megatron-maxscore[harness]'", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    Console(width=None if sys.stdout.isatty() else 100).print(table_of(found["results"]))
    if arguments.output is not None:
        write_whole(arguments.output, json.dumps(found["results"], indent=2, default=str))
    return 0
