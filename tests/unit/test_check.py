"""The dry run of a launch: Megatron's recipes, and what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import example_recipes, forked
from tests.recipes import BENCHMARK, RECIPES

ROOT = Path(__file__).resolve().parents[2]
# A process of its own: hooks and CPU mode stay installed.
SCRIPT = """
import json, os, sys
os.environ["NVTE_CPU_OFFLOAD_V1"] = "1"  # asked for by Megatron where activations are offloaded
from megatron_maxscore.commands.check import Launch, examine
from tests.recipes import RECIPES, command_of, ranks_of
found = {}
for name in RECIPES:
    command = ["--moe-router-type", "maxscore", *command_of(name)]
    report = examine(Launch(command, ranks_of(name)))
    found[name] = {"refusal": report.refusal, "unknown": report.unknown, "notes": report.notes}
print("FOUND " + json.dumps(found))
"""


@pytest.fixture(scope="module")
def recipes():
    done = forked.python("-c", SCRIPT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("FOUND ")[1])


def test_every_recipe_passes(recipes):
    assert len(recipes) == 18
    assert {name: found["refusal"] for name, found in recipes.items()} == dict.fromkeys(RECIPES, "")
    assert all(args[BENCHMARK] for args in RECIPES.values())
    # Known to Megatron's branch dev alone.
    unknown = {flag for found in recipes.values() for flag in found["unknown"]}
    assert unknown == {
        "--chunked-optimizer-state-offload", "--optimizer-state-offload-chunk-size-mb",
        "--moe-n-hash-layers", "--overlap-p2p-comm",
    }  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_said_of_a_recipe(recipes, name):
    args, notes = RECIPES[name], dict(recipes[name]["notes"])
    split = args["context_parallel_size"] * args["tensor_model_parallel_size"]
    tokens = args["seq_length"] * args["micro_batch_size"] // split
    share, rest = divmod(tokens * args["moe_router_topk"], args["num_experts"])
    assert notes["tokens"].startswith(f"{tokens:,} on each rank")
    assert notes["each expert"].startswith(f"{share:,} of a rank's tokens")
    assert ("one more" in notes["each expert"]) == bool(rest)
    assert "kernels take its place" in notes["--moe-router-fusion"]
    backend = "deepep" if args.get("moe_enable_deepep") else args["moe_flex_dispatcher_backend"]
    assert f"flex ({backend})" in notes["dispatch"]
    assert notes["solver"] == "on the GPU, with a certified gap"
    function = args.get("moe_router_score_function", "softmax")
    assert notes["gates"].startswith(
        "SoftTopk" if function == "softmax" else f"those of {function}"
    )
    if args.get("moe_router_enable_expert_bias"):
        assert "scores" in notes["objective"] and notes["stock Megatron"].startswith("yes")
    factor = args.get("moe_expert_rank_capacity_factor")
    if factor is not None:
        # Every expert's rows are a multiple of 256 in these recipes.
        assert "the least safe one is 1," in notes["--moe-expert-rank-capacity-factor"]
    assert ("CUDA graphs" in notes) == ("cuda_graph_scope" in args)


def test_layers_of_every_recipe():
    # It declares packages before Megatron is imported.
    done = subprocess.run(
        [sys.executable, "-m", "tests.recipe_layers"],
        capture_output=True, text=True, timeout=240, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.split("FOUND ")[1])
    assert found.keys() == RECIPES.keys()
    for name, layer in found.items():
        args = RECIPES[name]
        is_softmax = args.get("moe_router_score_function", "softmax") == "softmax"
        has_bias = args.get("moe_router_enable_expert_bias", False)
        assert layer == {
            "router": "MaxScoreRouter",
            "dispatcher": "BudgetedFlexTokenDispatcher"
            if "moe_expert_rank_capacity_factor" in args
            else "MoEFlexTokenDispatcher",
            "experts": args["num_experts"] // args["expert_model_parallel_size"],
            "dtype": "torch.bfloat16",
            "options": ["soft_topk", "logits"] if is_softmax else ["score", "scores"],
            "bias": has_bias,
            "groups": "moe_router_num_groups" in args,
        }, name


def check(*command):
    return forked.python("-m", "megatron_maxscore", "check", *command)


MODEL = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 128 "
    "--max-position-embeddings 128 --num-experts 16 --moe-router-topk 2 --micro-batch-size 1 "
    "--global-batch-size 16 --lr 1e-3 --train-iters 4 --tokenizer-type NullTokenizer "
    "--vocab-size 100 --moe-token-dispatcher-type alltoall --expert-model-parallel-size 4"
).split()


def test_a_launch_that_works():
    launcher = "torchrun --nnodes=2 --nproc-per-node 4 -m megatron_maxscore launch".split()
    done = check(
        "--", *launcher, "pretrain_gpt.py", *MODEL, "--moe-router-type", "maxscore", "--bf16",
        "--data-path", "/not/on/this/laptop", "--my-own-flag", "3",
        "--moe-router-force-load-balancing",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    said = " ".join(done.stdout.split())
    for text in ("8 ranks", "skipped: --my-own-flag", "remove it to train", "known in advance"):
        assert text in said, (text, done.stdout)


# Flags of the auxiliary loss, and what is in force with MaxScore.
AUX = {
    "": "aux_loss times 0.1, MaxScore's default; --moe-aux-loss-coeff changes it",
    "--moe-router-load-balancing-type aux_loss": (
        "aux_loss times 0.1, MaxScore's default; --moe-aux-loss-coeff changes it"
    ),
    "--moe-aux-loss-coeff 0": "none",
    "--moe-aux-loss-coeff 0.0 --moe-router-load-balancing-type aux_loss": "none",
    "--moe-aux-loss-coeff 1e-3": "aux_loss times 0.001",
    "--moe-router-load-balancing-type none": "none",
    # A spec is read too late to set our default.
    "--spec megatron_maxscore.moe.specs gpt_layer": "none",
    "--use-checkpoint-args --load nowhere": (
        "that of the checkpoint's run, if it ran with MaxScore; otherwise aux_loss times 0.1, "
        "MaxScore's default; --moe-aux-loss-coeff changes it"
    ),
    "--moe-router-load-balancing-type seq_aux_loss": "none",
    "--moe-router-load-balancing-type aux_loss seq_aux_loss --moe-aux-loss-coeff 1e-2 1e-4": (
        "aux_loss times 0.01 and seq_aux_loss times 0.0001"
    ),
}
AUX_SCRIPT = """
import json, sys
from megatron_maxscore.commands.check import Launch, examine
model, flags = sys.argv[1].split(), sys.argv[2:]
found = {}
for each in flags:
    ours = [] if "--spec" in each else ["--moe-router-type", "maxscore"]
    report = examine(Launch([*model, *ours, *each.split()], 16))
    found[each] = report.refusal or dict(report.notes)["auxiliary loss"]
