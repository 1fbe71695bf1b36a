"""Build a model from a Megatron checkpoint, for inference.

Megatron's own functions parse the arguments, build the model and load the weights; this module
calls them in the order in which its training loop does, without optimizer and data. It needs
megatron-core 0.19, whose wheel can build a model from parsed arguments; with older releases the
builder lives in the launch script of their tree.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import os
import socket
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_maxscore._replacements import Replacements
from megatron_maxscore.cpu.arguments import WITHOUT_TRANSFORMER_ENGINE
from megatron_maxscore.export.formats import COMMON

_LATEST = "latest_checkpointed_iteration.txt"
# Arguments that change what a model computes and that Megatron does not restore. What is not at its
# default was asked for and stays.
FURTHER = (
    "layernorm_epsilon", "qk_layernorm", "moe_router_dtype", "moe_router_load_balancing_type",
    "moe_router_num_groups", "moe_router_group_topk", "moe_token_drop_policy",
    "rope_scaling_factor", "attention_softmax_in_fp32", "mup_base_hidden_size",
    "mup_embedding_mult", "mup_output_mult", "mup_base_head_dim", "mup_attn_scale_power", "bf16",
    "fp16", "micro_batch_size",
    # What keeps a model from being exported is looked at there, so it must be as in training.
    *(need.name for need in COMMON),
)  # fmt: skip
# What of the tokenizer's arguments is decided anew: whether a tokenizer may run code of its own.
_NOT_RESTORED = ("trust_remote_code",)


class NotFiniteError(ValueError):
    """A model computes logits that are NaN or infinite."""


@dataclass(frozen=True)
class TrainedModel:
    """A model in evaluation mode and what it was trained with.

    Attributes:
        model: a GPTModel; with pipeline parallelism this rank's part.
        tokenizer: Megatron's tokenizer, with ``tokenize`` and ``detokenize``.
        args: Megatron's arguments.
        saved_args: those of the training run, as the checkpoint holds them; None without one.
    """

    model: Any
    tokenizer: Any
    args: Any
    saved_args: Any = None

    def logits(self, tokens_BS: Tensor) -> Tensor:
        """Return the (B, S, V) logits of whole sequences, in float32 at least.

        Args:
            tokens_BS: (B, S) int64 on any device. Under price routing padding on the right
                changes nothing to its left.
        """
        self.check_is_whole()
        device = next(self.model.parameters()).device
        tokens_BS = tokens_BS.to(device)
        positions_BS = torch.arange(tokens_BS.shape[1], device=device).expand_as(tokens_BS)
        with torch.no_grad():
            logits = self.model(tokens_BS, positions_BS, None, runtime_gather_output=True)
        return self.wide(logits)

    def widen(self, dtype: torch.dtype) -> None:
        """Let the model compute in float32 or float64 from now on."""
        self.model.to(dtype)
        for module in self.model.modules():
            # Attention's softmax casts its result to what the model was trained in.
            if getattr(module, "input_in_float16", False):
                module.input_in_float16 = False

    def routers(self) -> dict[int, Any]:
        """Return the routers of the decoder's MoE layers, without multi-token prediction's."""
        from megatron.core.transformer.moe.router import Router

        found = [module for module in self.model.decoder.modules() if isinstance(module, Router)]
        return {int(router.layer_number or 0): router for router in found}

    def routed(self, output: Any) -> tuple[Tensor, float]:
        """Return the (E,) int64 loads and the sum of all gates of a router's call."""
        probs_TE, map_TE = output
        return map_TE.sum(0).long().cpu(), float(probs_TE.double().sum())

    def check_is_whole(self) -> None:
        """Raise a ValueError if the model is split into pipeline stages."""
        stages = self.args.pipeline_model_parallel_size
        if stages > 1:
            raise ValueError(
                "inference needs the whole model on a rank; restore it with "
                f"--pipeline-model-parallel-size 1 instead of {stages}"
            )

    def wide(self, logits: Tensor) -> Tensor:
        """Return logits without those that pad the vocabulary, in float32 at least.

        Raises:
            NotFiniteError: some are NaN or infinite; names how many router scores were.
        """
        logits = logits[..., : self.tokenizer.vocab_size]
        if not bool(torch.isfinite(logits).all()):
            raise NotFiniteError(self._why_not_finite())
        return logits if logits.dtype == torch.float64 else logits.float()

    def _why_not_finite(self) -> str:
        from megatron_maxscore.moe.step import maxscore_routers

        found = []
        for router in maxscore_routers([self.model]):
            count = int(router.evaluated_bad_tokens)
            router.evaluated_bad_tokens = 0
            if count:
                found.append(f"layer {router.layer_number}: {count} tokens")
        where = f" (router scores are, in {', '.join(found)})" if found else ""
        return f"the model's logits are NaN or infinite{where}; use an earlier checkpoint"


