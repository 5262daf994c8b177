"""How charts look: colours in light and dark, and what all axes have in common."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

# By name, light and dark. The page swaps them, so the light ones must differ from each other.
COLOURS = {
    "ink": ("#1b1f24", "#e6e8eb"),
    "muted": ("#59636e", "#9aa4af"),
    "grid": ("#e3e6ea", "#333a42"),
    "paper": ("#ffffff", "#15191e"),
    "warmup": ("#8c6bb1", "#b79adb"),
    "full": ("#2171b5", "#6baed6"),
    "predict": ("#238b45", "#66c27c"),
    "correct": ("#d9570c", "#fd9a55"),
    "rose": ("#b5265b", "#f07aa5"),
    "gold": ("#8a6d00", "#e0b93a"),
}
LIGHT = {name: light for name, (light, _) in COLOURS.items()}


def style() -> Any:
    """Return matplotlib's settings for the light colours."""
    ink = dict.fromkeys(
        ("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), LIGHT["ink"]
    )
    return {
        **ink,
        "axes.edgecolor": LIGHT["muted"],
        "axes.facecolor": LIGHT["paper"],
        "figure.facecolor": LIGHT["paper"],
        "legend.facecolor": LIGHT["paper"],
        "legend.edgecolor": LIGHT["grid"],
        "legend.fontsize": 8,
        "grid.color": LIGHT["grid"],
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 9,
        "svg.fonttype": "none",
        "svg.hashsalt": "hybridcore",
    }


def scale_by(axes: Axes, losses: NDArray[np.float64]) -> None:
    """Make the y axis logarithmic, but linear about zero where not all `losses` are above it."""
    finite = losses[np.isfinite(losses)]
    if np.min(finite, initial=np.inf) > 0.0:
        logarithmic(axes)
        return
    # All linear, one spike would flatten the rest.
    axes.set_yscale("symlog", linthresh=float(np.median(np.abs(finite))) or 1.0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def logarithmic(axes: Axes) -> None:
    """Make the y axis logarithmic, with plain numbers beside it."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    decades = math.log10(high / low) if low > 0.0 else 0.0
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    if decades < 1.5:
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))


def legend(axes: Axes, loc: Any = "best") -> None:
    """Draw the legend, where it hides little."""
    axes.legend(loc=loc, framealpha=0.85)
