"""Symbols of Megatron itself that assume a GPU build."""

from __future__ import annotations

import copy
from typing import Any

from megatron_maxscore._replacements import Replacements
from megatron_maxscore._wheel import answer_dataset_helpers


def answer_jit(replacements: Replacements) -> None:
    """``jit_fuser`` compiles nothing; must come before modules that bind it by name."""
    from megatron.core import jit

    replacements.set(jit, "jit_fuser", jit.noop_decorator)


def answer_torch_norm(replacements: Replacements) -> None:
    """``WrappedTorchNorm`` under sequence parallelism.

    It refuses sequence parallelism because a plain torch norm's parameters lack the mark that
    makes Megatron sum their gradients over the tensor-parallel group. Here they get the mark.
    """
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    original = WrappedTorchNorm.__new__

    def new(cls: Any, config: Any, hidden_size: int, *args: Any, **kwargs: Any) -> Any:
        if not getattr(config, "sequence_parallel", False):
            return original(cls, config, hidden_size, *args, **kwargs)
        plain = copy.copy(config)
        plain.sequence_parallel = False
        norm = original(cls, plain, hidden_size, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = True
        return norm

    replacements.set(WrappedTorchNorm, "__new__", new)


def answer_inference_layers(replacements: Replacements) -> None:
    """``isinstance`` checks against layers for inference, in megatron-core 0.20.

    These layers derive from Transformer Engine's. Without it they are mocks, and ``isinstance``
    fails because a mock is not a type. Here they become empty classes.
    """
    from megatron.core import tensor_parallel

    module = getattr(tensor_parallel, "inference_layers", None)
    for name in ("InferenceColumnParallelLinear", "InferenceLayerNormColumnParallelLinear"):
        if module is not None and not isinstance(getattr(module, name, object), type):
            replacements.set(module, name, type(name, (), {}))


ANSWERS = (answer_jit, answer_dataset_helpers, answer_torch_norm, answer_inference_layers)
