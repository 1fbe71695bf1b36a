"""The study's bookkeeping: which runs are done, resumed, evaluated, and what is kept of them."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest

from megatron_maxscore.commands.processes import alone_in
from tests.unit.study_lines import SIZE, result
from tools.study import __main__ as study_main
from tools.study import results as study_results
from tools.study import runs as study_runs
from tools.study.arms import ARMS, START, Run, Setting


def test_a_run_is_known_by_what_decides_its_result(tmp_path):
    run = Run("prose", SIZE, ARMS["maxscore"], START, 1, "core")
    path = tmp_path / "results.jsonl"
    study_runs.Results(path).add(result(run, 4.0))
    results = study_runs.Results(path)
    assert results.of(run) is not None
    slower = dataclasses.replace(SIZE, seconds_per_step=9.0)
    assert results.of(dataclasses.replace(run, size=slower)) is not None
    for change in (
        dict(seed=2), dict(family="code"), dict(setting=Setting("1e-3", "4")),
        dict(arm=ARMS["gshard"]), dict(arm=ARMS["one_flag"]), dict(data="other"),
        dict(setting=Setting("2e-3", "2")), dict(device="cuda"),
        dict(size=dataclasses.replace(SIZE, iterations=21)),
    ):  # fmt: skip
        assert results.of(dataclasses.replace(run, **change)) is None, change
    assert study_main.minutes([run], results, jobs=2) == 0
    assert study_main.minutes([dataclasses.replace(run, seed=2)], results, jobs=2) > 0


def test_results_of_several_processes_and_of_others(tmp_path):
    run = Run("prose", SIZE, ARMS["maxscore"], START, 1, "core")
    path = tmp_path / "made" / "results.jsonl"
    one, other = study_runs.Results(path), study_runs.Results(path)
    one.add(result(run, 4.0))
    other.add(result(dataclasses.replace(run, seed=2), 4.1))
    assert len(study_runs.Results(path).lines) == 2 == len(other.lines)
    path.write_text(path.read_text() + '{"key": "abc"}\n')
    with pytest.raises(ValueError, match="line 3, is no result of this study"):
        study_runs.Results(path)


@pytest.fixture
def main(monkeypatch):
    """Return the study's command, which must change nothing of this process."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(study_main.signal, "signal", lambda *_: None)
    return study_main.main


def test_a_second_study_in_the_same_place_is_refused(tmp_path, monkeypatch, capsys, main):
    command = ["study", "--quick", "--output", str(tmp_path / "here"), "--data", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    (tmp_path / "here").mkdir()
    with alone_in(tmp_path / "here", "study"):
        assert main() == 2
    assert "another study is writing to" in capsys.readouterr().err


@pytest.mark.parametrize(("change", "status"), [(0.0, 0), (5e-7, 0), (2e-6, 1)])
def test_a_run_is_made_again_and_compared(tmp_path, monkeypatch, capsys, main, change, status):
    size = dataclasses.replace(SIZE, name="small")
    monkeypatch.setitem(study_main.SIZES, "small", size)
    monkeypatch.setattr(study_main.data, "prepare", lambda *_: tmp_path)
    monkeypatch.setattr(study_main.data, "digest", lambda _: "d1")
    run = Run("prose", size, ARMS["servable_sigmoid"], START, 22, "servable", "d1")
    recorded = tmp_path / "results.jsonl"
    study_runs.Results(recorded).add(result(run, 4.0, data="d1", device="cpu"))
    before = recorded.read_bytes()

    begun = tmp_path / "out" / "repeats" / run.key
    begun.mkdir(parents=True)

    def carried_out(runs, _data, output, results, *_):
        assert runs == [run]
        assert output == begun.parent and not begun.exists(), "would be compared with itself"
        results.add(result(runs[0], 4.0 + change))

    monkeypatch.setattr(study_main, "carry_out_all", carried_out)
    command = ["study", "--results", str(recorded), "--output", str(tmp_path / "out"), "--repeat"]
    monkeypatch.setattr(sys, "argv", [*command, run.key])
    assert main() == status
    assert "recorded 4.000000000, now" in capsys.readouterr().out
    assert recorded.read_bytes() == before
    monkeypatch.setattr(sys, "argv", [*command, "0000"])
    assert main() == 2 and "no run with the key '0000'" in capsys.readouterr().err
    monkeypatch.setattr(study_main.data, "digest", lambda _: "d2")
    monkeypatch.setattr(sys, "argv", [*command, run.key])
    assert main() == 2 and "text d2, recorded d1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "diverged"),
    [
        ("ValueError: Unexpected result nan (message='found NaN in local forward loss')", True),
        ("error: router scores were NaN or infinite in iteration 7", True),
        ("RuntimeError: out of memory", False),
    ],
)
def test_only_a_run_that_diverged_counts_as_such(tmp_path, monkeypatch, words, diverged):
    run = Run("code", SIZE, ARMS["gshard"], START, 1, "core")
    # Every step's line has a nan in it.
    text = f"iteration 6/ 20 | lm loss: 5.0 | number of nan iterations: 0 |\n{words}"

    # Torchrun says a lot more, after a rank has failed.
    said = tmp_path / "said"
    said.write_text(text + 40 * "\nerror: a rank has failed" + "\n")
    command = [sys.executable, "-c", f"print(open({str(said)!r}).read()); raise SystemExit(1)"]
    monkeypatch.setattr(study_runs, "training_command", lambda *_: command)
    arguments = (run, tmp_path, tmp_path, study_runs.Processes(), lambda *step: None)
    if diverged:
        assert words in study_runs.carry_out(*arguments)["diverged"]
    else:
        with pytest.raises(study_runs.RunError, match="a rank has failed"):
            study_runs.carry_out(*arguments)


