"""Build a release, check it, and print what would be uploaded. Uploads nothing.

    pip install -e ".[release]"
    python -m tools.maintenance.release [--output runs/release] [--build-only]

Checks that version, CHANGELOG and documents agree; builds wheel and source distribution; runs twine
check; installs the wheel into an empty environment (5.5 GB) and follows docs/quickstart-laptop.md
there.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import megatron_maxscore

from . import quickstart

ROOT = Path(__file__).resolve().parents[2]


def disagreements(root: Path = ROOT) -> list[str]:
    """Return what does not agree with the package's version, a line each."""
    version = megatron_maxscore.__version__
    found = []
    headings = re.findall(r"^## (\S+)", (root / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    if headings[:1] != [version]:
        found.append(f"CHANGELOG.md begins with {headings[:1]}, the package is {version}")
    for path in (root / "README.md", *sorted((root / "docs").rglob("*.md"))):
        for named in re.findall(r"megatron_maxscore-(\d[\w.]*?)-py3", path.read_text()):
            if named != version:
                found.append(f"{path.name} names the wheel of {named}, the package is {version}")
    return found


def build(output: Path) -> list[Path]:
    """Build wheel and source distribution from a copy of the tracked files; check both."""
    tree = output / "tree"
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    dist = output / "dist"
    built = subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(dist), str(tree)], check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    if built.returncode:
        raise RuntimeError(f"the build failed:\n{built.stdout[-2000:]}{built.stderr[-2000:]}")
    files = sorted(dist.iterdir())
    subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *map(str, files)], check=True
    )
    return files


def try_wheel(wheel: Path, output: Path) -> None:
    """Install the wheel into an empty environment and follow the laptop's page there."""
    environment = output / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    constraints = str(ROOT / "tools" / "constraints.txt")
    subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", "-c", constraints, str(wheel)], check=True
    )
    directory = output / "quickstart"
    directory.mkdir()
    quickstart.run(python, directory, shorter=True)


def main() -> int:
    """Build, check, try, and say what would be uploaded."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "release")
    parser.add_argument("--build-only", action="store_true", help="do not install the wheel")
    arguments = parser.parse_args()
    if found := disagreements():
        print("error: " + "\n".join(found), file=sys.stderr)
        return 1
    output = arguments.output.resolve()
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    files = build(output)
    if not arguments.build_only:
        print("trying the wheel in an environment of its own: docs/quickstart-laptop.md")
        try_wheel(next(path for path in files if path.suffix == ".whl"), output)
    print("\nwould be uploaded with: python -m twine upload " + " ".join(map(str, files)))
    for path in files:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        print(f"  {path.name}  {path.stat().st_size:,} bytes  sha256 {digest}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
