"""Which layers and iterations are recorded, and what is in a file."""

from __future__ import annotations

import pytest
import torch

from megatron_maxscore.moe import MaxScoreConfig
from megatron_maxscore.moe.recording import ScoreRecorder, parse_numbers


def test_numbers_and_ranges():
    assert [list(part) for part in parse_numbers("1, 4-6")] == [[1], [4, 5, 6]]


@pytest.mark.parametrize("text", ["a", "3-", "-3", "1;2", "6-4", "²"])
def test_other_text_is_refused(text):
    with pytest.raises(ValueError, match="numbers and ranges like 1,4-6"):
        parse_numbers(text)
    with pytest.raises(ValueError, match="--maxscore-record-steps: expected numbers"):
        MaxScoreConfig(record_dir="scores", record_steps=text)


def test_numbers_begin_at_one():
    with pytest.raises(ValueError, match="--maxscore-record-steps: numbers begin at 1, got '0-3'"):
        MaxScoreConfig(record_dir="scores", record_steps="0-3")


def test_only_what_was_asked_for_is_written(tmp_path):
    recorder = ScoreRecorder(str(tmp_path / "new"), "2", "5-6")
    scores, capacity, prices = torch.randn(6, 4), torch.tensor([3, 3, 3, 3]), torch.rand(4)
    valid = torch.tensor([True] * 5 + [False])
    for layer in (1, 2):
        for iteration in (4, 5, 7):
            recorder.record(layer, iteration, scores, 2, capacity, prices, valid)
    recorder.record(2, 6, scores, 2, capacity, prices, None)
    recorder.record(2, 6, 2 * scores, 2, capacity, prices, None)
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == [
        "iteration00005_layer002_rank000_solve000.pt",
        "iteration00006_layer002_rank000_solve000.pt",
        "iteration00006_layer002_rank000_solve001.pt",
    ]
    saved = torch.load(tmp_path / "new" / names[0])
    assert torch.equal(saved["scores"], scores) and torch.equal(saved["valid"], valid)
    assert torch.equal(saved["capacity"], capacity) and torch.equal(saved["prices"], prices)
    assert saved["topk"] == 2
    assert torch.equal(torch.load(tmp_path / "new" / names[2])["scores"], 2 * scores)
