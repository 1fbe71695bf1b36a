"""The CUDA generator is the CPU's default generator."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import dataloader

from megatron_maxscore._replacements import Replacements


def answer_generator(replacements: Replacements) -> None:
    """Seeding, reading and setting the CUDA generator's state."""

    def seed(value: int) -> None:
        torch.default_generator.manual_seed(int(value))

    def get_state(device: Any = "cuda") -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, device: Any = "cuda") -> None:
        torch.set_rng_state(state)

    for owner in (torch.cuda, torch.cuda.random):
        replacements.set(owner, "manual_seed", seed)
        replacements.set(owner, "manual_seed_all", seed)
        replacements.set(owner, "get_rng_state", get_state)
        replacements.set(owner, "set_rng_state", set_state)
    replacements.set(torch.cuda, "default_generators", (torch.default_generator,))


_Generator = torch.Generator


class _AnyGenerator(type(_Generator)):  # type: ignore[misc]
    """Makes generators that were there before instances of :class:`Generator` too."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, _Generator)


class Generator(_Generator, metaclass=_AnyGenerator):
    """A generator on the CPU, whatever device is asked for."""

    def __new__(cls, device: Any = None) -> Generator:
        """Make one, of the default seed."""
        generator: Generator = _Generator.__new__(cls, "cpu")  # type: ignore[call-arg]
        return generator


def answer_generator_class(replacements: Replacements) -> None:
    """``torch.Generator(device="cuda")`` makes one on the CPU."""
    replacements.set(torch, "Generator", Generator)


def answer_tracker(replacements: Replacements) -> None:
    """Megatron's RNG tracker binds the CUDA functions by name when it is imported."""
    from megatron.core.tensor_parallel import random

    def get_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> Any:
        return torch.get_rng_state()

    def set_state(new_state: Any, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    replacements.set(random, "_get_cuda_rng_state", get_state)
    replacements.set(random, "_set_cuda_rng_state", set_state)
    replacements.set(random, "_lazy_init", lambda: None)
    replacements.set(random, "_lazy_call", lambda function, **kwargs: function())


def answer_dataloader_seed(replacements: Replacements) -> None:
    """Making a data iterator draws a seed from the CPU generator.

    On a GPU that leaves the stream that dropout uses alone. Here both are one generator, so its
    state is put back; a resumed run would otherwise differ from an uninterrupted one.
    """

    def make(original: Any) -> Any:
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            state = torch.get_rng_state()
            try:
                original(self, *args, **kwargs)
            finally:
                torch.set_rng_state(state)

        return init

    replacements.wrap(dataloader._BaseDataLoaderIter, "__init__", make)


ANSWERS = (answer_generator, answer_generator_class, answer_tracker, answer_dataloader_seed)
