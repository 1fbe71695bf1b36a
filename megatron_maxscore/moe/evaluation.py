"""Which rule routes tokens outside training: prices (causal) or the flow (as in training)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

_forced: Literal["price", "flow"] | None = None


def uses_flow(eval_routing: str) -> bool:
    """Return whether a module in evaluation mode routes by the flow now."""
    return (_forced or eval_routing) == "flow"


@contextmanager
def evaluation_routing(rule: Literal["price", "flow"]) -> Iterator[None]:
    """Make every MaxScore router in evaluation mode use ``rule`` inside the ``with`` block."""
    global _forced
    before, _forced = _forced, rule
    try:
        yield
    finally:
        _forced = before
