"""Megatron's index builder, which its wheel ships compiled."""

from __future__ import annotations

import importlib.util
from typing import Any

from megatron_maxscore import cpu
from megatron_maxscore._patches import PatchSet


def hook(patches: PatchSet) -> None:
    """Do not run make for what can be imported: the wheel has no makefile, so training would end.

    CPU mode, which may be on without our hooks, has done so already.
    """
    if not cpu.is_enabled():
        without_make(patches)


def without_make(patches: PatchSet) -> None:
    """Let ``compile_helpers`` do nothing where the index builder is there."""
    from megatron.core.datasets import utils

    def make(original: Any) -> Any:
        def compile_helpers() -> None:
            if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
                original()

        return compile_helpers

    patches.wrap(utils, "compile_helpers", make)
