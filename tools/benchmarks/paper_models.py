"""Count parameters and FLOPs of the paper's models, as the launch scripts build them.

    python -m tools.benchmarks.paper_models

Reads the flags from examples/paper/flags.sh, lets Megatron parse them and build each model on the
meta device, with each router, and prints what a token uses beside the nominal size.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ROOT / "examples" / "paper" / "flags.sh"
SIZES = {"162M": 162e6, "317M": 317e6, "599M": 599e6, "1205M": 1205e6}
ROUTERS = ("maxscore", "authors", "gshard", "dropless", "deepseek")
VOCABULARY = 32000


def flags_of(size: str, router: str) -> list[str]:
    """Return the flags of a size and a router.

    Raises:
        ValueError: the script refuses one of them; with its message.
    """
    script = f'source "{FLAGS}" && paper_model "$1" && paper_router "$2"'
    done = subprocess.run(
        ["bash", "-c", script, "flags", size, router], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ValueError(done.stderr.strip())
    return done.stdout.split()


def build(flags: list[str]) -> dict[str, Any]:
    """Build one model in this process and count; Megatron's arguments are global.

    Returns:
        Numbers of parameters: all, those a token uses, experts, routers, embeddings; and FLOPs per
        token of a forward and a backward pass.
    """
    import torch

    from megatron_maxscore.cpu import enable

    enable()
    from megatron_maxscore.training import install

    install()
    import torch.distributed as dist
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.initialize import initialize_megatron

    from megatron_maxscore.cpu.arguments import WITHOUT_TRANSFORMER_ENGINE

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost")
    os.environ.setdefault("MASTER_PORT", "29577")
    sys.argv = ["paper_models", *flags, *WITHOUT_TRANSFORMER_ENGINE]
    sys.argv += "--micro-batch-size 1 --train-iters 1 --tokenizer-type NullTokenizer".split()
    # The tokenizer adds the end of a document.
    sys.argv += f"--vocab-size {VOCABULARY - 1} --use-cpu-initialization".split()
    sys.argv += "--make-vocab-size-divisible-by 128".split()
    args = parse_and_validate_args()
    initialize_megatron()
    config = gpt_config_from_args(args)
    builder = config.get_builder_cls()(config)
    with torch.device("meta"):
        model = builder.build_model(ProcessGroupCollection.use_mpu_process_groups(), True, True)
    dist.destroy_process_group()
    counts = {"all": 0, "experts": 0, "routers": 0, "embedding": 0}
    marks = {"all": "", "experts": ".experts.", "routers": ".router.", "embedding": "word_embed"}
    for name, parameter in model.named_parameters():
        for part, mark in marks.items():
            counts[part] += parameter.numel() if mark in name else 0
        assert parameter.device.type == "meta", name
    used = counts["all"] - counts["experts"] * (1 - args.moe_router_topk / args.num_experts)
    # Two for a multiplication and an addition, three for forward and backward; looking a token up
    # in the embedding costs none. Attention looks at half of the sequence on average.
    attention = args.num_layers * args.hidden_size * args.seq_length
    flops = 6 * (used - counts["embedding"]) + 3 * 2 * attention
    router = type(model.decoder.layers[0].mlp.router).__name__
    return {**counts, "used": used, "flops": flops, "router": router}


def main() -> int:
    """Build every model in a process of its own and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", nargs="?", choices=SIZES, help="with router: this model alone")
    parser.add_argument("router", nargs="?", choices=ROUTERS)
    arguments = parser.parse_args()
    if arguments.router is not None:
        print(json.dumps(build(flags_of(arguments.size, arguments.router))))
        return 0
    if arguments.size is not None:
        parser.error("name a router too, or neither")
    pairs = [(size, router) for size in SIZES for router in ROUTERS]
    found = {}
    for size, router in track(pairs, "building", disable=not sys.stdout.isatty()):
        done = subprocess.run(
            [sys.executable, "-m", "tools.benchmarks.paper_models", size, router],
            capture_output=True, text=True, check=False, cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
        )  # fmt: skip
        if done.returncode:
            print(f"error: {size} {router}: {done.stderr.strip()[-2000:]}", file=sys.stderr)
            return 1
        found[size, router] = json.loads(done.stdout.splitlines()[-1])
    table = Table(
        "model", "router", "class", "parameters a token uses", "of nominal", "all parameters",
        "in routers", "MFLOP per token", title="The paper's models, built on the meta device",
    )  # fmt: skip
    for (size, router), counts in found.items():
        table.add_row(
            size, router, counts["router"], f"{counts['used'] / 1e6:,.1f} M",
            f"{counts['used'] / SIZES[size]:.1%}", f"{counts['all'] / 1e6:,.0f} M",
            f"{counts['routers'] / 1e6:.2f} M", f"{counts['flops'] / 1e6:,.0f}",
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
