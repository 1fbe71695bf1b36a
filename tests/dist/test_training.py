"""Megatron's own training loop, started as a user starts it."""

from __future__ import annotations

import itertools
import re
from importlib.metadata import version

import pytest
import torch

from megatron_maxscore import flow
from tests.dist.training_runs import MAXSCORE, TOPK, run, succeed
from tools.maintenance.releases import in_front, on_every_release, wheel


def on(release):
    """Return the environment in which a release hides the installed one, if it is another."""
    return {} if release == version("megatron-core") else in_front(wheel(release))


LAYOUTS = {
    "TP2xEP2": "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2 "
    "--expert-tensor-parallel-size 1 --moe-z-loss-coeff 1e-3",
    "PP2xEP2": "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2",
    "EP4": "--expert-model-parallel-size 4 --bf16 --moe-router-dtype fp32",
    "TP2xPP2": "--tensor-model-parallel-size 2 --sequence-parallel "
    "--pipeline-model-parallel-size 2",
}


# The last one is trained in by another test too.
@pytest.mark.parametrize(
    "layout", [*list(LAYOUTS)[:-1], pytest.param("TP2xPP2", marks=pytest.mark.full)]
)
def test_trains_in_every_layout(tmp_path, layout):
    result = succeed(tmp_path, 4, f"{MAXSCORE} {LAYOUTS[layout]} --train-iters 6")
    losses = [float.fromhex(text) for text in result.losses]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.1
    assert set(result.validation) == {"(price routing)", "(flow routing)"}
    assert len(result.statistics) == 6
    for line in result.statistics:
        assert line["maxvio"] == [0.0, 0.0] and line["dropped"] == [0, 0]
        # 8 sequences of 64 tokens, 2 experts each, over 8 experts.
        assert line["loads"] == [[128] * 8] * 2
        assert line["largest_gap"] <= 1e-9 and line["solves"] > 0


RECOMPUTE = {
    "none": "",
    "selective": "--recompute-granularity selective --recompute-modules moe",
    "full": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
}


def balanced_losses(tmp_path, flags, iterations, recomputes, scope="group"):
    """Train with each way of recomputation; return the losses, the same for all."""
    flags = f"{MAXSCORE} --maxscore-scope {scope} {flags} --train-iters {iterations}"
    losses = []
    for name in recomputes:
        result = succeed(tmp_path / name, 4, f"{flags} {RECOMPUTE[name]}", timeout=900.0)
        assert len(result.statistics) == iterations
        for line in result.statistics:
            assert line["maxvio"] == [0.0, 0.0] and line["dropped"] == [0, 0]
            assert line["loads"] == [[128] * 8] * 2 and line["largest_gap"] <= 1e-9
        losses.append(result.losses)
    assert all(other == losses[0] for other in losses) and len(losses[0]) == iterations
    return [float.fromhex(text) for text in losses[0]]


@pytest.mark.parametrize(
    ("layout", "scope", "recomputes"),
    [
        ("TP2xEP2", "group", ["none", "selective"]),
        pytest.param("EP4", "group", ["none", "full"], marks=pytest.mark.full),
        ("TP2xEP2", "sequence", ["none"]),
    ],
)
def test_trains_in_scopes_across_ranks(tmp_path, layout, scope, recomputes):
    losses = balanced_losses(tmp_path, LAYOUTS[layout], 6, recomputes, scope)
    assert losses[-1] < losses[0] - 0.1


PIPELINES = {
    "PP2": "--pipeline-model-parallel-size 2",
    "VPP": "--pipeline-model-parallel-size 2 --num-layers 4 "
    "--num-layers-per-virtual-pipeline-stage 1",
    "MTP": "--mtp-num-layers 2",
    "PP2 and MTP": "--pipeline-model-parallel-size 2 --mtp-num-layers 1",
}


