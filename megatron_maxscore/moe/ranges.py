"""NVTX ranges around the parts of a routing call, for Nsight Systems.

They use Megatron's functions, so the flags that turn on Megatron's ranges (``--nvtx-ranges``, with
``--profile``) turn on these too. If they are off, a range costs one comparison.
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
