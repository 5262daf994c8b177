"""The picture of a comparison: loss over cost, coloured by phase, with the jumps marked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from hybridcore import Phase
from hybridcore.cli.compare import Comparison, Run

COLOURS = {
    Phase.WARMUP.name: "#8c6bb1",
    Phase.FULL.name: "#2171b5",
    Phase.CORRECT.name: "#f16913",
}
JUMP = "#238b45"


def draw(comparisons: Sequence[Comparison], path: Path) -> None:
    """Draw one panel for each comparison into a PNG at `path`."""
    figure, panels = plt.subplots(
        1, len(comparisons), figsize=(7.2 * len(comparisons), 5.2), squeeze=False
    )
    for panel, comparison in zip(panels[0], comparisons, strict=True):
        _panel(panel, comparison)
    entries = [Line2D([], [], color="0.45", label="plain, best rate")]
    entries += [Line2D([], [], color="0.8", label="plain, other rates")]
    entries += [
        Line2D([], [], color=colour, label=f"hybridcore, {name.lower()} steps")
        for name, colour in COLOURS.items()
    ]
    entries += [
        Line2D([], [], color=JUMP, marker="v", linestyle=":", label="jump (predicted steps)"),
        Line2D([], [], color="black", linestyle="--", label="target: plain's lowest loss"),
    ]
    figure.legend(handles=entries, loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.11, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(panel: Axes, comparison: Comparison) -> None:
    workload, plain, hybrid = comparison.workload, comparison.best_plain, comparison.best_hybrid
    for run in comparison.plain:
        if run is not plain:
            panel.plot(*_curve(run), color="0.8", linewidth=0.9, zorder=1)
    panel.plot(*_curve(plain), color="0.45", linewidth=1.6, zorder=2)
    _hybrid_curve(panel, hybrid)
    summary = comparison.summary()
    if workload.noisy:
        cost = summary["hybrid_total_cost"] / summary["plain_total_cost"]
        losses = f"{summary['hybrid_final']:.4f} against {summary['plain_final']:.4f} plain"
        verdict = f"held-out loss {losses}, cost {cost:.2f}"
    else:
        panel.axhline(comparison.target, color="black", linestyle="--", linewidth=0.9, zorder=1)
        ratio = summary["cost_ratio"]
        verdict = (
            f"plain's lowest loss at {ratio:.2f} of its cost"
            if math.isfinite(ratio)
            else "plain's lowest loss was not reached"
        )
    panel.set_title(f"{workload.title}\n{verdict}", fontsize=11)
    panel.set_xlabel("cost (full steps)")
    panel.set_ylabel("training loss" + (", running median" if workload.noisy else ""))
    panel.set_yscale("log")
    panel.grid(visible=True, which="major", color="0.92")


def _window(run: Run) -> int:
    return max(5, len(run.loss) // 40)


def _curve(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Cost and running median of the real losses of `run`."""
    real = np.array([phase != Phase.PREDICT.name for phase in run.phase])
    cost, loss = np.array(run.cost)[real], np.array(run.loss)[real]
    width = 5 if loss.size < 50 else _window(run) if _is_rough(loss) else 5
    padded = np.pad(loss, (width - 1, 0), mode="edge")
    return cost, np.median(np.lib.stride_tricks.sliding_window_view(padded, width), axis=1)


def _is_rough(loss: np.ndarray) -> bool:
    steps = np.abs(np.diff(np.log(np.maximum(loss, 1e-300))))
    return bool(np.median(steps) > 0.05)


def _hybrid_curve(panel: Axes, run: Run) -> None:
    cost, loss = _curve(run)
    phases = [phase for phase in run.phase if phase != Phase.PREDICT.name]
    start = 0
    for index in range(1, len(phases) + 1):
        if index == len(phases) or phases[index] != phases[start]:
            stop = min(index + 1, len(phases))
            panel.plot(
                cost[start:stop],
                loss[start:stop],
                color=COLOURS[phases[start]],
                linewidth=1.8,
                zorder=3,
            )
            start = index
    real = -1
    for step, phase in enumerate(run.phase):
        if phase != Phase.PREDICT.name:
            real += 1
        elif step > 0 and run.phase[step - 1] != Phase.PREDICT.name:
            panel.axvline(run.cost[step], color=JUMP, linestyle=":", linewidth=0.9, zorder=1)
            panel.plot(run.cost[step], loss[max(real, 0)], "v", color=JUMP, markersize=7, zorder=4)
