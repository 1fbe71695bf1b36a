"""Exported models open in transformers and route there as their checkpoints do."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
import torch

from megatron_maxscore.commands import demo
from megatron_maxscore.export.directory import read_weights as weights_of
from tests import forked
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
    # At a larger rate the model takes all tokens for one.
    flags = f"{SMALL[request.param]} --lr 2e-3 --train-iters 20"
    checkpoint_runs.train(directory, data, 2, flags)
    served = directory / "served"
    done = tool("export", "--checkpoint", directory / "checkpoint", "--output", served)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{served}: {request.param}, " in done.stdout
    return request.param, directory / "checkpoint", served


def agreement(checkpoint, served, data):
    """Return what the probe finds of a checkpoint and its exported model."""
    done = forked.python(
        "tests/dist/agreement_probe.py", checkpoint, served, f"{data}/valid_text_document",
        timeout=600,
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
    # The comparison can fail: routing depends on the bias, and changed models are told.
    assert found["biased"] > found["decided"] / 100
    assert found["faults"].keys() == {"negate", "swap"} and all(found["faults"].values())


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
        losses.append(price["loss"])
        loads.append(torch.tensor(price["loads"]))
        done = tool(
            "harness", "--checkpoint", model, "--output", output, *task, environment=environment
        )
        assert done.returncode == 0, done.stderr[-3000:]
        scores.append(json.loads(output.read_text()))
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert torch.equal(*loads)
    assert scores[0]["local_items"]["acc,none"] == scores[1]["local_items"]["acc,none"] == 1.0
    words = [score["local_texts"]["word_perplexity,none"] for score in scores]
    assert words[1] == pytest.approx(words[0], rel=1e-4)


def test_warm_start_from_an_imported_model(exported, data, tmp_path):
    kind, checkpoint, served = exported
    warm = tmp_path / "warm"
    done = tool("import", "--model", served, "--output", warm)
    assert done.returncode == 0, done.stderr[-3000:]
    # What comes back is what went out, bias included.
    done = tool("export", "--checkpoint", warm, "--output", tmp_path / "again", "--no-compare")
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = weights_of(served), weights_of(tmp_path / "again")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        # Of the prices only differences count.
        shift = tensor.max() - after[name].max() if "correction_bias" in name else 0.0
        torch.testing.assert_close(after[name] + shift, tensor, rtol=0.0, atol=1e-7)
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
    flags += " --attention-softmax-in-fp32"
    flags += " --make-vocab-size-divisible-by 128"
    checkpoint_runs.train(tmp_path, data, 2, flags)
    served = tmp_path / "served"
    done = tool(
        "export", "--checkpoint", tmp_path / "checkpoint", "--output", served,
        "--shard-size", "100KB",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list(served.glob("*.safetensors"))) > 1
    weights = weights_of(served)
    for name, tensor in weights.items():
        assert tensor.dtype == (torch.float32 if "correction_bias" in name else torch.bfloat16)
    bias = weights["model.layers.1.mlp.moe_statics.e_score_correction_bias"]
    assert bias.any() and not torch.equal(bias, bias.bfloat16().float()), "not rounded on the way"
    assert json.loads((served / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_no_format_holds_is_refused(data, tmp_path):
    flags = f"{OURS} {EP2} --train-iters 2"
    checkpoint_runs.train(tmp_path, data, 2, flags)
    served = tmp_path / "served"
    done = tool("export", "--checkpoint", tmp_path / "checkpoint", "--output", served)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for word in (
        "add --maxscore-preset servable (gates are SoftTopk", "for glm4_moe",
        "--moe-router-score-function sigmoid",
    ):  # fmt: skip
        assert word in line
    assert not list(tmp_path.glob("*served*"))
    # Nor does it help to claim that the model was trained otherwise.
    done = tool(
        "export", "--checkpoint", tmp_path / "checkpoint", "--output", served, "--",
        "--maxscore-preset", "servable",
    )  # fmt: skip
    assert done.returncode == 1 and "gates are SoftTopk" in done.stderr
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


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Return the demo's data, the sources of Python's library."""
    directory = tmp_path_factory.mktemp("demo") / "data"
    done = tool("prepare", "--output", directory)
    assert done.returncode == 0, done.stderr
    return directory


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("layout", [demo.TENSOR_EXPERT, demo.PIPELINE_EXPERT])
@pytest.mark.parametrize(
    "router", [PRESET, f"{PRESET} {SIGMOID}", f"{SIGMOID} --moe-router-enable-expert-bias"]
)
def test_the_demos_model(corpus, tmp_path, layout, router):
    """60 steps in the demo's setting."""
    run = demo.Run("run", "run", layout, f"{OURS} {router}", 60, is_kept=True)
    command = demo.command(run, corpus, tmp_path)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    served, checkpoint = tmp_path / "served", tmp_path / demo.CHECKPOINT
    done = tool("export", "--checkpoint", checkpoint, "--output", served)
    assert done.returncode == 0, done.stderr[-3000:]
    found = agreement(checkpoint, served, corpus)
    print("AGREEMENT", layout, router, json.dumps(found))
    assert found["sequences"] == 64 and found["new"] == 64
    check_agreement(found)
