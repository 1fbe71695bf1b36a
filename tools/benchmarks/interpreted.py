"""Triton's interpreter, made faster: by itself it patches the language anew in every function."""

from __future__ import annotations

import inspect
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_original = interpreter._patch_lang
# What is patched while a kernel runs, by the modules that its functions see.
_scopes: dict[tuple[bool, bool], Any] = {}


class _All:
    """Restores everything when the kernel has ended."""

    def restore(self) -> None:
        while _scopes:
            _scopes.popitem()[1].restore()


def _patch(fn: Any) -> _All:
    seen = [value for value in fn.__globals__.values() if inspect.ismodule(value)]
    modules = (tl in seen, tl.core in seen)
    if modules not in _scopes:
        _scopes[modules] = _original(fn)
    return _All()


def install() -> None:
    """Patch the language once for each launch."""
    interpreter._patch_lang = _patch
