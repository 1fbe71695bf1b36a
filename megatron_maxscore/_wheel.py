"""What Megatron's wheel lacks beside its source tree."""

from __future__ import annotations

import importlib.util
from typing import Any

from megatron_maxscore._replacements import Replacements


def answer_dataset_helpers(replacements: Replacements) -> None:
    """Skip ``make`` for Megatron's index builder where it is already compiled.

    Megatron's wheel ships the builder compiled, without a makefile. CPU mode and the training hooks
    both call this function; the second call changes nothing.
    """
    from megatron.core.datasets import utils

    if hasattr(utils.compile_helpers, "only_if_missing"):
        return

    def make(original: Any) -> Any:
        def compile_helpers() -> None:
            if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
                original()

        compile_helpers.only_if_missing = True  # type: ignore[attr-defined]
        return compile_helpers

    replacements.wrap(utils, "compile_helpers", make)
