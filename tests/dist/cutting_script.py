"""``exact_losses.py`` whose ranks cut their batches to lengths that differ (LENGTHS), or repeat
their sequences (COPIES): one number for each rank, moving on with every microbatch.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))


import torch
from exact_losses import pretrain_gpt

_rank = int(os.environ["RANK"])
_lengths = [int(text) for text in os.environ["LENGTHS"].split(",")]
_copies = [int(text) for text in os.environ.get("COPIES", "1").split(",")]
_calls = 0
_get_batch = pretrain_gpt.get_batch


def _cut(value, length, copies):
    if not isinstance(value, torch.Tensor):
        return value
    if value.dim() == 4:
        return value[..., :length, :length]
    return value[:, :length].repeat(copies, 1)


def get_batch(*args, **kwargs):
    """Cut what the original returns."""
    global _calls
    length = _lengths[(_rank + _calls) % len(_lengths)]
    copies = _copies[_rank % len(_copies)]
    _calls += 1
    batch = _get_batch(*args, **kwargs)
    if isinstance(batch, dict):
        return {name: _cut(value, length, copies) for name, value in batch.items()}
    return tuple(_cut(value, length, copies) for value in batch)


pretrain_gpt.get_batch = get_batch

if __name__ == "__main__":
    pretrain_gpt.main()
