"""A checkpoint trained here, in use: evaluation, decoding, generation, the evaluation harness."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest

from tests import forked
from tests.dist.checkpoint_runs import MODEL_ON_TEXT, local_task, prepare_words, tool, train
from tests.dist.training_runs import MAXSCORE, MODEL, succeed


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train a small model for some steps; return its checkpoint and data."""
    directory = tmp_path_factory.mktemp("inference")
    data = prepare_words(directory)
    flags = (
        f"{MAXSCORE} --train-iters 20 --norm-epsilon 1e-4 --moe-router-topk-scaling-factor 2 "
        "--maxscore-temperature 0.7"
    )
    result = train(directory, data, 1, flags)
    return directory / "checkpoint", data, result


def test_evaluation_of_a_checkpoint(trained, tmp_path):
    checkpoint, data, training = trained
    output = tmp_path / "found.json"
    done = tool(
        "evaluate", "--checkpoint", checkpoint, "--data", data / "valid_text_document",
        "--output", output, "--", "--micro-batch-size", 4,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Falling back" not in done.stderr, "warnings of optional packages"
    found = json.loads(output.read_text())
    price, flow = found["rules"]["price"], found["rules"]["flow"]
    # Megatron's own validation, on other cuts of the same text.
    assert abs(price["loss"] - training.validation["(price routing)"]) < 0.05
    assert abs(flow["loss"] - training.validation["(flow routing)"]) < 0.05
    assert price["tokens"] > 1000
    for rule in (price, flow):
        loads = np.array(rule["loads"])
        assert loads.shape == (2, 8) and (loads.sum(1) == 2 * rule["tokens"]).all()
        np.testing.assert_allclose(rule["maxvio"], loads.max(1) / loads.mean(1) - 1)
    # Every batch of the flow is balanced: one token per batch at most above the mean.
    assert np.ptp(flow["loads"], axis=1).max() <= np.ceil(flow["tokens"] / 256)
    assert np.ptp(price["loads"]) > np.ptp(flow["loads"])
    assert 0 < found["comparison"]["kl"] < 0.1 < found["comparison"]["top1_agreement"] <= 1
    decoding = found["decoding"]
    assert decoding["sequences"] == 4 and decoding["largest_difference_float64"] < 1e-9
    for kind in ("", "_float64"):
        one, other = (decoding[f"loss_{way}{kind}"] for way in ("one_pass", "token_by_token"))
        assert abs(one - other) < 1e-5


def test_the_study_evaluates_by_its_own_flags(trained, tmp_path):
    from tools.study import runs as study_runs
    from tools.study.arms import ARMS, START, Run, Size

    checkpoint, data, _ = trained
    flags = f"{MODEL_ON_TEXT} --norm-epsilon 1e-4"
    size = Size("tiny", " ".join(flags.split()), 20, 512, 0.1, valid_sequences=16)
    (tmp_path / "custom").symlink_to(data)
    (tmp_path / "checkpoint").symlink_to(checkpoint)
    run = Run("custom", size, ARMS["gshard"], START, 1, "core")
    command = study_runs.evaluation_command(run, tmp_path, tmp_path)
    done = forked.python(*command[1:])
    assert done.returncode == 0, done.stderr[-3000:]
    rules = json.loads((tmp_path / "evaluation.json").read_text())["rules"]
    assert list(rules) == ["own", "no drops"]
    assert rules["own"]["dropped"] > 0.01 > rules["no drops"]["dropped"] == 0.0


def test_generation(trained):
    checkpoint, data, _ = trained
    arguments = ("--checkpoint", checkpoint, "--tokens", 12, "--prompt", "token expert")
    done = tool("generate", *arguments, "--temperature", 0, "--samples", 2)
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = done.stdout.split("-" * 40)
    assert one.startswith("token expert") and len(one) > 14 and one.strip() == other.strip()
    tokenizer = ("--", "--tokenizer-model", data / "tokenizer.model")
    done = tool("generate", *arguments, "--seed", 3, "--samples", 2, *tokenizer)
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = done.stdout.split("-" * 40)
    assert one.strip() != other.strip()
    wrong = tool("generate", *arguments, "--", "--tokenizer-model", "nowhere.model")
    assert wrong.returncode == 2 and "tokenizer nowhere.model does not exist" in wrong.stderr
    wrong = tool("generate", "--checkpoint", data)
    assert wrong.returncode == 2 and "holds no checkpoint" in wrong.stderr


def in_process(script, *arguments):
    """Run a script that restores a checkpoint, which a process can do once."""
    return forked.python("-c", script, *arguments, timeout=300)


NULL_TOKENIZER = """
import sys, torch
from megatron_maxscore.inference import restore
trained = restore(sys.argv[1])
assert trained.args.tokenizer_type == "NullTokenizer" and trained.args.vocab_size == 127
assert trained.args.null_tokenizer_pad_id == 126
logits = trained.logits(torch.arange(64)[None])
assert logits.shape[:2] == (1, 64) and torch.isfinite(logits).all()
torch.distributed.destroy_process_group()
print("restored")
"""


def test_a_checkpoint_without_a_tokenizer_is_restored(tmp_path):
    flags = f"{MAXSCORE} --train-iters 2 --save {tmp_path}/checkpoint --save-interval 2"
    succeed(tmp_path, 1, f"{flags} --null-tokenizer-pad-id 126")
    done = in_process(NULL_TOKENIZER, tmp_path / "checkpoint")
    assert done.stdout.strip() == "restored", done.stderr[-3000:]


BAD_WEIGHT = """
import sys, torch
from megatron_maxscore.inference import Decoder, NotFiniteError, restore, sample
from megatron_maxscore.inference.harness import MaxScoreLM
from megatron_maxscore.moe.step import maxscore_routers
trained = restore(sys.argv[1])
tokens = torch.arange(10)[None]
assert torch.isfinite(trained.logits(tokens)).all()
routers = maxscore_routers([trained.model])
with torch.no_grad():
    routers[1].weight[2, 3] = float("nan")
lm = MaxScoreLM(trained)
for use in (
    lambda: trained.logits(tokens),
    lambda: Decoder(trained, 1, 16).feed(tokens),
    lambda: list(sample(trained, [1, 2, 3], 4)),
    lambda: lm._loglikelihood_tokens([(None, [1, 2], [3, 4])], disable_tqdm=True),
):
    try:
        use()
    except NotFiniteError as error:
        assert f"layer {routers[1].layer_number}: " in str(error), error
    else:
        raise AssertionError("a NaN went unnoticed")
torch.distributed.destroy_process_group()
print("refused")
"""


def test_bad_router_scores_are_reported_in_inference(trained):
    done = in_process(BAD_WEIGHT, trained[0])
    assert done.stdout.strip() == "refused", done.stderr[-3000:]


FLOW = """
import sys, torch
from megatron_maxscore.inference import Decoder, restore
from megatron_maxscore.moe.evaluation import evaluation_routing
trained = restore(sys.argv[1])
tokens = torch.arange(10)[None]
decoder = Decoder(trained, 1, 16)
decoder.feed(tokens)
def refused(use):
    try:
        use()
    except ValueError as error:
        return "--maxscore-eval-routing price" in str(error)
    return False
with evaluation_routing("flow"):
    assert refused(lambda: Decoder(trained, 1, 16)) and refused(lambda: decoder.feed(tokens[:, :1]))
    trained.logits(tokens)  # whole sequences may
    from megatron.core.inference.utils import InferenceMode
    with InferenceMode.active():
        assert refused(lambda: trained.logits(tokens)), "one of Megatron's engines"
decoder.feed(tokens[:, :1])
torch.distributed.destroy_process_group()
print("refused")
"""


def test_flow_routing_is_refused_in_decoding(trained):
    done = in_process(FLOW, trained[0])
    assert done.stdout.strip() == "refused", done.stderr[-3000:]
    wrong = tool(
        "generate", "--checkpoint", trained[0], "--prompt", "token", "--",
        "--maxscore-eval-routing", "flow",
    )  # fmt: skip
    assert wrong.returncode == 2
    lines = [line for line in wrong.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "--maxscore-eval-routing price" in lines[0]


def test_a_killed_run_of_the_study_goes_on_and_ends_alike(trained, tmp_path, monkeypatch):
    from tools.study import runs as study_runs
    from tools.study.arms import ARMS, START, Run, Size

    monkeypatch.setattr(study_runs, "SAVE_EVERY", 2)
    monkeypatch.setattr(study_runs, "CURVE_POINTS", 3)
    _, data, _ = trained
    flags = re.sub(r"--mock-data.*--vocab-size 127|--split \S+|--(seed|lr) \S+", "", MODEL)
    flags = re.sub(r"--eval-\S+ \S+", "", flags) + " --min-lr 1e-4"
    size = Size("tiny", " ".join(flags.split()), 6, 512, 0.1, valid_sequences=8)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "custom").symlink_to(data)
    run = Run("custom", size, ARMS["maxscore"], START, 21, "core")

    class KilledError(Exception):
        pass

    seen = []

    def step(iteration, loss):
        seen.append(iteration)
        if iteration == 5 and len(seen) == 5:
            raise KilledError

    def no_evaluation(run, data, directory):
        code = f"open({str(directory / 'evaluation.json')!r}, 'w').write('{{}}')"
        return [sys.executable, "-c", code]

    monkeypatch.setattr(study_runs, "evaluation_command", no_evaluation)

    def carry_out(output):
        processes = study_runs.Processes()
        return study_runs.carry_out(run, tmp_path / "data", output, processes, step)

    with pytest.raises(KilledError):
        carry_out(tmp_path / "killed")
    resumed = carry_out(tmp_path / "killed")
    assert seen in ([1, 2, 3, 4, 5, 5, 6], [1, 2, 3, 4, 5, 3, 4, 5, 6]), "from a checkpoint"
    whole = carry_out(tmp_path / "whole")
    for name in ("curve", "load_map", "maxvio_mean", "dropped"):
        assert resumed[name] == whole[name], name
    # Megatron's log has the mean of a process's first two steps for the second one.
    assert resumed["train_loss"][:5] == whole["train_loss"][:5]
    assert abs(np.mean(whole["train_loss"][4:]) - resumed["train_loss"][5]) < 1e-4
    assert list(whole["curve"]) == [2, 4, 6] and whole["maxvio_max"] == 0.0


PROBE = """
import sys, torch
from megatron_maxscore.inference import Decoder, restore
from megatron_maxscore.inference.harness import MaxScoreLM

trained = restore(sys.argv[1], ["--micro-batch-size=3"])
args = trained.args
assert args.micro_batch_size == 3 and args.layernorm_epsilon == 1e-4
assert args.moe_router_type == "maxscore" and args.maxscore_temperature == 0.7
assert args.maxscore_eval_routing == "both" and args.moe_token_dispatcher_type == "alltoall"

model = MaxScoreLM(trained, batch_size=3)
from lm_eval.api.instance import Instance
pairs = [("token", " expert"), ("", "capacity price"), ("a", " b c")]
pairs.append((("flow score " * 8).strip(), " gap"))
requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
for (logprob, greedy), (context, continuation) in zip(
    model.loglikelihood(requests, disable_tqdm=True), pairs
):
    given = model.tok_encode(context) or [model.eot_token_id]
    whole = given + model.tok_encode(continuation)
    if context:
        whole = model.tok_encode(context + continuation)
    # One by one and without padding, by another path: the cache.
    decoder, total, is_greedy = Decoder(trained, 1, 200), 0.0, True
    for place, token in enumerate(whole[:-1]):
        row = decoder.feed(torch.tensor([[token]]))[0].log_softmax(0)
        if place + 1 >= len(given):
            total += float(row[whole[place + 1]])
            is_greedy &= int(row.argmax()) == whole[place + 1]
    assert abs(total - logprob) < 1e-3, (total, logprob)
    assert is_greedy == greedy
text = "token expert capacity " * 40
rolling = Instance("loglikelihood_rolling", {}, (text,), 0)
assert -1000 < model.loglikelihood_rolling([rolling], disable_tqdm=True)[0] < -10
wish = Instance("generate_until", {}, ("token", {"until": ["\\n"], "max_gen_toks": 20}), 0)
(answer,) = model.generate_until([wish], disable_tqdm=True)
assert "\\n" not in answer
try:
    decoder.feed(torch.tensor([[1, 2]]))
except ValueError as error:
    assert "see each other" in str(error)
else:
    raise AssertionError("several tokens after the first")
print("OK")
"""


def test_restored_arguments_and_scores(trained):
    checkpoint, _, _ = trained
    done = in_process(PROBE, checkpoint)
    assert done.returncode == 0 and "OK" in done.stdout, done.stderr[-3000:]


def test_harness_on_a_local_task(trained, tmp_path):
    checkpoint, _, _ = trained
    task, environment = local_task(tmp_path)
    output = tmp_path / "found.json"
    done = tool(
        "harness", "--checkpoint", checkpoint, "--output", output, *task, environment=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Words of the text are likelier than letters that it does not have.
    assert json.loads(output.read_text())["local_items"]["acc,none"] == 1.0
    assert "local_items" in done.stdout
