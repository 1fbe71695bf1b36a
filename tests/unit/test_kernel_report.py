"""Every kernel compiles for every target without a device, and spills no register."""

from __future__ import annotations

import pytest

from tools.kernel_report import TARGETS, all_variants, usage

REGISTERS = 65536


def cases():
    """Yield variants and targets; the most used ones in every run of the suite."""
    for variant in all_variants():
        for target in TARGETS:
            is_quick = target == 90 and (
                "soft_topk" in variant.name or " 64 experts" in variant.name
            )
            marks = () if is_quick else pytest.mark.full
            yield pytest.param(variant, target, marks=marks, id=f"{variant.name}, sm_{target}")


@pytest.mark.parametrize(("variant", "target"), cases())
def test_no_spills(variant, target):
    found = usage(variant, target)
    assert found.spills == 0 and found.stack == 0
    # Kernels of one program are of eight warps, and have a multiprocessor to themselves; of the
    # others at least two programs have to fit.
    programs = 1 if variant.num_warps == 8 else 2
    assert 0 < found.registers * 32 * variant.num_warps <= REGISTERS // programs
    assert found.shared <= 48 * 1024
