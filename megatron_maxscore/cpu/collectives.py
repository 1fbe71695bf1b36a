"""Process groups on gloo: the backend's name, and what gloo does not take."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_maxscore._patches import PatchSet


def _gloo(backend: Any) -> Any:
    return "gloo" if isinstance(backend, str) and "nccl" in backend else backend


def answer_init(patches: PatchSet) -> None:
    """``init_process_group('nccl')`` makes a gloo group on no device."""

    def make(original: Any) -> Any:
        def init_process_group(backend: Any = None, *args: Any, **kwargs: Any) -> Any:
            kwargs.pop("device_id", None)
            return original("gloo" if backend is None else _gloo(backend), *args, **kwargs)

        return init_process_group

    patches.wrap(dist, "init_process_group", make)


def answer_new_group(patches: PatchSet) -> None:
    """Groups of the same ranks share one gloo communicator.

    Megatron makes several hundred groups over few distinct rank lists. Each gloo communicator has
    threads of its own, which otherwise number over a thousand per process.
    """
    groups: dict[tuple[int, ...], Any] = {}

    def make(original: Any) -> Any:
        def new_group(ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
            key = tuple(range(dist.get_world_size())) if ranks is None else tuple(sorted(ranks))
            if key not in groups:
                timeout = kwargs.get("timeout")
                groups[key] = original(list(key), timeout=timeout, backend="gloo")
            return groups[key]

        return new_group

    def make_destroy(original: Any) -> Any:
        def destroy_process_group(group: Any = None) -> None:
            # A shared communicator goes when the world does.
            if group is None:
                groups.clear()
                original()

        return destroy_process_group

    patches.wrap(dist, "new_group", make)
    patches.wrap(dist, "destroy_process_group", make_destroy)


def answer_barrier(patches: PatchSet) -> None:
    """Barriers take no device."""

    def make(original: Any) -> Any:
        def barrier(*args: Any, **kwargs: Any) -> Any:
            kwargs.pop("device_ids", None)
            return original(*args, **kwargs)

        return barrier

    patches.wrap(dist, "barrier", make)


def answer_splits(patches: PatchSet) -> None:
    """``all_to_all_single`` takes split sizes as lists; Megatron passes CPU tensors."""

    def as_list(splits: Any) -> Any:
        return splits.tolist() if hasattr(splits, "tolist") else splits

    def make(original: Any) -> Any:
        def all_to_all_single(
            output: torch.Tensor,
            input: torch.Tensor,
            output_split_sizes: Any = None,
            input_split_sizes: Any = None,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            return original(
                output,
                input,
                as_list(output_split_sizes),
                as_list(input_split_sizes),
                *args,
                **kwargs,
            )

        return all_to_all_single

    patches.wrap(dist, "all_to_all_single", make)


ANSWERS = (answer_init, answer_new_group, answer_barrier, answer_splits)
