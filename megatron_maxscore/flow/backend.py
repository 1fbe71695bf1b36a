"""Which implementation of the row kernels runs: numba's if it is installed, else torch's."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from typing import Any

ENVIRONMENT = "MAXSCORE_SOLVER"
_MODULES = {
    "numba": "megatron_maxscore.flow.fused",
    "torch": "megatron_maxscore.flow.plain",
}


def backend() -> Any:
    """Return :mod:`fused` or :mod:`plain`; both make the same decisions.

    ``MAXSCORE_SOLVER=torch`` or ``=numba`` names one.

    Raises:
        ValueError: the variable names another, or numba is asked for and missing.
    """
    return _load(os.environ.get(ENVIRONMENT, ""))


def describe() -> str:
    """Return which implementation runs, and why if it is not the fast one; loads it.

    Raises:
        ValueError: as for :func:`backend`.
    """
    if backend().__name__ == _MODULES["numba"]:
        return "numba"
    if os.environ.get(ENVIRONMENT):
        return f"torch and numpy, several times slower than numba, because {ENVIRONMENT}=torch"
    return "torch and numpy, several times slower than numba, which cannot be imported"


@functools.cache
def _load(name: str) -> Any:
    if not name:
        try:
            return importlib.import_module(_MODULES["numba"])
        except ImportError as error:
            if os.environ.get("RANK", "0") == "0":
                print(
                    "megatron_maxscore: the solver runs with torch and numpy, several times slower "
                    f"than with numba, which cannot be imported ({error}); pip install numba",
                    file=sys.stderr,
                    flush=True,
                )
            return importlib.import_module(_MODULES["torch"])
    if name not in _MODULES:
        raise ValueError(f"{ENVIRONMENT} must be numba or torch, got {name!r}")
    try:
        return importlib.import_module(_MODULES[name])
    except ImportError as error:
        raise ValueError(
            f"{ENVIRONMENT}={name}, but numba cannot be imported ({error}); pip install numba, or "
            f"set {ENVIRONMENT}=torch"
        ) from error
