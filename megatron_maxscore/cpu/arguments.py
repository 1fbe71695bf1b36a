"""Megatron's arguments on a machine without Transformer Engine."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import sys
from typing import Any

from megatron_maxscore._replacements import Replacements

# What Megatron needs to hear there; its defaults take kernels of Transformer Engine and Apex.
WITHOUT_TRANSFORMER_ENGINE = (
    "--transformer-impl local --no-persist-layer-norm --no-bias-swiglu-fusion --no-rope-fusion "
    "--no-masked-softmax-fusion --no-gradient-accumulation-fusion"
).split()


def answer_arguments(replacements: Replacements) -> None:
    """Make these flags the defaults of Megatron's parser, where Transformer Engine is missing.

    Imports ``megatron.training``, so it comes after whatever must be there before that.
    """
    if importlib.util.find_spec("transformer_engine") is not None:
        return
    from megatron.training import arguments

    replacements.wrap(arguments, "add_megatron_arguments", _with_defaults)


def _with_defaults(original: Any) -> Any:
    def add_megatron_arguments(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        result = original(parser, *args, **kwargs)
        known = parser._option_string_actions
        flags = iter(WITHOUT_TRANSFORMER_ENGINE)
        for flag in flags:
            # A flag that a release lacks has nothing to switch off.
            action = known.get(flag)
            value = next(flags) if flag == "--transformer-impl" else getattr(action, "const", None)
            if action is not None:
                parser.set_defaults(**{action.dest: value})
        _say_once()
        return result

    return add_megatron_arguments


@functools.cache
def _say_once() -> None:
    """Megatron makes its parser more than once."""
    if os.environ.get("RANK", "0") == "0":
        print(
            "megatron_maxscore: Transformer Engine is not installed, so CPU mode adds "
            + " ".join(WITHOUT_TRANSFORMER_ENGINE),
            file=sys.stderr,
            flush=True,
        )
