"""Run a user's training script as ``__main__`` and end every rank cleanly."""

from __future__ import annotations

import os
import runpy
import sys
import time
from typing import NoReturn

# How long other ranks give rank 0 to print before they exit: torchrun ends all workers as soon
# as the first one is gone, and would otherwise cut rank 0's message off.
_GRACE_SECONDS = 10.0


def is_rank_zero() -> bool:
    """Return whether this process is rank 0, by the launcher's environment variable."""
    return os.environ.get("RANK", "0") == "0"


def exit_with_error(message: str, code: int = 2, on_every_node: bool = False) -> NoReturn:
    """End this rank with one line on rank 0's standard error.

    Args:
        message: what was wrong, the value, and what mends it. Line breaks are folded.
        code: exit status of every rank.
        on_every_node: whether each node's first rank says it, for what is wrong on single nodes.

    Raises:
        SystemExit: always.
    """
    if is_rank_zero() or (on_every_node and os.environ.get("LOCAL_RANK", "0") == "0"):
        print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    else:
        time.sleep(_GRACE_SECONDS)
    raise SystemExit(code)


def check_script(script: str) -> None:
    """End this rank with one line if there is no such script."""
    if script.startswith("-"):
        exit_with_error(f"unknown option {script} before the script")
    if not os.path.isfile(script):
        exit_with_error(f"script {script!r} does not exist; give the path of a training script")


def run_script(arguments: list[str]) -> None:
    """Run ``arguments[0]`` as ``__main__`` with the rest as its command line.

    A ValueError or AssertionError that is raised before the process group exists is a mistake in
    the options and the same on every rank. It is printed as one line, and the exit status is 2.
    An error that all ranks raise together (:class:`CollectiveError`) is printed as one line too,
    with exit status 1. ``MAXSCORE_DEBUG=1`` shows the traceback instead.
    """
    import torch.distributed as dist

    from megatron_maxscore.errors import CollectiveError

    debug = bool(os.environ.get("MAXSCORE_DEBUG"))

    script = arguments[0]
    sys.argv = list(arguments)
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
    try:
        runpy.run_path(script, run_name="__main__")
    except (ValueError, AssertionError) as error:
        if debug or dist.is_initialized():
            raise
        exit_with_error(str(error) or f"{type(error).__name__} in {_where(error)}")
    except CollectiveError as error:
        if debug:
            raise
        if dist.is_initialized():
            dist.destroy_process_group()
        exit_with_error(str(error), code=1)
    # gloo aborts a process that exits with a live group.
    if dist.is_initialized():
        dist.destroy_process_group()


def _where(error: BaseException) -> str:
    frames = error.__traceback__
    while frames is not None and frames.tb_next is not None:
        frames = frames.tb_next
    if frames is None:
        return "an unknown place"
    return f"{frames.tb_frame.f_code.co_filename}:{frames.tb_lineno}"