def add_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add ``--checkpoint`` and Megatron's own arguments, which follow ``--``, to a tool's parser.

    Args:
        parser: of the tool.
        required: whether there is no other way to name a checkpoint.
    """
    parser.add_argument("--checkpoint", required=required, help="directory that --save wrote")
    parser.add_argument("megatron", nargs="*", help="further arguments of Megatron's, after --")


def restore(checkpoint: str | Path | None, arguments: Sequence[str] = ()) -> TrainedModel:
    """Load a checkpoint for inference.

    A process that torchrun has not started becomes a group of one rank. Where there is no CUDA
    device Megatron runs on the CPU. It may be called once per process: Megatron's arguments and
    groups are global. What Megatron says while it starts is shown only if it fails.

    Args:
        checkpoint: directory that ``--save`` wrote. Arguments that are not given come from it: our
            options, the tokenizer's arguments, those that Megatron's ``--use-checkpoint-args``
            restores, and those in :data:`FURTHER`. None: ``arguments`` say everything, ``--load``
            included.
        arguments: further arguments of Megatron's, such as parallel sizes.

    Returns:
        The model in evaluation mode, in which MaxScore routes by prices.

    Raises:
        ValueError: there is no checkpoint in the directory, or its tokenizer is gone.
    """
    command = list(arguments)
    if checkpoint is not None:
        if not (Path(checkpoint) / _LATEST).is_file():
            raise ValueError(
                f"{checkpoint} holds no checkpoint: {_LATEST} is missing; give the directory that "
                "--save wrote"
            )
        command += ["--load", str(checkpoint), "--use-checkpoint-args"]
        # Megatron would replace the tokenizer's type and model together, even if one was given.
        # _parsed() restores only what was not given.
        command.append("--no-use-tokenizer-model-from-checkpoint-args")
    return _started(command, _restored)


def build(arguments: Sequence[str]) -> TrainedModel:
    """Build a model for inference that no checkpoint is loaded into; see :func:`restore`.

    Args:
        arguments: Megatron's, all that the model needs.
    """
    return _started(list(arguments), _build)


def save(trained: TrainedModel, directory: Path) -> None:
    """Write a model as a checkpoint that ``--load`` starts from with ``--finetune``.

    Args:
        trained: of one rank.
        directory: to write into.
    """
    trained.args.save = str(directory)
    with _quiet(io.StringIO()):
        from megatron.training.checkpointing import save_checkpoint

        save_checkpoint(0, [trained.model], None, None, 0)


def _started(command: list[str], make: Callable[[], TrainedModel]) -> TrainedModel:
    """Return what is made while Megatron runs with these arguments."""
    from megatron_maxscore.cpu import enable_if_needed

    if importlib.util.find_spec("transformer_engine") is None:
        # First, so that what is given counts.
        command = [*WITHOUT_TRANSFORMER_ENGINE, *command]
    command += ["--no-load-optim", "--no-load-rng", "--exit-on-missing-checkpoint"]
    _become_a_rank()
    argv, sys.argv = sys.argv, ["megatron_maxscore", *command]
    said = io.StringIO()
    try:
        with _quiet(said):
            enable_if_needed()
            # After CPU mode, which must be there before Megatron is imported.
            from megatron_maxscore.training import install

            install()
            return make()
    except ValueError:
        raise
    except BaseException:
        sys.stderr.write(said.getvalue())
        raise
    finally:
        sys.argv = argv


@contextlib.contextmanager
def _quiet(said: io.StringIO) -> Iterator[None]:
    """Keep what is printed, and drop the warnings of optional packages."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(said):
        warnings.simplefilter("ignore")
        yield


def _become_a_rank() -> None:
    """Set what torchrun would have set, for a process started without it."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT=str(port)
    )


def _parsed(parse: Any) -> tuple[Any, Any]:
    """Parse arguments; with ``--use-checkpoint-args`` restore more of them.

    Returns:
        The arguments, and those that the checkpoint holds, None if it was not asked for them.
    """
    from megatron.training import arguments, checkpointing
    from megatron.training.config import TokenizerConfig

    defaults = arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    of_tokenizer = {field.name for field in dataclasses.fields(TokenizerConfig)}
    further = [*FURTHER, *sorted(of_tokenizer - set(_NOT_RESTORED))]
    during = Replacements("arguments of a checkpoint")
    saved: list[Any] = [None]

    def with_further(original: Any) -> Any:
        def load_args_from_checkpoint(args: Any, *rest: Any, **kwargs: Any) -> Any:
            result = original(args, *rest, **kwargs)
            if isinstance(result, tuple):
                saved[0] = result[1]
                for name in further:
                    is_default = getattr(args, name, None) == defaults.get_default(name)
                    if hasattr(args, name) and hasattr(result[1], name) and is_default:
                        setattr(args, name, getattr(result[1], name))
            if args.tokenizer_model is not None and not os.path.exists(args.tokenizer_model):
                raise ValueError(
                    f"the tokenizer {args.tokenizer_model} does not exist; give its path with "
                    "--tokenizer-model"
                )
            return result

        return load_args_from_checkpoint

    during.wrap(checkpointing, "load_args_from_checkpoint", with_further)
    try:
        return parse(), saved[0]
    finally:
        during.undo()


def _restored() -> TrainedModel:
    trained = _build()
    from megatron.training.checkpointing import load_checkpoint

    trained.args.iteration, _ = load_checkpoint([trained.model], None, None)
    trained.model.eval()
    return trained


def _build() -> TrainedModel:
    from megatron.training import argument_utils

    if not hasattr(argument_utils, "gpt_config_from_args"):
        raise ValueError(
            "restoring a checkpoint needs megatron-core 0.19, where the wheel can build a model "
            "from arguments; install it, or evaluate with the training script of your tree"
        )
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.global_vars import get_tokenizer
    from megatron.training.initialize import initialize_megatron

    args, saved = _parsed(parse_and_validate_args)
    initialize_megatron()
    config = argument_utils.gpt_config_from_args(args)
    builder = config.get_builder_cls()(config)
    models = builder.build_distributed_models(
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False
    )
    model = models[0]
    while hasattr(model, "module"):
        model = model.module
    args.iteration = 0
    return TrainedModel(model.eval(), get_tokenizer(), args, saved)
