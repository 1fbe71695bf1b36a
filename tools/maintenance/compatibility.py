"""Write docs/evidence/compatibility.md from a recorded run of the tests.

    python -m pytest -n 2 -m "not gpu" --junitxml results.xml tests/dist
    python -m tools.maintenance.compatibility --record results.xml

Every row is a configuration, every column a release. A cell says what the run found: passed,
refused (the test of the refusal passed), failed, or not run. ``--record`` replaces the record in
docs/evidence/compatibility.json by what these JUnit files hold, and by this checkout's commit; run
it in the checkout that was tested. Without it the document is written from the record. ``--check``
fails where the document is not what this writes. A release without a wheel has a column where
``MEGATRON_TREE`` named its checkout, in the run and here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from . import features
from .releases import NEWEST, RELEASES, TREES

ROOT = Path(__file__).resolve().parents[2]

DOCUMENT = ROOT / "docs" / "evidence" / "compatibility.md"
RECORD = ROOT / "docs" / "evidence" / "compatibility.json"
_OLDER = "test_ways_in.py::test_contracts_and_dispatcher[{release}-]"


def same(test: str) -> tuple[str, str]:
    """Return a test with the release as its parameter, for all releases."""
    return f"{test}[{{release}}]", f"{test}[{{release}}]"


def layer(test: str) -> tuple[str, str]:
    """Return a test of layers or routers; for older releases, the test that runs the same files."""
    return test, _OLDER


# Name: (test on the newest release, test on the others).
WAYS = {
    "launcher, unmodified script": same("test_ways_in.py::test_all_ways_in_train_alike"),
    "`--spec megatron_maxscore.moe.specs gpt_layer`": same(
        "test_ways_in.py::test_all_ways_in_train_alike"
    ),
    "patched fork, plain torchrun": same("test_ways_in.py::test_all_ways_in_train_alike"),
    "`with_maxscore(spec, ...)`, own loop": same(
        "test_ways_in.py::test_example_without_megatron_training"
    ),
    "`--moe-router-type topk` is stock, bit for bit": same(
        "test_ways_in.py::test_topk_is_stock_bit_for_bit"
    ),
}
LAYERS = {
    "context parallelism, layer and groups": layer(
        "test_moe_layer.py::test_scopes_are_optimal_over_their_ranks"
    ),
    "padding mask": layer("test_router.py::test_padding_mask"),
    "static shapes: splits known without a copy": layer(
        "test_moe_layer.py::test_collectives_are_stocks_minus_the_metadata_gather"
    ),
    "permute fusion (stand-ins for the kernels)": layer(
        "test_moe_layer.py::test_permute_fusion_changes_nothing"
    ),
    "upcycling from a dense model": layer(
        "test_moe_layer.py::test_upcycled_model_begins_as_the_dense_one"
    ),
    "auxiliary losses' gradients and metrics": layer(
        "test_router.py::test_auxiliary_losses_are_stocks"
    ),
    "half-precision wrapping leaves prices alone": layer(
        "test_router.py::test_half_precision_models_keep_float32_prices"
    ),
    "decoding with a KV cache": layer("test_serving.py::test_kv_cache"),
    "Megatron's static inference engine": layer("test_serving.py::test_static_engine"),
    "expert bias in stock's routers, also for inference": layer(
        "test_router.py::test_expert_bias_is_what_stock_routes_by"
    ),
}
CHECKPOINTS = {
    "resume": same("test_training.py::test_resumed_run_continues_bit_for_bit"),
    "other TP, PP, EP sizes": same("test_training.py::test_prices_survive_a_change_of_layout"),
    "stock's into ours and back": same(
        "test_training.py::test_checkpoints_of_stock_and_maxscore_load_into_each_other"
    ),
    "expert bias to stock and back, with no export": same(
        "test_training.py::test_expert_bias_goes_to_stock_and_back"
    ),
    "another number of experts: refused": same(
        "test_training.py::test_another_number_of_experts_is_refused_before_training"
    ),
    "CUDA graph of attention is let through, scope local": same("test_features.py::test_refusals"),
    "metrics in TensorBoard and the log": same("test_features.py::test_metrics_reach_the_writers"),
}
# Upstream's own tests, by tools.maintenance.upstream_tests: stock passes, ours, per-token.
UPSTREAM = (
    ("test_routers", 43, 33, 10),
    ("test_a2a_token_dispatcher", 17, 17, 0),
    ("test_token_dispatcher", 9, 9, 0),
    ("test_aux_loss", 66, 66, 0),
    ("test_moe_layer", 39, 39, 0),
    ("test_shared_experts", 17, 17, 0),
    ("test_router_replay", 6, 6, 0),
    ("test_router_trace", 11, 11, 0),
)


def recorded(paths: list[Path]) -> dict[str, Any]:
    """Return the record of JUnit files: when they ran, and every test's last result."""
    results, dates = {}, []
    for path in paths:
        for suite in ElementTree.parse(path).getroot().iter("testsuite"):
            dates.append(suite.get("timestamp", "")[:10])
            for case in suite.iter("testcase"):
                kinds = {child.tag for child in case}
                result = "not run" if "skipped" in kinds else "passed"
                result = "failed" if kinds & {"failure", "error"} else result
                file = case.get("classname", "").rsplit(".", 1)[-1]
                results[f"{file}.py::{case.get('name')}"] = result
    return {
        "date": max(dates),
        "commit": commit_of(ROOT),
        "releases": {
            release: f"branch at {commit_of(TREES[release])}" if release in TREES else "wheel"
            for release in RELEASES
        },
        "refusals": [item.name for item in features.REFUSALS],
        "results": {name: result for name, result in sorted(results.items()) if of_document(name)},
    }


