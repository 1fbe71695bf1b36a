"""Compile every Triton kernel ahead of time and print what each needs; no GPU is needed.

    python -m tools.maintenance.kernel_report [--targets 80 90 100] [--output FILE.md]

Registers and stack per thread, instructions that spill, and shared memory per program are read from
the compiled code with the cuobjdump that comes with Triton. Ends with 1 if a kernel spills more
than is known of it.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_maxscore.flow.device.kernel import solve_kernel
from megatron_maxscore.flow.engine import REGISTERS, WARPS, Shape
from megatron_maxscore.ops.kernels import soft_topk
from megatron_maxscore.ops.kernels.compilations import Compilation

TARGETS = (80, 90, 100)
# Experts and k of the engine's kernel.
SIZES = ((16, 2), (64, 8), (128, 8), (160, 6), (256, 8), (384, 6), (512, 16), (1024, 8))
# Bytes of stack per thread at most, by target. All other kernels spill nothing.
_KNOWN_STACK = {
    "solve, fp32": {80: 16, 90: 0, 100: 0},
    "solve, bf16": {80: 64, 90: 56, 100: 400},
}
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel needs.

    Attributes:
        registers: per thread.
        stack: bytes per thread.
        spills: instructions that access local memory.
        shared: bytes per program.
    """

    registers: int
    stack: int
    spills: int
    shared: int


def all_compilations() -> list[Compilation]:
    """Return every kernel in every form in which it is launched."""
    return [*soft_topk.compilations(), *engine_compilations()]


def engine_compilations() -> list[Compilation]:
    """Return the engine's kernel for common sizes."""
    pointers = {
        "warm_ptr": "*fp32", "capacity_ptr": "*i64", "quota_ptr": "*i64", "experts_ptr": "*i64",
        "order_ptr": "*i64",
        "results_ptr": "*fp64", "rows_ptr": "*fp32", "bits_ptr": "*i32", "partial_ptr": "*fp64",
        "work_ptr": "*i32", "keys_ptr": "*i64",
    }  # fmt: skip
    found = []
    for experts, topk in SIZES:
        constants = Shape(1, 8192, experts, topk).constants
        for dtype in ("fp32", "bf16") if experts == 64 else ("fp32",):
            types = {**pointers, "scores_ptr": f"*{dtype}"}
            signature = {
                name: types.get(name, "i32")
                for name in solve_kernel.arg_names
                if name not in constants
            }
            name = f"solve, {dtype}, {experts} experts, top-{topk}"
            options = {"maxnreg": REGISTERS}
            found.append(Compilation(name, solve_kernel, signature, constants, WARPS, options))
    return found


def most_stack(compilation: Compilation, target: int) -> int:
    """Return how many bytes of stack per thread the registers that a kernel spills may take."""
    kind = next((kind for kind in _KNOWN_STACK if compilation.name.startswith(kind)), "")
    return _KNOWN_STACK[kind].get(target, 0) if kind else 0


def usage(compilation: Compilation, target: int) -> Usage:
    """Compile a kernel for ``sm_<target>`` and read what it needs."""
    # Tensors are aligned in a launch, unless the kernel says that it does not care.
    attributes = {
        (parameter.num,): [["tt.divisibility", 16]]
        for parameter in compilation.kernel.params
        if compilation.signature.get(parameter.name, "").startswith("*")
        and not parameter.do_not_specialize_on_alignment
    }
    source = ASTSource(compilation.kernel, compilation.signature, compilation.constants, attributes)
    options = {"num_warps": compilation.num_warps, **compilation.options}
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(_CUOBJDUMP), "--dump-resource-usage", file.name]
        dumped = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        command = [str(_CUOBJDUMP), "--dump-sass", file.name]
        code = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    numbers = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", dumped)}
    # Spilled registers go through local memory, which these kernels use for nothing else.
    spills = len(re.findall(r"\b(?:STL|LDL)\b", code))
    return Usage(numbers["REG"], numbers["STACK"], spills, compiled.metadata.shared)


def main() -> int:
    """Print the table; return 1 if a kernel spills more than it may."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--targets", type=int, nargs="+", default=TARGETS)
    parser.add_argument("--output", type=Path, help="write the table as Markdown too")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 160)
    columns = [
        "kernel",
        "warps",
        *(f"sm_{t}: registers, stack, spills, shared" for t in arguments.targets),
    ]
    table = Table(
        *columns, title=f"Triton {triton.__version__}, bytes per thread; shared per program"
    )
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    spilled = []
    for compilation in all_compilations():
        cells = [compilation.name, str(compilation.num_warps)]
        for target in arguments.targets:
            found = usage(compilation, target)
            cells.append(f"{found.registers}, {found.stack}, {found.spills}, {found.shared}")
            if found.stack > most_stack(compilation, target):
                spilled.append(f"{compilation.name} on sm_{target}")
        table.add_row(*cells)
        lines.append("| " + " | ".join(cells) + " |")
    console.print(table)
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n")
    console.print(f"spilled: {', '.join(spilled)}" if spilled else "no kernel spills too much")
    return 1 if spilled else 0


if __name__ == "__main__":
    raise SystemExit(main())
