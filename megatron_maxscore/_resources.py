"""Files that ship in the package and live elsewhere in the repository.

The build copies them into ``megatron_maxscore/_shipped``; a checkout has them at their own place.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

_SHIPPED = "_shipped"
_ROOT = Path(__file__).resolve().parents[1]


def folder(name: str) -> Path:
    """Return the folder ``patches`` or ``examples``, with what of it ships.

    Raises:
        FileNotFoundError: the installation is incomplete.
    """
    for path in (Path(str(resources.files("megatron_maxscore"))) / _SHIPPED / name, _ROOT / name):
        if path.is_dir():
            return path
    raise FileNotFoundError(
        f"this installation of megatron_maxscore lacks its folder {name}; install it again"
    )
