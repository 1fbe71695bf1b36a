"""Every parallelism and MoE feature trains, or is refused by name, on every release."""

from __future__ import annotations

import json
import re

import pytest

from megatron_maxscore.moe import metrics
from tests.dist.training_runs import MAXSCORE, MODEL, run, succeed
from tools.maintenance import features
from tools.maintenance.releases import NEWEST, RELEASES, in_front, on_every_release, wheel


def _cases():
    for release in RELEASES:
        for item in features.known_to(release, features.PARALLELISM + features.FEATURES):
            for scope in item.scopes:
                quick = item.quick and release == NEWEST
                marks = () if quick else (pytest.mark.full,)
                yield pytest.param(
                    release, item, scope, id=f"{item.name}-{scope}-{release}", marks=marks
                )


@pytest.mark.parametrize(("release", "item", "scope"), _cases())
def test_trains(tmp_path, release, item, scope):
    flags = f"{MAXSCORE.replace('scope local', f'scope {scope}')} --train-iters 4 {item.flags}"
    result = succeed(tmp_path, item.ranks, flags, environment=in_front(wheel(release)))
    losses = [float.fromhex(text) for text in result.losses]
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.1
    assert set(result.validation) == {"(price routing)", "(flow routing)"}
    assert len(result.statistics) == 4
    for line in result.statistics:
        for number, (loads, dropped, maxvio) in enumerate(
            zip(line["loads"], line["dropped"], line["maxvio"], strict=True)
        ):
            assert dropped == 0
            if number in item.moe_layers:
                # 8 sequences of 64 tokens, 2 experts each, over 8 experts.
                assert loads == [128] * 8 and maxvio == 0.0
            else:
                assert loads == [0] * 8
        assert line["largest_gap"] <= 1e-9 and line["solves"] > 0


@on_every_release
def test_refusals(tmp_path, release):
    graph_flag = "--cuda-graph-modules" if release >= "0.18" else "--cuda-graph-scope"
    te = "--transformer-impl transformer_engine"
    items = {item.name: item for item in features.known_to(release, features.REFUSALS)}
    let_through = {item.name: item for item in features.LET_THROUGH}
    model = MODEL.replace("--mock-data", f"--mock-data --data-cache-path {tmp_path}")
    cases = {
        name: " ".join(
            f"{model} {MAXSCORE} {item.flags.format(graph_flag=graph_flag, te=te)}".split()
        )
        for name, item in {**items, **let_through}.items()
    }
    result = run(
        tmp_path, 1, "", script="tests/dist/refusal_probe.py",
        environment={**in_front(wheel(release)), "REFUSALS": json.dumps(cases)},
    )  # fmt: skip
    assert result.status == 0, result.output[-3000:]
    answers = json.loads(result.output.split("ANSWERS ")[1].splitlines()[0])
    for name, item in items.items():
        said = answers[name]
        assert said is not None, f"{name} is not refused"
        assert "\n" not in said.strip(), said
        for word in item.words:
            assert word in said, (name, said)
    for name in let_through:
        said = answers[name] or ""
        assert "maxscore" not in said.lower(), f"{name} is refused: {said}"
        assert "unrecognized" not in said, said


def curves(directory):
    """Return every scalar curve of a TensorBoard directory, by name: {step: value}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    return {
        name: {point.step: point.value for point in events.Scalars(name)}
        for name in events.Tags()["scalars"]
    }


@on_every_release
def test_metrics_reach_the_writers(tmp_path, release):
    flags = (
        f"{MAXSCORE.replace('scope local', 'scope group')} --train-iters 4 --log-interval 2 "
        f"--tensorboard-log-interval 2 --tensorboard-dir {tmp_path}/tb --moe-per-layer-logging "
        "--expert-model-parallel-size 2 --pipeline-model-parallel-size 2 "
        "--num-layers 4 --moe-layer-freq ([0]*2+[1]*2)"
    )
    result = succeed(tmp_path, 4, flags, environment=in_front(wheel(release)))
    found = curves(tmp_path / "tb")
    for name in metrics.NAMES:
        assert found[name].keys() == {2, 4}, name
        # Metrics with percentiles leave out layers without a value.
        none = {2: 0.0, 4: 0.0}
        layers = [found.get(f"moe/{name}_layer_{layer}", none) for layer in range(4)]
        for step in (2, 4):
            assert [layer[step] for layer in layers[:2]] == [0.0, 0.0], "dense layers"
            mean = (layers[2][step] + layers[3][step]) / 2
            assert found[name][step] == pytest.approx(mean, rel=1e-5)
    value = {name.removeprefix(metrics.PREFIX): found[name][4] for name in metrics.NAMES}
    assert value["objective"] <= value["unconstrained"] + 1e-6
    assert value["load_p05"] == value["load_p95"] == value["load_max"] == pytest.approx(1.0)
    assert 0.0 < value["first_choices"] <= 1.0 and 0.0 < value["score_ratio"] <= 1.0
    assert value["gap"] <= 1e-9 and value["rounds"] >= 2 and value["solve_ms"] > 0.0
    if release != RELEASES[0]:
        line = next(x for x in result.output.splitlines() if "iteration        4/" in x)
        shown = re.findall(r"maxscore/(\w+)", line)
        assert sorted(shown) == ["first_choices", "price_range", "score_ratio"]
