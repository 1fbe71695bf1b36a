"""Ranks whose microbatches have different lengths, declared or not."""

from __future__ import annotations

import pytest

from megatron_maxscore.moe.quotas import quotas
from tests.dist import cases, length_cases
from tests.dist.training_runs import MAXSCORE, run, succeed

LAYOUTS = [(2, dict(ep=2)), (4, dict(tp=2, ep=2, etp=1)), (4, dict(tp=2, ep=2, etp=2))]


def lengths_of(size, layout):
    """Different lengths for ranks that do not share sequences."""
    return [(24, 17, 9, 21)[rank // layout.get("tp", 1)] for rank in range(size)]


@pytest.mark.parametrize(("size", "layout"), LAYOUTS)
@pytest.mark.parametrize("scope", ["local", "sequence", "group"])
@pytest.mark.parametrize("factor", [1.0, 1.25])
def test_lengths_that_nobody_has_declared(ranks, size, layout, scope, factor):
    lengths = lengths_of(size, layout)
    results = ranks(
        size, length_cases.layer_of_lengths, lengths=lengths, scope=scope, factor=factor, **layout
    )
    for result in results:
        assert result["right"] and result["per_token"] and result["gradient"]
        assert result["lost"] == 0 and result["message"] is None


@pytest.mark.parametrize(("size", "layout"), LAYOUTS)
def test_shorter_microbatches_than_declared_are_filled(ranks, size, layout):
    lengths = lengths_of(size, layout)
    results = ranks(size, length_cases.layer_of_lengths, lengths=lengths, shape=(24, 1), **layout)
    members = layout["ep"] * layout["etp"] if "etp" in layout else layout["ep"]
    for rank, result in enumerate(results):
        assert result["right"] and result["per_token"] and result["gradient"]
        assert result["lost"] == 0 and result["message"] is None
        # Nobody gets more than the quotas of the declared shape (turn 1: batch 1, microbatch 0).
        quota = quotas(24, cases.TOPK, cases.EXPERTS, rank % members, members, 1)
        assert all(own <= most for own, most in zip(result["own"], quota.tolist(), strict=True))


def test_shorter_sequences_than_declared_in_scope_sequence(ranks):
    # 24 positions times 2 experts are spread evenly over 8 experts; 17 are not.
    results = ranks(
        2, length_cases.layer_of_lengths, lengths=[24, 17], shape=(24, 3), batch=3,
        scope="sequence", ep=2,
    )  # fmt: skip
    assert all(r["right"] and r["per_token"] and r["message"] is None for r in results)
    results = ranks(
        2, length_cases.layer_of_lengths, lengths=[24, 17], shape=(24, 3), batch=2,
        scope="sequence", ep=2,
    )  # fmt: skip
    assert all(r["right"] and r["per_token"] and r["message"] is None for r in results)


def test_longer_microbatches_than_declared_end_in_one_error(ranks):
    results = ranks(2, length_cases.layer_of_lengths, lengths=[24, 30], shape=(24, 1), ep=2)
    assert results[0]["right"] and results[0]["lost"] == 0
    assert results[1]["lost"] == 30, "never a plausible wrong result"
    messages = {result["message"] for result in results}
    assert len(messages) == 1
    (message,) = messages
    assert "layer 1 on rank 1: 30 tokens" in message and "--maxscore-fixed-shape 0 0" in message


EP2 = f"{MAXSCORE} --expert-model-parallel-size 2"


@pytest.mark.parametrize("scope", ["local", pytest.param("sequence", marks=pytest.mark.full)])
def test_a_script_that_cuts_batches_trains(tmp_path, scope):
    result = succeed(
        tmp_path, 2, f"{EP2} --maxscore-scope {scope} --train-iters 6",
        script="tests/dist/cutting_script.py", environment={"LENGTHS": "48,64"},
    )  # fmt: skip
    losses = [float.fromhex(text) for text in result.losses]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.1
    for line in result.statistics:
        assert line["dropped"] == [0, 0]


def test_a_script_with_larger_microbatches_ends_in_one_line(tmp_path):
    flags = f"{EP2} --train-iters 3"
    environment = {"LENGTHS": "64,64", "COPIES": "1,2"}
    script = "tests/dist/cutting_script.py"
    result = run(tmp_path / "declared", 2, flags, script=script, environment=environment)
    assert result.status != 0 and len(result.errors) == 1
    # Two microbatches of four sequences of 64 tokens; declared are two.
    assert "on rank 1: 512 tokens" in result.errors[0]
    assert "--maxscore-fixed-shape 0 0" in result.errors[0]
    assert result.losses == [], "no step was taken"
    mended = f"{flags} --maxscore-fixed-shape 0 0"
    assert len(succeed(
        tmp_path / "mended", 2, mended, script=script, environment=environment
    ).losses) == 3  # fmt: skip
