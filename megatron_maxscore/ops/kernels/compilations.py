"""Kernels as they are launched, for compiling them ahead of time without a device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Compilation:
    """A kernel with the types of its arguments.

    Attributes:
        name: what it is, for reports.
        kernel: the Triton function.
        signature: type of each argument that is not a constant, in Triton's notation.
        constants: the compile-time constants.
        num_warps: warps per program.
        options: further options of the compiler.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    options: dict[str, Any] = field(default_factory=dict)