def commit_of(tree: Path) -> str:
    """Return the commit of a checkout."""
    command = ["git", "-C", str(tree), "rev-parse", "--short=10", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def of_document(name: str) -> bool:
    """Return whether a test decides a cell."""
    tests = {test for way in (WAYS, LAYERS, CHECKPOINTS) for pair in way.values() for test in pair}
    tests |= {"test_features.py::test_trains", "test_features.py::test_refusals"}
    return name.split("[")[0] in {test.split("[")[0] for test in tests}


def result_of(record: dict[str, Any], test: str) -> str:
    """Return what a test's cases, or the one case that is named, were found to be."""
    found = {
        result
        for name, result in record["results"].items()
        if name == test or name.startswith(f"{test}[")
    }
    return next((r for r in ("failed", "not run") if r in found), "passed" if found else "not run")


def read_record() -> dict[str, Any]:
    """Return the record of the last run."""
    return dict(json.loads(RECORD.read_text(encoding="utf-8")))


def table(first: str, rows: dict[str, list[str]]) -> list[str]:
    """Return a Markdown table; its columns but the first are the releases of the record."""
    releases = list(read_record()["releases"])
    lines = [f"| {first} | {' | '.join(releases)} |", "|---" * (len(releases) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    return [*lines, ""]


def by_hand(record: dict[str, Any], tests: dict[str, tuple[str, str]]) -> dict[str, list[str]]:
    """Return rows of tests that are named by hand."""
    return {
        name: [
            result_of(record, (new if release == NEWEST else old).format(release=release))
            for release in record["releases"]
        ]
        for name, (new, old) in tests.items()
    }


def trained(record: dict[str, Any], items: tuple[features.Item, ...]) -> dict[str, list[str]]:
    """Return rows of configurations that train."""

    def cell(item: features.Item, release: str) -> str:
        if item not in features.known_to(release, items):
            return f"from {item.since}"
        found: dict[str, list[str]] = {}
        for scope in item.scopes:
            test = f"test_features.py::test_trains[{item.name}-{scope}-{release}]"
            found.setdefault(result_of(record, test), []).append(scope)
        return "; ".join(f"{result}: {', '.join(scopes)}" for result, scopes in found.items())

    return {
        f"{item.name}<br>`{item.flags or '(data parallel is the rest)'}`": [
            cell(item, release) for release in record["releases"]
        ]
        for item in items
    }


def refused(record: dict[str, Any]) -> dict[str, list[str]]:
    """Return rows of configurations that are refused."""

    def cell(item: features.Refusal, release: str) -> str:
        if item not in features.known_to(release, features.REFUSALS):
            return f"from {item.since}"
        if item.name not in record["refusals"]:
            return "not run"
        result = result_of(record, f"test_features.py::test_refusals[{release}]")
        return "refused" if result == "passed" else result

    rows = {}
    for item in features.REFUSALS:
        words = ", ".join(f"`{word}`" for word in item.words)
        rows[f"{item.name}<br>the message has {words}"] = [
            cell(item, release) for release in record["releases"]
        ]
    return rows


def appendix() -> list[str]:
    """Return which test decides which row."""
    lines = ["| row | test |", "|---|---|"]
    lines.append("| parallelism and features that train | `test_features.py::test_trains` |")
    lines.append("| what is refused | `test_features.py::test_refusals` |")
    for way in (WAYS, LAYERS, CHECKPOINTS):
        for name, (new, old) in way.items():
            older = "" if old == new else f"; older releases `{old.split('[')[0]}`"
            lines.append(f"| {name} | `{new.split('[')[0]}`{older} |")
    return [*lines, ""]


def document() -> str:
    """Return the whole document."""
    record = read_record()
    branches = [f"{name}: {of}" for name, of in record["releases"].items() if of != "wheel"]
    lines = [
        "# Compatibility",
        "",
        f"This is what a run of the tests found on {record['date']}, at commit "
        f"{record['commit']}, on CPUs with gloo. `tools/maintenance/compatibility.py` wrote it "
        "from the run's results; do not edit.",
        "",
        "- *passed*: the configuration ran and gave what its test asks for. Behind it are the "
        "scopes (`--maxscore-scope`) in which it trained.",
        "- *refused*: the launch ends when arguments are validated, with one line that names the "
        "flag and the nearest choice.",
        "- *not run*: the test was not part of this run.",
        "- *from 0.18*: this release does not have the flag.",
        "",
        *(f"Not released yet, so tested from a checkout: {text}.\n" for text in branches),
        "## Ways in",
        "",
        *table("way", by_hand(record, WAYS)),
        "## Parallelism, through the training loop",
        "",
        *table("configuration", trained(record, features.PARALLELISM)),
        "The first losses from one checkpoint agree between layouts: "
        "`test_layouts.py::test_first_losses_agree_between_layouts`.",
        "",
        "## MoE features, through the training loop",
        "",
        *table("configuration", trained(record, features.FEATURES)),
        "## MoE features, at the level of the layer",
        "",
        *table("feature", by_hand(record, LAYERS)),
        "Megatron's own `--moe-use-upcycling` fails in the training loops of 0.17 to 0.19 "
        "(`load_checkpoint() got an unexpected keyword argument 'model'`), with stock routers too; "
        "the conversion itself is tested.",
        "",
        "## Checkpoints, logging, graphs",
        "",
        *table("item", by_hand(record, CHECKPOINTS)),
        "## Refused when arguments are validated",
        "",
        *table("configuration", refused(record)),
        "## Megatron-LM's own tests",
        "",
        "`python -m tools.maintenance.upstream_tests TREE` runs them unedited, at tag core_v0.19.0 "
        "with megatron-core 0.19.2, on eight gloo ranks. Ten router cases assume that each token "
        "takes its own k best experts whatever the others take (group-limited routing, expert "
        "bias, and equality of a prefix under padding); ours has the flow's properties tested "
        "instead. Refusals are off there: tests of dispatchers drop tokens on purpose.",
        "",
        "| file | tests that pass with the stock router | of these, pass with MaxScore | of these, "
        "assume per-token top-k and do not apply |",
        "|---|---|---|---|",
        *(f"| {name} | {stock} | {ours} | {other} |" for name, stock, ours, other in UPSTREAM),
        "",
        "## Which test decides which row",
        "",
        "Tests are in `tests/dist`. Those of older releases, and of most single configurations, "
        "run with `bash tools/test.sh --full`.",
        "",
        *appendix(),
    ]
    return "\n".join(lines)


def main() -> None:
    """Write the document, or compare it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    parser.add_argument("--record", nargs="+", type=Path, metavar="JUNIT_XML")
    arguments = parser.parse_args()
    if arguments.record:
        record = json.dumps(recorded(arguments.record), indent=1)
        RECORD.write_text(record + "\n", encoding="utf-8")
    if not arguments.check:
        DOCUMENT.write_text(document(), encoding="utf-8")
    elif DOCUMENT.read_text(encoding="utf-8") != document():
        parser.exit(1, "error: run python -m tools.maintenance.compatibility\n")


if __name__ == "__main__":
    main()
