"""Trained checkpoints in use: restore, score text, sample text, multiple-choice evaluation."""

from megatron_maxscore.inference.decoding import Decoder, sample
from megatron_maxscore.inference.restore import (
    NotFiniteError,
    TrainedModel,
    add_arguments,
    restore,
)

__all__ = ["Decoder", "NotFiniteError", "TrainedModel", "add_arguments", "restore", "sample"]
