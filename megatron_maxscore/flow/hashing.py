"""Fibonacci hashing of row indices: numbers that depend on the index alone, evenly spread.

Written for arrays, and for numbers in code that numba compiles.
"""

from __future__ import annotations

from typing import Any

# 2**32 over the golden ratio.
GOLDEN = 2654435769


def hashed(index_N: Any) -> Any:
    """Return 32 bits for each int64 index."""
    return (index_N * GOLDEN) & 0xFFFFFFFF


def part_of(hash_N: Any, parts: int) -> Any:
    """Return which of so many equal parts of 32 bits each falls in."""
    return (hash_N * parts) >> 32
