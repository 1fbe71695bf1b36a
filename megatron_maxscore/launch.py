"""``torchrun ... -m megatron_maxscore.launch [--cpu] SCRIPT ARGS``: run a Megatron script with us.

The script is any Megatron training script, unmodified. It gains ``--moe-router-type`` and the
``--maxscore-*`` options; with ``--moe-router-type topk``, the default, it trains as without the
launcher. ``--cpu`` forces CPU mode, which is automatic where there is no CUDA device.
"""

from __future__ import annotations

import sys

from megatron_maxscore._run import exit_with_error, run_script
from megatron_maxscore.cpu import enable_if_needed

USAGE = "usage: torchrun ... -m megatron_maxscore.launch [--cpu] SCRIPT [ARGS...]"


def main() -> None:
    """Parse our own options, install the hooks, run the script."""
    arguments = sys.argv[1:]
    forced = False
    while arguments and arguments[0].startswith("-"):
        if arguments[0] == "--cpu":
            forced = True
        elif arguments[0] in ("-h", "--help"):
            print(USAGE + "\n\nThe script's own --help lists Megatron's and MaxScore's options.")
            return
        else:
            exit_with_error(f"unknown option {arguments[0]} before the script; {USAGE}")
        arguments = arguments[1:]
    if not arguments:
        exit_with_error(f"no script was given; {USAGE}")
    enable_if_needed(forced)
    # Imported late: it imports Megatron, which must find CPU mode installed.
    from megatron_maxscore.training import install

    install()
    run_script(arguments)


if __name__ == "__main__":
    main()