print("FOUND " + json.dumps(found))
"""


def test_auxiliary_loss_in_force():
    done = forked.python("-c", AUX_SCRIPT, " ".join(MODEL), *AUX)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.split("FOUND ")[1]) == AUX


@pytest.mark.parametrize(
    ("flags", "where"),
    [
        ("", "on the GPU, with a certified gap"),
        (
            "--tensor-model-parallel-size 2 --sequence-parallel --disable-bias-linear",
            "exact, on the host",
        ),
    ],
)
def test_where_sequences_are_solved(flags, where):
    ours = "--moe-router-type maxscore --maxscore-scope sequence".split()
    done = check("--", "pretrain_gpt.py", *MODEL, *ours, *flags.split())
    said = " ".join(done.stdout.replace("│", " ").split())
    assert done.returncode == 0 and f"solver {where}" in said, done.stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--moe-expert-capacity-factor 1.0", ("--maxscore-capacity-factor",)),
        ("--moe-router-type best", ("--moe-router-type", "best")),
        ("--pipeline-model-parallel-size 3", ("pipeline",)),
        (
            "--maxscore-preset servable --position-embedding-type rope",
            ("--maxscore-preset servable", "use --normalization RMSNorm", "add --swiglu"),
        ),
        (
            "--maxscore-preset servable --maxscore-gate soft_topk",
            ("--maxscore-gate soft_topk", "--maxscore-preset servable"),
        ),
    ],
)
def test_a_launch_that_would_be_refused(flags, words):
    done = check("--", "pretrain_gpt.py", *MODEL, "--moe-router-type", "maxscore", *flags.split())
    assert done.returncode == 1, done.stdout
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("refused: ")]
    assert all(word in line for word in words), line


def test_which_formats_can_hold_the_model():
    shape = "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear"
    ours = ("--moe-router-type", "maxscore", *shape.split())
    done = check("--", "pretrain_gpt.py", *MODEL, *ours)
    said = " ".join(done.stdout.replace("│", " ").split())
    assert done.returncode == 0 and "none can hold it" in said
    assert "--maxscore-preset servable" in said
    done = check("--", "pretrain_gpt.py", *MODEL, *ours, "--maxscore-preset", "servable")
    said = " ".join(done.stdout.replace("│", " ").split())
    assert done.returncode == 0 and "export to Hugging Face as ernie4_5_moe" in said


def test_no_script():
    done = check("--", "bash", "train.sh")
    assert done.returncode == 2 and "names no Python script" in done.stderr


@pytest.mark.parametrize("name", example_recipes.NAMES)
def test_example_recipes_pass(name):
    command = example_recipes.command_of(name)
    done = check("--ranks", str(example_recipes.RANKS[name]), "--", "pretrain_gpt.py", *command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout
    said = " ".join(done.stdout.split())
    assert "flex (hybridep)" in said and "on the GPU, with a certified gap" in said
