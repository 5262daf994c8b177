"""The picture of a comparison: loss over cost, coloured by phase, with the jumps marked."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from hybridcore import Phase
from hybridcore.cli.common import ratio_text
from hybridcore.cli.compare import Comparison, Run
from hybridcore.cli.paired import Pair
from hybridcore.cli.palette import scale_by

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
    if any(len(comparison.plain) > 1 for comparison in comparisons):
        entries += [Line2D([], [], color="0.8", label="plain, other rates")]
    entries += _entries({phase for c in comparisons for phase in c.best_hybrid.phase})
    if not all(comparison.workload.noisy for comparison in comparisons):
        entries += [_TARGET]
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
            f"plain's lowest loss at {ratio_text(ratio)} of its cost"
            if math.isfinite(ratio)
            else "plain's lowest loss was not reached"
        )
    panel.set_title(f"{workload.title}\n{verdict}", fontsize=11)
    panel.set_xlabel("cost (full steps)")
    panel.set_ylabel("training loss" + (", running median" if workload.noisy else ""))
    panel.set_yscale("log")
    panel.grid(visible=True, which="major", color="0.92")


def draw_pairs(pairs: Sequence[Pair], verdict: str, judged_by: str, path: Path) -> None:
    """Draw the judged losses of plain and hybrid runs over their cost into a PNG at `path`.

    The pair whose hybrid run is coloured by phase is the one with the median ratio of costs.
    """
    figure, panel = plt.subplots(figsize=(8.0, 5.6))
    order = sorted(pairs, key=lambda pair: pair.summary()["cost_ratio"])
    shown = order[(len(order) - 1) // 2]
    for pair in pairs:
        front = pair is shown
        steps, losses = zip(*pair.plain.smooth(), strict=True)
        cost = [pair.plain.run.cost[step] for step in steps]
        panel.plot(cost, losses, color="0.45" if front else "0.8", linewidth=1.6, zorder=2)
        steps, losses = zip(*pair.hybrid.smooth(), strict=True)
        cost = [pair.hybrid.run.cost[step] for step in steps]
        if front:
            phases = [pair.hybrid.run.phase[step] for step in steps]
            _coloured(panel, np.array(cost), np.array(losses), phases)
            _jumps(panel, pair.hybrid.run, np.array(cost), np.array(losses))
        else:
            panel.plot(cost, losses, color="#b8cfe6", linewidth=1.2, zorder=2)
    panel.axhline(shown.target, color="black", linestyle="--", linewidth=0.9, zorder=1)
    several = len(pairs) > 1
    entries = [Line2D([], [], color="0.45", label="your loop, plain")]
    entries += [Line2D([], [], color="0.8", label="other seeds, plain")] * several
    entries += [Line2D([], [], color="#b8cfe6", label="other seeds, hybridcore")] * several
    entries += [*_entries(set(shown.hybrid.run.phase)), _TARGET]
    figure.legend(handles=entries, loc="lower center", ncols=3, frameon=False, fontsize=9)
    panel.set_title("\n".join(textwrap.wrap(verdict, 92)), fontsize=9, loc="left")
    panel.set_xlabel("cost (full steps)")
    panel.set_ylabel(judged_by)
    runs = [run for pair in pairs for run in (pair.plain, pair.hybrid)]
    scale_by(panel, np.concatenate([run.loss for run in runs]))
    panel.grid(visible=True, which="major", color="0.92")
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


_TARGET = Line2D([], [], color="black", linestyle="--", label="target: plain's lowest loss")


def _entries(occurring: Collection[str]) -> list[Line2D]:
    entries = [
        Line2D([], [], color=colour, label=f"hybridcore, {name.lower()} steps")
        for name, colour in COLOURS.items()
        if name in occurring
    ]
    if Phase.PREDICT.name in occurring:
        label = "jump (predicted steps)"
        entries += [Line2D([], [], color=JUMP, marker="v", linestyle=":", label=label)]
    return entries


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
    _coloured(panel, cost, loss, phases)
    _jumps(panel, run, cost, loss)


def _coloured(panel: Axes, cost: np.ndarray, loss: np.ndarray, phases: list[str]) -> None:
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


def _jumps(panel: Axes, run: Run, cost: np.ndarray, loss: np.ndarray) -> None:
    for step, phase in enumerate(run.phase):
        if step and phase == Phase.PREDICT.name != run.phase[step - 1]:
            before = max(0, int(np.searchsorted(cost, run.cost[step - 1], side="right")) - 1)
            panel.axvline(run.cost[step], color=JUMP, linestyle=":", linewidth=0.9, zorder=1)
            panel.plot(run.cost[step], loss[before], "v", color=JUMP, markersize=7, zorder=4)
