"""The paper's launch scripts: flags, and models of the nominal size."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path

import pytest

from tests import forked
from tools.benchmarks import paper_models

SCRIPTS = Path(__file__).resolve().parents[2] / "examples" / "paper"


def used_parameters(flags: list[str]) -> float:
    """Count by hand what a token uses: attention, two gated experts, norms, embeddings."""
    values = dict(itertools.pairwise(flags))
    hidden, ffn = int(values["--hidden-size"]), int(values["--moe-ffn-hidden-size"])
    layers = int(values["--num-layers"])
    per_layer = 4 * hidden**2 + 2 * 3 * hidden * ffn + 16 * hidden + 2 * hidden
    return layers * per_layer + 2 * 32000 * hidden + hidden


@pytest.mark.parametrize("size", paper_models.SIZES)
def test_sizes_are_nominal(size):
    flags = paper_models.flags_of(size, "maxscore")
    assert abs(used_parameters(flags) / paper_models.SIZES[size] - 1) < 0.005


def test_routers_differ_in_their_flags_only():
    flags = {router: paper_models.flags_of("162M", router) for router in paper_models.ROUTERS}
    common = set.intersection(*map(set, flags.values()))
    assert "--bf16" in common and "--adam-beta2" in common
    assert len({tuple(words) for words in flags.values()}) == len(flags)


@pytest.mark.parametrize(
    ("size", "router", "message"),
    [("2B", "maxscore", "unknown size 2B"), ("162M", "topk", "unknown router topk")],
)
def test_unknown_names_are_refused(size, router, message):
    with pytest.raises(ValueError, match=message):
        paper_models.flags_of(size, router)
    done = subprocess.run(
        ["bash", SCRIPTS / "train.sh", size, router, "data", "out"], capture_output=True, text=True
    )
    assert done.returncode == 2 and message in done.stderr


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_parse(script):
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize(
    ("size", "router"),
    [("162M", "maxscore"), pytest.param("1205M", "deepseek", marks=pytest.mark.full)],
)
def test_megatron_builds_them_on_the_meta_device(size, router):
    import json

    environment = {"MASTER_PORT": "29581"}
    done = forked.python(paper_models.__file__, size, router, environment=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    by_hand = used_parameters(paper_models.flags_of(size, router))
    assert abs(counts["used"] / by_hand - 1) < 1e-3
    assert counts["router"] == ("MaxScoreRouter" if router == "maxscore" else "TopKRouter")
