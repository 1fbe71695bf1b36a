"""Documents that are written from code are those that the code writes."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

from megatron_maxscore.moe.config import config_fields

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))


def test_compatibility_table_is_current_and_full():
    import make_compatibility

    text = make_compatibility.document()
    assert make_compatibility.DOCUMENT.read_text() == text
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
    named = set(re.findall(r"\b(test_[a-z_0-9]+)\b(?!\.py)", text.split("## Megatron-LM's")[0]))
    assert len(named) > 15 and named <= known


def test_readme_names_every_flag():
    text = (ROOT / "README.md").read_text()
    for name in config_fields():
        assert "--" + name.replace("_", "-") in text, name
