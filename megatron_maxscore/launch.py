"""``torchrun ... -m megatron_maxscore.launch [--cpu] SCRIPT ARGS``: run a Megatron script with us.

The script is any Megatron training script, unmodified. It gains ``--moe-router-type`` and the
``--maxscore-*`` options; with ``--moe-router-type topk``, the default, it trains as without the
launcher. ``--cpu`` forces CPU mode. Without the flag, CPU mode is chosen if there is no CUDA device
and nothing in the environment or the command says that there should be one. ``pretrain_gpt`` names
a script that comes with the package.
"""

from __future__ import annotations

import os
import sys

from megatron_maxscore import _resources
from megatron_maxscore._run import check_script, exit_with_error, run_script
from megatron_maxscore.cpu import NoDeviceError, answer_arguments, enable_if_needed

# A script that comes with the package, for Megatron's wheel, which has none.
SHIPPED = "pretrain_gpt"
USAGE = "usage: torchrun ... -m megatron_maxscore.launch [--cpu] SCRIPT [ARGS...]"


def main(command: list[str] | None = None) -> None:
    """Parse our own options, install the hooks, run the script.

    Args:
        command: options, script and its arguments; None takes those of the process.
    """
    arguments = sys.argv[1:] if command is None else command
    forced = False
    while arguments and arguments[0].startswith("-"):
        if arguments[0] == "--cpu":
            forced = True
        elif arguments[0] in ("-h", "--help"):
            print(
                f"{USAGE}\n\n"
                f"SCRIPT is a Megatron training script, or {SHIPPED} for one that comes with the "
                "package (megatron-core 0.19).\nIts own --help lists Megatron's and MaxScore's "
                "options. --cpu trains on the CPU.\n\n"
                "    torchrun --nproc-per-node 8 -m megatron_maxscore launch pretrain_gpt.py ... "
                "--moe-router-type maxscore"
            )
            return
        else:
            exit_with_error(f"unknown option {arguments[0]} before the script; {USAGE}")
        arguments = arguments[1:]
    if not arguments:
        exit_with_error(f"no script was given; {USAGE}")
    if arguments[0] == SHIPPED and not os.path.exists(SHIPPED):
        arguments = [str(_resources.folder("examples") / f"{SHIPPED}.py"), *arguments[1:]]
    check_script(arguments[0])
    try:
        enable_if_needed(forced)
    except NoDeviceError as error:
        exit_with_error(str(error), on_every_node=True)
    # Imported late: it imports Megatron, which must find CPU mode installed.
    from megatron_maxscore.training import install

    install()
    answer_arguments()
    run_script(arguments)


if __name__ == "__main__":
    main()
