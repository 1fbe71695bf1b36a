"""Write a trained checkpoint as a Hugging Face directory.

    python -m megatron_maxscore export --checkpoint runs/model --output served

The directory holds config.json, weights in safetensors, the tokenizer and a model card.
transformers, vLLM and SGLang open it, and their models route as MaxScore does by prices. What is
written is loaded and compared with the checkpoint before the directory gets its name. A model that
no format can hold exactly is refused, and the message says what would have to change. ``check``
says the same before training.
"""

from __future__ import annotations

from pathlib import Path

from megatron_maxscore.commands.converting import carry_out, size
from megatron_maxscore.commands.parsing import parser_of
from megatron_maxscore.export import FORMATS
from megatron_maxscore.export.choice import AUTO
from megatron_maxscore.inference import add_arguments


def main(command: list[str] | None = None) -> int:
    """Export a checkpoint; return 1 if it cannot be."""
    parser = parser_of("export", __doc__)
    add_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, help="directory to make")
    parser.add_argument(
        "--format", choices=(AUTO, *FORMATS), default=AUTO, help="default: the first that fits"
    )
    parser.add_argument(
        "--shard-size", type=size, default="5GB", help="of a file at most (default: 5GB)"
    )
    parser.add_argument(
        "--no-compare", action="store_true",
        help="do not load and compare what was written, which takes the model twice in float32",
    )  # fmt: skip
    arguments = parser.parse_args(command)

    def convert() -> None:
        from megatron_maxscore.export.convert import export

        done = export(
            arguments.checkpoint, arguments.output, arguments.format, tuple(arguments.megatron),
            arguments.shard_size, not arguments.no_compare,
        )  # fmt: skip
        print(f"{arguments.output}: {done.format}, {done.parameters:,} parameters")
        print(f"tokenizer: {done.tokenizer}")
        if done.difference is None:
            print("not compared with the checkpoint")
        else:
            print(
                "compared with the checkpoint in float32: the same experts, and logits differ by "
                f"{done.difference:.0e} of their standard deviation"
            )
        for note in done.notes:
            print(f"note: {note}")

    return carry_out(convert)
