"""Trained checkpoints in use: restore, score text, sample text, multiple-choice evaluation."""

from megatron_maxscore.inference.decoding import Decoder, sample
from megatron_maxscore.inference.restore import TrainedModel, restore

__all__ = ["Decoder", "TrainedModel", "restore", "sample"]
