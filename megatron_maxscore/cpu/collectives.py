"""Process groups on gloo: the backend's name, and what gloo does not take."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.distributed as dist

from megatron_maxscore._replacements import Replacements


def _gloo(backend: Any) -> Any:
    return "gloo" if isinstance(backend, str) and "nccl" in backend else backend


def answer_init(replacements: Replacements) -> None:
    """``init_process_group('nccl')`` makes a gloo group on no device."""

    def make(original: Any) -> Any:
        signature = inspect.signature(original)

        def init_process_group(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            given.pop("device_id", None)
            backend = given.pop("backend", None)
            return original("gloo" if backend is None else _gloo(backend), **given)

        return init_process_group

    replacements.wrap(dist, "init_process_group", make)


def answer_new_group(replacements: Replacements) -> None:
    """Groups of the same ranks share one gloo communicator.

    Megatron makes several hundred groups over few distinct rank lists. Each gloo communicator has
    threads of its own, which otherwise number over a thousand per process.
    """
    groups: dict[tuple[int, ...], Any] = {}

    def make(original: Any) -> Any:
        signature = inspect.signature(original)

        def new_group(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            ranks = given.get("ranks")
            key = tuple(range(dist.get_world_size())) if ranks is None else tuple(sorted(ranks))
            if key not in groups:
                timeout = given.get("timeout")
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

    replacements.wrap(dist, "new_group", make)
    replacements.wrap(dist, "destroy_process_group", make_destroy)


def answer_barrier(replacements: Replacements) -> None:
    """Barriers take no device."""

    def make(original: Any) -> Any:
        signature = inspect.signature(original)

        def barrier(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            given.pop("device_ids", None)
            return original(**given)

        return barrier

    replacements.wrap(dist, "barrier", make)


def answer_splits(replacements: Replacements) -> None:
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

    replacements.wrap(dist, "all_to_all_single", make)


def answer_uneven(replacements: Replacements) -> None:
    """``all_gather`` and ``reduce_scatter`` of lists with unequal sizes, which gloo lacks.

    Both become one ``all_to_all_single`` with unequal splits along the first dimension. Sums are
    taken in rank order.
    """

    def sizes(tensors: list[torch.Tensor]) -> list[int]:
        return [tensor.shape[0] for tensor in tensors]

    def make_gather(original: Any) -> Any:
        def all_gather(
            tensor_list: list[torch.Tensor],
            tensor: torch.Tensor,
            group: Any = None,
            async_op: bool = False,
        ) -> Any:
            if len({t.shape for t in tensor_list}) == 1:
                return original(tensor_list, tensor, group=group, async_op=async_op)
            received = tensor.new_empty((sum(sizes(tensor_list)), *tensor.shape[1:]))
            sent = torch.cat([tensor] * len(tensor_list))
            own = [tensor.shape[0]] * len(tensor_list)
            dist.all_to_all_single(received, sent, sizes(tensor_list), own, group=group)
            for output, part in zip(tensor_list, received.split(sizes(tensor_list)), strict=True):
                output.copy_(part)
            return _Done(tensor_list) if async_op else None

        return all_gather

    def make_scatter(original: Any) -> Any:
        def reduce_scatter(
            output: torch.Tensor,
            input_list: list[torch.Tensor],
            op: Any = dist.ReduceOp.SUM,
            group: Any = None,
            async_op: bool = False,
        ) -> Any:
            if len({t.shape for t in input_list}) == 1 or op != dist.ReduceOp.SUM:
                return original(output, input_list, op=op, group=group, async_op=async_op)
            ranks = len(input_list)
            received = output.new_empty((ranks * output.shape[0], *output.shape[1:]))
            own = [output.shape[0]] * ranks
            sent = torch.cat(input_list)
            dist.all_to_all_single(received, sent, own, sizes(input_list), group=group)
            output.copy_(received.reshape(ranks, *output.shape).sum(0))
            return _Done([output]) if async_op else None

        return reduce_scatter

    replacements.wrap(dist, "all_gather", make_gather)
    replacements.wrap(dist, "reduce_scatter", make_scatter)


class _Done:
    """A collective that was asked for with ``async_op`` and is done."""

    def __init__(self, result: list[torch.Tensor]) -> None:
        self._result = result

    def wait(self, timeout: Any = None) -> bool:
        """Return at once."""
        return True

    def is_completed(self) -> bool:
        """Return that it is done."""
        return True

    def is_success(self) -> bool:
        """Return that it has not failed."""
        return True

    def result(self) -> list[torch.Tensor]:
        """Return the output tensors."""
        return self._result

    def get_future(self) -> torch.futures.Future:
        """Return a future that is done."""
        future: torch.futures.Future = torch.futures.Future()
        future.set_result(self._result)
        return future


ANSWERS = (answer_init, answer_new_group, answer_barrier, answer_splits, answer_uneven)
