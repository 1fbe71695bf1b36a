"""The launches of a solve, and the buffers between them.

Every launch and every size follows from the shape of the scores, so nothing is copied to the host
and a CUDA graph can hold a solve.

Shape letters: see :mod:`megatron_maxscore`.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from megatron_maxscore.flow.device import layout
from megatron_maxscore.flow.device.kernel import solve_kernel
from megatron_maxscore.flow.device.sweeps import END, GO_ON, HOLD

__all__ = ["END", "GO_ON", "HOLD", "REGISTERS", "WARPS", "Shape", "Solve", "is_cooperative"]
# Entries of a tile, and its most rows. Rows must be fewer than 64: a tile's counts have 6 bits.
_TILE, _MOST_ROWS = 2048, 32
# Unless the number of registers is given, the assembler spills some so that more programs fit.
WARPS, REGISTERS = 8, 255
# Launches of one phase each where launches cannot be cooperative. One more makes all other phases.
_LAUNCHES = 40
_ENDLESS = 1 << 30
# int32 words of the header that ranks sum up in their first exchange.
HEADER_WORDS = layout.HEADER.value - layout.BAD.value


@functools.cache
def is_cooperative(device: torch.device) -> bool:
    """Return whether programs of a launch can wait for each other."""
    if device.type != "cuda":
        return False
    backend = importlib.import_module("triton.backends.nvidia.compiler")
    return "launch_cooperative_grid" in backend.CUDAOptions.__dataclass_fields__


@functools.cache
def _most_programs(device: torch.device) -> int:
    """Return how many programs run at the same time."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True)
