"""``python -m megatron_maxscore.cpu SCRIPT ARGS``: run a stock Megatron script on CPU."""

from __future__ import annotations

import sys

from megatron_maxscore._run import check_script, exit_with_error, run_script
from megatron_maxscore.cpu import answer_arguments, enable_if_needed

USAGE = "usage: torchrun ... -m megatron_maxscore.cpu SCRIPT [ARGS...]"


def main(arguments: list[str] | None = None) -> None:
    """Enable CPU mode, then run the script as ``__main__``.

    Args:
        arguments: the script and its own arguments; None takes those of the process.
    """
    command = sys.argv[1:] if arguments is None else arguments
    if command and command[0] in ("-h", "--help"):
        print(
            f"{USAGE}\n\nRuns a Megatron training script on the CPU with gloo, without MaxScore."
            "\n\n    torchrun --nproc-per-node 2 -m megatron_maxscore.cpu pretrain_gpt.py ..."
        )
        return
    if not command:
        exit_with_error(f"no script was given; {USAGE}")
    check_script(command[0])
    enable_if_needed(forced=True)
    answer_arguments()
    run_script(command)


if __name__ == "__main__":
    main()
