"""The argument parser of a command."""

from __future__ import annotations

import argparse


def parser_of(command: str, description: str | None) -> argparse.ArgumentParser:
    """Return the parser of a command; its help shows the text as it is."""
    return argparse.ArgumentParser(
        prog=f"python -m megatron_maxscore {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
