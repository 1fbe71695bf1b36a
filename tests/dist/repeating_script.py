"""``exact_losses.py`` whose steps are run again, and which notes the routers' prices.

RERUN=3,5: in these iterations Megatron's rerun state machine finds the loss unexpected, not
fatally, and runs the step again. RETRY=2,4: forward and backward passes are run twice before the
optimizer step, as the runner of the paged stash does after an overflow. SCORED=1: a pass without
gradients in training mode comes before each step. Whether the optimizer skipped its step, and the
prices after it, go to $EXACT_LOSSES.prices.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from exact_losses import pretrain_gpt, training
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.training import get_args

from megatron_maxscore.moe.step import maxscore_routers


def _iterations(name):
    return {int(text) for text in os.environ.get(name, "").split(",") if text}


RERUN, RETRY = _iterations("RERUN"), _iterations("RETRY")
_loss_func, _train_step = pretrain_gpt.loss_func, training.train_step
_schedule = training.get_forward_backward_func


def loss_func(loss_mask, output):
    """Let the state machine judge the loss."""
    result = _loss_func(loss_mask, output)
    current = get_args().curr_iteration + 1
    get_rerun_state_machine().validate_result(
        result=result[0].detach().clone(),
        rejection_func=lambda loss: current in RERUN,
        message="unexpected loss",
        fatal=False,
    )
    return result


def get_forward_backward_func(*args, **kwargs):
    """Return a schedule that runs twice where it has to."""
    schedule = _schedule(*args, **kwargs)

    def twice(*, data_iterator, model, num_microbatches, forward_only=False, **others):
        common = dict(
            model=model, num_microbatches=num_microbatches, forward_only=forward_only, **others
        )
        if forward_only or get_args().curr_iteration + 1 not in RETRY:
            return schedule(data_iterator=data_iterator, **common)
        batches = [next(data_iterator) for _ in range(num_microbatches)]
        schedule(data_iterator=iter(batches), **common)
        for chunk in model:
            chunk.zero_grad_buffer()
        return schedule(data_iterator=iter(batches), **common)

    return twice


def train_step(*args, **kwargs):
    """Note the prices after the step."""
    model = args[2] if len(args) > 2 else kwargs["model"]
    if os.environ.get("SCORED"):
        tokens = torch.arange(64).remainder(127).expand(2, -1)
        with torch.no_grad():
            model[0](tokens, torch.arange(64).expand(2, -1), None, labels=tokens)
    result = _train_step(*args, **kwargs)
    if int(os.environ["RANK"]) == 0:
        prices = [router.expert_prices.tolist() for router in maxscore_routers(model)]
        with open(os.environ["EXACT_LOSSES"] + ".prices", "a") as file:
            file.write(json.dumps({"skipped": bool(result[1]), "prices": prices}) + "\n")
    return result


pretrain_gpt.loss_func = loss_func
training.train_step = train_step
training.get_forward_backward_func = get_forward_backward_func

if __name__ == "__main__":
    pretrain_gpt.main()
