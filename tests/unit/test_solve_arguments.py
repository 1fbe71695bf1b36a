"""``solve()`` as a library: what it takes, and what it says of the rest."""

from __future__ import annotations

import os
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch

from megatron_maxscore.flow import certified, solve
from megatron_maxscore.flow.kernels import compiler

SCORES = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))


def test_arrays_and_lists_are_tensors():
    expected = solve(SCORES, 2)
    for scores in (SCORES.numpy(), SCORES.tolist(), SCORES.double().numpy()):
        assert torch.equal(solve(scores, 2).experts, expected.experts)
    given = solve(
        SCORES.numpy(), np.int64(2), capacity=np.full(4, 8), prices=[0.0] * 4,
        valid=np.ones(16, bool),
    )  # fmt: skip
    assert torch.equal(given.experts, expected.experts)
    assert torch.equal(solve(SCORES, torch.tensor(2), capacity=[8] * 4).experts, expected.experts)
    warm = solve(SCORES, 2, prices=torch.zeros(4, dtype=torch.bfloat16))
    assert torch.equal(warm.experts, expected.experts)


@pytest.mark.parametrize("slack", [dict(capacity=2**63), dict(capacity_factor=1e300)])
def test_capacities_beyond_all_integers_bound_nothing(slack):
    best = SCORES.topk(2, dim=1).indices
    assert torch.equal(solve(SCORES, 2, **slack).experts, best)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(topk=2.0), "topk must be a whole number, got 2.0"),
        (dict(topk=True), "topk must be a whole number, got True"),
        (dict(topk=0), "topk must lie between 1 and"),
        (dict(capacity_factor="1"), "capacity_factor must be a number, got '1'"),
        (dict(capacity_factor=float("inf")), "capacity_factor must be a positive number, got inf"),
        (dict(capacity=1.5), r"capacity must be an int or \(4,\) int64, got 1.5"),
        (dict(valid=np.ones(3, bool)), r"valid must be \(16,\) bool, got \(3,\)"),
        (dict(valid=[1.0] * 16), r"valid must be \(16,\) bool, got \(16,\) torch.float32"),
        (dict(prices="dear"), "prices must be a tensor, an array or nested lists"),
        (dict(prices=[float("nan")] * 4), "prices must be finite"),
        (dict(scores=None), "scores must be a tensor, an array or nested lists.*NoneType"),
        (dict(scores=[["a"]]), "scores must be a tensor"),
        (dict(scores=[[1, 2]]), "scores must be floating point"),
    ],
)
def test_other_arguments_are_a_value_error(arguments, message):
    given = {"scores": SCORES, "topk": 2, **arguments}
    with pytest.raises(ValueError, match=message):
        solve(given.pop("scores"), given.pop("topk"), **given)


def test_stands_in_a_compiled_function():
    @torch.compile(backend="eager")
    def compiled(scores):
        return solve(scores * 2, 2).experts + 1

    assert torch.equal(compiled(SCORES), solve(SCORES * 2, 2).experts + 1)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (dict(mode="exact"), "mode is exact"),
        (dict(scores=SCORES.double()), "scores are torch.float64"),
        (dict(scores=SCORES.double(), mode="bounded"), "scores are torch.float64"),
        (dict(scores=SCORES[:0]), "there are no tokens"),
        (dict(valid=torch.ones(len(SCORES), dtype=torch.bool)), "padding gets no experts"),
    ],
)
def test_scores_that_leave_a_device_are_told_once(capfd, arguments, reason):
    given = {"scores": SCORES, "topk": 2, **arguments}
    certified._told.clear()
    with mock.patch.object(certified, "_on_gpu", lambda scores: True):
        for _ in range(2):
            scores, topk = given["scores"], given["topk"]
            rest = {k: v for k, v in given.items() if k not in ("scores", "topk")}
            solve(scores, topk, **rest)
    lines = [line for line in capfd.readouterr().err.splitlines() if "copied from the GPU" in line]
    assert len(lines) == 1 and reason in lines[0]


def run(script, **environment):
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=240,
        env={**os.environ, **environment},
    )  # fmt: skip


def test_compiling_is_told_once_and_kept(tmp_path):
    script = "from megatron_maxscore.flow import solve; solve([[1.0, 0.0, 0.5]] * 6, 2)"
    first = run(script, NUMBA_CACHE_DIR=str(tmp_path))
    assert first.stderr.count("compiling the solver's kernels") == 1
    assert "python -m megatron_maxscore compile" in first.stderr
    second = run(script, NUMBA_CACHE_DIR=str(tmp_path))
    assert second.returncode == 0 and "compiling" not in second.stderr


def test_a_directory_that_others_can_write_keeps_no_kernels(tmp_path, monkeypatch):
    monkeypatch.setattr(compiler.tempfile, "gettempdir", lambda: str(tmp_path))
    own = compiler._temporary_directory()
    assert own is not None and own.parent == tmp_path and own.stat().st_mode & 0o777 == 0o700
    own.chmod(0o777)
    assert compiler._temporary_directory() is None
    own.rmdir()
    own.symlink_to(tmp_path)
    assert compiler._temporary_directory() is None


def test_where_no_cache_can_be_written_kernels_go_to_the_temporary_directory(tmp_path, monkeypatch):
    places = []

    def njit(cache=False, **options):
        if cache and not compiler.numba.config.CACHE_DIR:
            raise RuntimeError("no locator available")
        places.append(compiler.numba.config.CACHE_DIR if cache else "nowhere")
        return lambda function: function

    monkeypatch.setattr(compiler, "njit", njit)
    monkeypatch.setattr(compiler.numba.config, "CACHE_DIR", "")
    monkeypatch.setattr(compiler.tempfile, "gettempdir", lambda: str(tmp_path))
    assert compiler.jit(len) is len
    assert places == [str(compiler._temporary_directory())]
    assert compiler.numba.config.CACHE_DIR == ""
    monkeypatch.setattr(compiler.tempfile, "gettempdir", lambda: "/proc/nowhere")
    assert compiler.jit(len) is len and places[1:] == ["nowhere"]
