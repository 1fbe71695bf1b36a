"""Write docs/compatibility.md from the tests that prove it.

    python tools/make_compatibility.py [--check]

Every row is a configuration, every column a release, every cell the test that ran it, or the test
that shows how it is refused. ``--check`` fails where the document is not what this writes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests import features  # noqa: E402
from tests.releases import NEWEST, RELEASES  # noqa: E402

DOCUMENT = ROOT / "docs" / "compatibility.md"
_OLDER = "test_ways_in.py::test_contracts_and_dispatcher[{release}-]"


def same(test: str) -> tuple[str, str]:
    """Return a test with the release as its parameter, for all releases."""
    return f"{test}[{{release}}]", f"{test}[{{release}}]"


def layer(test: str) -> tuple[str, str]:
    """Return a test of layers or routers, which a run of the same files covers on older ones."""
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
# Upstream's own tests, measured with tools/run_upstream_tests.py: stock passes, ours, per-token.
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


def table(first: str, rows: dict[str, list[str]]) -> list[str]:
    """Return a Markdown table with a column per release."""
    lines = [f"| {first} | {' | '.join(RELEASES)} |", "|---" * (len(RELEASES) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    return [*lines, ""]


def by_hand(tests: dict[str, tuple[str, str]]) -> dict[str, list[str]]:
    """Return rows of tests that are named by hand."""
    return {
        name: [f"tested: `{(new if r == NEWEST else old).format(release=r)}`" for r in RELEASES]
        for name, (new, old) in tests.items()
    }


def trained(items: tuple[features.Item, ...]) -> dict[str, list[str]]:
    """Return rows of configurations that train."""
    rows = {}
    for item in items:
        scopes = ", ".join(item.scopes)
        rows[f"{item.name}<br>`{item.flags or '(data parallel is the rest)'}`"] = [
            f"tested: `test_trains[{item.name}-*-{release}]`, scope {scopes}"
            if item in features.known_to(release, items)
            else f"not in this release (from {item.since})"
            for release in RELEASES
        ]
    return rows


def refused() -> dict[str, list[str]]:
    """Return rows of configurations that are refused."""
    rows = {}
    for item in features.REFUSALS:
        words = ", ".join(f"`{word}`" for word in item.words)
        rows[item.name] = [
            f"refused, naming {words}: `test_refusals[{release}]`"
            if item in features.known_to(release, features.REFUSALS)
            else f"not in this release (from {item.since})"
            for release in RELEASES
        ]
    return rows


def document() -> str:
    """Return the whole document."""
    lines = [
        "# Compatibility",
        "",
        "Written by `tools/make_compatibility.py` from the lists that the tests run; do not edit.",
        "All on CPU and gloo. Tests are in `tests/dist`; those of older releases and single items "
        "run with `tools/test.sh --full`.",
        "",
        "## Ways in",
        "",
        *table("way", by_hand(WAYS)),
        "## Parallelism, through the training loop",
        "",
        *table("configuration", trained(features.PARALLELISM)),
        "The first losses from one checkpoint agree between layouts: "
        "`test_layouts.py::test_first_losses_agree_between_layouts`.",
        "",
        "## MoE features, through the training loop",
        "",
        *table("configuration", trained(features.FEATURES)),
        "## MoE features, at the level of the layer",
        "",
        *table("feature", by_hand(LAYERS)),
        "Megatron's own `--moe-use-upcycling` fails in the training loops of all three releases "
        "(`load_checkpoint() got an unexpected keyword argument 'model'`), with stock routers too; "
        "the conversion itself is tested.",
        "",
        "## Checkpoints, logging, graphs",
        "",
        *table("item", by_hand(CHECKPOINTS)),
        "## Refused, in one line, when arguments are validated",
        "",
        *table("configuration", refused()),
        "## Megatron-LM's own tests",
        "",
        "`python tools/run_upstream_tests.py TREE` runs them unedited, at tag core_v0.19.0 with "
        "megatron-core 0.19.2, on eight gloo ranks. Ten router cases assume that each token takes "
        "its own k best experts whatever the others take (group-limited routing, expert bias, and "
        "equality of a prefix under padding); ours has the flow's properties tested instead. "
        "Refusals are off there: tests of dispatchers drop tokens on purpose.",
        "",
        "| file | stock passes | of these ours | assume per-token top-k |",
        "|---|---|---|---|",
        *(f"| {name} | {stock} | {ours} | {other} |" for name, stock, ours, other in UPSTREAM),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Write the document, or compare it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        if DOCUMENT.read_text(encoding="utf-8") != document():
            parser.exit(1, "error: run python tools/make_compatibility.py\n")
        return
    DOCUMENT.write_text(document(), encoding="utf-8")


if __name__ == "__main__":
    main()
