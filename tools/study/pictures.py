"""The study's pictures: curves with bands, and expert loads over training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from .arms import ARMS
from .results import Lines

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def curves(arms: dict[str, Lines], path: Path) -> None:
    """Draw validation curves and training losses with bands of one standard deviation."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.6))
    for index, (name, lines) in enumerate(arms.items()):
        style = {"color": f"C{index}", "label": ARMS[name].title}
        steps = [int(step) for step in lines[0]["curve"]]
        values = np.array([list(line["curve"].values()) for line in lines])
        _band(axes[0], np.array(steps), values, style)
        window = max(1, len(lines[0]["train_loss"]) // 30)
        kernel = np.ones(window) / window
        smooth = np.array([np.convolve(li["train_loss"], kernel, "valid") for li in lines])
        _band(axes[1], np.arange(smooth.shape[1]) + window, smooth, style)
    axes[0].set(title="validation, own rule (64 sequences a point)", ylabel="loss, nats")
    axes[1].set(title="training; routing may see the batch, so not comparable")
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        low = min(line.get_ydata()[-1] for line in axis.lines)
        axis.set_ylim(low - 0.1, low + 2.0)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def _band(axis: Any, steps: np.ndarray, values: np.ndarray, style: dict) -> None:
    mean, spread = values.mean(0), values.std(0)
    axis.plot(steps, mean, linewidth=1.4, **style)
    axis.fill_between(steps, mean - spread, mean + spread, color=style["color"], alpha=0.15)


def price_curve(lines: Lines, path: Path) -> None:
    """Draw what prices cost against the flow, and their maxvio, over training; a line a seed."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8))
    for line in lines:
        steps = [int(step) for step in line["milestones"]] + [line["iterations"]]
        every = [*line["milestones"].values(), line["evaluation"]["rules"]]
        cost = [rules["price"]["loss"] - rules["flow"]["loss"] for rules in every]
        maxvio = [max(rules["price"]["maxvio"]) for rules in every]
        axes[0].plot(steps, cost, marker="o", label=f"seed {line['seed']}")
        axes[1].plot(steps, maxvio, marker="o", label=f"seed {line['seed']}")
    axes[0].axhline(0.0, color="black", linestyle=":", linewidth=1.0)
    axes[0].set(ylabel="nats per token", title="loss by prices minus loss by the flow")
    axes[1].set(ylabel="maxvio", title="maxvio by prices, worst layer", ylim=(0, None))
    for axis in axes:
        axis.set(xlabel="training step", xscale="log")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def load_maps(arms: dict[str, Lines], path: Path) -> bool:
    """Draw every expert's load over training, in each arm's least balanced layer."""
    maps = {
        name: np.array(line["load_map"])
        for name, lines in arms.items()
        for line in lines
        if "load_map" in line
    }
    if not maps:
        return False
    figure, axes = plt.subplots(1, len(maps), figsize=(3.1 * len(maps), 3.6), squeeze=False)
    for axis, (name, map_SLE) in zip(axes[0], maps.items(), strict=True):
        layer = int(map_SLE.max(2).mean(0).argmax())
        image = axis.imshow(
            map_SLE[:, layer].T, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2,
            interpolation="nearest", extent=(0, 100, map_SLE.shape[2] - 0.5, -0.5),
        )  # fmt: skip
        axis.set_title(f"{ARMS[name].title}\nlayer {layer + 1}", fontsize=8)
        axis.set_xlabel("% of training")
    axes[0][0].set_ylabel("expert")
    figure.colorbar(image, ax=axes[0], label="load / mean load", fraction=0.02)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
    return True
