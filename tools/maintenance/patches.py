"""Write ``patches/`` from the options and from Megatron trees of the supported releases.

    python -m tools.maintenance.patches TREE=core_v0.19.0 [TREE=core_v0.18.2 ...]

Each tree is an unchanged checkout of the tag. The blocks are the same in all releases; only their
places differ.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import textwrap
from pathlib import Path

from megatron_maxscore.moe.fields import fork_fields
from megatron_maxscore.patch import BEGIN, END, line_hash

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Place:
    """A block and the line of Megatron's that it goes before (or after)."""

    path: str
    line: str
    is_after: bool
    indent: int
    block: str


def places() -> list[Place]:
    """Return our blocks with their places."""
    return [
        Place(
            "megatron/core/transformer/transformer_config.py",
            "moe_router_topk: int = 2",
            False,
            4,
            fork_fields(),
        ),
        Place(
            "megatron/core/transformer/moe/moe_layer.py",
            "# Initialize router.",
            False,
            8,
            """
            if getattr(config, "moe_router_type", "topk") == "maxscore":
                from megatron_maxscore.moe.layer import choose_router

                self.submodules = choose_router(config, self.submodules)
            """,
        ),
        Place(
            "megatron/core/transformer/moe/moe_layer.py",
            "# Initialize experts",
            False,
            8,
            """
            if getattr(config, "moe_router_type", "topk") == "maxscore":
                from megatron_maxscore.moe.layer import choose_dispatcher

                choose_dispatcher(self, pg_collection)
            """,
        ),
        Place(
            "megatron/training/arguments.py",
            "def validate_args(args, defaults={}):",
            True,
            4,
            """
            if (
                getattr(args, "moe_router_type", "topk") == "maxscore"
                or getattr(args, "maxscore_stats_file", None) is not None
            ):
                from megatron_maxscore.training import begin

                begin(args)
            """,
        ),
        Place(
            "megatron/training/checkpointing.py",
            "_set_arg('moe_router_topk', force=True)",
            False,
            4,
            """
            if getattr(checkpoint_args, "moe_router_type", None) is not None:
                from megatron_maxscore.training.arguments import restore_options

                restore_options(args, checkpoint_args)
            """,
        ),
    ]


def block_lines(place: Place) -> list[str]:
    """Return a block's lines between marks, indented."""
    body = textwrap.dedent(place.block).strip("\n")
    text = "\n".join([BEGIN, body, END])
    return textwrap.indent(text, " " * place.indent).splitlines()


def patch_text(tree: Path) -> str:
    """Return the patch for a tree."""
    result: list[str] = []
    by_path: dict[str, list[Place]] = {}
    for place in places():
        by_path.setdefault(place.path, []).append(place)
    for path, here in by_path.items():
        lines = (tree / path).read_text(encoding="utf-8").splitlines()
        hashes = [line_hash(line) for line in lines]
        result += [f"--- a/{path}", f"+++ b/{path}"]
        added = 0
        for place in here:
            found = [i for i, line in enumerate(lines) if line.strip() == place.line]
            if len(found) != 1:
                raise SystemExit(f"{tree}/{path}: '{place.line}' occurs {len(found)} times")
            index = found[0] + place.is_after
            pair = (hashes[index - 1], hashes[index])
            if list(itertools.pairwise(hashes)).count(pair) != 1:
                raise SystemExit(f"{tree}/{path}: the lines around '{place.line}' are not unique")
            block = block_lines(place)
            result.append(
                f"@@ -{index},0 +{index + 1 + added},{len(block)} @@ "
                f"after {pair[0]} before {pair[1]}"
            )
            result += [f"+{line}" for line in block]
            added += len(block)
    return "\n".join(result) + "\n"


def main() -> None:
    """Write one patch per TREE=TAG."""
    if len(sys.argv) < 2 or any("=" not in item for item in sys.argv[1:]):
        raise SystemExit(__doc__)
    for item in sys.argv[1:]:
        tree, tag = item.rsplit("=", 1)
        path = ROOT / "patches" / f"{tag}.patch"
        path.write_text(patch_text(Path(tree)), encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
