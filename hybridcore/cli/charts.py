"""The charts of a run: each draws itself into axes, for the PNG and for the page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hybridcore import Phase, Stream
from hybridcore.cli.palette import LIGHT, legend, logarithmic, scale_by, style
from hybridcore.cli.reading import calibration, history, jumps, phases, segments, thinned

POINTS = 2000
SERIES = ("full", "correct", "predict", "warmup", "rose", "gold")


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart of the report.

    Attributes
    ----------
    name, title, caption : str
        What it is called, and what it shows.
    draw : callable
        ``draw(axes, stream)``.
    shown : callable
        Whether the stream has anything for it.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[Axes, Stream], None]
    shown: Callable[[Stream], bool]


def _loss(axes: Axes, stream: Stream) -> None:
    steps, loss = np.array(stream.column("step")), np.array(stream.column("loss"))
    names = [line["phase"] for line in stream.steps]
    rough = _is_rough(loss[[name != Phase.PREDICT.name for name in names]])
    lines: dict[str, list[np.ndarray]] = {}
    for start, stop in segments(names):
        # With the first point of the next stretch, so that the line has no gap.
        index = np.arange(start, min(stop + 1, len(names)))
        index = index[thinned(loss[index], max(4, POINTS * len(index) // len(names)))]
        lines.setdefault(names[start], []).append(
            np.array([[*steps[index], np.nan], [*loss[index], np.nan]])
        )
    for phase in Phase:
        if phase.name in lines:
            x, y = np.concatenate(lines[phase.name], axis=1)
            colour = LIGHT[phase.value]
            label = f"{phase.value} (forecast)" if phase is Phase.PREDICT else phase.value
            width, alpha = (0.7, 0.45) if rough else (1.7, 1.0)
            axes.plot(x, y, color=colour, linewidth=width, alpha=alpha, label=label)
    if rough:
        x, y = _running_median(steps, loss, names)
        axes.plot(x, y, color=LIGHT["ink"], linewidth=1.6, label="running median")
    for outcome, marker in (("kept", "v"), ("rolled back", "x"), ("under way", "1")):
        chosen = [jump.step for jump in jumps(stream) if jump.outcome == outcome]
        if chosen:
            heights = loss[np.maximum(np.searchsorted(steps, chosen) - 1, 0)]
            axes.plot(
                chosen,
                heights,
                marker,
                color=LIGHT["ink"],
                markersize=6,
                linestyle="none",
                label=f"jump, {outcome}",
            )
    scale_by(axes, loss)
    axes.set_ylabel("loss")
    legend(axes)


def _running_median(
    steps: np.ndarray, loss: np.ndarray, names: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    real = np.array([name != Phase.PREDICT.name for name in names]) & np.isfinite(loss)
    x, y = steps[real], loss[real]
    width = min(max(5, len(y) // 60), len(y))
    padded = np.pad(y, (width - 1, 0), mode="edge")
    smooth = np.median(np.lib.stride_tricks.sliding_window_view(padded, width), axis=1)
    kept = thinned(smooth, POINTS // 2)
    return x[kept], smooth[kept]


def _is_rough(loss: np.ndarray) -> bool:
    loss = loss[np.isfinite(loss)]
    if len(loss) < 10 or loss.min() <= 0.0:
        return False
    return bool(np.median(np.abs(np.diff(np.log(loss)))) > 0.05)


def _confidence(axes: Axes, stream: Stream) -> None:
    steps, values = np.array(stream.column("step")), np.array(stream.column("confidence"))
    kept = thinned(values, POINTS)
    axes.plot(steps[kept], values[kept], color=LIGHT["full"], linewidth=1.5, label="confidence")
    threshold = stream.config.get("confidence_threshold")
    if isinstance(threshold, int | float):
        label = f"threshold {threshold:g}"
        axes.axhline(threshold, color=LIGHT["muted"], linestyle="--", linewidth=1.0, label=label)
    errors = np.array(stream.column("prediction_error"))
    chosen = np.flatnonzero(np.isfinite(errors))
    chosen = chosen[thinned(errors[chosen], POINTS)] if len(chosen) else chosen
    if len(chosen):
        axes.plot(
            steps[chosen],
            np.minimum(errors[chosen], 1.0),
            ".",
            color=LIGHT["correct"],
            markersize=4,
            label="error of a forecast (above 1 at 1)",
        )
    axes.set_ylim(-0.03, 1.05)
    axes.set_ylabel("confidence, relative error")
    legend(axes)


def _calibration(axes: Axes, stream: Stream) -> None:
    bins = calibration(stream)
    axes.plot([0, 1], [0, 1], color=LIGHT["muted"], linestyle="--", linewidth=1.0, label="ideal")
    x, y = [b.confidence for b in bins], [b.share for b in bins]
    spread = [[b.share - b.low for b in bins], [b.high - b.share for b in bins]]
    axes.errorbar(
        x,
        y,
        yerr=np.maximum(spread, 0.0),
        fmt="o",
        color=LIGHT["full"],
        capsize=3,
        label="forecasts, with 90 % interval",
    )
    for b in bins:
        axes.annotate(
            f"{b.count}", (b.confidence, b.share), textcoords="offset points", xytext=(7, -11)
        )
    axes.set_xlim(0.0, 1.03)
    axes.set_ylim(0.0, 1.05)
    axes.set_xlabel("confidence")
    axes.set_ylabel("share within 20 %")
    legend(axes, loc="upper left")


def _speedup(axes: Axes, stream: Stream) -> None:
    steps, values = history(stream, "measured_speedup")
    _, intervals = history(stream, "measured_speedup_interval")
    low = np.array([interval[0] for interval in intervals], dtype=float)
    open_above = np.array([interval[1] is None for interval in intervals])
    high = np.array([math.nan if i[1] is None else i[1] for i in intervals])
    closed = np.where(open_above, np.nan, np.array(values, dtype=float))
    colour = LIGHT["full"]
    if not open_above.all():
        label = "90 % interval"
        axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0, label=label)
        marker, label = "." if len(steps) < 40 else "", "measured speed-up"
        axes.plot(steps, closed, color=colour, linewidth=1.7, marker=marker, label=label)
    if open_above.any():
        axes.plot(
            np.array(steps)[open_above],
            low[open_above],
            "^",
            color=LIGHT["warmup"],
            markersize=5,
            label="at least, open above",
        )
    axes.axhline(1.0, color=LIGHT["muted"], linestyle="--", linewidth=1.0)
    axes.set_ylabel("speed-up")
    legend(axes)


def _signals(axes: Axes, stream: Stream) -> None:
    steps, values = history(stream, "divergence_signals")
    for name, colour in zip(values[-1], SERIES, strict=False):
        severity = [max(value.get(name) or 0.0, 1e-3) for value in values]
        axes.plot(steps, severity, color=LIGHT[colour], linewidth=1.5, marker=".", label=name)
    axes.axhline(1.0, color=LIGHT["muted"], linestyle="--", linewidth=1.0)
    logarithmic(axes)
    # Room for the legend.
    most = max(severity or 0.0 for value in values for severity in value.values())
    axes.set_ylim(8e-4, 40.0 * max(most, 1.0))
    axes.set_ylabel("severity, triggered above 1")
    axes.legend(loc="upper center", ncols=3, framealpha=0.85)


def _scales(axes: Axes, stream: Stream) -> None:
    scaled = [jump for jump in jumps(stream) if jump.scales]
    groups = len(scaled[0].scales)
    for group in range(groups):
        chosen = [jump for jump in scaled if len(jump.scales) > group]
        axes.plot(
            [jump.step for jump in chosen],
            [jump.scales[group] for jump in chosen],
            marker="o",
            markersize=4,
            linewidth=1.2,
            alpha=1.0 - 0.6 * (group // len(SERIES)),
            color=LIGHT[SERIES[group % len(SERIES)]],
            label=f"group {group + 1}",
        )
    axes.axhline(1.0, color=LIGHT["muted"], linestyle="--", linewidth=1.0)
    axes.set_ylabel("factor on the displacement")
    legend(axes)


def _time(axes: Axes, stream: Stream) -> None:
    figures = phases(stream)[::-1]
    for index, figure in enumerate(figures):
        colour = LIGHT[figure.phase.lower()]
        axes.barh(index, figure.seconds, color=colour, height=0.62)
        text = f"{figure.seconds:.2f} s, {figure.steps} steps of {figure.median_ms:.2g} ms"
        _beside(axes, text, figure.seconds, index)
    names = [figure.phase.lower() for figure in figures]
    if stream.statistics:
        own = stream.statistics[-1]["overhead_seconds"] or 0.0
        axes.barh(-1, own, color=LIGHT["muted"], height=0.62)
        total = sum(figure.seconds for figure in figures)
        share = own / total if total else 0.0
        _beside(axes, f"{own:.2f} s, {share:.1%} of all of it", own, -1)
        names = ["of which its own", *names]
    axes.set_yticks(range(-1 if stream.statistics else 0, len(figures)), names)
    axes.set_xlim(0.0, 1.55 * max(*(figure.seconds for figure in figures), 1e-3))
    axes.set_xlabel("seconds")


def _beside(axes: Axes, text: str, x: float, y: float) -> None:
    axes.annotate(text, (x, y), va="center", textcoords="offset points", xytext=(5, 0))


def _gradients(axes: Axes, stream: Stream) -> None:
    steps = np.array(stream.column("step"))
    drawn = (("gradient_norm", "full", "gradient norm"), ("learning_rate", "gold", "learning rate"))
    for name, colour, label in drawn:
        values = np.array(stream.column(name))
        values[~(values > 0.0)] = np.nan
        kept = thinned(values, POINTS)
        axes.plot(steps[kept], values[kept], color=LIGHT[colour], linewidth=1.2, label=label)
    logarithmic(axes)
    legend(axes)


def _has_statistics(stream: Stream) -> bool:
    return bool(stream.statistics)


def _uses_confidence(stream: Stream) -> bool:
    # Quasi-Newton leaps are not decided by it.
    return {jump.kind for jump in jumps(stream)} != {"leap"}


CHARTS = (
    Chart(
        "loss",
        "Loss by phase",
        "Training loss of each step, coloured by phase. In the predict phase it is a forecast, or "
        "a probe where there was one. Marks are where jumps begin.",
        _loss,
        lambda stream: bool(stream.steps),
    ),
    Chart(
        "speedup",
        "Measured speed-up",
        "Full steps that the run stands for, by what it cost, with the interval that it states.",
        _speedup,
        _has_statistics,
    ),
    Chart(
        "confidence",
        "Confidence",
        "Confidence at the last decision, and how far forecasts missed the loss that probes found.",
        _confidence,
        _uses_confidence,
    ),
    Chart(
        "calibration",
        "Calibration of the confidence",
        "Of the jumps' forecasts with about some confidence, the share that came within 20 % of "
        "the loss; beside it how many there were.",
        _calibration,
        lambda stream: bool(calibration(stream)),
    ),
    Chart(
        "signals",
        "Divergence signals",
        "Severity of each signal when the statistics were taken; at 1 it triggers.",
        _signals,
        _has_statistics,
    ),
    Chart(
        "gradients",
        "Gradient norm and learning rate",
        "Norm of all gradients before clipping, in real steps, and the rate of the first group.",
        _gradients,
        lambda stream: bool(stream.steps),
    ),
    Chart(
        "scales",
        "Scales of the layer groups",
        "Factor on each layer group's part of a jump, where group correction scaled it.",
        _scales,
        lambda stream: any(jump.scales for jump in jumps(stream)),
    ),
    Chart(
        "time",
        "Where the time went",
        "Wall-clock time of the steps of each phase, and what of it all was hybridcore's own work.",
        _time,
        lambda stream: bool(stream.steps),
    ),
)


def _draw(chart: Chart, axes: Axes, stream: Stream) -> None:
    chart.draw(axes, stream)
    if not axes.get_xlabel():
        axes.set_xlabel("step")


def draw_png(stream: Stream, title: str, path: Path) -> None:
    """Draw all charts that the stream has something for into one PNG."""
    shown = [chart for chart in CHARTS if chart.shown(stream)]
    rows = math.ceil(len(shown) / 2)
    with plt.rc_context(style()):
        figure = plt.figure(figsize=(13.0, 3.9 * rows + 0.5), layout="constrained")
        figure.suptitle(title, fontsize=12)
        for index, chart in enumerate(shown, start=1):
            axes = figure.add_subplot(rows, 2, index)
            _draw(chart, axes, stream)
            axes.set_title(chart.title, fontsize=11, loc="left")
        figure.savefig(path, dpi=110)
        plt.close(figure)


def draw_svg(chart: Chart, stream: Stream) -> str:
    """Draw a chart as an SVG element for a page that defines the colours as variables."""
    with plt.rc_context(style()):
        figure = Figure(figsize=(8.0, 3.9), layout="constrained")
        _draw(chart, figure.add_subplot(), stream)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # The browser knows the namespaces; the size is the page's business.
    text = re.sub(r' (xmlns|xmlns:xlink|version|width|height)="[^"]*"', "", text, count=5)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{chart.name}-", text)
    for name, colour in LIGHT.items():
        text = text.replace(colour, f"var(--{name})")
    label = f'<svg role="img" aria-labelledby="{chart.name}-title {chart.name}-caption"'
    return text.replace("<svg", label, 1)