class Shape:
    """Sizes of a solve, and constants of its kernel."""

    problems: int
    tokens: int
    experts: int
    topk: int

    @functools.cached_property
    def constants(self) -> dict[str, int]:
        """The kernel's compile-time constants."""
        block = max(16, triton.next_power_of_2(self.experts))
        return {
            "E": self.experts, "K": self.topk, "BLOCK_E": block,
            "ROWS": min(_MOST_ROWS, _TILE // block),
            # More slots would spill registers with 1,024 experts.
            "S": 2 if block > 512 else max(4, min(16, 512 // block)),
            "RESULTS": 8 + self.experts + (self.experts + 1) // 2,
        }  # fmt: skip

    @property
    def tiles(self) -> int:
        """Tiles of rows of a problem."""
        return -(-self.tokens // self.constants["ROWS"])

    def words(self, programs: int) -> int:
        """Return the int32 words of a problem, an even number."""
        block = self.constants["BLOCK_E"]
        state = layout.SCALARS.value + layout.VECTORS.value * block
        return int(layout.HEADER.value + 3 * layout.COUNTS.value * block + programs * state)


def _parts(sizes: list[int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Return parts of one allocation, each from a multiple of 16 bytes on.

    Triton compiles another kernel for a pointer that is aligned otherwise.
    """
    step = 16 // dtype.itemsize
    rounded = [-(-size // step) * step for size in sizes]
    whole = torch.empty(sum(rounded), dtype=dtype, device=device)
    parts = torch.split(whole, rounded)
    return [part[:size] for part, size in zip(parts, sizes, strict=True)]


class Results(NamedTuple):
    """Of each problem: sums over its rows as float64, counts of rows, loads and prices."""

    objective: Tensor
    bound: Tensor
    gap: Tensor
    difference: Tensor
    ranges: Tensor
    bad: Tensor
    scaled: Tensor
    converged: Tensor
    loads: Tensor
    prices: Tensor


class Solve:
    """Buffers of one solve; :meth:`run` makes it, and :meth:`found` has the results.

    Args:
        scores: (B, T, E) float32, bfloat16 or float16, contiguous.
        topk: K.
        prices: (E,) or (B, E) float32, on the same device.
        rank: of the ranks that solve one problem; their perturbations differ.
        programs: for each problem; None for as many as the device runs.
    """

    def __init__(
        self,
        scores: Tensor,
        topk: int,
        prices: Tensor,
        rank: int = 0,
        programs: int | None = None,
    ) -> None:
        problems, tokens, experts = scores.shape
        self.shape = shape = Shape(problems, tokens, experts, topk)
        constants, device = shape.constants, scores.device
        block, most = constants["BLOCK_E"], _most_programs(device)
        members = max(1, min(programs or most // problems, shape.tiles))
        # Fewer programs may have no more tiles each; the others would only be waited for.
        self.members = -(-shape.tiles // -(-shape.tiles // members))
        self.grid = (self.members * max(1, min(problems, most // self.members)),)
        self.words = shape.words(self.members)
        # Only the headers begin as zero; all else is written before it is read.
        keys, units = 3 * 2 * block * constants["S"], tokens * topk
        sizes = [self.words, 2 * keys, 24 * shape.tiles, 3 * tokens, tokens * (-(-block // 32))]
        self.work, keys_3, partial, rows, bits = _parts(
            [problems * size for size in sizes], torch.int32, device
        )
        self.work.view(problems, -1)[:, : layout.HEADER.value].zero_()
        chosen, order = _parts([problems * units, problems * 2 * units], torch.int64, device)
        self.experts = chosen.view(problems, tokens, topk)
        self.order = order.view(problems, 2, units)
        # Apart, because prices and the gap are views of it that outlive the assignment.
        self.results = torch.empty(
            (problems, constants["RESULTS"]), dtype=torch.int64, device=device
        )
        self.scores, self.prices = scores, prices
        self.arguments = (
            self.experts, self.order, self.results.view(torch.float64), rows.view(torch.float32),
            bits, partial.view(torch.float64), self.work, keys_3.view(torch.int64),
            problems, tokens, shape.tiles, self.words,
            rank * 0x9E3779B1 & 0x3FFFFFFF,
        )  # fmt: skip

    def launch(
        self,
        first: int,
        last: int,
        capacity: Tensor | None = None,
        quota: Tensor | None = None,
        end: Any = GO_ON,
        mark: int = 0,
        members: int = 0,
        **options: Any,
    ) -> None:
        """Make phases ``first`` to ``last``.

        Args:
            first: number of the first phase, 0 for the scan of rows.
            last: number of the one after the last.
            capacity: (E,) or (B, E) int64 of all ranks' rows; None for the scan alone.
            quota: (E,) int64 of this rank's rows, None for the capacities.
            end: what to do when sweeps are over.
            mark: a digest of the arguments, which ranks that solve one problem compare.
            members: programs for each problem; 0 for the usual number.
            options: of the launch.
        """
        capacity = self.results if capacity is None else capacity  # which a scan does not read
        # Triton launches on the current device, whatever device its arguments are on.
        with torch.cuda.device_of(self.scores):
            solve_kernel[self.grid if members == 0 else (self.shape.problems * members,)](
                self.scores, self.prices, capacity, capacity if quota is None else quota,
                *self.arguments, first, last, members or self.members, end.value, mark,
                *(x.stride(0) if x.dim() == 2 else 0 for x in (self.prices, capacity)),
                **self.shape.constants, num_warps=WARPS, maxnreg=REGISTERS, enable_fp_fusion=True,
                **options,
            )  # fmt: skip

    def run(
        self, capacity: Tensor, quota: Tensor | None = None, first: int = 0, end: Any = GO_ON
    ) -> None:
        """Make all phases from ``first`` on; see :meth:`launch`."""
        if self.members == 1:
            self.launch(first, _ENDLESS, capacity, quota, end)
        elif is_cooperative(self.scores.device):
            self.launch(first, _ENDLESS, capacity, quota, end, launch_cooperative_grid=True)
        else:
            for phase in range(first, first + _LAUNCHES):
                self.launch(phase, phase + 1, capacity, quota, end if phase == first else GO_ON)
            self.launch(first + _LAUNCHES, _ENDLESS, capacity, quota, members=1)

    def found(self, is_batch: bool = True) -> Results:
        """Return the results, of the first problem alone unless it is a batch."""
        results, experts = self.results if is_batch else self.results[0], self.shape.experts
        objective, bound, gap, difference, ranges = (
            results[..., :5].view(torch.float64).unbind(-1)
        )  # fmt: skip
        bad, scaled = results[..., 5:7].unbind(-1)
        converged = results[..., 7:8].view(torch.bool)[..., 0]
        loads = results[..., 8 : 8 + experts]
        prices = results[..., 8 + experts :].view(torch.float32)[..., :experts]
        return Results(
            objective, bound, gap, difference, ranges, bad, scaled, converged, loads, prices
        )

    def state(self, name: str) -> Tensor:
        """Return a number of the state after the last phase, 0-dim int32, of the first problem."""
        return self.work[self._first_state + getattr(layout, name).value]

    @property
    def _first_state(self) -> int:
        return self.shape.words(0)

    # What ranks that solve one problem exchange.

    def word(self, name: str) -> Tensor:
        """Return a word of the header, 0-dim int32."""
        return self.work[getattr(layout, name).value]

    @property
    def header(self) -> Tensor:
        """Sums over rows, int32."""
        return self.work[layout.BAD.value : layout.HEADER.value]

    def counts(self, phase: int) -> Tensor:
        """Loads and bids that a sweep has counted, int32."""
        first = self._first_count(phase)
        return self.work[first : first + layout.LEAST.value * self.shape.constants["BLOCK_E"]]

    def own_loads(self, phase: int) -> Tensor:
        """(E,) loads of this rank in a sweep."""
        first = self._first_count(phase)
        first += layout.OWN_LOAD.value * self.shape.constants["BLOCK_E"]
        return self.work[first : first + self.shape.experts].long()

    def _first_count(self, phase: int) -> int:
        block = self.shape.constants["BLOCK_E"]
        return int(layout.HEADER.value + phase % 3 * layout.COUNTS.value * block)

    @property
    def sweep_prices(self) -> Tensor:
        """(E,) float32 prices at which the last sweep has chosen."""
        first = self._first_state + layout.SCALARS.value
        return self.work[first : first + self.shape.experts].view(torch.float32)
