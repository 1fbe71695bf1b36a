"""Distributed checkpoints: those of stock runs lack expert prices, which then start at zero."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_maxscore._patches import PatchSet
from megatron_maxscore._run import is_rank_zero
from megatron_maxscore.moe.router import PRICES_NAME


def hook(patches: PatchSet) -> None:
    """Wrap the function that loads a distributed checkpoint."""
    from megatron.core import dist_checkpointing

    patches.wrap(dist_checkpointing, "load", _without_absent_prices)


def _price_entries(state: Any) -> Iterator[tuple[dict, str, Any]]:
    """Yield (containing dict, key, sharded tensor) of every price buffer in a nested state."""
    for key, value in list(state.items()) if isinstance(state, dict) else ():
        if isinstance(value, dict):
            yield from _price_entries(value)
        elif str(getattr(value, "key", "")).endswith(f".{PRICES_NAME}"):
            yield state, key, value


def _without_absent_prices(original: Any) -> Any:
    def load(sharded_state_dict: Any, checkpoint_dir: Any, *args: Any, **kwargs: Any) -> Any:
        from megatron.core import dist_checkpointing

        entries = list(_price_entries(sharded_state_dict))
        if entries:
            present = dist_checkpointing.load_tensors_metadata(str(checkpoint_dir)).keys()
            absent = [(owner, key) for owner, key, value in entries if value.key not in present]
            for owner, key in absent:
                # The router fills what is missing with zeros when the state reaches it.
                del owner[key]
            if absent and is_rank_zero():
                print(
                    f"megatron_maxscore: {checkpoint_dir} has no expert prices; they start at zero",
                    flush=True,
                )
        return original(sharded_state_dict, checkpoint_dir, *args, **kwargs)

    return load
