"""What ``evaluate`` prints."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table


def table_of(result: dict[str, Any]) -> Table:
    """Return the table of losses and loads."""
    table = Table(title=f"{result['tokens']:,} tokens of {result['data']}")
    table.add_column("")
    rules = result["rules"]
    for rule in rules:
        table.add_column(rule, justify="right")

    def row(label: str, values: list[str]) -> None:
        table.add_row(label, *values)

    row("loss, nats per token", [f"{r['loss']:.4f}" for r in rules.values()])
    row("perplexity", [f"{math.exp(r['loss']):.2f}" for r in rules.values()])
    row("maxvio per layer, mean", [f"{np.mean(r['maxvio']):.4f}" for r in rules.values()])
    row("maxvio per layer, max", [f"{np.max(r['maxvio']):.4f}" for r in rules.values()])
    row(
        "maxvio of a batch, mean", [f"{np.mean(r['maxvio_per_batch']):.4f}" for r in rules.values()]
    )
    row("sum of a token's gates, mean", [f"{np.mean(r['gate_sum']):.3f}" for r in rules.values()])
    row("dropped assignments", [f"{r['dropped']:.2%}" for r in rules.values()])
    return table


def report(result: dict[str, Any]) -> None:
    """Print the table and the comparisons."""
    console = Console(width=100 if not sys.stdout.isatty() else None)
    console.print(table_of(result))
    comparison = result["comparison"]
    if comparison:
        first, second = comparison["rules"]
        console.print(
            f"{first} against {second}: KL {comparison['kl']:.4f} nats, same likeliest token "
            f"{comparison['top1_agreement']:.1%}"
        )
    if "decoding" in result:
        found = result["decoding"]
        for kind, name in (("", "token by token"), ("_float64", "the same in float64")):
            console.print(
                f"{name}, {found['sequences']} sequences: loss "
                f"{found['loss_token_by_token' + kind]:.6f}, in one pass "
                f"{found['loss_one_pass' + kind]:.6f}, largest difference of a log-probability "
                f"{found['largest_difference' + kind]:.1e}"
            )
