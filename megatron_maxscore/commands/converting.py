"""What the commands that convert models have in common."""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Callable

import torch.distributed as dist

_SIZE = re.compile(r"[1-9]\d*(?:KB|MB|GB)")


def size(text: str) -> str:
    """Return the size of a file, for argparse."""
    if not _SIZE.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text} is no size; write it as 500MB or 5GB")
    return text


def carry_out(convert: Callable[[], None]) -> int:
    """Convert a model; return the exit status, after one line if it cannot be done.

    A terminated run cleans up like an interrupted one.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        convert()
    except ImportError as error:
        print(f"error: {error}; pip install 'megatron-maxscore[export]'", file=sys.stderr)
    except (ValueError, OSError, RuntimeError, AssertionError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {said}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    else:
        return 0
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 1
