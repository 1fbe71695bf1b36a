"""Files that commands write: checked before the work begins, and whole when they appear."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def check_output(parser: argparse.ArgumentParser, path: Path) -> None:
    """End the command with one line if a file cannot be written."""
    above = path.absolute().parent
    if path.is_dir():
        parser.error(f"--output {path} is a directory; name a file in it")
    if not above.is_dir():
        parser.error(f"--output {path}: {above} is no directory; make it, or name another file")
    if not os.access(path if path.exists() else above, os.W_OK):
        parser.error(f"--output {path}: no permission to write there; name another file")


def write_whole(path: Path, text: str) -> None:
    """Write a file; it appears, or is replaced, when it is complete."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
