"""The wheel alone, beside its dependencies: what a person has who installed it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig

import pytest

from tests.dist.training_runs import ROOT
from tools.maintenance import quickstart
from tools.maintenance.releases import copy_of_wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Install the wheel into an environment that sees this one's packages but not the project."""
    directory = tmp_path_factory.mktemp("wheel")
    run = lambda *command: subprocess.run(  # noqa: E731
        [*map(str, command)], check=True, capture_output=True, text=True, cwd=directory
    )
    # A copy: the build leaves folders behind.
    tree = directory / "tree"
    tree.mkdir()
    for name in ("megatron_maxscore", "patches", "examples"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(tree)], check=True)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        subprocess.run(["cp", str(ROOT / name), str(tree)], check=True)
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", directory, tree)
    (wheel,) = directory.glob("*.whl")
    environment = directory / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    packages = next(environment.glob("lib/python*/site-packages"))
    # A path in a .pth file adds a directory without reading the .pth files in it, and so without
    # the editable installation of this checkout.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", packages, wheel)
    return environment / "bin" / "python", directory, wheel


def test_the_source_distribution_is_whole(tmp_path):
    import tarfile

    tree = tmp_path / "tree"
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if names.returncode:
        pytest.skip("not a git checkout")
    for name in names.stdout.splitlines():
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path)],
        cwd=tree, check=True, capture_output=True,
    )  # fmt: skip
    (archive,) = tmp_path.glob("*.tar.gz")
    held = {name.partition("/")[2] for name in tarfile.open(archive).getnames()}
    for name in (
        "docs/routing.md", "mkdocs.yml", "examples/pretrain_gpt.py", "tools/test.sh", "LICENSE",
        "tests/unit/test_flow.py", "patches/core_v0.19.0.patch", "CHANGELOG.md",
    ):  # fmt: skip
        assert name in held, name


def python(installed, *arguments, timeout=240, **environment):
    interpreter, directory, _ = installed
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        [str(interpreter), *map(str, arguments)],
        capture_output=True, text=True, timeout=timeout, cwd=directory,
        env={**clean, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def test_what_the_wheel_holds(installed):
    import zipfile

    names = zipfile.ZipFile(installed[2]).namelist()
    assert "megatron_maxscore/py.typed" in names
    assert "megatron_maxscore/_shipped/examples/pretrain_gpt.py" in names
    shipped = sum(name.startswith("megatron_maxscore/_shipped/patches/core_v") for name in names)
    assert shipped == len(list((ROOT / "patches").glob("core_v*.patch"))) == 4
    assert not [name for name in names if name.startswith(("tests/", "tools/"))]
    where = python(installed, "-c", "import megatron_maxscore; print(megatron_maxscore.__file__)")
    assert "environment" in where.stdout, where.stderr


def test_solve(installed):
    script = "from megatron_maxscore.flow import solve\n"
    script += "print(solve([[1.0, 0.9], [0.8, 0.1]], 1).experts)"
    result = python(installed, "-c", script)
    assert "[[1],\n        [0]]" in result.stdout, result.stderr


def test_commands(installed):
    result = python(installed, "-m", "megatron_maxscore.launch", "--help")
    assert result.returncode == 0 and "torchrun" in result.stdout
    tree = copy_of_wheel("0.19.2", installed[1] / "fork")
    result = python(installed, "-m", "megatron_maxscore", "patch", "check", tree)
    assert result.returncode == 0 and "can be patched" in result.stdout, result.stderr
    assert python(installed, "-m", "megatron_maxscore", "patch", "apply", tree).returncode == 0
    assert "is patched" in python(installed, "-m", "megatron_maxscore.patch", "check", tree).stdout


def test_the_laptops_page(installed):
    """Its commands as they stand there, with a tenth of the steps."""
    interpreter, directory, _ = installed
    # Paths may have spaces and letters of any language.
    laptop = directory / "mein Läptop 機"
    laptop.mkdir()
    printed = quickstart.run(interpreter, laptop, shorter=True)
    losses = [float(x) for x in re.findall(r"lm loss: ([\d.E+-]+)", printed)]
    assert len(losses) >= 2 and losses[-1] < losses[0] - 0.1
    assert "MaxScore routing, scope local, mode auto, solved on the CPU" in printed
    added = re.findall(r"CPU mode adds (.*)", printed)
    assert added and all(line.startswith("--transformer-impl local --no-persist") for line in added)
    assert "price against flow" in printed and "maxvio per layer" in printed
