"""The commands of docs/quickstart-laptop.md, as they stand there, run in a directory of their own.

python -m tools.maintenance.quickstart DIRECTORY     # made; with this interpreter, in full
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "quickstart-laptop.md"
# What a shorter run replaces.
SHORTER = {"--train-iters 200": "--train-iters 20", "-interval 100": "-interval 10"}


def commands() -> list[str]:
    """Return the page's shell commands, without those that install."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [block for block in blocks if "pip install" not in block]


def write_texts(directory: Path) -> None:
    """Write what the page asks for: text files in my_texts/; here the project's own documents."""
    texts = directory / "my_texts"
    texts.mkdir()
    for path in sorted((ROOT / "docs").rglob("*.md")):
        (texts / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")


def run(interpreter: Path, directory: Path, shorter: bool) -> str:
    """Run all commands with an interpreter; return what they have printed.

    Args:
        interpreter: has the package; its environment need not have torchrun as a script.
        directory: current directory of the commands.
        shorter: a tenth of the steps.

    Raises:
        RuntimeError: a command failed; has its output.
    """
    write_texts(directory)
    bin_directory = directory / "bin"
    bin_directory.mkdir()
    for name, words in (("python", ""), ("torchrun", " -m torch.distributed.run")):
        script = bin_directory / name
        script.write_text(f'#!/bin/sh\nexec "{interpreter}"{words} "$@"\n')
        script.chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment = {
        **clean, "PATH": f"{bin_directory}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    printed = []
    for command in commands():
        for long, short in SHORTER.items() if shorter else ():
            command = command.replace(long, short)
        done = subprocess.run(
            ["bash", "-c", "set -e\n" + command], cwd=directory, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        printed.append(done.stdout)
        if done.returncode:
            raise RuntimeError(f"{command}\nexit status {done.returncode}\n{done.stdout[-4000:]}")
    return "\n".join(printed)


def main() -> int:
    """Run the page in full."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True)
    print(run(Path(sys.executable), arguments.directory.resolve(), shorter=False))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
