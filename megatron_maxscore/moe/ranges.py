"""NVTX ranges around the parts of a routing call, for Nsight Systems.

They are Megatron's own, so they are there where Megatron's are (``--nvtx-ranges``, with
``--profile``), and cost a comparison elsewhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from megatron.core.utils import nvtx_range_pop, nvtx_range_push


@contextlib.contextmanager
def nvtx(part: str) -> Iterator[None]:
    """Name a part of a routing call: scores, solve, gates or dispatch."""
    message = f"maxscore {part}"
    nvtx_range_push(message)
    try:
        yield
    finally:
        nvtx_range_pop(message)