def test_what_other_sources_began_is_begun_anew(tmp_path, monkeypatch):
    run = Run("code", SIZE, ARMS["gshard"], START, 1, "core")
    command = [sys.executable, "-c", "raise SystemExit(1)"]
    monkeypatch.setattr(study_runs, "training_command", lambda *_: command)
    left = tmp_path / run.key / "checkpoint"
    left.parent.mkdir()
    for code, kept in (
        (None, False),
        ("of others", False),
        (study_runs.code_digest(), True),
    ):
        left.write_text("a model")
        if code is not None:
            (left.parent / "code").write_text(code)
        with pytest.raises(study_runs.RunError, match="exit status 1"):
            study_runs.carry_out(run, tmp_path, tmp_path, study_runs.Processes(), print)
        assert left.exists() == kept


def test_milestones_are_evaluated_at_their_step(tmp_path, monkeypatch):
    run = Run("code", SIZE, ARMS["maxscore"], START, 31, "prices", milestones=(4, 10))
    directory = tmp_path / run.key
    tracker = directory / "checkpoint" / "latest_checkpointed_iteration.txt"
    tracker.parent.mkdir(parents=True)
    (directory / "code").write_text(study_runs.code_digest())
    done = []

    def execute(command, log, processes, follow=None):
        step = int(command[-1]) if "--exit-interval" in command else SIZE.iterations
        if "evaluate" in command:
            done.append(f"evaluate {tracker.read_text()}")
            (directory / "evaluation.json").write_text(json.dumps({"rules": tracker.read_text()}))
        else:
            done.append(f"train to {step}")
            tracker.write_text(str(step))

    monkeypatch.setattr(study_runs, "execute", execute)
    monkeypatch.setattr(study_runs, "summary", lambda *_: {})
    arguments = (run, tmp_path, tmp_path, study_runs.Processes(), print)
    study_runs.carry_out(*arguments)
    assert done == [
        "train to 4", "evaluate 4", "train to 10", "evaluate 10", "train to 20", "evaluate 20",
    ]  # fmt: skip
    assert json.loads((directory / "evaluation-4.json").read_text())["rules"] == "4"
    # A run that was killed between training and evaluation is not trained on.
    (directory / "evaluation-10.json").unlink()
    tracker.write_text("10")
    done.clear()
    study_runs.carry_out(*arguments)
    assert done[0] == "evaluate 10"
    (directory / "evaluation-10.json").unlink()
    tracker.write_text("20")
    with pytest.raises(study_runs.RunError, match="checkpoint of step 20, not 10"):
        study_runs.carry_out(*arguments)


def test_of_drops_the_lower_loss_is_compared():
    run = Run("prose", SIZE, ARMS["gshard"], START, 1, "core")
    line = result(run, 4.0)
    line["evaluation"]["rules"]["no drops"] = {"loss": 3.9}
    assert study_results.compared_loss(line) == 3.9 and study_results.own_loss(line) == 4.0
    line = result(Run("prose", SIZE, ARMS["maxscore"], START, 1, "core"), 4.0)
    line["evaluation"]["rules"]["flow"]["loss"] = 3.0
    assert study_results.compared_loss(line) == 4.0, "MaxScore by prices"


def test_summary_keeps_the_last_of_steps_that_a_resumed_run_repeats(tmp_path):
    run = Run("code", SIZE, ARMS["gshard"], START, 1, "core")
    log, lines = [], []
    for iteration in [*range(1, 13), *range(9, 21)]:
        loss = 5.0 + iteration + (100 if iteration < 13 and len(lines) < 12 else 0)
        log.append(
            f" [2026-01-01] iteration {iteration:8}/      20 | consumed samples: 1 | elapsed time "
            f"per iteration (ms): 10.0 | lm loss: {loss:.6E} | grad norm: 1.0"
        )
        if iteration % 10 == 0:
            # With two rules that by prices is kept.
            rule = " (price routing)" if iteration == 10 else ""
            log.append(
                f" validation loss at iteration {iteration}{rule} | lm loss value: 6.5E+00 | lm PPL"
            )
            if rule:
                log.append(" validation loss at iteration 10 (flow routing) | lm loss value: 7.5 |")
        lines.append(
            {"iteration": iteration, "loads": [[4] * 16] * 4,
             "dropped": [0, 64, 0, 0] if iteration == 20 else [0] * 4,
             "maxvio": [0.5] * 4, "largest_gap": 0.0, "solves": 0, "solve_seconds": 0.0,
             "step_seconds": 1.0}
        )  # fmt: skip
    log.append(
        " validation loss at iteration 20 on validation set | lm loss value: 9.9E+00 | lm PPL"
    )
    (tmp_path / "log").write_text("\n".join(log))
    (tmp_path / "stats.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "evaluation.json").write_text("{}")
    line = study_runs.summary(run, tmp_path, 5.0)
    expected = [105.0 + i if i < 9 else 5.0 + i for i in range(1, 21)]
    assert line["train_loss"] == expected and line["solve_share"] is None
    assert line["curve"] == {10: 6.5, 20: 6.5}
    # 4 layers with 64 assignments each have arrived.
    assert line["dropped_by_step"] == [0.0] * 19 + [0.2]
    (tmp_path / "log").write_text("\n".join(log[:-3]))
    with pytest.raises(study_runs.RunError, match="lacks steps"):
        study_runs.summary(run, tmp_path, 5.0)
