"""What a stream tells about its run: the figures of the report, without a picture."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybridcore import Phase, Stream

# The monitor's, and what confidence is about: a forecast within so much of the loss.
TOLERANCE = 0.2
BINS = 5


@dataclass(slots=True)
class Jump:
    """A predict phase and what became of it.

    Attributes
    ----------
    step : int
        Its first step.
    kind : str
        ``jump`` along the path, or ``leap`` of quasi-Newton steps.
    arm : str
        Extrapolator of a jump.
    steps : int
        Predicted steps.
    outcome : str
        ``kept``, ``rolled back``, or ``under way`` at the end of the stream.
    scales : tuple of float
        Factor of each layer group; empty where all are 1.
    """

    step: int
    kind: str
    arm: str
    steps: int
    outcome: str
    scales: tuple[float, ...]


def jumps(stream: Stream) -> list[Jump]:
    """Predict phases of the run, oldest first."""
    found: list[Jump] = []
    for line in stream.steps:
        for event in line["events"]:
            kind, _, rest = event["event"].partition(" ")
            if kind not in ("jump", "leap"):
                continue
            if not rest:
                scales = tuple(event.get("scales", ()))
                found.append(Jump(line["step"], kind, event.get("arm", ""), 0, "under way", scales))
            elif found and rest in ("kept", "rolled back"):
                found[-1].outcome = rest
        if line["was_predicted"] and found:
            found[-1].steps += 1
    return found


@dataclass(slots=True)
class Bin:
    """Forecasts of about the same confidence.

    Attributes
    ----------
    confidence : float
        Mean confidence, in [0, 1].
    share : float
        Share of them within the tolerance, in [0, 1].
    count : int
        How many there are.
    low, high : float
        Wilson's 90 % interval of the share.
    """

    confidence: float
    share: float
    count: int
    low: float
    high: float


def calibration(stream: Stream) -> list[Bin]:
    """Share of jumps' forecasts that came true, by confidence; leaps have none to speak of."""
    pairs, kind = [], ""
    for line in stream.steps:
        for event in line["events"]:
            if event["event"] in ("jump", "leap"):
                kind = event["event"]
        error, confidence = line["prediction_error"], line["confidence"]
        known = error is not None and confidence is not None
        if line["was_predicted"] and known and kind == "jump":
            pairs.append((confidence, error <= TOLERANCE))
    bins = []
    for index in range(BINS):
        low, high = index / BINS, (index + 1) / BINS
        chosen = [p for p in pairs if low <= p[0] < high or (index == BINS - 1 and p[0] == 1.0)]
        if chosen:
            count, hits = len(chosen), sum(hit for _, hit in chosen)
            mean = sum(confidence for confidence, _ in chosen) / count
            bins.append(Bin(mean, hits / count, count, *wilson(hits, count)))
    return bins


def wilson(hits: int, count: int, z: float = 1.645) -> tuple[float, float]:
    """Interval of a share (Wilson 1927, equation of his section 2); `z` 1.645 is 90 %."""
    share, zz = hits / count, z * z / count
    centre = (share + zz / 2.0) / (1.0 + zz)
    half = z / (1.0 + zz) * math.sqrt(share * (1.0 - share) / count + zz / (4.0 * count))
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(slots=True)
class PhaseFigures:
    """What the steps of one phase came to.

    Attributes
    ----------
    phase : str
        Its name.
    steps : int
        Steps in it.
    seconds : float
        Wall-clock time of them.
    median_ms : float
        Median time of a step, in milliseconds.
    first, last, lowest : float
        Losses; NaN where there is none.
    """

    phase: str
    steps: int
    seconds: float
    median_ms: float
    first: float
    last: float
    lowest: float


def phases(stream: Stream) -> list[PhaseFigures]:
    """Figures of each phase that the run has been in."""
    figures = []
    for phase in Phase:
        lines = [line for line in stream.steps if line["phase"] == phase.name]
        if not lines:
            continue
        times = [line["step_time_ms"] or 0.0 for line in lines]
        losses = [line["loss"] for line in lines if line["loss"] is not None]
        ends = (losses[0], losses[-1], min(losses)) if losses else (math.nan,) * 3
        spent = sum(times) / 1e3
        figures.append(PhaseFigures(phase.name, len(lines), spent, float(np.median(times)), *ends))
    return figures


def history(stream: Stream, name: str) -> tuple[list[int], list[Any]]:
    """Return steps and values of one of the statistics."""
    taken = stream.statistics
    return [s["step"] for s in taken], [s[name] for s in taken]


def figure(value: float | None, form: str) -> str:
    """Return `value` in the format `form`, or that it is not finite."""
    return "not finite" if value is None else f"{value:{form}}"


def speedup_text(statistics: dict[str, Any] | None) -> str:
    """Measured speed-up with its interval, in words."""
    if statistics is None:
        return "not recorded"
    if not (
        statistics["predicted_steps"] or statistics["secant_steps"] or statistics["outer_steps"]
    ):
        return "none, nothing was predicted"
    low, high = statistics["measured_speedup_interval"]
    least = figure(low, ".2f")
    if high is None:
        if statistics["secant_steps"]:
            return f"not known for quasi-Newton steps, at least {least}: compare runs to know"
        return f"at least {least} so far"
    known = ", without what outer momentum gains" * bool(statistics["outer_steps"])
    return f"{figure(statistics['measured_speedup'], '.2f')} (90 %: {least} to {high:.2f}){known}"


def thinned(values: NDArray[np.float64], most: int) -> NDArray[np.intp]:
    """Return indices of about `most` of `values` that keep every peak, gap and end."""
    if len(values) <= most:
        return np.arange(len(values))
    chunks = np.array_split(np.arange(len(values)), max(1, most // 2))
    kept = {0, len(values) - 1}
    for chunk in chunks:
        part = values[chunk]
        if np.isfinite(part).any():
            kept |= {int(chunk[np.nanargmin(part)]), int(chunk[np.nanargmax(part)])}
        # A gap stays one, and is not bridged.
        kept |= set(chunk[np.isnan(part)][:1].tolist())
    return np.array(sorted(kept))


def segments(names: Sequence[str]) -> list[tuple[int, int]]:
    """First index and one past the last of each stretch of equal `names`."""
    cuts = [i for i in range(1, len(names)) if names[i] != names[i - 1]]
    edges = [0, *cuts, len(names)]
    return [(a, b) for a, b in itertools.pairwise(edges) if a < b]