@pytest.mark.parametrize(
    ("pipeline", "scope"),
    [
        ("VPP", "group"),
        *(
            pytest.param(name, scope, marks=pytest.mark.full)
            for name in PIPELINES
            for scope in ("local", "group")
            if (name, scope) != ("VPP", "group")
        ),
    ],
)
def test_recomputation_changes_no_loss_under_any_schedule(tmp_path, pipeline, scope):
    flags = f"{MAXSCORE} --maxscore-scope {scope} {PIPELINES[pipeline]} --train-iters 5"
    flags += " --expert-model-parallel-size 2"
    found = {
        name: succeed(tmp_path / name, 4, f"{flags} {recompute}", timeout=600.0)
        for name, recompute in RECOMPUTE.items()
        # Both kinds in the long suite; full recomputation repeats what selective does.
        if name != "selective" or (pipeline, scope) != ("VPP", "group")
    }
    plain = found["none"]
    assert len(plain.losses) == 5
    for result in found.values():
        # Losses of later steps follow from the gradients of earlier ones. With multi-token
        # prediction stock's own losses differ in the last bit under full recomputation.
        losses = [float.fromhex(text) for text in result.losses]
        assert losses == pytest.approx([float.fromhex(text) for text in plain.losses], rel=1e-6)
        assert result.validation == pytest.approx(plain.validation, rel=1e-6)
        assert [s["loads"] for s in result.statistics] == [s["loads"] for s in plain.statistics]
        assert [s["solves"] for s in result.statistics] == [s["solves"] for s in plain.statistics]


def test_options_come_from_the_checkpoint(tmp_path):
    """With ``--use-checkpoint-args``: also an auxiliary loss that was switched off."""
    ours = "--moe-router-type maxscore --maxscore-scope group --moe-aux-loss-coeff 0"
    ep2, saved = "--expert-model-parallel-size 2", f"--save {tmp_path}/checkpoint --save-interval 2"
    whole = succeed(tmp_path / "whole", 2, f"{ours} {ep2} --train-iters 4 {saved}")
    (tmp_path / "checkpoint/latest_checkpointed_iteration.txt").write_text("2")
    again = f"{ep2} --train-iters 4 --use-checkpoint-args --load {tmp_path}/checkpoint"
    resumed = succeed(tmp_path / "resumed", 2, again)
    for result in (whole, resumed):
        assert "MaxScore routing, scope group" in result.output
        assert "auxiliary loss: none" in result.output
    assert resumed.losses == whole.losses[2:]


@pytest.mark.full
@pytest.mark.parametrize("layout", ["TP2xEP2", "EP4"])
def test_two_hundred_iterations_in_scope_group(tmp_path, layout):
    losses = balanced_losses(tmp_path, LAYOUTS[layout], 200, ["none", "selective", "full"])
    assert losses[-1] < losses[0] - 1.0


def test_recorded_scores_are_those_of_the_run(tmp_path):
    scores = tmp_path / "scores"
    record = (
        f"--maxscore-record-dir {scores} --maxscore-record-layers 2 --maxscore-record-steps 2-3"
    )
    result = succeed(
        tmp_path, 2, f"{MAXSCORE} {record} --expert-model-parallel-size 2 --train-iters 4"
    )
    # Two microbatches of 2 x 64 tokens per rank and iteration.
    names = {
        f"iteration{iteration:05d}_layer002_rank{rank:03d}_solve{solve:03d}.pt"
        for iteration in (2, 3)
        for rank in (0, 1)
        for solve in (0, 1)
    }
    assert {path.name for path in scores.iterdir()} == names
    loads = torch.zeros(8, dtype=torch.int64)
    for path in scores.glob("iteration00003*"):
        saved = torch.load(path)
        assert saved["scores"].shape == (128, 8) and saved["scores"].std() > 0
        assert saved["prices"].abs().sum() > 0, "the running average of the first iterations"
        solution = flow.solve(
            saved["scores"], saved["topk"], capacity=saved["capacity"], prices=saved["prices"]
        )
        loads += solution.loads[0]
    assert loads.tolist() == result.statistics[2]["loads"][1]


