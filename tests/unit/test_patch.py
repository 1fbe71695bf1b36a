"""The patch for forks: what it adds, where, and what it leaves as it was."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import pytest

from megatron_maxscore import patch
from megatron_maxscore.moe.fields import config_fields
from tools.maintenance import patches
from tools.maintenance.releases import RELEASES, copy_of_wheel

CONFIG = "megatron/core/transformer/transformer_config.py"


@pytest.fixture(scope="module", params=RELEASES)
def tree(request, tmp_path_factory):
    return copy_of_wheel(request.param, tmp_path_factory.mktemp("tree"))


def contents(tree):
    return {p.relative_to(tree): p.read_bytes() for p in tree.rglob("*") if p.is_file()}


def act(action, tree):
    return "\n".join(patch.run(action, tree))


def test_apply_check_revert(tree):
    before = contents(tree)
    assert "can be patched" in act("check", tree)
    assert contents(tree) == before
    act("apply", tree)
    patched = contents(tree)
    changed = {str(name) for name in patched if patched[name] != before[name]}
    assert changed == {hunk.path for hunk in patch.hunks_for(tree)} and len(changed) == 4
    assert "is patched" in act("check", tree)
    assert "nothing to apply" in act("apply", tree) and contents(tree) == patched
    act("revert", tree)
    assert contents(tree) == before
    assert "nothing to revert" in act("revert", tree)


def test_adds_every_option_with_its_default(tree):
    act("apply", tree)
    found = {}
    for node in ast.parse((tree / CONFIG).read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == "TransformerConfig":
            for item in node.body:
                if isinstance(item, ast.AnnAssign) and item.value is not None:
                    found[item.target.id] = ast.unparse(item.annotation), item.value
    act("revert", tree)
    for name, item in config_fields().items():
        hint, value = found[name]
        shown = item.type.__name__ if isinstance(item.type, type) else str(item.type)
        assert hint == shown.replace("typing.", "")
        assert ast.literal_eval(value) == item.default


def test_takes_forks_whose_other_lines_differ(tree):
    path = tree / CONFIG
    original = path.read_text()
    path.write_text("# A line of the fork's own.\n" * 5 + original)
    act("apply", tree)
    assert "    moe_router_type: Literal" in path.read_text()
    act("revert", tree)
    assert path.read_text() == "# A line of the fork's own.\n" * 5 + original
    path.write_text(original)


def test_replaces_blocks_of_another_release_of_ours(tree):
    act("apply", tree)
    path = tree / CONFIG
    patched = path.read_text()
    path.write_text(patched.replace("    maxscore_price_decay: float = 0.9\n", ""))
    with pytest.raises(patch.PatchError, match="is patched in part, or by another release"):
        act("check", tree)
    act("apply", tree)
    assert path.read_text() == patched
    act("revert", tree)


def test_a_tree_that_is_patched_in_part_is_told_apart(tree):
    plain = (tree / CONFIG).read_text()
    act("apply", tree)
    patched = (tree / CONFIG).read_text()
    (tree / CONFIG).write_text(plain)
    with pytest.raises(patch.PatchError, match=r"in part.*transformer_config\.py"):
        act("check", tree)
    act("apply", tree)
    assert (tree / CONFIG).read_text() == patched and "is patched" in act("check", tree)
    act("revert", tree)


def test_keeps_links_and_line_ends(tree, tmp_path):
    before = contents(tree)
    config = tree / CONFIG
    elsewhere = tmp_path / "config.py"
    elsewhere.write_bytes(config.read_bytes().replace(b"\n", b"\r\n"))
    config.unlink()
    config.symlink_to(elsewhere)
    linked = elsewhere.read_bytes()
    act("apply", tree)
    assert config.is_symlink()
    patched = elsewhere.read_bytes()
    assert b"moe_router_type: Literal" in patched
    assert patched.count(b"\n") == patched.count(b"\r\n") > linked.count(b"\r\n")
    act("revert", tree)
    assert config.is_symlink() and elsewhere.read_bytes() == linked
    config.unlink()
    config.write_bytes(linked.replace(b"\r\n", b"\n"))
    assert contents(tree) == before


def test_names_a_file_that_is_no_text(tree):
    config = tree / CONFIG
    original = config.read_bytes()
    config.write_bytes(original + b"# \xff\n")
    with pytest.raises(patch.PatchError, match=f"{CONFIG} is not UTF-8 text"):
        act("apply", tree)
    config.write_bytes(original)


def test_reverts_a_tree_that_has_moved_on(tree):
    before = contents(tree)
    act("apply", tree)
    info = tree / "megatron/core/package_info.py"
    release = info.read_text()
    info.write_text("MAJOR = 0\nMINOR = 99\n")
    # One of the files is gone there.
    gone = tree / "megatron/training/checkpointing.py"
    there = gone.read_text()
    gone.unlink()
    with pytest.raises(patch.PatchError, match=r"0\.99"):
        act("apply", tree)
    act("revert", tree)
    gone.write_text(there)
    info.write_text(release)
    act("revert", tree)
    assert contents(tree) == before


@pytest.mark.parametrize("broken", ["anchor", "file", "mark"])
def test_refuses_and_leaves_a_tree_as_it_was(tree, broken):
    path = tree / "megatron/training/checkpointing.py"
    original = path.read_text()
    if broken == "anchor":
        path.write_text(original.replace("_set_arg('moe_router_topk', force=True)", "pass"))
        why = "checkpointing.py: the place of block 1 of 1 occurs 0 times"
    elif broken == "file":
        path.unlink()
        why = "lacks megatron/training/checkpointing.py"
    else:
        path.write_text(original + patch.BEGIN + "\n")
        why = "has no"
    before = contents(tree)
    for action in ("check", "apply"):
        with pytest.raises(patch.PatchError, match=why):
            act(action, tree)
        assert contents(tree) == before
    path.write_text(original)


def test_a_failing_write_leaves_a_tree_as_it_was(tree, monkeypatch):
    before = contents(tree)
    calls = []

    def replace(source, target):
        calls.append(target)
        if len(calls) == 3:
            raise OSError("the disk is full")
        return original(source, target)

    original = os.replace
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(patch.PatchError, match="nothing was changed: the disk is full"):
        act("apply", tree)
    assert len(calls) == 3 and contents(tree) == before


def test_refuses_unknown_releases_and_places(tmp_path):
    with pytest.raises(patch.PatchError, match="no Megatron tree"):
        act("check", tmp_path)
    info = tmp_path / "megatron/core/package_info.py"
    info.parent.mkdir(parents=True)
    info.write_text("MAJOR = 0\nMINOR = 12\n")
    with pytest.raises(patch.PatchError, match=r"0\.12; there are patches for 0\.17, 0\.18, 0\.19"):
        act("apply", tmp_path)
    command = [sys.executable, "-m", "megatron_maxscore.patch", "apply", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_patches_hold_no_line_of_megatrons():
    for path in patch.patch_files().values():
        lines = path.read_text().splitlines()
        assert all(line.startswith(("+", "--- a/", "@@ ")) for line in lines)


def test_patches_are_those_of_the_current_options():
    blocks = [[line + "\n" for line in patches.block_lines(p)] for p in patches.places()]
    for path in patch.patch_files().values():
        assert [hunk.lines for hunk in patch.read_hunks(path)] == blocks
