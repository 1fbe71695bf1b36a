"""Trained models as Hugging Face directories, and back.

Price routing adds a bias to the scores when experts are chosen, and leaves the gates alone. Several
architectures of transformers compute the same. A format (:mod:`formats`) says which models it can
hold, and what its weights are called; there is one file for each.
"""

from megatron_maxscore.export.choice import FORMATS, choose, refusals
from megatron_maxscore.export.formats import Format

__all__ = ["FORMATS", "Format", "choose", "refusals"]
