"""Wheels of the supported megatron-core releases, side by side with one torch.

A wheel is a few megabytes: put in front on the path it hides the installed one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RELEASES = ("0.17.1", "0.18.2", "0.19.2")
# The newest in every run of the suite, older ones with --full.
on_every_release = pytest.mark.parametrize(
    "release",
    [pytest.param(r, marks=() if r == RELEASES[-1] else pytest.mark.full) for r in RELEASES],
)


def wheel(release: str) -> Path:
    """Return a directory that holds ``megatron`` of a release; installs it when asked first."""
    target = Path(sys.prefix) / "releases" / release
    if not (target / "megatron" / "core").is_dir():
        unfinished = target.with_name(f"{release}.{os.getpid()}")
        subprocess.run(
            [
                sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target",
                str(unfinished), f"megatron-core=={release}",
            ],
            check=True,
        )  # fmt: skip
        try:
            unfinished.rename(target)
        except OSError:  # another worker was faster
            shutil.rmtree(unfinished)
    return target


def copy_of_wheel(release: str, directory: Path) -> Path:
    """Copy the Python files of a release's ``megatron``; compiled helpers come along."""
    shutil.copytree(
        wheel(release) / "megatron",
        directory / "megatron",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    return directory


def in_front(path: Path) -> dict[str, str]:
    """Return the environment that hides the installed Megatron behind the one in ``path``."""
    before = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": f"{path}{os.pathsep}{before}" if before else str(path)}
