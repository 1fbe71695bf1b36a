"""Data preparation on small inputs, through the command line."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

COMMAND = [sys.executable, "-m", "megatron_maxscore", "prepare"]
ROOT = Path(__file__).resolve().parents[2]


def prepare(*arguments, **kwargs):
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        **kwargs,
    )


@pytest.fixture
def texts(tmp_path):
    """Documents with tabs, blank lines, other scripts; a binary file; an empty one."""
    source = tmp_path / "texts"
    source.mkdir()
    words = "token expert capacity price residual flow score gap".split()
    rng = np.random.default_rng(0)
    for index in range(40):
        lines = [" ".join(rng.choice(words, 9)) + f"\t{index}  näïve 漢字" for _ in range(60)]
        (source / f"{index:02}.txt").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    (source / "image.bin").write_bytes(bytes(range(256)))
    (source / "empty.txt").write_text("")
    return source


def test_documents_come_back(tmp_path, texts):
    output = tmp_path / "data"
    result = prepare("--input", texts, "--output", output, "--vocab-size", 400)
    assert result.returncode == 0, result.stderr
    assert "left out 1 of 42 files, empty: empty.txt" in result.stdout
    assert "left out 1 of 42 files, not UTF-8 text: image.bin" in result.stdout
    assert sorted(p.name for p in output.iterdir()) == [
        "prepared.json",
        "tokenizer.model",
        "train_text_document.bin",
        "train_text_document.idx",
        "valid_text_document.bin",
        "valid_text_document.idx",
    ]
    assert not list(tmp_path.glob(".*")), "no scratch directory stays"
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(output / "tokenizer.model"))
    assert tokenizer.get_piece_size() == 400
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    decoded = []
    for name in ("train", "valid"):
        dataset = IndexedDataset(str(output / f"{name}_text_document"))
        assert len(dataset) == {"train": 38, "valid": 2}[name]
        for index in range(len(dataset)):
            ids = dataset[index].tolist()
            assert ids[-1] == tokenizer.eos_id()
            decoded.append(tokenizer.decode(ids[:-1]))
    written = [p.read_text(encoding="utf-8") for p in sorted(texts.glob("??.txt"))]
    assert sorted(decoded) == sorted(written), "the tokenizer loses nothing"
    again = prepare("--input", texts, "--output", output, "--vocab-size", 400)
    assert "up to date" in again.stdout
    (texts / "00.txt").write_text("changed " * 500)
    assert (
        "up to date"
        not in prepare("--input", texts, "--output", output, "--vocab-size", 400).stdout
    )


@pytest.mark.parametrize("damage", ["truncated", "missing", "other bytes", "record"])
def test_damaged_data_are_made_anew(tmp_path, texts, damage):
    output = tmp_path / "data"
    arguments = ("--input", texts, "--output", output, "--vocab-size", 400)
    assert prepare(*arguments).returncode == 0
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    name = {"missing": "valid_text_document.idx", "record": "prepared.json"}.get(
        damage, "train_text_document.bin"
    )
    path = output / name
    if damage == "missing":
        path.unlink()
    elif damage == "other bytes":
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    else:
        path.write_bytes(path.read_bytes()[:10])
    result = prepare(*arguments)
    assert result.returncode == 0 and "up to date" not in result.stdout
    assert name in result.stdout and "made anew" in result.stdout
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert "up to date" in prepare(*arguments).stdout


def test_two_at_once(tmp_path, texts):
    output = tmp_path / "data"
    command = [*COMMAND, "--input", texts, "--output", output, "--vocab-size", "400"]
    both = [
        subprocess.Popen(
            list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for _ in range(2)
    ]
    for process in both:
        said, _ = process.communicate(timeout=240)
        assert process.returncode == 0, said.decode()
    assert "up to date" in prepare(*command[4:]).stdout
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("kind", ["file", "below a file"])
def test_an_output_that_cannot_be_written(tmp_path, texts, kind):
    (tmp_path / "file").write_text("mine")
    output = tmp_path / "file" if kind == "file" else tmp_path / "file" / "data"
    result = prepare("--input", texts, "--output", output, "--vocab-size", 400)
    assert result.returncode == 2 and result.stderr.count("error: ") == 1
    assert "Traceback" not in result.stderr and str(output) in result.stderr
    assert (tmp_path / "file").read_text() == "mine" and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "/does/not/exist"], "--input /does/not/exist does not exist"),
        (["--vocab-size", "10"], "--vocab-size must be at least 300"),
        (["--valid-share", "1.5"], "--valid-share must lie between 0 and 1"),
    ],
)
def test_bad_input(tmp_path, arguments, message):
    output = tmp_path / "data"
    result = prepare("--output", output, *arguments)
    assert result.returncode == 2 and message in result.stderr
    assert not output.exists()


def test_too_little_text(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("hello world")
    output = tmp_path / "data"
    result = prepare("--input", tmp_path / "a.txt", tmp_path / "b.txt", "--output", output)
    assert result.returncode == 2 and "--vocab-size 8192" in result.stderr
    assert not output.exists() and not list(tmp_path.glob(".data*"))


def test_terminated_run_leaves_nothing(tmp_path):
    output = tmp_path / "data"
    process = subprocess.Popen(
        [*COMMAND, "--output", str(output)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".data*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(tmp_path.glob(".data*")), "it has begun to write"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 130
    assert not output.exists() and not list(tmp_path.glob(".data*"))
