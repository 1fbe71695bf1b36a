"""Validation reports the loss under both routing rules, on the same samples, and bad scores."""

from __future__ import annotations

import inspect
from typing import Any

from megatron_maxscore._replacements import Replacements
from megatron_maxscore._run import is_rank_zero
from megatron_maxscore.moe.evaluation import evaluation_routing
from megatron_maxscore.moe.step import evaluated_bad_tokens, maxscore_routers


def hook(replacements: Replacements) -> None:
    """Wrap the function that evaluates and prints."""
    from megatron.training import training

    replacements.wrap(training, "evaluate_and_print_results", _under_both_rules)


class _Recorder:
    """Passes a data iterator's samples on and keeps them."""

    def __init__(self, iterator: Any) -> None:
        self._iterator = iterator
        self.samples: list[Any] = []

    def __iter__(self) -> _Recorder:
        return self

    def __next__(self) -> Any:
        sample = next(self._iterator)
        # A script may change the batch in place.
        self.samples.append(dict(sample) if isinstance(sample, dict) else sample)
        return sample


def _recording(iterators: Any) -> Any:
    if isinstance(iterators, list):
        return [_recording(item) for item in iterators]
    return None if iterators is None else _Recorder(iterators)


def _replaying(recorders: Any) -> Any:
    if isinstance(recorders, list):
        return [_replaying(item) for item in recorders]
    return None if recorders is None else iter(recorders.samples)


def _under_both_rules(original: Any) -> Any:
    signature = inspect.signature(original)

    def evaluate_and_print_results(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args

        arguments = get_args()
        if arguments.moe_router_type != "maxscore":
            return original(*args, **kwargs)
        call = signature.bind(*args, **kwargs).arguments
        if arguments.maxscore_eval_routing != "both":
            result = original(**call)
            _report_bad_scores(call["model"], call["prefix"])
            return result
        prefix, recorders = call["prefix"], _recording(call["data_iterator"])
        call["data_iterator"] = recorders
        call["prefix"] = f"{prefix} (price routing)"
        with evaluation_routing("price"):
            original(**call)
        consumed = arguments.consumed_valid_samples
        call["data_iterator"] = _replaying(recorders)
        call["prefix"] = f"{prefix} (flow routing)"
        # TensorBoard and W&B have one curve of the validation loss: it is the loss by prices.
        call["write_to_tensorboard"] = False
        with evaluation_routing("flow"):
            original(**call)
        arguments.consumed_valid_samples = consumed
        _report_bad_scores(call["model"], prefix)
        return None

    return evaluate_and_print_results


def _report_bad_scores(model: Any, prefix: str) -> None:
    """Say how many tokens had router scores that were not finite; one all-reduce of an int64."""
    count = evaluated_bad_tokens(maxscore_routers(model))
    if count and is_rank_zero():
        print(
            f"megatron_maxscore: router scores were NaN or infinite for {count} tokens at "
            f"{prefix}, counted in every layer and rule; the loss there is not a number",
            flush=True,
        )
