"""Errors that concern all ranks."""


class CollectiveError(RuntimeError):
    """Raised on every rank together, with the same message: no rank waits for another."""
