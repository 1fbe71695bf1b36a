"""Build script; all metadata is in pyproject.toml.

Patches and the training script live at the top of the repository, where people look for them. The
build copies them into the package.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SHIPPED = ("patches/*.patch", "examples/pretrain_gpt.py")


class BuildWithShipped(build_py):
    """Copies :data:`SHIPPED` into the package that is built; an editable one reads the checkout."""

    def run(self) -> None:
        """Build, then copy."""
        super().run()
        if self.editable_mode:
            return
        for pattern in SHIPPED:
            for source in sorted(ROOT.glob(pattern)):
                place = Path(self.build_lib) / "megatron_maxscore" / "_shipped" / source.parent.name
                place.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, place)


setup(cmdclass={"build_py": BuildWithShipped})