@on_every_release
def test_resumed_run_continues_bit_for_bit(tmp_path, release):
    flags = (
        f"{MAXSCORE} --expert-model-parallel-size 2 --hidden-dropout 0.1 --ckpt-format torch_dist"
    )
    whole = succeed(tmp_path / "whole", 2, f"{flags} --train-iters 8", environment=on(release))
    checkpoint = tmp_path / "checkpoint"
    first = succeed(
        tmp_path / "first",
        2,
        f"{flags} --train-iters 8 --exit-interval 4 --save {checkpoint} --save-interval 4",
        environment=on(release),
    )
    second = succeed(
        tmp_path / "second",
        2,
        f"{flags} --train-iters 8 --load {checkpoint}",
        environment=on(release),
    )
    assert len(first.losses) == 4 and len(second.losses) == 4
    assert first.losses + second.losses == whole.losses
    # Price routing sees the saved running average.
    assert second.validation == whole.validation


@on_every_release
def test_prices_survive_a_change_of_layout(tmp_path, release):
    # Megatron pads the vocabulary to a multiple of this times TP, and padding has logits.
    flags = "--ckpt-format torch_dist --make-vocab-size-divisible-by 64"
    flags = f"{MAXSCORE} --maxscore-scope group --train-iters 20 {flags}"
    checkpoint = tmp_path / "checkpoint"
    saved = succeed(
        tmp_path / "save",
        4,
        f"{flags} {LAYOUTS['TP2xPP2']} --save {checkpoint} --save-interval 20",
        environment=on(release),
    )
    # Nothing is left to train: what is evaluated is what was loaded.
    layout = "--expert-model-parallel-size 4 --no-load-optim --no-load-rng"
    loaded = succeed(
        tmp_path / "load", 4, f"{flags} {layout} --load {checkpoint}", environment=on(release)
    )
    assert not loaded.losses
    price, flow_loss = saved.validation["(price routing)"], saved.validation["(flow routing)"]
    # By the flow a token's experts depend on the batch, which the layout splits in other ways.
    assert loaded.validation["(price routing)"] == pytest.approx(price, rel=1e-5)
    assert abs(price - flow_loss) > 1e-4, "the rules differ, so prices count"


@on_every_release
def test_checkpoints_of_stock_and_maxscore_load_into_each_other(tmp_path, release):
    flags = "--expert-model-parallel-size 2 --ckpt-format torch_dist --train-iters 4"
    finetune = "--finetune --load"
    for name, save, load in (("stock", TOPK, MAXSCORE), ("maxscore", MAXSCORE, TOPK)):
        saved = tmp_path / name / "checkpoint"
        first = succeed(
            tmp_path / name / "save",
            2,
            f"{save} {flags} --save {saved} --save-interval 4",
            environment=on(release),
        )
        # The stock side runs without our hooks.
        module = "megatron_maxscore.cpu" if load == TOPK else "megatron_maxscore.launch --cpu"
        second = succeed(
            tmp_path / name / "load",
            2,
            f"{load} {flags} {finetune} {saved}",
            module=module,
            environment=on(release),
        )
        assert ("has no expert prices; prices start at zero" in second.output) == (name == "stock")
        assert float.fromhex(second.losses[0]) < float.fromhex(first.losses[2]), "it goes on"


def test_bad_scores_end_every_rank_before_the_step(tmp_path):
    result = run(
        tmp_path,
        4,
        f"{MAXSCORE} --expert-model-parallel-size 4 --train-iters 5",
        environment={"BAD_RANK": "2", "BAD_ITERATION": "3"},
    )
    assert result.status != 0 and len(result.losses) == 2
    assert len(result.errors) == 1
    # The first layer's logits of one position of two sequences.
    assert "in iteration 3" in result.errors[0]
    assert "layer 1 on rank 2: 2 tokens" in result.errors[0]
    assert "Traceback" not in result.output.split("error: router scores")[0].split("iteration")[-1]


