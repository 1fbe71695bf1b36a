"""From a checkpoint to a Hugging Face directory, and back."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_maxscore.cpu.arguments import WITHOUT_TRANSFORMER_ENGINE
from megatron_maxscore.export import weights
from megatron_maxscore.export.card import card, notes_on
from megatron_maxscore.export.choice import AUTO, FORMATS, choose
from megatron_maxscore.export.directory import (
    appearing,
    check_free,
    read_config,
    read_weights,
    write_model,
)
from megatron_maxscore.export.formats import Format, common_arguments
from megatron_maxscore.export.tokenizer import arguments_of, write_tokenizer
from megatron_maxscore.export.verify import verify
from megatron_maxscore.inference.restore import build, restore, save


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        format: name of the format.
        parameters: number of weights.
        tokenizer: what of it was written, in words.
        difference: of logits, relative to their standard deviation, in float32; None if they
            were not compared.
        notes: what differs between training and serving.
    """

    format: str
    parameters: int
    tokenizer: str
    difference: float | None
    notes: list[str]


def export(
    checkpoint: str | Path,
    output: Path,
    format_name: str = AUTO,
    arguments: tuple[str, ...] = (),
    shard_size: str = "5GB",
    is_compared: bool = True,
) -> Exported:
    """Write a checkpoint as a Hugging Face directory.

    The whole model is in this process's memory: in its dtype, and twice in float32 while it is
    compared.

    Args:
        checkpoint: directory that ``--save`` wrote, of any parallel sizes.
        output: directory to make.
        format_name: of the format, or auto.
        arguments: further arguments of Megatron's.
        shard_size: of a file at most.
        is_compared: whether what was written is loaded and compared with the checkpoint.

    Raises:
        ValueError: no format can hold the model, a file cannot be written or read, or what was
            written is not the model. Then nothing is left behind.
    """
    check_free(output)
    _check_alone("exports")
    trained = restore(checkpoint, [*WITHOUT_TRANSFORMER_ENGINE, *arguments])
    trained.check_is_whole()
    args = trained.args
    # By what the model was trained with, whatever was given now.
    format_ = choose(trained.saved_args, format_name)
    _check_same(format_, args, trained.saved_args)
    vocabulary, end = int(trained.tokenizer.vocab_size), int(trained.tokenizer.eod)
    tensors = weights.exported(weights.state_of(trained.model), format_, args, vocabulary)
    config = format_.config(args) | {
        "architectures": [format_.architecture],
        "model_type": format_.name,
        "vocab_size": vocabulary,
    }
    notes = notes_on(args, format_)
    with appearing(output) as directory:
        said, special = write_tokenizer(args, vocabulary, end, directory)
        write_model(directory, config | special, tensors, shard_size)
        parameters = sum(tensor.numel() for tensor in tensors.values())
        del tensors
        difference = verify(trained, directory, format_.score) if is_compared else None
        text = card(args, format_, parameters, said, notes)
        (directory / "README.md").write_text(text, encoding="utf-8")
    return Exported(format_.name, parameters, said, difference, notes)


def import_(
    directory: Path, output: Path, arguments: tuple[str, ...] = ()
) -> tuple[str, list[str]]:
    """Write a Hugging Face directory as a checkpoint that training starts from.

    Args:
        directory: in one of the formats.
        output: checkpoint directory to make.
        arguments: further arguments of Megatron's, which take the place of those that
            config.json says.

    Returns:
        Name of the format, and the arguments of the model.

    Raises:
        ValueError: the format is not known, or a weight has no place.
    """
    check_free(output)
    _check_alone("imports")
    format_, config = opened(directory)
    vocabulary = int(config["vocab_size"])
    tensors, config = weights.simplest(read_weights(directory), config)
    model_arguments = [
        *common_arguments(config), *format_.arguments(config),
        *("--moe-router-type", "maxscore", "--maxscore-preset", "servable"),
        *arguments_of(directory, vocabulary),
    ]  # fmt: skip
    length = str(config["max_position_embeddings"])
    trained = build(
        [
            *WITHOUT_TRANSFORMER_ENGINE, *model_arguments,
            *("--seq-length", length, "--micro-batch-size", "1", "--global-batch-size", "1"),
            *("--ckpt-format", "torch_dist", "--no-save-optim", "--no-save-rng"),
            *arguments,
        ]
    )  # fmt: skip
    state = weights.imported(
        tensors, weights.state_of(trained.model), format_, trained.args, vocabulary
    )
    weights.load_state(trained.model, state)
    with appearing(output) as partial:
        save(trained, partial)
        verify(trained, directory, format_.score)
    return format_.name, model_arguments


def opened(directory: Path) -> tuple[Format, dict[str, Any]]:
    """Return the format of a Hugging Face directory, and config.json with all defaults.

    Raises:
        ValueError: there is no model, or it has another format.
    """
    kind = read_config(directory).get("model_type")
    if kind not in FORMATS:
        raise ValueError(f"{directory} is a {kind}; formats are {', '.join(FORMATS)}")
    from transformers import AutoConfig

    return FORMATS[kind], AutoConfig.from_pretrained(directory).to_dict()


def _check_alone(does: str) -> None:
    """Refuse several ranks, each of which would write."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"one process {does} a whole model; start it without torchrun")


def _check_same(format_: Format, args: Any, saved: Any) -> None:
    """Refuse arguments that make another model of the checkpoint than was trained."""
    from megatron_maxscore.moe.config import MaxScoreConfig

    made = [
        (format_.config(each), MaxScoreConfig.from_transformer_config(each).resolved_for(each))
        for each in (args, saved)
    ]
    for name in made[0][0]:
        if made[0][0][name] != made[1][0][name]:
            raise ValueError(
                f"{name} would be {made[0][0][name]}, and the model was trained with "
                f"{made[1][0][name]}; leave out what was given after --"
            )
    (_, ours), (_, theirs) = made
    if getattr(saved, "moe_router_type", "topk") == "maxscore" and (
        (ours.gate, ours.objective) != (theirs.gate, theirs.objective)
    ):
        raise ValueError(
            f"the model was trained with gates {theirs.gate} and prices of {theirs.objective}; "
            "leave out what was given after --"
        )
