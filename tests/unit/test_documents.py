"""Documents that are written from code are those that the code writes."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import torch

import megatron_maxscore
from megatron_maxscore.moe.fields import config_fields
from megatron_maxscore.ops import soft_topk
from tools.maintenance import compatibility

ROOT = Path(__file__).resolve().parents[2]


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
    text = (ROOT / "docs/compatibility.md").read_text()
    known = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                known.add(node.name)
    named = set(re.findall(r"\.py::(test_[a-z_0-9]+)\b", text))
    assert len(named) > 15 and named <= known


def test_readme_names_every_flag():
    text = (ROOT / "README.md").read_text()
    for name in config_fields():
        assert "--" + name.replace("_", "-") in text, name


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
