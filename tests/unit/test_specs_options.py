"""Options from the environment are checked by name and type."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WRONG = {
    '{"normalize_gates": "no"}': "--maxscore-normalize-gates must be true or false, got 'no'",
    '{"normalize_gates": 1}': "must be true or false, got 1",
    '{"record_layers": 1, "record_dir": "x"}': "--maxscore-record-layers must be a text, got 1",
    '{"record_dir": 5}': "--maxscore-record-dir must be a text, got 5",
    '{"stats_file": 5}': "--maxscore-stats-file must be a text, got 5",
    '{"capacity_factor": "2"}': "--maxscore-capacity-factor must be a number, got '2'",
    '{"capacity_factor": true}': "must be a number, got True",
    '{"anneal_steps": 1.5}': "--maxscore-anneal-steps must be a whole number, got 1.5",
    '{"scope": ["group"]}': "--maxscore-scope must be one of local, group, sequence",
    '{"temperature": [1]}': "--maxscore-temperature must be a number",
    '{"fixed_shape": "64"}': "--maxscore-fixed-shape must be two numbers",
    '{"speed": 9}': "unknown options ['speed']; there are scope",
    '["scope"]': "must be a JSON object",
    "{scope": "is not JSON",
}
SCRIPT = """
import json, os, sys
sys.argv = ["script"]
os.environ.pop("MEGATRON_MAXSCORE", None)
from megatron_maxscore.moe import environment
found = {}
for text in json.loads(sys.stdin.read()):
    os.environ["MEGATRON_MAXSCORE"] = text
    try:
        environment.options_from_environment()
        found[text] = "accepted"
    except ValueError as error:
        found[text] = str(error)
os.environ["MEGATRON_MAXSCORE"] = '{"mode": "bounded"}'
from megatron_maxscore.moe import MaxScoreConfig
kept = environment.options_from_environment(MaxScoreConfig(scope="group"))
found["beside flags"] = [kept.scope, kept.mode]
os.environ["MEGATRON_MAXSCORE"] = '{"scope": "sequence"}'
try:
    environment.options_from_environment(MaxScoreConfig(scope="group"))
except ValueError as error:
    found["against flags"] = str(error)
print("FOUND " + json.dumps(found))
"""


@pytest.fixture(scope="module")
def answers():
    texts = [*WRONG, '{"scope": "group", "capacity_factor": 2, "fixed_shape": [64, 2]}', "{}"]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=json.dumps(texts), capture_output=True, text=True,
        cwd=ROOT, timeout=120,
    )  # fmt: skip
    assert "FOUND" in done.stdout, done.stderr[-2000:]
    return json.loads(done.stdout.split("FOUND ")[1])


@pytest.mark.parametrize("text", WRONG)
def test_wrong_values(answers, text):
    assert WRONG[text] in answers[text] and answers[text].startswith("MEGATRON_MAXSCORE")


def test_right_values(answers):
    assert [text for text, answer in answers.items() if answer == "accepted"] == [
        '{"scope": "group", "capacity_factor": 2, "fixed_shape": [64, 2]}', "{}",
    ]  # fmt: skip


def test_flags_beside_the_environment(answers):
    assert answers["beside flags"] == ["group", "bounded"]
    assert answers["against flags"] == (
        "MEGATRON_MAXSCORE says scope 'sequence', and --maxscore-scope 'group'; "
        "leave one of them out"
    )
