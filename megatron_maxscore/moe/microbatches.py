"""The number of the microbatch that Megatron's schedules are running.

Quotas turn with it (:mod:`quotas`). All ranks that share experts run the same schedule, so they
agree on it without communication. Replaced symbol: ``set_current_microbatch`` in
``megatron.core.pipeline_parallel.schedules``.
"""

from __future__ import annotations

from typing import Any

from megatron_maxscore._replacements import Replacements
from megatron_maxscore.moe.context import RUN

_replacements = Replacements("MaxScore microbatches")


def install() -> None:
    """Follow Megatron's schedules; a second call does nothing."""
    if not _replacements:
        from megatron.core.pipeline_parallel import schedules

        _replacements.wrap(schedules, "set_current_microbatch", _noting)


def uninstall() -> None:
    """Undo :func:`install`, for tests."""
    _replacements.undo()


def _noting(original: Any) -> Any:
    def set_current_microbatch(model: Any, microbatch_id: int) -> Any:
        RUN.microbatch = int(microbatch_id)
        return original(model, microbatch_id)

    return set_current_microbatch
