"""How kernels are compiled: once per signature, without the interpreter lock, kept on disk."""

from __future__ import annotations

from typing import Any

from numba import njit


def jit(function: Any) -> Any:
    """Compile a kernel at its first call; the result is kept where numba finds a writable place."""
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no such place
        return njit(**options)(function)
