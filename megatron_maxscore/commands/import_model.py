"""Turn a Hugging Face directory into a checkpoint that training starts from.

    python -m megatron_maxscore import --model served --output warm
    ... pretrain_gpt.py MODEL'S ARGUMENTS --load warm --finetune

Takes the formats that ``export`` writes. The bias of experts becomes MaxScore's prices. Prints the
model's arguments; Megatron reads most of them from the checkpoint with --use-checkpoint-args.
Further arguments of Megatron's follow ``--``.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from megatron_maxscore.commands.converting import carry_out
from megatron_maxscore.commands.parsing import parser_of


def main(command: list[str] | None = None) -> int:
    """Import a model; return 1 if it cannot be."""
    parser = parser_of("import", __doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory with config.json")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint directory to make")
    parser.add_argument("megatron", nargs="*", help="further arguments of Megatron's, after --")
    arguments = parser.parse_args(command)

    def convert() -> None:
        from megatron_maxscore.export.convert import import_

        kind, model = import_(arguments.model, arguments.output, tuple(arguments.megatron))
        print(f"{arguments.output}: from {kind}, compared with it in float32: the same experts")
        print(f"start with --load {arguments.output} --finetune and the model's arguments:")
        print(shlex.join(model))

    return carry_out(convert)
