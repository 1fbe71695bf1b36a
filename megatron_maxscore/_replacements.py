"""Replace attributes of other packages so that every replacement can be undone.

CPU mode and the hooks into Megatron both work by replacing single symbols. They share this
registry, so each replacement is applied once, keeps the original in ``__wrapped__``, and a symbol
that the installed Megatron lacks is reported by its full path.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_MISSING = object()


def path_of(owner: Any, attribute: str) -> str:
    """Return the dotted name of ``owner.attribute`` for messages."""
    name = getattr(owner, "__qualname__", None) or getattr(owner, "__name__", repr(owner))
    module = getattr(owner, "__module__", None)
    return f"{module}.{name}.{attribute}" if module else f"{name}.{attribute}"


class Replacements:
    """An ordered set of attribute replacements, applied one by one and undone all together."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._undo: list[Callable[[], None]] = []

    def __bool__(self) -> bool:
        return bool(self._undo)

    def set(self, owner: Any, attribute: str, value: Any) -> None:
        """Set ``owner.attribute = value``, remembering what the owner itself held before."""
        # An attribute found on a base class is not in vars(owner): undoing then deletes ours.
        before = vars(owner).get(attribute, _MISSING)
        if before is _MISSING:
            self._undo.append(lambda: delattr(owner, attribute))
        else:
            self._undo.append(lambda: setattr(owner, attribute, before))
        setattr(owner, attribute, value)

    def set_item(self, items: dict, key: Any, value: Any) -> None:
        """Set ``items[key] = value``, a key that is not there yet."""
        self._undo.append(lambda: items.pop(key))
        items[key] = value

    def wrap(self, owner: Any, attribute: str, make: Callable[[Any], Callable]) -> None:
        """Replace a callable by ``make(original)``.

        Raises:
            ImportError: the owner has no such attribute; names its path and these replacements.
        """
        original: Any = getattr(owner, attribute, _MISSING)
        if original is _MISSING:
            raise ImportError(
                f"{self.name}: {path_of(owner, attribute)} does not exist in the installed "
                "packages; install a supported megatron-core release (0.17 to 0.20)"
            )
        wrapper = make(original)
        functools.update_wrapper(wrapper, original)
        self.set(owner, attribute, wrapper)

    def undo(self) -> None:
        """Put everything back, newest first."""
        while self._undo:
            self._undo.pop()()
