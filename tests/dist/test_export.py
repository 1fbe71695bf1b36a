"""Exported models open in transformers and route there as their checkpoints do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open

from megatron_maxscore.commands import demo
from tests.dist import checkpoint_runs
from tests.dist.checkpoint_runs import local_task, of_data, prepare_words, tool
from tests.dist.training_runs import ROOT, succeed

OURS = "--moe-router-type maxscore --moe-router-load-balancing-type none"
PRESET = "--maxscore-preset servable"
SIGMOID = "--moe-router-score-function sigmoid"
# No rows pad the vocabulary of 320: Megatron's loss counts them, and exported models have none.
EP2 = "--expert-model-parallel-size 2 --make-vocab-size-divisible-by 64"
# What each format has beyond the plainest model.
SMALL = {
    "ernie4_5_moe": (
        f"{OURS} {PRESET} {EP2} --group-query-attention --num-query-groups 2 --kv-channels 16 "
        "--moe-shared-expert-intermediate-size 64 --moe-layer-freq ([0]*1+[1]*1)"
    ),
    "glm4_moe": (
        f"{OURS} {SIGMOID} --moe-router-enable-expert-bias {EP2} "
        "--untie-embeddings-and-output-weights --qk-layernorm --add-qkv-bias --rotary-percent 0.5 "
        "--moe-router-topk-scaling-factor 2.5 --moe-router-num-groups 4 --moe-router-group-topk 1"
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return prepared data."""
    return prepare_words(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module", params=list(SMALL))
def exported(request, data, tmp_path_factory):
    """Train a small model, export it; return the format, the checkpoint and the directory."""
    directory = tmp_path_factory.mktemp(request.param)
    checkpoint_runs.train(directory, data, 2, f"{SMALL[request.param]} --train-iters 20")
    served = directory / "served"
    done = tool("export", "--checkpoint", directory / "checkpoint", "--output", served)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{served}: {request.param}, " in done.stdout
    return request.param, directory / "checkpoint", served


def agreement(checkpoint, served, data):
    """Return what the probe finds of a checkpoint and its exported model."""
    done = subprocess.run(
        [
            sys.executable, "tests/dist/agreement_probe.py", str(checkpoint), str(served),
            f"{data}/valid_text_document",
        ],
        capture_output=True, text=True, timeout=600, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("AGREEMENT ")[1])


def check_agreement(found):
    """Assert the promises of an exported model."""
    assert found["sequences"] >= 30 and found["spread"] > 0.1
    assert found["logit"] <= 1e-4
    assert found["other_experts"] == 0 and found["ties"] <= found["decided"] / 1000
    assert found["greedy"] == found["prompts"]
    assert found["tokenized"] == found["sequences"]


def test_logits_experts_and_decoding_are_the_checkpoints(exported, data):
    _, checkpoint, served = exported
    check_agreement(agreement(checkpoint, served, data))


def test_evaluation_and_harness_give_the_same_numbers(exported, data, tmp_path):
    _, checkpoint, served = exported
    losses, loads, scores = [], [], []
    task, environment = local_task(tmp_path)
    for number, model in enumerate((checkpoint, served)):
        output = tmp_path / f"{number}.json"
        done = tool(
            "evaluate", "--checkpoint", model, "--data", data / "valid_text_document",
            "--decode", 0, "--output", output,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        price = json.loads(output.read_text())["rules"]["price"]
        # The batches may be cut differently at the end.
        losses.append(price["loss"])
        loads.append(torch.tensor(price["loads"]) / price["tokens"])
        done = tool("harness", "--checkpoint", model, "--output", output, *task, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        scores.append(json.loads(output.read_text())["local_items"])
    assert losses[1] == pytest.approx(losses[0], abs=2e-3)
    assert (loads[0] - loads[1]).abs().max() < 5e-3
    assert scores[0]["acc,none"] == scores[1]["acc,none"] == 1.0


def test_warm_start_from_an_imported_model(exported, data, tmp_path):
    kind, checkpoint, served = exported
    warm = tmp_path / "warm"
    done = tool("import", "--model", served, "--output", warm)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = []
    for number, start in enumerate((checkpoint, warm)):
        flags = f"{SMALL[kind]} --load {start} --finetune --no-load-optim --no-load-rng"
        run = succeed(
            tmp_path / str(number), 2, f"{flags} --train-iters 1 {of_data(data)}",
            model=checkpoint_runs.MODEL_ON_TEXT,
        )  # fmt: skip
        losses.append(float.fromhex(run.losses[0]))
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)


def test_half_precision_keeps_the_routers_bias(data, tmp_path):
    flags = f"{SMALL['ernie4_5_moe']} --bf16 --moe-router-dtype fp32 --train-iters 4"
    flags += " --make-vocab-size-divisible-by 128"
    checkpoint_runs.train(tmp_path, data, 2, flags)
    served = tmp_path / "served"
    done = tool(
        "export", "--checkpoint", tmp_path / "checkpoint", "--output", served,
        "--shard-size", "100KB",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    files = sorted(served.glob("*.safetensors"))
    assert len(files) > 1 and (served / "model.safetensors.index.json").is_file()
    dtypes = {}
    for file in files:
        with safe_open(file, "pt") as weights:
            dtypes |= {name: weights.get_tensor(name).dtype for name in weights.keys()}
    assert {dtype for name, dtype in dtypes.items() if "bias" in name} == {torch.float32}
    assert dtypes["model.layers.1.mlp.experts.3.up_proj.weight"] == torch.bfloat16
    assert json.loads((served / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_no_format_holds_is_refused(data, tmp_path):
    flags = f"{OURS} {EP2} --qk-layernorm --train-iters 2"
    checkpoint_runs.train(tmp_path, data, 2, flags)
    served = tmp_path / "served"
    done = tool("export", "--checkpoint", tmp_path / "checkpoint", "--output", served)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for word in (
        "gates are SoftTopk", "--maxscore-preset servable", "for glm4_moe", "for ernie4_5_moe",
        "--moe-router-score-function sigmoid", "leave out --qk-layernorm",
    ):  # fmt: skip
        assert word in line
    assert not list(tmp_path.glob("*served*"))


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_export_leaves_nothing_that_looks_whole(exported, tmp_path, sent):
    _, checkpoint, _ = exported
    served = tmp_path / "served"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "megatron_maxscore", "export", "--checkpoint"),
            *(str(checkpoint), "--output", str(served)),
        ],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while process.poll() is None and not list(tmp_path.glob(".served*")):
        time.sleep(0.01)
    process.send_signal(sent)
    _, said = process.communicate(timeout=60)
    assert process.returncode == (130 if sent == signal.SIGTERM else -sent), said
    assert not served.exists()
    left = list(tmp_path.iterdir())
    if sent == signal.SIGTERM:
        assert not left and "nothing was written" in said
    else:
        assert [path.name.startswith(".served.incomplete-") for path in left] == [True]


@pytest.mark.full
@pytest.mark.parametrize("layout", [demo.TENSOR_EXPERT, demo.PIPELINE_EXPERT])
@pytest.mark.parametrize(
    "router", [PRESET, f"{PRESET} {SIGMOID}", f"{SIGMOID} --moe-router-enable-expert-bias"]
)
def test_the_demos_model(tmp_path, layout, router):
    """60 steps in the demo's setting, on the sources of Python's library."""
    corpus = tmp_path / "corpus"
    done = tool("prepare", "--output", corpus)
    assert done.returncode == 0, done.stderr
    run = demo.Run("run", "run", layout, f"{OURS} {router}", 60, is_kept=True)
    command = demo.command(run, corpus, tmp_path)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    served, checkpoint = tmp_path / "served", tmp_path / demo.CHECKPOINT
    done = tool("export", "--checkpoint", checkpoint, "--output", served)
    assert done.returncode == 0, done.stderr[-3000:]
    found = agreement(checkpoint, served, corpus)
    assert found["sequences"] == 64 and found["new"] == 64
    check_agreement(found)
