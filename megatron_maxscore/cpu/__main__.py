"""``python -m megatron_maxscore.cpu SCRIPT ARGS``: run a stock Megatron script on CPU."""

from __future__ import annotations

import sys

from megatron_maxscore._run import run_script
from megatron_maxscore.cpu import enable_if_needed


def main() -> None:
    """Enable CPU mode, then run the script as ``__main__``."""
    if len(sys.argv) < 2:
        raise SystemExit("usage: torchrun ... -m megatron_maxscore.cpu SCRIPT [ARGS...]")
    enable_if_needed(forced=True)
    run_script(sys.argv[1:])


if __name__ == "__main__":
    main()
