"""Sample text from a trained checkpoint, token by token with a key-value cache.

    python -m megatron_maxscore generate --checkpoint runs/model --prompt "def main("
    python -m megatron_maxscore generate --checkpoint runs/model --temperature 0 --tokens 50

MaxScore routes each token by its scores and the learned prices, so the text does not depend on what
else is generated. Works on CPU. Where the checkpoint's tokenizer has moved, name it:
``-- --tokenizer-model tokenizer.model``.
"""

from __future__ import annotations

import argparse
import math
import sys

import torch
import torch.distributed as dist

from megatron_maxscore.commands.parsing import parser_of
from megatron_maxscore.inference import TrainedModel, add_arguments, restore, sample

# What a half-read character looks like; it waits for its other bytes.
_INCOMPLETE = "\ufffd"


def write(trained: TrainedModel, prompt: str, arguments: argparse.Namespace, seed: int) -> int:
    """Print a prompt and its continuation as it comes; return how many tokens came."""
    tokenizer = trained.tokenizer
    # Without a prompt a document begins.
    ids = list(tokenizer.tokenize(prompt)) if prompt else [tokenizer.eod]
    generator = torch.Generator().manual_seed(seed)
    shown, count = len(tokenizer.detokenize(ids)) if prompt else 0, 0
    print(prompt, end="", flush=True)
    start = ids if prompt else []
    new: list[int] = []
    for token in sample(
        trained, ids, arguments.tokens, arguments.temperature, arguments.top_p, generator
    ):
        new.append(token)
        count += 1
        text = tokenizer.detokenize([*start, *new])
        if not text.endswith(_INCOMPLETE):
            print(text[shown:], end="", flush=True)
            shown = len(text)
    print(flush=True)
    return count


def main(command: list[str] | None = None) -> int:
    """Restore a checkpoint and sample from it."""
    parser = parser_of("generate", __doc__)
    add_arguments(parser)
    parser.add_argument("--prompt", default="", help="text to continue (default: a new document)")
    parser.add_argument("--tokens", type=int, default=100, help="at most (default: 100)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest")
    parser.add_argument("--top-p", type=float, default=0.95, help="share of probability kept")
    parser.add_argument("--samples", type=int, default=1, help="how many texts (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the first sample")
    arguments = parser.parse_args(command)
    for name in ("tokens", "samples"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    if not 0.0 <= arguments.temperature < math.inf:
        parser.error(f"--temperature must be at least 0, got {arguments.temperature}")
    if not 0.0 < arguments.top_p <= 1.0:
        parser.error(f"--top-p must lie in (0, 1], got {arguments.top_p}")
    try:
        trained = restore(arguments.checkpoint, arguments.megatron)
        for index in range(arguments.samples):
            if index:
                print("-" * 40)
            write(trained, arguments.prompt, arguments, arguments.seed + index)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0
