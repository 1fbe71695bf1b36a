"""The kernels in the forms in which they are launched, to be compiled ahead of time."""

from __future__ import annotations

from typing import Any

import triton  # type: ignore[import-untyped]

from megatron_maxscore.flow.buckets import ALL_BUCKETS
from megatron_maxscore.flow.device.kernels import (
    all_rows,
    contested,
    layout,
    moves,
    results,
    sweeps,
)
from megatron_maxscore.flow.device.solver import PARALLEL, SERIAL, Shape
from megatron_maxscore.ops.kernels.variants import Variant

# Tokens, experts, k, and whether capacities may leave slack.
SHAPES = (
    (8192, 64, 8, False),
    (8192, 64, 8, True),
    (512, 16, 2, False),
    (4096, 256, 8, False),
    (8192, 512, 8, True),
)
_POINTERS = {
    "warm_ptr": "*fp32", "capacity_ptr": "*i64", "spread_ptr": "*i32", "partial_ptr": "*fp64",
    "state_ptr": "*i64", "counts_ptr": "*i32", "near_ptr": "*i32", "slot_ptr": "*i32",
    "x_ptr": "*i8", "claims_ptr": "*i32", "key_ptr": "*i64", "scratch_ptr": "*i32",
    "converged_ptr": "*i8", "tolerance_bits": "i64", "value_ptr": "*fp64",
    "experts_ptr": "*i64", "prices_ptr": "*fp32", "loads_ptr": "*i64",
}  # fmt: skip


def variants(shapes: tuple[tuple[int, int, int, bool], ...] = SHAPES) -> list[Variant]:
    """Return what to compile ahead of time."""
    return [
        variant
        for numbers in shapes
        for dtype in ("fp32", "bf16")
        if dtype == "fp32" or numbers == SHAPES[0]
        for variant in _of_shape(Shape(*numbers), dtype)
    ]


def _of_shape(shape: Shape, dtype: str) -> list[Variant]:
    block_g = triton.next_power_of_2(shape.programs)
    num_state = triton.next_power_of_2(layout.state_size(shape.experts))
    passes: dict[str, Any] = {
        **shape.choice(),
        **shape.steps(shape.buckets),
        "BUCKETS": shape.buckets,
        "BLOCK_G": block_g,
        "CAN_SAMPLE": bool(shape.sample),
    }
    scan = {**shape.tile(), "BUCKETS": shape.buckets, "NUM_STATE": num_state}
    found: list[tuple[str, Any, dict[str, Any], dict[str, Any]]] = [
        ("scan", sweeps.scan, scan, PARALLEL),
        ("first pass", sweeps.price_pass, {**passes, "IS_FIRST": True}, PARALLEL),
        ("price pass", sweeps.price_pass, {**passes, "IS_FIRST": False}, PARALLEL),
        ("contested rows", contested.nearest, shape.choice(), PARALLEL),
        ("rounds of moves", moves.move, shape.moves(), SERIAL),
        ("rounds over all rows", all_rows.move_all, shape.all_moves(), SERIAL),
        (
            "results",
            results.conclude,
            {**shape.tile(), "TOPK": shape.topk, "BLOCK_G": block_g},
            PARALLEL,
        ),
    ]
    if shape.sample:
        sample = {**shape.choice(), **shape.steps(ALL_BUCKETS)}
        found.append(("sample", sweeps.sample_sweeps, sample, SERIAL))
    slack = ", slack" if shape.may_be_loose else ""
    label = f"{dtype}, {shape.tokens}x{shape.experts}x{shape.topk}{slack}"
    pointers = {**_POINTERS, "scores_ptr": f"*{dtype}"}
    return [
        Variant(
            f"{name}, {label}",
            kernel,
            {
                argument: pointers.get(argument, "i32")
                for argument in kernel.arg_names
                if argument not in constants
            },
            constants,
            options["num_warps"],
            options,
        )
        for name, kernel, constants, options in found
    ]
