"""The shell scripts' way to .venv, with stand-ins for Python; and the tools' command lines."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Says that it is new enough, makes environments of itself, and notes what pip is asked for.
PYTHON = """#!/usr/bin/env bash
case "$*" in
  -c*) echo 1 ;;
  --version) echo Python 3.12.0 ;;
  "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; touch "$3/bin/has-pip" ;;
  "-m pip --version") [ -e "$(dirname "$0")/has-pip" ] ;;
  "-m pip install"*) echo "$*" >>"$(dirname "$0")/installed" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "tools").mkdir()
    for name in ("tools/env.sh", "tools/constraints.txt", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    return tmp_path


def set_up(checkout):
    return subprocess.run(
        ["bash", "-c", "set -euo pipefail; source tools/env.sh; maxscore_setup demo"],
        cwd=checkout, capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHON": str(checkout / "python")},
    )  # fmt: skip


def test_an_environment_is_made_once(checkout):
    first = set_up(checkout)
    assert first.returncode == 0 and "Making .venv" in first.stdout, first.stderr
    second = set_up(checkout)
    assert second.returncode == 0 and second.stdout == ""
    assert (checkout / ".venv/bin/installed").read_text().count("install") == 1


def test_an_interrupted_environment_is_made_anew(checkout):
    assert set_up(checkout).returncode == 0
    (checkout / ".venv/bin/has-pip").unlink()
    again = set_up(checkout)
    assert again.returncode == 0 and "Making .venv" in again.stdout
    assert (checkout / ".venv/bin/has-pip").exists()


@pytest.mark.parametrize("kind", ["directory", "without pip"])
def test_an_environment_of_somebody_else_stays(checkout, kind):
    (checkout / ".venv/bin").mkdir(parents=True)
    (checkout / ".venv/mine").write_text("mine")
    if kind == "without pip":
        shutil.copy(checkout / "python", checkout / ".venv/bin/python")
    result = set_up(checkout)
    assert result.returncode == 1 and (checkout / ".venv/mine").read_text() == "mine"
    assert result.stderr.startswith("error: .venv is not of these scripts' making")


@pytest.mark.parametrize("script", ["demo.sh", "test.sh", "gpu_check.sh"])
def test_help_installs_nothing(checkout, script):
    shutil.copy(ROOT / "tools" / script, checkout / "tools")
    result = subprocess.run(
        ["bash", f"tools/{script}", "--help"], cwd=checkout, capture_output=True, text=True,
        timeout=30,
    )  # fmt: skip
    assert result.returncode == 0 and result.stdout and not (checkout / ".venv").exists()


def test_a_machine_without_a_gpu_is_found_before_anything_is_installed(checkout):
    shutil.copy(ROOT / "tools/gpu_check.sh", checkout / "tools")
    (checkout / "nvidia-smi").write_text("#!/usr/bin/env bash\nexit 9\n")
    (checkout / "nvidia-smi").chmod(0o755)
    result = subprocess.run(
        ["bash", "tools/gpu_check.sh"], cwd=checkout, capture_output=True, text=True, timeout=30,
        env={**os.environ, "PATH": f"{checkout}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert result.returncode == 1 and "nvidia-smi finds no GPU" in result.stderr
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("benchmarks.solver --sizes foo", "like 8192x64x8, got foo"),
        ("benchmarks.solver --sizes 512x16x17", "1 <= k <= experts"),
        ("benchmarks.scale --ranks 0", "--ranks must lie between 1 and"),
        ("benchmarks.scale --experts 5000", "--experts must lie between 1 and 4096, got 5000"),
        ("benchmarks.record_scores --steps a-b", "--steps: expected numbers and ranges"),
        ("benchmarks.paper_models huge", "invalid choice: 'huge'"),
    ],
)
def test_tools_refuse_wrong_arguments_in_one_line(arguments, words, capsys, monkeypatch):
    module, *given = arguments.split()
    monkeypatch.setattr(sys, "argv", [module, *given])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"tools.{module}", run_name="__main__")
    assert end.value.code == 2 and words in capsys.readouterr().err


def test_help_of_the_papers_models_builds_none(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["paper_models.py", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("tools.benchmarks.paper_models", run_name="__main__")
    assert end.value.code == 0 and "usage: " in capsys.readouterr().out
