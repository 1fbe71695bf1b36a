"""The package's commands: help at once, errors in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_maxscore.__main__ import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments, module="megatron_maxscore", **environment):
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


def one_line(result):
    """Return the only line of an error, the command's usage aside."""
    lines = [line for line in result.stderr.splitlines() if "error: " in line]
    assert result.returncode not in (0, -9) and len(lines) == 1, result.stderr[-3000:]
    assert "Traceback" not in result.stderr
    return lines[0]


def test_commands_are_listed():
    result = command("--help")
    assert result.returncode == 0 and all(f"  {name}" in result.stdout for name in COMMANDS)
    assert "there is no command 'train'" in one_line(command("train"))
    assert command().returncode == 2


def test_help_answers_without_importing_megatron():
    script = (
        "import contextlib, io, sys; from megatron_maxscore.__main__ import COMMANDS, main\n"
        "for name in COMMANDS:\n"
        "    said = io.StringIO()\n"
        "    with contextlib.redirect_stdout(said):\n"
        "        try: status = main([name, '--help'])\n"
        "        except SystemExit as end: status = end.code\n"
        "    assert not status, (name, status)\n"
        "    assert f'megatron_maxscore' in said.getvalue() and name in said.getvalue(), name\n"
        "found = [m for m in sys.modules if m.startswith(('megatron.core', 'megatron.training'))]\n"
        "assert not found, found"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("evaluate --checkpoint x --data y --sequences 0", "--sequences must be at least 1, got 0"),
        ("evaluate --checkpoint x --data y --sequences -3", "at least 1, got -3"),
        ("evaluate --checkpoint x --data y --output /nowhere/f.json", "/nowhere is no directory"),
        ("evaluate --checkpoint x --data y --output /tmp", "is a directory"),
        ("evaluate --checkpoint /nowhere --data y", "/nowhere holds no checkpoint"),
        ("generate --checkpoint x --temperature nan", "--temperature must be at least 0, got nan"),
        ("generate --checkpoint x --samples -1", "--samples must be at least 1, got -1"),
        ("generate --checkpoint x --top-p 0", "--top-p must lie in (0, 1], got 0.0"),
        ("demo --iterations 0", "--iterations must be at least 6, got 0"),
        ("demo --output /etc/hostname/demo", "--output /etc/hostname/demo cannot be written"),
        ("launch nowhere.py", "script 'nowhere.py' does not exist"),
        ("launch --gpu script.py", "unknown option --gpu before the script"),
        ("launch", "no script was given"),
        ("cpu nowhere.py", "script 'nowhere.py' does not exist"),
        ("cpu --frobnicate", "unknown option --frobnicate"),
        ("cpu", "no script was given"),
        ("patch check /nowhere", "/nowhere"),
    ],
)
def test_errors_are_one_line(arguments, words, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    # In this process, whose handlers stay.
    monkeypatch.setattr(signal, "signal", lambda *given: None)
    try:
        status = main(arguments.split())
    except SystemExit as end:
        status = end.code
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert status in (1, 2) and len(lines) == 1 and words in lines[0]


@pytest.mark.parametrize(
    ("variable", "value"),
    [("CUDA_VISIBLE_DEVICES", "0,1"), ("SLURM_GPUS_ON_NODE", "8"), ("SLURM_JOB_GPUS", "0")],
)
def test_promised_devices_that_are_missing(variable, value):
    script = "tests/dist/refusal_probe.py"
    line = one_line(command("launch", script, **{variable: value, "RANK": "3", "LOCAL_RANK": "0"}))
    assert f"{variable} is {value}" in line and "--cpu before the script" in line


def test_a_backend_that_needs_devices():
    script = "tests/dist/refusal_probe.py"
    line = one_line(command("launch", script, "--distributed-backend", "nccl"))
    assert "--distributed-backend nccl was given" in line


@pytest.mark.parametrize("arguments", [("--cpu",), ()])
def test_every_rank_says_that_it_is_in_cpu_mode(arguments, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("print('ran')")
    result = command("launch", *arguments, script, RANK="3", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0 and "ran" in result.stdout
    lines = [line for line in result.stderr.splitlines() if "CPU mode (gloo) on rank 3" in line]
    assert len(lines) == 1
    assert ("it was asked for" if arguments else "no CUDA device was found") in lines[0]


def test_an_interrupted_demo_ends_with_one_line(tmp_path):
    process = subprocess.Popen(
        [
            sys.executable, "-m", "megatron_maxscore", "demo",
            "--data", tmp_path / "data", "--output", tmp_path / "demo",
        ],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        # A suite that runs in the background of a script has inherited that it is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".data*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (tmp_path / "demo" / ".lock").exists()
    second = command("demo", "--data", tmp_path / "data2", "--output", tmp_path / "demo")
    assert "another demo is writing to" in one_line(second)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in said
    assert "interrupted" in said
