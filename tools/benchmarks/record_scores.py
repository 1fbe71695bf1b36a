"""Record router scores of a real training run, for ``tools/benchmarks/solver.py``.

Trains a small mixture-of-experts model with 64 experts, top-8 and 8,192 tokens per solve on one CPU
rank, on the demo's text, and keeps what the solver was asked in two layers at a few steps.

    python -m tools.benchmarks.record_scores        # about five minutes, writes runs/recorded
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from megatron_maxscore.commands import prepare
from megatron_maxscore.moe.recording import parse_numbers

ROOT = Path(__file__).resolve().parents[2]
MODEL = """
    --num-layers 2 --hidden-size 128 --num-attention-heads 4 --seq-length 512
    --max-position-embeddings 512 --position-embedding-type rope --normalization RMSNorm --swiglu
    --disable-bias-linear --attention-dropout 0 --hidden-dropout 0
    --num-experts 64 --moe-router-topk 8 --moe-ffn-hidden-size 32
    --moe-token-dispatcher-type alltoall --moe-router-load-balancing-type none
    --moe-router-type maxscore --maxscore-scope local
    --micro-batch-size 16 --global-batch-size 16 --lr 2e-3 --min-lr 2e-4 --lr-decay-style cosine
    --lr-warmup-fraction 0.1 --weight-decay 0.1 --clip-grad 1.0 --seed 1234 --log-interval 10
    --eval-interval 100000 --eval-iters 1
    --transformer-impl local --no-persist-layer-norm --no-bias-swiglu-fusion --no-rope-fusion
    --no-masked-softmax-fusion --no-gradient-accumulation-fusion --num-workers 0
"""


def main() -> int:
    """Prepare data, train, move the recording into place."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="prepared data")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "recorded")
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--steps", default="100,150,198-200", help="iterations to keep")
    arguments = parser.parse_args()
    try:
        parse_numbers(arguments.steps)
    except ValueError as error:
        parser.error(f"--steps: {error}")
    if status := prepare.main(["--output", str(arguments.data)]):
        return status
    unfinished = arguments.output.with_name(arguments.output.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    command = [
        *f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 1".split(),
        *"-m megatron_maxscore.launch --cpu examples/pretrain_gpt.py".split(),
        *MODEL.split(),
        *("--train-iters", str(arguments.iterations)),
        *("--lr-decay-iters", str(arguments.iterations)),
        *("--tokenizer-type", "SentencePieceTokenizer"),
        *("--tokenizer-model", str(arguments.data / "tokenizer.model")),
        *("--train-data-path", str(arguments.data / "train_text_document")),
        *("--valid-data-path", str(arguments.data / "valid_text_document")),
        *("--data-cache-path", str(unfinished / "cache")),
        *("--maxscore-record-dir", str(unfinished / "scores")),
        *("--maxscore-record-steps", arguments.steps),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count() or 1)}
    if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
        print("error: the training run failed; its output is above", file=sys.stderr)
        return 1
    shutil.rmtree(arguments.output, ignore_errors=True)
    (unfinished / "scores").rename(arguments.output)
    shutil.rmtree(unfinished)
    files = sorted(path.name for path in arguments.output.iterdir())
    print(f"{len(files)} solves in {arguments.output}: {files[0]} to {files[-1]}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