def test_bad_scores_skip_the_step_under_a_dynamic_loss_scaler(tmp_path):
    result = succeed(
        tmp_path,
        4,
        f"{MAXSCORE} --pipeline-model-parallel-size 2 --expert-model-parallel-size 2 "
        "--fp16 --initial-loss-scale 1024 --train-iters 4",
        environment={"BAD_RANK": "1", "BAD_ITERATION": "2"},
    )
    skipped = re.findall(r"iteration +(\d)/.*number of skipped iterations: +1", result.output)
    assert skipped == ["2"]
    assert "in iteration 2 (layer 1 on rank 1: " in result.output
    assert "the step is skipped" in result.output


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (f"{MAXSCORE} --moe-router-type greedy", ["--moe-router-type", "greedy", "maxscore"]),
        (f"{MAXSCORE} --data-path nowhere/text", ["--data-path nowhere/text", ".idx"]),
    ],
)
def test_wrong_options_end_every_rank_with_one_line(tmp_path, flags, words):
    flags = flags.replace("--mock-data", "")
    result = run(tmp_path, 2, f"--train-iters 2 {flags}", timeout=90.0)
    assert result.status != 0 and len(result.errors) == 1 and not result.losses
    for word in words:
        assert word in result.errors[0]


@pytest.mark.full
@on_every_release
def test_expert_bias_goes_to_stock_and_back(tmp_path, release):
    flags = (
        "--expert-model-parallel-size 2 --ckpt-format torch_dist --moe-router-score-function "
        "sigmoid --moe-router-enable-expert-bias --override-opt_param-scheduler"
    )
    stock_flags = f"{flags} --moe-router-load-balancing-type none"
    checkpoint = tmp_path / "checkpoint"

    def train(name, steps, own, **kwargs):
        return succeed(
            tmp_path / name, 2,
            f"{own} --train-iters {steps} --load {checkpoint} --save {checkpoint} "
            "--save-interval 10", environment=on(release), **kwargs,
        )  # fmt: skip

    stock = dict(module="megatron_maxscore.cpu")
    ours = train("ours", 20, f"{MAXSCORE} {flags}")
    assert "--moe-router-bias-update-rate is ignored" in ours.output
    # Stock evaluates the checkpoint as it is, and trains on from it.
    evaluated = train("evaluated", 20, f"{stock_flags} --no-load-optim --no-load-rng", **stock)
    assert not evaluated.losses
    assert evaluated.validation[""] == ours.validation["(price routing)"]
    onward = train("onward", 30, stock_flags, **stock)
    # And back again: the bias is the warm start.
    again = train("again", 40, f"{MAXSCORE} {flags}")
    losses = [[float.fromhex(text) for text in run.losses] for run in (ours, onward, again)]
    assert [len(part) for part in losses] == [20, 10, 10]
    assert "start at zero" not in again.output
    for before, after in itertools.pairwise(losses):
        assert after[0] < before[-1] + 0.1, "the loss goes on where it was"
    for line in again.statistics:
        assert line["loads"] == [[128] * 8] * 2 and line["dropped"] == [0, 0]


@pytest.mark.full
@on_every_release
def test_another_number_of_experts_is_refused_before_training(tmp_path, release):
    flags = f"{MAXSCORE} --expert-model-parallel-size 2 --ckpt-format torch_dist --train-iters 2"
    checkpoint = tmp_path / "checkpoint"
    succeed(
        tmp_path / "save",
        2,
        f"{flags} --save {checkpoint} --save-interval 2",
        environment=on(release),
    )
    result = run(
        tmp_path / "load",
        2,
        f"{flags} --num-experts 16 --load {checkpoint}",
        timeout=90.0,
        environment=on(release),
    )
    assert result.status != 0 and len(result.errors) == 1 and not result.losses
    assert "has 8 experts, --num-experts is 16" in result.errors[0]
