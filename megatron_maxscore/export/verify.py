"""Compare an exported model with Megatron's, before it gets its name."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Tokens that are compared, and by how much a logit may differ, in standard deviations of logits.
_SEQUENCES, _LENGTH = 4, 64
_TOLERANCE = 1e-3


def load_served(directory: str | Path, dtype: torch.dtype | str = "auto") -> Any:
    """Return the model of a directory, as transformers loads it on the CPU.

    Raises:
        ValueError: weights are missing or left over, or have other shapes.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    level = logging.getLogger("transformers").level
    transformers.utils.logging.set_verbosity_error()
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            str(directory), dtype=dtype, output_loading_info=True
        )
        model, report = loaded
    finally:
        transformers.utils.logging.set_verbosity(level or logging.WARNING)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            names = sorted(map(str, report[kind]))[:3]
            raise ValueError(f"{directory}: {kind.replace('_', ' ')}: {', '.join(names)}")
    return model.eval()


def verify(trained: Any, directory: Path) -> float:
    """Return by how much logits differ, relative to their standard deviation.

    Both models compute in float32; Megatron's is in float32 afterwards. A token whose k-th and next
    expert are nearly equal may choose differently, so the tenth of the tokens that differ most
    is left out.

    Args:
        trained: Megatron's model, with ``logits``.
        directory: of the exported one.

    Raises:
        ValueError: they differ by more than rounding.
    """
    trained.model.float()
    served = load_served(directory, torch.float32)
    length = min(_LENGTH, int(trained.args.seq_length))
    generator = torch.Generator().manual_seed(0)
    tokens_BS = torch.randint(served.config.vocab_size, (_SEQUENCES, length), generator=generator)
    ours: Tensor = trained.logits(tokens_BS).float().cpu()
    with torch.no_grad():
        theirs: Tensor = served(tokens_BS).logits.float()
    if ours.shape != theirs.shape:
        raise ValueError(f"the served model's logits are {theirs.shape}, Megatron's {ours.shape}")
    largest = (ours - theirs).abs().amax(-1).flatten()
    difference = float(largest.quantile(0.9) / ours.std())
    if not difference <= _TOLERANCE:
        raise ValueError(
            f"the exported model is not the trained one: logits differ by {difference:.1e} of "
            "their standard deviation; this is a fault of the export, nothing was written"
        )
    return difference
