"""How kernels are compiled: once per signature, without the interpreter lock, kept on disk.

Numba keeps them beside the package, or in the user's cache directory where the package cannot be
written, or in the directory that ``NUMBA_CACHE_DIR`` names. Where none of these can be written (a
container without a home), they go to a directory of the user's own among the temporary files.
"""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from pathlib import Path
from typing import Any

import numba
from numba import njit
from numba.core import event


def jit(function: Any) -> Any:
    """Compile a kernel at its first call; the result is kept where numba finds a writable place."""
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no such place
        pass
    directory = _temporary_directory()
    if directory is None:
        return njit(**options)(function)
    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(directory)
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:
        return njit(**options)(function)
    finally:
        numba.config.CACHE_DIR = before


def _temporary_directory() -> Path | None:
    """Return a directory that only this user can write, None if there is none.

    What numba keeps is unpickled when it is read, so others must not be able to write it.
    """
    path = Path(tempfile.gettempdir()) / f"megatron_maxscore-{os.getuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
    except OSError:
        return None
    is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
    return path if is_own and not status.st_mode & 0o022 else None


class _Announcer(event.Listener):
    """Says once per process that kernels are being compiled, which takes a while in silence."""

    def __init__(self) -> None:
        self._has_spoken = False

    def on_start(self, event: Any) -> None:
        """Print a line when the first kernel of ours is not found in the cache."""
        module = event.data["dispatcher"].py_func.__module__
        if self._has_spoken or not module.startswith("megatron_maxscore."):
            return
        self._has_spoken = True
        if os.environ.get("RANK", "0") == "0":
            print(
                "megatron_maxscore: compiling the solver's kernels, which takes about 20 s, once "
                "for each kind of solve and machine (python -m megatron_maxscore compile does it "
                "ahead of time)",
                file=sys.stderr,
                flush=True,
            )

    def on_end(self, event: Any) -> None:
        """Do nothing."""


event.register("numba:compile", _Announcer())
