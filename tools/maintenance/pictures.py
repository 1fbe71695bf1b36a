"""Draw what MaxScore does: tokens and experts under top-k and under the flow.

    python -m tools.maintenance.pictures        # writes docs/pictures/routing.png

Scores are drawn once, with a preference for one expert; both panels assign the same scores.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import torch

from megatron_maxscore.flow import solve

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "pictures" / "routing.png"
TOKENS, EXPERTS, CAPACITY = 8, 4, 2
PREFERENCE = (0.1, 0.7, 0.2, -0.3)
COLOURS = ("#4477aa", "#cc6677", "#228833", "#aa7733")


def scores() -> torch.Tensor:
    """Return the (tokens, experts) scores of both panels."""
    generator = torch.Generator().manual_seed(267)
    return torch.randn(TOKENS, EXPERTS, generator=generator) + torch.tensor(PREFERENCE)


def panel(axis: Any, title: str, expert_T: torch.Tensor, total: float) -> None:
    """Draw tokens, experts, who goes where, and each expert's room."""
    token_y = [(TOKENS - 1 - i) / (TOKENS - 1) for i in range(TOKENS)]
    expert_y = [(EXPERTS - 1 - j) / (EXPERTS - 1) * 0.84 + 0.08 for j in range(EXPERTS)]
    loads = torch.bincount(expert_T, minlength=EXPERTS).tolist()
    for token, expert in enumerate(expert_T.tolist()):
        start, end = (0.08, token_y[token]), (0.56, expert_y[expert])
        axis.annotate(
            "", end, start,
            arrowprops=dict(arrowstyle="->", color=COLOURS[expert], linewidth=1.6, shrinkB=0),
        )  # fmt: skip
    for token, y in enumerate(token_y):
        axis.text(0.0, y, f"token {token + 1}", ha="center", va="center", fontsize=9)
    for expert, (y, load) in enumerate(zip(expert_y, loads, strict=True)):
        for place in range(max(load, CAPACITY)):
            is_over = place >= CAPACITY
            axis.add_patch(
                plt.Rectangle(
                    (0.58 + 0.075 * place, y - 0.05), 0.065, 0.1,
                    facecolor=COLOURS[expert] if place < load else "white",
                    edgecolor="black" if is_over else "#555555",
                    hatch="////" if is_over else None, linewidth=1.0,
                )
            )  # fmt: skip
        what = "full" if load == CAPACITY else f"{load} of {CAPACITY}"
        if load > CAPACITY:
            what = f"{load - CAPACITY} too many"
        axis.text(0.58, y + 0.075, f"expert {expert + 1}: {what}", va="bottom", fontsize=9)
    edge = 0.58 + 0.075 * CAPACITY - 0.005
    axis.plot([edge, edge], [-0.02, 1.02], color="black", linestyle=":", linewidth=1.2)
    axis.text(edge, -0.05, "capacity", ha="center", va="top", fontsize=9)
    axis.set_title(f"{title}\ntotal score {total:.2f}", fontsize=11)
    axis.set(xlim=(-0.1, 1.08), ylim=(-0.14, 1.12))
    axis.axis("off")


def main() -> None:
    """Draw both panels."""
    scores_TE = scores()
    chosen_T = scores_TE.argmax(1)
    solution = solve(scores_TE, topk=1, capacity=CAPACITY)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4))
    best = float(scores_TE.max(1).values.sum())
    panel(axes[0], "top-k: every token takes its favourite", chosen_T, best)
    panel(
        axes[1], "MaxScore: the best assignment with room for all", solution.experts[:, 0],
        float(solution.objective),
    )  # fmt: skip
    figure.savefig(PICTURE, dpi=130, bbox_inches="tight")


if __name__ == "__main__":
    main()
