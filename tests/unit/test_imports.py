"""Imports point one way, and importing the package changes nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_maxscore"
# What each layer may import of the project and of Megatron, besides torch, numpy and the standard
# library.
ALLOWED = {
    "ops": {"megatron_maxscore.ops"},
    "flow": {"megatron_maxscore.flow", "megatron_maxscore.ops", "megatron_maxscore.errors"},
    "cpu": {"megatron_maxscore.cpu", "megatron_maxscore._", "megatron.core", "megatron.training"},
    "moe": {
        "megatron_maxscore.moe",
        "megatron_maxscore.flow",
        "megatron_maxscore.ops",
        "megatron_maxscore._",
        "megatron_maxscore.errors",
        "megatron_maxscore.releases",
        "megatron.core",
    },
    "training": {"megatron_maxscore", "megatron.core", "megatron.training"},
    "inference": {"megatron_maxscore", "megatron.core", "megatron.training"},
    "export": {"megatron_maxscore", "megatron.core"},
    "commands": {"megatron_maxscore", "megatron.core", "megatron.training"},
}
# An entry for stock scripts, named like the specs it stands beside: it installs the hooks.
ENTRIES = {"moe/specs.py": "training"}
# Training asks whether CPU mode is on, and knows none of its parts.
FORBIDDEN_IN_TRAINING = "megatron_maxscore.cpu."


def imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # Also "from package import module".
            names.append(node.module or "")
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("layer", sorted(ALLOWED))
def test_direction(layer):
    files = list((PACKAGE / layer).rglob("*.py"))
    assert files
    for path in files:
        allowed = ALLOWED[ENTRIES.get(str(path.relative_to(PACKAGE)), layer)]
        for name in imports(path):
            if name.split(".")[0] in ("megatron", "megatron_maxscore"):
                assert any(name.startswith(prefix) for prefix in allowed), (path, name)
                # What trains and routes does not know who uses it.
                if layer != "commands":
                    assert not name.startswith("megatron_maxscore.commands"), (path, name)
                if layer not in ("inference", "export", "commands"):
                    assert not name.startswith("megatron_maxscore.inference"), (path, name)
                if layer == "training":
                    assert not name.startswith(FORBIDDEN_IN_TRAINING), (path, name)


def test_formats_are_known_before_training():
    """Checks of arguments ask which format holds a model; formats know nothing of checkpoints."""
    for name in ("__init__", "choice", "formats", "glm4_moe", "ernie4_5_moe"):
        for imported in imports(PACKAGE / "export" / f"{name}.py"):
            if imported.startswith("megatron"):
                assert imported.startswith(("megatron_maxscore.export", "megatron_maxscore.moe"))
                assert not imported.endswith(("convert", "weights", "verify"))


def test_importing_changes_nothing_and_needs_no_megatron():
    code = (
        "import sys, torch\n"
        "before = (torch.zeros, torch.Tensor.to, torch.cuda.is_available, torch.cuda.Stream)\n"
        "import megatron_maxscore, megatron_maxscore.flow, megatron_maxscore.ops\n"
        "import megatron_maxscore.cpu, megatron_maxscore._replacements\n"
        "after = (torch.zeros, torch.Tensor.to, torch.cuda.is_available, torch.cuda.Stream)\n"
        "assert before == after\n"
        "assert 'megatron.core' not in sys.modules and 'megatron.training' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_tools_stand_on_their_own():
    """No tool imports tests or edits the path; tests take nothing from tools that is private."""
    root = PACKAGE.parent
    tools = list((root / "tools").rglob("*.py"))
    assert len(tools) > 20
    for path in tools:
        text = path.read_text()
        assert "sys.path.insert" not in text, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert not ast.unparse(node).startswith(("from tests", "import tests")), path
    for path in (root / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tools"):
                names = {alias.name for alias in node.names} - {"__main__"}
                assert not [name for name in names if name[0] == "_"], path
