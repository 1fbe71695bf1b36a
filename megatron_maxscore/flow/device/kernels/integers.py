"""Scores as integers, levels, and edges of buckets, as in :mod:`problem` and :mod:`buckets`."""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_maxscore.flow import buckets, hashing, problem, rounds

_ROUNDER = tl.constexpr(problem.ROUNDER)
_ROUNDER_BITS = tl.constexpr(problem.ROUNDER_BITS)
SCORE_BITS = tl.constexpr(problem.SCORE_BITS)
_GOLDEN = tl.constexpr(hashing.GOLDEN)
# Where a level begins in the bits of a float64, and the level of 0 bits.
_MANTISSA = tl.constexpr(52 - buckets.MANTISSA_BITS)
_ZERO_LEVEL = tl.constexpr(1023 << buckets.MANTISSA_BITS)
_PER_OCTAVE = tl.constexpr((1 << buckets.MANTISSA_BITS) - 1)
_OCTAVE_BITS = tl.constexpr(buckets.MANTISSA_BITS)
LEVELS = tl.constexpr(buckets.NUM_LEVELS)
_KEY_BITS = tl.constexpr(rounds.KEY_BITS)
NEVER = tl.constexpr(-(1 << 62))


@triton.constexpr_function
def cost_bits(num_experts):
    """Return how many bits a cost may have; see :func:`rounds.cost_bits`."""
    return _KEY_BITS.value - int(num_experts).bit_length()


@triton.jit
def to_bits(values):
    """Return the bits of float64 values."""
    return values.to(tl.float64).to(tl.int64, bitcast=True)


@triton.jit
def to_integer(values):
    """Round float64 below 2**51 in size to int64, half to even."""
    return (values + _ROUNDER).to(tl.int64, bitcast=True) - _ROUNDER_BITS


@triton.jit
def power_of_two(exponent):
    """Return 2.0**exponent as float64."""
    return ((exponent.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def level_of(sizes):
    """Return the level of int64 sizes from 1 to 2**50."""
    return (to_bits(sizes) >> _MANTISSA) - _ZERO_LEVEL


@triton.jit
def edge_of(levels):
    """Return the lowest size of a level as float64."""
    bits = ((levels.to(tl.int64) >> _OCTAVE_BITS) + 1023) << 52
    within = (levels.to(tl.int64) & _PER_OCTAVE) << _MANTISSA
    return (bits | within).to(tl.float64, bitcast=True)


@triton.jit
def shift_for(largest):
    """Return by how many bits scores are shifted, from the largest range of a row, float64."""
    exponent = (to_bits(largest) >> 52) - 1022
    return tl.where(largest == 0.0, 0, tl.minimum(-(exponent - SCORE_BITS), 1000))


@triton.jit
def hashed(index):
    """Return 32 bits that depend on the index of a row, as int64."""
    return (index.to(tl.int64) * _GOLDEN) & 0xFFFFFFFF


@triton.jit
def gap_within(gaps_ptr, rank, LEVEL_BLOCK: tl.constexpr):
    """Return a gap such that more than ``rank`` rows have no larger one."""
    at = tl.arange(0, LEVEL_BLOCK)
    gaps = tl.load(gaps_ptr + at, mask=at <= LEVELS, other=0, cache_modifier=".cg")
    reach = tl.cumsum(gaps, 0)
    level = tl.sum(((reach <= rank) & (at <= LEVELS)).to(tl.int32), 0)
    edge = edge_of(tl.minimum(level, LEVELS)).to(tl.int64)
    return tl.where(level == 0, 0, edge)
