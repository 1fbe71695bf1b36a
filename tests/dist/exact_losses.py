"""``examples/pretrain_gpt.py`` that also writes every global batch's training loss exactly.

With BAD_RANK and BAD_ITERATION set, that rank's first router meets NaN in that iteration.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import pretrain_gpt
import torch
from megatron.training import get_args, training

_train_step = training.train_step


def _recording_step(*args, **kwargs):
    result = _train_step(*args, **kwargs)
    # The loss is reduced over data-parallel ranks, and the last pipeline stage has it.
    is_last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    for loss in result[0].values() if is_last else ():
        with open(os.environ["EXACT_LOSSES"], "a") as file:
            file.write(float(loss).hex() + "\n")
    return result


training.train_step = _recording_step

if "BAD_RANK" in os.environ:
    from megatron.core.transformer.moe.router import Router

    _gating = Router.gating

    def _bad_gating(self, hidden):
        logits = _gating(self, hidden)
        due = get_args().curr_iteration + 1 == int(os.environ["BAD_ITERATION"])
        if due and self.training and os.environ["RANK"] == os.environ["BAD_RANK"]:
            logits = torch.cat([torch.full_like(logits[:1], float("nan")), logits[1:]])
        return logits

    Router.gating = _bad_gating

if __name__ == "__main__":
    pretrain_gpt.main()
