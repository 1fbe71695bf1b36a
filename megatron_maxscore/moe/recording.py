"""Recording what the flow was asked to solve: real scores for benchmarks and bug reports."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor


def parse_numbers(text: str) -> list[range]:
    """Parse ``"1,4-6"``.

    Raises:
        ValueError: not numbers or ranges of numbers, or an empty range.
    """
    ranges = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        ends = (first, last) if dash else (first, first)
        if not all(end.isascii() and end.isdecimal() for end in ends):
            raise ValueError(f"expected numbers and ranges like 1,4-6, got {text!r}")
        ranges.append(range(int(ends[0]), int(ends[1]) + 1))
        if ranges[-1].start == 0:
            raise ValueError(f"numbers begin at 1, got {text!r}")
        if not ranges[-1]:
            raise ValueError(f"expected numbers and ranges like 1,4-6, got the empty range {part}")
    return ranges


class ScoreRecorder:
    """Writes one file per solve of chosen layers and iterations.

    ``iteration00020_layer002_rank000_solve000.pt`` holds a dict that ``torch.load`` reads:
    ``scores`` (T, E) float32 or float64, ``topk``, ``capacity`` (E,) int64, ``prices`` (E,) float32
    the warm start, ``valid`` (T,) bool or None.

    Args:
        directory: where to write; made if need be.
        layers: layer numbers from 1, like ``"1,3-4"``; None = all.
        iterations: iterations from 1, likewise.
    """

    def __init__(self, directory: str, layers: str | None, iterations: str | None) -> None:
        self._directory = Path(directory)
        self._layers = None if layers is None else parse_numbers(layers)
        self._iterations = None if iterations is None else parse_numbers(iterations)
        # Solves of each layer and iteration in the attempt at a global batch that is under way.
        self._solves: Counter[tuple[int, int]] = Counter()

    def record(
        self,
        layer: int,
        iteration: int,
        scores_TE: Tensor,
        topk: int,
        capacity_E: Tensor,
        prices_E: Tensor,
        valid_T: Tensor | None,
    ) -> None:
        """Write the arguments of a solve, if its layer and iteration are wanted."""
        for number, wanted in ((layer, self._layers), (iteration, self._iterations)):
            if wanted is not None and not any(number in numbers for numbers in wanted):
                return
        solve = self._solves[layer, iteration]
        self._solves[layer, iteration] += 1
        rank = dist.get_rank() if dist.is_initialized() else 0
        name = f"iteration{iteration:05d}_layer{layer:03d}_rank{rank:03d}_solve{solve:03d}.pt"
        self._directory.mkdir(parents=True, exist_ok=True)
        arguments = {
            "scores": scores_TE.detach().cpu(),
            "topk": topk,
            "capacity": capacity_E.cpu(),
            "prices": prices_E.detach().cpu().clone(),
            "valid": None if valid_T is None else valid_T.cpu(),
        }
        # Renamed when complete, so that a file is always whole.
        unfinished = self._directory / f".{name}.{os.getpid()}"
        torch.save(arguments, unfinished)
        unfinished.rename(self._directory / name)

    def end_attempt(self) -> None:
        """Forget what was counted: a batch that is run again overwrites its files."""
        self._solves.clear()
