"""The heat map of a sweep: one panel for each value of the first of three settings."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle

from hybridcore.cli.common import ratio_text


def draw_heatmap(
    grid: Mapping[str, Sequence[Any]],
    summary: Sequence[Mapping[str, Any]],
    defaults: Mapping[str, Any],
    title: str,
    path: Path,
) -> None:
    """Draw the ratios of costs into a PNG at `path`; what was not run yet stays empty.

    Parameters
    ----------
    grid : mapping
        One to three settings with their values.
    summary : sequence of mappings
        ``settings`` and ``cost_ratio`` of what was run.
    defaults : mapping
        Settings that get a frame.
    title : str
        Above all panels.
    path : Path
        Where it goes.
    """
    names = list(grid)
    ratios = {tuple(row["settings"].values()): row["cost_ratio"] for row in summary}
    panels = [(value,) for value in grid[names[0]]] if len(names) == 3 else [()]
    rows, columns = _axes_names(names)
    known = [ratio for ratio in ratios.values() if math.isfinite(ratio)]
    reach = max(abs(ratio - 1.0) for ratio in [*known, 1.1])
    norm = Normalize(1.0 - reach, 1.0 + reach)
    width = max(3.2, 0.75 * len(grid[columns]) + 1.2) * len(panels)
    height = max(2.6, 0.5 * (len(grid[rows]) if rows else 1) + 1.7)
    figure, drawn = plt.subplots(
        1, len(panels), figsize=(width + 1.2, height), squeeze=False, layout="constrained"
    )
    best = min(ratios.values(), default=math.inf)
    for panel, first in zip(drawn[0], panels, strict=True):
        values = _values(grid, ratios, first, rows, columns)
        image = panel.imshow(values, cmap="RdBu_r", norm=norm, aspect="auto")
        panel.set_facecolor("0.93")
        _label(panel, grid, ratios, first, rows, columns, best, defaults, reach)
        if first:
            panel.set_title(f"{names[0]} {first[0]}", fontsize=10)
    figure.colorbar(image, ax=drawn[0].tolist(), label="cost to target, plain is 1")
    # About twelve characters of this size are an inch.
    parts = (title, "Framed: the default; bold: the best; grey: not run")
    lines = [line for part in parts for line in textwrap.wrap(part, int(12 * (width + 1.2)))]
    figure.suptitle("\n".join(lines), fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _axes_names(names: list[str]) -> tuple[str | None, str]:
    return (names[-2] if len(names) > 1 else None), names[-1]


def _key(first: tuple[Any, ...], row: Any, column: Any, rows: str | None) -> tuple[Any, ...]:
    return (*first, *((row,) if rows else ()), column)


def _values(
    grid: Mapping[str, Sequence[Any]],
    ratios: Mapping[tuple[Any, ...], float],
    first: tuple[Any, ...],
    rows: str | None,
    columns: str,
) -> np.ndarray:
    values = [
        [ratios.get(_key(first, row, column, rows), math.nan) for column in grid[columns]]
        for row in (grid[rows] if rows else (None,))
    ]
    found = np.array(values, dtype=float)
    return np.where(np.isinf(found), np.nan, found)


def _label(
    panel: Axes,
    grid: Mapping[str, Sequence[Any]],
    ratios: Mapping[tuple[Any, ...], float],
    first: tuple[Any, ...],
    rows: str | None,
    columns: str,
    best: float,
    defaults: Mapping[str, Any],
    reach: float,
) -> None:
    row_values = grid[rows] if rows else (None,)
    panel.set_xticks(range(len(grid[columns])), [str(value) for value in grid[columns]])
    panel.set_yticks(range(len(row_values)), [str(v) if rows else "" for v in row_values])
    panel.set_xlabel(columns)
    panel.set_ylabel(rows or "")
    default = tuple(defaults[name] for name in grid)
    for y, row in enumerate(row_values):
        for x, column in enumerate(grid[columns]):
            key = _key(first, row, column, rows)
            ratio = ratios.get(key)
            if ratio is None:
                continue
            reached = math.isfinite(ratio)
            weight = "bold" if ratio == best else "normal"
            text = ratio_text(ratio) if reached else "not\nreached"
            size = 8 if reached else 6
            # The ends of the colour map are dark.
            dark = reached and abs(ratio - 1.0) > 0.6 * reach
            panel.text(
                x,
                y,
                text,
                ha="center",
                va="center",
                fontsize=size,
                fontweight=weight,
                color="white" if dark else "black",
            )
            if key == default:
                frame = Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, fill=False, linewidth=1.8)
                panel.add_patch(frame)
