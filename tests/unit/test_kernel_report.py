"""Every kernel compiles for every target without a device; it spills no more than is known."""

from __future__ import annotations

import pytest

from tools.maintenance.kernel_report import TARGETS, all_compilations, most_stack, usage

REGISTERS = 65536


def cases():
    """Yield compilations and targets; the most used ones in every run of the suite."""
    for compilation in all_compilations():
        for target in TARGETS:
            is_quick = target == 90 and (
                "soft_topk" in compilation.name or " 64 experts" in compilation.name
            )
            marks = () if is_quick else pytest.mark.full
            yield pytest.param(
                compilation, target, marks=marks, id=f"{compilation.name}, sm_{target}"
            )


@pytest.mark.parametrize(("compilation", "target"), cases())
def test_registers_and_spills(compilation, target):
    found = usage(compilation, target)
    assert found.stack <= most_stack(compilation, target) and (found.stack or not found.spills)
    # Kernels of one program are of eight warps, and have a multiprocessor to themselves; of the
    # others at least two programs have to fit.
    programs = 1 if compilation.num_warps == 8 else 2
    assert 0 < found.registers * 32 * compilation.num_warps <= REGISTERS // programs
    assert found.shared <= 48 * 1024
