"""Start tiny training runs on this machine, and follow them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# A model that trains in a second; tests/dist trains it too.
TINY = """
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 64
    --max-position-embeddings 64 --position-embedding-type rope --normalization RMSNorm --swiglu
    --disable-bias-linear --num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 32
    --moe-token-dispatcher-type alltoall --num-workers 0 --micro-batch-size 2
    --lr 1e-2 --lr-decay-style constant --weight-decay 0.1 --seed 7 --log-interval 1
    --split 80,10,10 --mock-data --tokenizer-type NullTokenizer --vocab-size 127
"""
MODEL = (
    f"{TINY} --moe-router-type maxscore --moe-router-load-balancing-type none "
    "--eval-interval 1000000 --eval-iters 1 --distributed-timeout-minutes 1"
)
RANKS = 2


def start(
    directory: Path, flags: str, environment: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start two ranks with expert parallelism; output goes to ``log`` in the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    command = (
        f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node {RANKS} "
        f"-m megatron_maxscore.launch --cpu tools/soak/training_script.py {MODEL} "
        f"--expert-model-parallel-size {RANKS} --data-cache-path {directory}/cache {flags}"
    )
    with (directory / "log").open("a", encoding="utf-8") as log:
        return subprocess.Popen(
            command.split(), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env={
                **os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                "PYTHONPATH": str(ROOT), **(environment or {}),
            },
        )  # fmt: skip
