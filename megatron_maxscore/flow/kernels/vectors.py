"""Vector code that compilers do not find by themselves: comparisons as bits, and loops over them.

It is written in LLVM's own vector instructions, which compile for any processor.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from megatron_maxscore.flow.kernels.compiler import jit

# Entries that are compared at once.
LANES = 16


@intrinsic
def bits(typing_context: Any, value: Any) -> Any:
    """Return the bit pattern of a float64 as int64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(64))

    return types.int64(types.float64), generate


@intrinsic
def exceeding(typing_context: Any, value_E: Any, added_E: Any, first: Any, limit: Any) -> Any:
    """Return which of LANES entries from ``first`` on have value + added > limit, as bits.

    Written as vectors, since compilers do not find them here.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lanes = ir.VectorType(ir.IntType(64), LANES)
        parts = []
        for kind, array in zip(signature.args[:2], arguments[:2], strict=True):
            data = context.make_array(kind)(context, builder, array).data
            at = builder.bitcast(builder.gep(data, [arguments[2]]), lanes.as_pointer())
            parts.append(builder.load(at, align=8))
        one = builder.insert_element(
            ir.Constant(lanes, ir.Undefined), arguments[3], ir.Constant(ir.IntType(32), 0)
        )
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        limits = builder.shuffle_vector(one, ir.Constant(lanes, ir.Undefined), zeros)
        above = builder.icmp_signed(">", builder.add(*parts), limits)
        return builder.zext(builder.bitcast(above, ir.IntType(LANES)), ir.IntType(64))

    return types.int64(value_E, added_E, types.int64, types.int64), generate


@intrinsic
def lowest_bit(typing_context: Any, value: Any) -> Any:
    """Return the index of the lowest bit set of an int64, which is not 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), generate


@intrinsic
def count_bits(typing_context: Any, value: Any) -> Any:
    """Return how many bits of an int64 are set."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.int64(types.int64), generate


@jit
def padded(count):
    """Return the least multiple of LANES that is no smaller."""
    return (count + LANES - 1) // LANES * LANES


@jit
def aligned(count):
    """Return (count,) int64, not initialised, from the beginning of a cache line on."""
    room = np.empty(count + 7, np.int64)
    first = -(room.ctypes.data >> 3) & 7
    return room[first : first + count]


@jit
def next_bit(word_W, first):
    """Return the index of the lowest bit set from ``first`` on, over all words; -1 if none is."""
    for word in range(first >> 6, word_W.shape[0]):
        found = word_W[word]
        if word == first >> 6:
            found &= np.int64(-1) << (first & 63)
        if found:
            return 64 * word + lowest_bit(found)
    return -1
