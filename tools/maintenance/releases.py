"""Wheels of the supported megatron-core releases, side by side with one torch.

A wheel is a few megabytes: put in front on the path it hides the installed one. A release that has
no wheel yet is tested from a checkout, which ``MEGATRON_TREE`` names.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NEWEST = "0.19.2"


def _version_of(tree: Path) -> str:
    text = (tree / "megatron" / "core" / "package_info.py").read_text()
    return ".".join(re.findall(r"^(?:MAJOR|MINOR|PATCH) = (\d+)", text, flags=re.MULTILINE))


# A checkout, by its version.
TREES = {
    _version_of(Path(tree)): Path(tree).resolve()
    for tree in os.environ.get("MEGATRON_TREE", "").split(os.pathsep)
    if tree
}
RELEASES = ("0.17.1", "0.18.2", NEWEST, *TREES)
# The newest in every run of the suite, older ones with --full.
on_every_release = pytest.mark.parametrize(
    "release",
    [pytest.param(r, marks=() if r == NEWEST else pytest.mark.full) for r in RELEASES],
)


def package(name: str, version: str) -> Path:
    """Return a directory that holds a package without its dependencies; installs it at first."""
    target = Path(sys.prefix) / "releases" / f"{name}-{version}"
    if name == "megatron-core":
        target = target.with_name(version)
    if not (target / "megatron").is_dir():
        unfinished = target.with_name(f"{target.name}.{os.getpid()}")
        subprocess.run(
            [
                sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target",
                str(unfinished), f"{name}=={version}",
            ],
            check=True,
        )  # fmt: skip
        try:
            unfinished.rename(target)
        except OSError:  # another worker was faster
            shutil.rmtree(unfinished)
    return target


def wheel(release: str) -> Path:
    """Return a directory that holds ``megatron`` of a release; installs it when asked first."""
    return TREES[release] if release in TREES else package("megatron-core", release)


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
