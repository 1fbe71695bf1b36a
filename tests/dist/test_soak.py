"""The soak's parts, briefly; ``python -m tools.soak --full`` is the soak."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.dist.training_runs import ROOT
from tools.soak import faults, kills, report, solves, steps


def test_random_solves():
    line = solves.run_chunk(0, 300)
    assert line["failures"] == [] and line["compared"] >= 20 and 0 < line["infeasible"] < 60


def test_the_checks_of_random_solves_see_what_is_wrong(monkeypatch):
    scores = torch.tensor([[3.0, 1.0, 0.0], [3.0, 2.0, 0.0], [1.0, 0.0, -torch.inf]])
    problem = solves.Problem("", scores, 1, 1, 1.0, None, None, False, True)
    assert solves.check_feasible(problem, scores, None, torch.tensor([[1], [2], [0]])) == 2.0
    for experts in ([[0], [1], [0]], [[0], [1], [2]], [[0], [1], [-1]]):
        with pytest.raises(AssertionError):
            solves.check_feasible(problem, scores, None, torch.tensor(experts))
    twice = solves.Problem("", scores, 2, 3, 1.0, None, None, False, True)
    with pytest.raises(AssertionError, match="distinct"):
        solves.check_feasible(twice, scores, None, torch.tensor([[0, 0], [0, 1], [0, 1]]))

    def worse(*arguments, **options):
        solution = original(*arguments, **options)
        solution.experts[:] = torch.tensor([[1], [2], [0]])
        solution.objective.fill_(2.0)
        return solution

    assert solves.check(problem)["optimal"] == 1
    original = solves.solve
    monkeypatch.setattr(solves, "solve", worse)
    with pytest.raises(AssertionError, match="OR-tools has"):
        solves.check(problem)


@pytest.mark.parametrize(
    ("scope", "how", "place"),
    [("group", "dies", 2), ("group", "stalls", 3), ("sequence", "has other arguments", 1)],
)
def test_faults(scope, how, place):
    line = faults.run_case(scope, how, place)
    assert line["failures"] == [] and len(line["phases"]) >= (1 if "other" in how else place)


def test_a_fault_that_is_not_told_is_found():
    line = faults.run_case("group", "dies", 999)
    assert all("no error" in failure for failure in line["failures"]) and len(line["failures"]) == 2


def test_a_killed_run():
    # While it saves: every process of it.
    line = kills.trial(4, {})
    assert line["killed"] and line["failures"] == []


def test_many_steps():
    line = steps.watch("group", 120)
    assert line["failures"] == [] and line["steps"] == 120 and line["memory_mb"][0] > 100


def test_what_grows_is_found():
    samples = [(100.0 + i, 10 + i // 20, 5) for i in range(100)]
    lines = [{"largest_gap": 0.0, "loads": [[4, 4]], "dropped": [0]}] * 10
    found = steps.judge("local", 10, samples, lines, 1.0)["failures"]
    assert len(found) == 2 and "memory grew" in found[0] and "files grew" in found[1]
    steady = [(100.0, 10, 5)] * 100
    assert steps.judge("local", 10, steady, lines, 1.0)["failures"] == []
    lines[3] = {"largest_gap": 0.0, "loads": [[3, 5]], "dropped": [0]}
    assert "loads differ by 2" in steps.judge("local", 10, steady, lines, 1.0)["failures"][0]


def test_several_models_and_the_report(tmp_path):
    results, text = tmp_path / "soak.jsonl", tmp_path / "soak.md"
    command = [
        sys.executable, "-W", "ignore", "-m", "tools.soak", "--parts", "models",
        "--minutes", "0.1", "--results", str(results), "--report", str(text),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert results.read_text().count('"failures": []') == 6
    assert "two models in threads" in text.read_text() and "0 failed" in text.read_text()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and len(results.read_text().splitlines()) == 6, "not repeated"


def test_a_failure_is_in_the_report():
    line = {
        "part": "solves", "chunk": 0, "solves": 10, "compared": 1, "infeasible": 0,
        "largest_gap": 0.0, "seconds": 1.0, "failures": ["3: no expert is over its capacity"],
    }  # fmt: skip
    text = report.text_of([line])
    assert "of which 1 failed" in text and "- solves: 3: no expert is over its capacity" in text


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", ["solves", "models", "faults", "kills", "steps"])
def test_ten_minutes_of_each_part(tmp_path, part):
    command = [
        sys.executable, "-W", "ignore", "-m", "tools.soak", "--parts", part, "--minutes", "10",
        "--results", str(tmp_path / "soak.jsonl"),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
