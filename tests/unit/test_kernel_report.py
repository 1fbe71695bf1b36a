"""Every kernel compiles for every target without a device, and spills no register."""

from __future__ import annotations

import pytest

from tools.kernel_report import TARGETS, all_variants, usage


@pytest.mark.parametrize(
    "target", [90, *(pytest.param(t, marks=pytest.mark.full) for t in TARGETS if t != 90)]
)
@pytest.mark.parametrize("variant", all_variants(), ids=lambda variant: variant.name)
def test_no_spills(variant, target):
    found = usage(variant, target)
    assert found.spills == 0 and found.stack == 0
    # A program of so many registers still fits an SM at all, and twice.
    assert 0 < found.registers * 32 * variant.num_warps <= 32768
    assert found.shared <= 48 * 1024
