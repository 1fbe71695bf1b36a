"""Build script; all metadata but the patches' place is in pyproject.toml."""

from glob import glob

from setuptools import setup

setup(data_files=[("share/megatron_maxscore/patches", sorted(glob("patches/*.patch")))])
