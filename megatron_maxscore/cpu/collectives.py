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


def answer_uneven(patches: PatchSet) -> None:
    """``all_gather`` and ``reduce_scatter`` of lists with unequal sizes, which gloo lacks.

    Both become one ``all_to_all_single`` with unequal splits along the first dimension. Sums are
    taken in rank order.
    """

    def sizes(tensors: list[torch.Tensor]) -> list[int]:
        return [tensor.shape[0] for tensor in tensors]

    def make_gather(original: Any) -> Any:
        def all_gather(
            outputs: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, **kwargs: Any
        ) -> Any:
            if len({t.shape for t in outputs}) == 1:
                return original(outputs, tensor, group=group, **kwargs)
            received = tensor.new_empty((sum(sizes(outputs)), *tensor.shape[1:]))
            sent = torch.cat([tensor] * len(outputs))
            own = [tensor.shape[0]] * len(outputs)
            dist.all_to_all_single(received, sent, sizes(outputs), own, group=group)
            for output, part in zip(outputs, received.split(sizes(outputs)), strict=True):
                output.copy_(part)
            return None

        return all_gather

    def make_scatter(original: Any) -> Any:
        def reduce_scatter(
            output: torch.Tensor,
            inputs: list[torch.Tensor],
            op: Any = dist.ReduceOp.SUM,
            group: Any = None,
            **kwargs: Any,
        ) -> Any:
            if len({t.shape for t in inputs}) == 1 or op != dist.ReduceOp.SUM:
                return original(output, inputs, op=op, group=group, **kwargs)
            received = output.new_empty((len(inputs) * output.shape[0], *output.shape[1:]))
            own = [output.shape[0]] * len(inputs)
            dist.all_to_all_single(received, torch.cat(inputs), own, sizes(inputs), group=group)
            output.copy_(received.reshape(len(inputs), *output.shape).sum(0))
            return None

        return reduce_scatter

    patches.wrap(dist, "all_gather", make_gather)
    patches.wrap(dist, "reduce_scatter", make_scatter)


ANSWERS = (answer_init, answer_new_group, answer_barrier, answer_splits, answer_uneven)
