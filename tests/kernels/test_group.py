"""Scope group with the solver's kernels, on two real ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_scope_group_waits_for_nothing_and_routes_as_on_the_cpu():
    command = "-m torch.distributed.run --standalone --nproc-per-node 2"
    command += " -m tests.kernels.group_probe"
    result = subprocess.run(
        [sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert result.returncode == 0 and "OK" in result.stdout, result.stderr[-4000:]
