"""Documents that are written from code are those that the code writes."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

import megatron_maxscore
from megatron_maxscore.moe.fields import config_fields
from megatron_maxscore.ops import soft_topk
from tools.maintenance import compatibility, release

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Written by programs.
GENERATED = ("compatibility.md", "report.md")


def test_compatibility_table_is_current_and_full():
    text = compatibility.document()
    assert compatibility.DOCUMENT.read_text() == text
    cells = [
        cell.strip()
        for line in text.splitlines()
        if line.startswith("|") and not line.startswith("|---")
        for cell in line.strip("|").split(" | ")
    ]
    assert all(cells), "no cell is empty"


def test_every_test_that_the_table_names_exists():
    text = (ROOT / "docs/evidence/compatibility.md").read_text()
    known = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                known.add(node.name)
    named = set(re.findall(r"\.py::(test_[a-z_0-9]+)\b", text))
    assert len(named) > 15 and named <= known


def test_every_flag_is_in_the_reference():
    text = (ROOT / "docs/flags.md").read_text()
    for name in config_fields():
        assert "--" + name.replace("_", "-") in text, name


def test_the_site_builds_without_warnings(tmp_path):
    """Strict: no broken link or anchor, no page outside the navigation, no missing name."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=240,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "api.html").read_text()
    for name in ("solve", "FlowSolution", "MaxScoreConfig", "with_maxscore", "soft_topk"):
        assert re.search(rf'id="megatron_maxscore[\w.]*\.{name}"', page), name


def test_links_outside_the_site_lead_somewhere():
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "docs/evidence/study/first/README.md",
    ):
        path = ROOT / name
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
            if not link.startswith("http"):
                assert (path.parent / link).exists(), f"{name}: {link}"


def test_no_page_is_too_long_to_read():
    for path in PAGES:
        if path.name not in GENERATED:
            assert len(path.read_text().splitlines()) <= 250, path.name


def test_every_command_says_what_runs_it():
    """A test that exists, CI, or why it cannot be run here."""
    count = 0
    for path in (*PAGES, ROOT / "CONTRIBUTING.md"):
        lines = path.read_text().splitlines()
        for place, line in enumerate(lines):
            if line != "```bash":
                continue
            said = re.fullmatch(r"<!-- command: (.+) -->", lines[place - 1])
            assert said, f"{path.name}:{place + 1}: no comment says what runs this command"
            if said[1].startswith("tests/"):
                assert (ROOT / said[1]).is_file(), f"{path.name}: {said[1]}"
            else:
                assert said[1] == "CI" or said[1].startswith(("needs a ", "takes ", "serves "))
            count += 1
    assert count > 20


def test_version_changelog_and_documents_agree(tmp_path):
    assert release.disagreements() == []
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/page.md").write_text("pip install megatron_maxscore-9.9-py3-none-any.whl\n")
    (tmp_path / "README.md").write_text("")
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 9.9 (unreleased)\n")
    assert len(release.disagreements(tmp_path)) == 2


def test_table_of_what_gates_sum_to():
    text = (ROOT / "docs/routing.md").read_text().split("| experts, k |")[1]
    sizes, _, first, above = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[:4]
    )
    assert len(sizes) == 6
    for size, at_first, far_above in zip(sizes, first[1:], above[1:], strict=True):
        num_experts, k = map(int, size.split(","))
        logits = torch.randn(4000, num_experts, generator=torch.Generator().manual_seed(0))
        # Half of the standard deviation is the default; a thousand is far above it.
        for temperature, shown in ((0.5, at_first), (1000.0, far_above)):
            mean = soft_topk(logits, k, temperature).topk(k).values.sum(1).mean()
            assert abs(float(mean) / float(shown) - 1) < 0.05, (size, temperature)


def test_shape_letters_have_one_meaning():
    """Every letter at the end of a name is in the one legend, and no module has its own."""
    legend = set(re.findall(r"^- ([A-Z]): ", megatron_maxscore.__doc__, re.MULTILINE))
    for path in (ROOT / "megatron_maxscore").rglob("*.py"):
        text = path.read_text()
        for name, letters in re.findall(r"\b([a-z]\w*_([A-Z]{1,4}))\b", text):
            assert set(letters) <= legend, f"{path.name}: {name}"
        own = [line for line in text.splitlines() if "Shape letters:" in line]
        assert all("see :mod:`megatron_maxscore`" in line for line in own), path.name
