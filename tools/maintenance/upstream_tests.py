"""Run Megatron-LM's own unit tests of MoE layers against MaxScore's classes, on CPU.

    python -m tools.maintenance.upstream_tests TREE [--router maxscore topk] [--ranks 8]

``TREE`` is a Megatron-LM checkout at the tag of the installed megatron-core. Its tests run
unchanged, on gloo ranks in CPU mode: once with MaxScore's router and dispatcher in every MoE layer,
and once with stock's. Prints and writes which of the tests that pass with stock also pass with
MaxScore.

Configurations that MaxScore refuses to users are not refused here. Some tests of dispatchers drop
tokens on purpose, and what they check does not depend on the router.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

MOE = "tests/unit_tests/transformer/moe"
FILES = (
    "test_routers", "test_a2a_token_dispatcher", "test_token_dispatcher", "test_aux_loss",
    "test_moe_layer", "test_shared_experts", "test_router_replay", "test_router_trace",
)  # fmt: skip
# Cases that assume that each token takes its own k best experts, whatever the others take.
PER_TOKEN_TOPK = (
    "test_routers.py::TestTop2Router::test_router_with_padding_mask",
    "test_routers.py::TestGroupLimitedRouter::",
    "test_routers.py::TestAuxLossFreeTop2Router::",
)


class _Report:
    """Collects a session's outcomes."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note failures of any phase, else the outcome of the call."""
        name = report.nodeid.removeprefix(MOE + "/")
        if report.failed:
            self.outcomes[name] = "failed"
        elif report.when == "call" or report.skipped:
            self.outcomes.setdefault(name, report.outcome)


def reuse_groups() -> None:
    """Make process groups once: each has threads of its own, and tests make thousands."""
    import torch.distributed as dist

    made: dict[Any, Any] = {}
    new_group, destroy = dist.new_group, dist.destroy_process_group

    def cached(ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
        key = None if ranks is None else tuple(ranks)
        if key not in made:
            made[key] = new_group(ranks, *args, **kwargs)
        return made[key]

    def keep(group: Any = None) -> None:
        if group is None:
            made.clear()
            destroy()

    dist.new_group, dist.destroy_process_group = cached, keep


def session(tree: Path, router: str, file: str, output: Path) -> None:
    """Run one file's tests on this rank."""
    from megatron_maxscore import cpu

    cpu.enable()
    # The tests' own conftest would download data sets that these tests do not use.
    name = "tests.test_utils.python_scripts.download_unit_tests_dataset"
    no_download = types.ModuleType(name)
    vars(no_download)["download_and_extract_asset"] = lambda **kwargs: None
    sys.modules[name] = no_download
    if router == "maxscore":
        from megatron.core.transformer import TransformerConfig

        from megatron_maxscore._replacements import Replacements
        from megatron_maxscore.moe import router as our_router
        from megatron_maxscore.moe.fields import install_config_fields
        from megatron_maxscore.moe.layer import install_layer_hook

        install_config_fields(Replacements("upstream tests"))
        install_layer_hook()
        TransformerConfig.moe_router_type = "maxscore"
        our_router.check_transformer_config = lambda config, options: None
    import pytest
    from megatron.core.transformer.moe.router import TopKRouter

    built: collections.Counter[str] = collections.Counter()
    original = TopKRouter.__init__

    def counting(self: Any, *args: Any, **kwargs: Any) -> None:
        built[type(self).__name__] += 1
        original(self, *args, **kwargs)

    TopKRouter.__init__ = counting
    reuse_groups()
    os.chdir(tree)
    sys.path.append(str(tree))
    report = _Report()
    quiet = open(os.devnull, "w") if os.environ["RANK"] != "0" else None
    if quiet:
        sys.stdout = quiet
    pytest.main(
        [f"{MOE}/{file}.py", "-q", "--import-mode=append", "-p", "no:cacheprovider", "-p",
         "no:xdist", "--timeout", "300", "-o", "addopts="],
        plugins=[report],
    )  # fmt: skip
    path = output / f"{router}-{file}-{os.environ['RANK']}.json"
    path.write_text(json.dumps({"outcomes": report.outcomes, "routers": built}))
    # Threads of gloo may abort a process that ends in the ordinary way.
    sys.stdout.flush()
    os._exit(0)


def outcomes(
    tree: Path, router: str, file: str, ranks: int
) -> tuple[dict[str, str], dict[str, int]]:
    """Run one file on all ranks.

    Returns:
        outcomes by test, passed if it has on every rank; how many routers of each class a rank
        has built.
    """
    with tempfile.TemporaryDirectory() as output:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
            str(ranks), "-m", "tools.maintenance.upstream_tests", str(tree), "--session", router,
            "--files", file, "--output", output,
        ]  # fmt: skip
        log = Path(output) / "log"
        with log.open("w") as stream:
            subprocess.run(
                command,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=1800,
            )
        found: dict[str, set[str]] = collections.defaultdict(set)
        for path in Path(output).glob("*.json"):
            said = json.loads(path.read_text())
            routers = said["routers"]
            for name, outcome in said["outcomes"].items():
                found[name].add(outcome)
        if not found:
            print(log.read_text()[-4000:], file=sys.stderr)
            raise SystemExit(f"error: no test of {file} ran with {router}; the log is above")
    return {
        name: next(o for o in ("failed", "passed", "skipped") if o in kinds)
        for name, kinds in found.items()
    }, routers


def inapplicable(name: str) -> bool:
    """Return whether a case assumes a per-token top-k."""
    return name.startswith(PER_TOKEN_TOPK)


def main() -> None:
    """Run the files with each router; exit status 1 if ours fails what stock passes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("tree", type=Path)
    parser.add_argument("--router", nargs="+", default=["topk", "maxscore"])
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--files", nargs="+", default=list(FILES))
    parser.add_argument("--output", type=Path, default=Path("runs/upstream"))
    parser.add_argument("--session", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    tree = arguments.tree.resolve()
    if not (tree / MOE).is_dir():
        parser.exit(2, f"error: {tree} has no {MOE}; give a Megatron-LM checkout\n")
    if arguments.session:
        session(tree, arguments.session, arguments.files[0], arguments.output)
        return
    from rich.console import Console
    from rich.table import Table

    arguments.output.mkdir(parents=True, exist_ok=True)
    table = Table(
        "file", "stock passes", "of these ours", "per-token top-k", "fails", "skipped",
        "our routers built",
    )  # fmt: skip
    missed: list[str] = []
    for file in arguments.files:
        found, built = {}, 0
        for router in arguments.router:
            found[router], routers = outcomes(tree, router, file, arguments.ranks)
            built = routers.get("MaxScoreRouter", 0)
        (arguments.output / f"{file}.json").write_text(json.dumps(found, indent=1))
        ours = found.get("maxscore", {})
        stock = found.get("topk", ours)
        passes = [name for name, outcome in stock.items() if outcome == "passed"]
        good = [name for name in passes if ours.get(name) == "passed"]
        other = [name for name in passes if name not in good and inapplicable(name)]
        bad = [name for name in passes if name not in good and not inapplicable(name)]
        missed += bad
        skipped = sum(outcome == "skipped" for outcome in stock.values())
        table.add_row(
            file, *map(str, (len(passes), len(good), len(other), len(bad), skipped, built))
        )
    Console(width=120).print(table)
    for name in missed:
        print(f"fails with MaxScore: {name}")
    raise SystemExit(bool(missed) and "maxscore" in arguments.router)


if __name__ == "__main__":
    main()
