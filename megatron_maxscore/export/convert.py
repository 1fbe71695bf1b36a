"""From a checkpoint to a Hugging Face directory, and back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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
from megatron_maxscore.export.formats import common_arguments
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
    trained = restore(checkpoint, [*WITHOUT_TRANSFORMER_ENGINE, *arguments])
    trained.check_is_whole()
    args = trained.args
    format_ = choose(args, format_name)
    vocabulary, end = int(trained.tokenizer.vocab_size), int(trained.tokenizer.eod)
    tensors = weights.exported(weights.state_of(trained.model), format_, args, vocabulary)
    config = format_.config(args) | {
        "architectures": [format_.architecture],
        "model_type": format_.name,
        "vocab_size": vocabulary,
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    notes = notes_on(args, format_)
    with appearing(output) as directory:
        said = write_tokenizer(args, end, directory)
        write_model(directory, config, tensors, shard_size)
        parameters = sum(tensor.numel() for tensor in tensors.values())
        del tensors
        difference = verify(trained, directory) if is_compared else None
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
    config = read_config(directory)
    kind = config.get("model_type")
    if kind not in FORMATS:
        raise ValueError(f"{directory} is a {kind}; formats are {', '.join(FORMATS)}")
    format_ = FORMATS[kind]
    tensors = weights.without_further_predictions(read_weights(directory), config)
    tensors, config = weights.without_empty_shared_experts(tensors, config)
    model_arguments = [
        *common_arguments(config), *format_.arguments(config),
        *("--moe-router-type", "maxscore", "--maxscore-preset", "servable"),
        *arguments_of(directory),
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
        tensors, weights.state_of(trained.model), format_, trained.args, int(config["vocab_size"])
    )
    weights.load_state(trained.model, state)
    with appearing(output) as partial:
        save(trained, partial)
    return kind, model_arguments
