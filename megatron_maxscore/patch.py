"""``python -m megatron_maxscore.patch apply|check|revert PATH``: MaxScore's options inside a fork.

``PATH`` is a Megatron-LM tree, or a copy of an installed wheel: a directory that holds
``megatron/core``. After ``apply`` an ordinary launch script knows ``--moe-router-type maxscore``
under plain torchrun. ``check`` says whether a tree is patched, can be patched, or cannot, and
changes nothing; ``revert`` takes our lines out again.

There is one patch per release in ``patches/``. The patches contain no lines of Megatron's. For each
block of ours a patch has the hashes of the line above and the line below, which mark its place. So
a fork can be patched too, even if it has changed other lines. On an unchanged tree of the release
``git apply --unidiff-zero`` can apply the same files. Either all files are changed or none.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_maxscore import _resources

BEGIN, END = "# >>> megatron_maxscore", "# <<< megatron_maxscore"


class PatchError(Exception):
    """A tree cannot be patched; the message says why, and nothing was changed."""


@dataclass(frozen=True)
class Hunk:
    """Lines of ours between two of Megatron's.

    Attributes:
        path: of the file, within the tree.
        after: hash of the line above.
        before: hash of the line below.
        lines: ours, with line ends; the first and the last are the marks.
    """

    path: str
    after: str
    before: str
    lines: list[str]


def line_hash(line: str) -> str:
    """Return what tells a line apart, without its indentation."""
    return hashlib.sha256(line.strip().encode()).hexdigest()[:12]


def patch_files() -> dict[str, Path]:
    """Return the patches by release, as ``"0.19"``."""
    found = {}
    for path in sorted(_resources.folder("patches").glob("core_v*.patch")):
        major, minor = path.stem.removeprefix("core_v").split(".")[:2]
        found[f"{major}.{minor}"] = path
    return found


def read_hunks(path: Path) -> list[Hunk]:
    """Read a patch file."""
    hunks: list[Hunk] = []
    name = ""
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.startswith("+++ b/"):
            name = line[6:].strip()
        elif line.startswith("@@"):
            after, before = line.rsplit("@@", 1)[1].split()[1::2]
            hunks.append(Hunk(name, after, before, []))
        elif line.startswith("+") and hunks and not line.startswith("+++"):
            hunks[-1].lines.append(line[1:])
    return hunks


def release_of(tree: Path) -> str:
    """Return ``"major.minor"`` of a tree.

    Raises:
        PatchError: it is no Megatron tree.
    """
    info = tree / "megatron" / "core" / "package_info.py"
    if not info.is_file():
        raise PatchError(
            f"{tree} is no Megatron tree: it has no megatron/core/package_info.py; give the "
            "directory that holds the folder megatron"
        )
    text = info.read_text(encoding="utf-8")
    found = [re.search(rf"^{name} *= *(\d+)", text, re.MULTILINE) for name in ("MAJOR", "MINOR")]
    if None in found:
        raise PatchError(f"{info} does not say MAJOR and MINOR, so the release is unknown")
    return ".".join(match.group(1) for match in found if match)


def hunks_for(tree: Path) -> list[Hunk]:
    """Return the hunks of a tree's release.

    Raises:
        PatchError: there is no patch for it.
    """
    release, known = release_of(tree), patch_files()
    if release not in known:
        raise PatchError(
            f"{tree} is megatron-core {release}; there are patches for {', '.join(known)}. The "
            "launcher (python -m megatron_maxscore.launch) needs no patch"
        )
    return read_hunks(known[release])


def without_ours(lines: list[str], name: str) -> list[str]:
    """Return a file's lines without our blocks.

    Raises:
        PatchError: a block has lost its end.
    """
    result: list[str] = []
    inside = False
    for line in lines:
        text = line.strip()
        if text == BEGIN:
            if inside:
                raise PatchError(f"{name}: '{BEGIN}' occurs twice without '{END}' between")
            inside = True
        elif text == END and inside:
            inside = False
        elif not inside:
            result.append(line)
    if inside:
        raise PatchError(f"{name}: '{BEGIN}' has no '{END}'; mend the file by hand")
    return result


def with_ours(lines: list[str], hunks: list[Hunk]) -> list[str]:
    """Return a file's lines with the blocks of the hunks.

    Raises:
        PatchError: the place of a block does not occur in the file, or occurs more than once.
    """
    hashes = [line_hash(line) for line in lines]
    places: dict[int, Hunk] = {}
    for number, hunk in enumerate(hunks, 1):
        found = [
            index
            for index in range(1, len(lines))
            if hashes[index - 1] == hunk.after and hashes[index] == hunk.before
        ]
        if len(found) != 1:
            raise PatchError(
                f"{hunk.path}: the place of block {number} of {len(hunks)} occurs {len(found)} "
                "times, not once; the lines around it are not those of the release. Use the "
                "launcher instead, or add the block of the patch by hand"
            )
        places[found[0]] = hunk
    result: list[str] = []
    for index, line in enumerate(lines):
        if index in places:
            result += places[index].lines
        result.append(line)
    return result


def changes(tree: Path, action: str) -> dict[Path, str]:
    """Return the new texts of the files that an action changes.

    Args:
        tree: holds ``megatron/core``.
        action: "apply" or "revert".

    Raises:
        PatchError: the tree cannot be patched.
    """
    if action == "revert":
        # Taking our blocks out needs no patch: a tree may have moved on to another release.
        hunks = [hunk for path in patch_files().values() for hunk in read_hunks(path)]
    else:
        hunks = hunks_for(tree)
    result = {}
    for name in dict.fromkeys(hunk.path for hunk in hunks):
        path = tree / name
        if not path.is_file():
            if action == "revert":
                continue
            raise PatchError(f"{tree} lacks {name}")
        try:
            old = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise PatchError(f"{name} is not UTF-8 text: {error}") from error
        # Our lines end as the file's do.
        end = "\r\n" if "\r\n" in old else "\n"
        lines = without_ours(old.replace("\r\n", "\n").splitlines(keepends=True), name)
        if action == "apply":
            lines = with_ours(lines, [hunk for hunk in hunks if hunk.path == name])
        new = "".join(lines).replace("\n", end)
        try:
            ast.parse(new)
        except SyntaxError as error:
            raise PatchError(f"{name}: would not be Python any more: {error}") from error
        if new != old:
            result[path] = new
    return result


def write_all(texts: dict[Path, str]) -> None:
    """Write files so that all of them are new, or none."""
    temporary: dict[Path, Path] = {}
    replaced: dict[Path, bytes] = {}
    try:
        # Where a file is a link, what it points to is replaced.
        for path, text in ((path.resolve(), text) for path, text in texts.items()):
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=".maxscore")
            temporary[path] = Path(name)
            with os.fdopen(handle, "wb") as file:
                file.write(text.encode("utf-8"))
            os.chmod(name, path.stat().st_mode)
        for path, new in temporary.items():
            before = path.read_bytes()
            os.replace(new, path)
            replaced[path] = before
    except BaseException as error:
        for path, before in replaced.items():
            path.write_bytes(before)
        if isinstance(error, OSError):
            raise PatchError(f"nothing was changed: {error}") from error
        raise
    finally:
        for new in temporary.values():
            new.unlink(missing_ok=True)


def run(action: str, tree: Path) -> Iterator[str]:
    """Do what the command line asks; yields lines to print."""
    texts = changes(tree, "revert" if action == "revert" else "apply")
    names = [str(path.relative_to(tree)) for path in texts]
    release = release_of(tree)
    if action == "check":
        if not names:
            yield f"{tree} (megatron-core {release}) is patched"
            return
        if changes(tree, "revert"):
            raise PatchError(
                f"{tree} is patched in part, or by another release of megatron_maxscore; apply "
                f"makes it whole, revert takes it out ({', '.join(names)})"
            )
        yield f"{tree} (megatron-core {release}) can be patched; apply would change"
    elif not names:
        yield f"{tree} (megatron-core {release}): nothing to {action}"
        return
    else:
        write_all(texts)
        yield f"{tree} (megatron-core {release}): {action} changed"
    for name in names:
        yield f"  {name}"


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line. Exit status 1 where a tree cannot be patched.

    Args:
        arguments: of the command; None takes those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m megatron_maxscore patch",
        description=(__doc__ or "").split("\n")[0],
        epilog="example: python -m megatron_maxscore patch check ../Megatron-LM",
    )
    parser.add_argument("action", choices=("apply", "check", "revert"))
    parser.add_argument("path", type=Path, help="directory that holds the folder megatron")
    given = parser.parse_args(arguments)
    try:
        for line in run(given.action, given.path):
            print(line)
    except (PatchError, UnicodeDecodeError, OSError) as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
