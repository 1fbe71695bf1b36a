"""Turn text files into a tokenizer and Megatron data sets.

    python -m megatron_maxscore prepare --output data --input notes/ a.txt # your files
    python -m megatron_maxscore prepare --output data # the sources of this Python's library

Writes ``tokenizer.model`` (SentencePiece, BPE with byte fallback) and the data sets
``train_text_document`` and ``valid_text_document`` (.bin and .idx). One file is one document; the
split is by document. Everything is written to a directory of its own and moved into place at
the end, so an interrupted run leaves nothing behind. ``prepared.json`` keeps what the data were
made of, and the size and digest of every file: data that are complete are not made again.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import logging
import os
import random
import shutil
import signal
import sys
import sysconfig
import tempfile
import warnings
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from megatron_maxscore.commands.parsing import parser_of

# SentencePiece rejects longer training sentences; documents are cut into pieces of this size.
SENTENCE_BYTES = 4096
# Sampling more text than this changes an 8k vocabulary little and costs minutes.
TOKENIZER_BYTES = 20_000_000


def find_files(inputs: list[str]) -> list[Path]:
    """Return the text files below the given paths, sorted.

    Raises:
        ValueError: a path does not exist, or nothing was found.
    """
    if not inputs:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [p for p in root.rglob("*.py") if "site-packages" not in p.parts]
    else:
        files = []
        for item in map(Path, inputs):
            if item.is_dir():
                files += [p for p in item.rglob("*") if p.is_file()]
            elif item.is_file():
                files.append(item)
            else:
                raise ValueError(f"--input {item} does not exist; name text files or directories")
    files = sorted(set(files))
    if not files:
        raise ValueError(f"--input {' '.join(inputs)} holds no files; name text files")
    return files


def read_documents(files: list[Path]) -> list[str]:
    """Return the files' texts; say which files are left out, as no UTF-8 text, empty or unreadable.

    Raises:
        ValueError: none is left.
    """
    documents = []
    left_out: dict[str, list[str]] = {}
    for path in tqdm(files, desc="reading", unit="file", disable=None):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            left_out.setdefault("not UTF-8 text", []).append(path.name)
            continue
        except OSError:
            left_out.setdefault("unreadable", []).append(path.name)
            continue
        if "\x00" in text:
            left_out.setdefault("not UTF-8 text", []).append(path.name)
        elif not text.strip():
            left_out.setdefault("empty", []).append(path.name)
        else:
            documents.append(text)
    for reason, names in sorted(left_out.items()):
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        print(f"left out {len(names)} of {len(files)} files, {reason}: {shown}", flush=True)
    if not documents:
        raise ValueError("none of the files is UTF-8 text; name text files with --input")
    return documents


def split(documents: list[str], share: float, seed: int) -> tuple[list[str], list[str]]:
    """Split by document into train and validation; each gets at least one.

    Raises:
        ValueError: there are fewer than two documents.
    """
    if len(documents) < 2:
        raise ValueError("one document cannot be split; name at least two files with --input")
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    count = min(max(1, round(share * len(documents))), len(documents) - 1)
    held_out = set(order[:count])
    train = [d for i, d in enumerate(documents) if i not in held_out]
    return train, [documents[i] for i in sorted(held_out)]


def train_tokenizer(documents: list[str], vocab_size: int, path: Path, seed: int) -> None:
    """Train a SentencePiece model on the training documents and write it."""
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    sentences, total = [], 0
    for index in order:
        text = documents[index]
        for start in range(0, len(text), SENTENCE_BYTES // 4):
            sentences.append(text[start : start + SENTENCE_BYTES // 4])
        total += len(text)
        if total > TOKENIZER_BYTES:
            break
    print(f"training a tokenizer of {vocab_size} pieces on {total / 1e6:.1f} MB", flush=True)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            # Not by its path, which would be kept in the model.
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=0.9995,
            # Keep source code as it is: no normalisation, white space is meaningful.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            split_by_unicode_script=True,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n"],
            num_threads=os.cpu_count() or 1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"the text is too small for --vocab-size {vocab_size} ({error}); lower it or name "
            "more files with --input"
        ) from error
    path.write_bytes(model.getvalue())


def write_dataset(
    documents: list[str], tokenizer: sentencepiece.SentencePieceProcessor, prefix: Path
) -> int:
    """Write one Megatron data set, an end-of-document token after each document.

    Returns:
        The number of tokens.
    """
    with warnings.catch_warnings():
        # Megatron and torch tell of packages and devices that writing files does not need.
        warnings.simplefilter("ignore")
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(
        f"{prefix}.bin", dtype=DType.optimal_dtype(tokenizer.get_piece_size())
    )
    total = 0
    for text in tqdm(documents, desc=f"writing {prefix.name}", unit="doc", disable=None):
        ids = [*tokenizer.encode(text), tokenizer.eos_id()]
        builder.add_item(torch.tensor(ids, dtype=torch.int64))
        builder.end_document()
        total += len(ids)
    builder.finalize(f"{prefix}.idx")
    return total


def fingerprint(files: list[Path], arguments: argparse.Namespace) -> str:
    """Return a digest of what the output depends on: files, sizes, times and options."""
    digest = hashlib.sha256()
    for path in files:
        status = path.stat()
        digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    options = (arguments.vocab_size, arguments.valid_share, arguments.seed)
    digest.update(repr(options).encode())
    return digest.hexdigest()


def identity(path: Path) -> list[Any]:
    """Return the size and digest of a file."""
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def is_complete(record: Path, mark: str) -> bool:
    """Return whether data are those of a fingerprint and as they were written; say why not."""
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
        made_of, written = found["fingerprint"], dict(found["files"])
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError):
        print(f"{record} cannot be read; the data are made anew", flush=True)
        return False
    if made_of != mark:
        return False
    for name, wanted in written.items():
        path = record.parent / name
        if not path.is_file():
            print(f"{path} is missing; the data are made anew", flush=True)
            return False
        if identity(path) != wanted:
            print(f"{path} is not as it was written; the data are made anew", flush=True)
            return False
    return True


def prepare(arguments: argparse.Namespace) -> None:
    """Make the data, or say that it is there already."""
    output = Path(arguments.output)
    files = find_files(arguments.input)
    mark = fingerprint(files, arguments)
    record = output / "prepared.json"
    if is_complete(record, mark):
        print(f"{output} is up to date")
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    # Of this run alone: another may prepare the same data at the same time.
    scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        train, valid = split(read_documents(files), arguments.valid_share, arguments.seed)
        train_tokenizer(train, arguments.vocab_size, scratch / "tokenizer.model", arguments.seed)
        tokenizer = sentencepiece.SentencePieceProcessor(
            model_file=str(scratch / "tokenizer.model")
        )
        rows = []
        for name, documents in (("train", train), ("valid", valid)):
            tokens = write_dataset(documents, tokenizer, scratch / f"{name}_text_document")
            characters = sum(map(len, documents))
            rows.append((name, len(documents), characters, tokens))
        summary = {
            "fingerprint": mark,
            "sets": rows,
            "vocab_size": arguments.vocab_size,
            "files": {path.name: identity(path) for path in sorted(scratch.iterdir())},
        }
        (scratch / record.name).write_text(json.dumps(summary))
        # Only files of ours are replaced; the directory may hold others.
        output.mkdir(exist_ok=True)
        record.unlink(missing_ok=True)
        for path in sorted(scratch.iterdir(), key=lambda p: p.name == record.name):
            os.replace(path, output / path.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    table = Table(title=f"Data in {output}")
    for heading in ("set", "documents", "characters", "tokens", "characters per token"):
        table.add_column(heading, justify="left" if heading == "set" else "right")
    for name, count, characters, tokens in rows:
        table.add_row(
            name, f"{count:,}", f"{characters:,}", f"{tokens:,}", f"{characters / tokens:.2f}"
        )
    Console().print(table)


def main(command: list[str] | None = None) -> int:
    """Parse the command line and prepare the data."""
    parser = parser_of("prepare", __doc__)
    parser.add_argument(
        "--input",
        nargs="*",
        default=[],
        metavar="PATH",
        help="text files or directories; default: the running Python's standard library sources",
    )
    parser.add_argument("--output", default="data", help="directory to write (default: data)")
    parser.add_argument("--vocab-size", type=int, default=8192, help="pieces (default: 8192)")
    parser.add_argument(
        "--valid-share", type=float, default=0.05, help="share of documents held out"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the split and the samples")
    arguments = parser.parse_args(command)
    if not 0 < arguments.valid_share < 1:
        parser.error(f"--valid-share must lie between 0 and 1, got {arguments.valid_share}")
    if arguments.vocab_size < 300:
        parser.error(
            f"--vocab-size must be at least 300 for 256 byte pieces, got {arguments.vocab_size}"
        )
    # A terminated run cleans up like an interrupted one.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        prepare(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"error: --output {arguments.output} cannot be written ({error}); name another one",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0
