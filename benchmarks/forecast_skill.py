"""How well forecasters of the loss do on recorded runs, against simple baselines.

    python -m benchmarks.forecast_skill

starts a forecast every 40 steps in the second half of each recorded run and writes
benchmarks/results/forecast_skill.json. A forecaster sees the run from its first step.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import scipy
from scipy.special import erf

from benchmarks.forecasters import (
    Array,
    Discounted,
    Forecaster,
    LinearTrend,
    Persistence,
    PowerLaw,
    Smoothed,
)
from benchmarks.recordings import Recording, load

# Called with the runs of all other workloads, from which a learned model may start: leaving the
# whole workload out is what makes the run held out. An online model ignores them.
Factory: TypeAlias = Callable[[Sequence[Recording]], Forecaster]

RESULTS = Path(__file__).parent / "results" / "forecast_skill.json"
HORIZONS = (5, 15, 75)
STRIDE = 40
HALF_WIDTH = 10
TOLERANCE = float(np.log(1.2))
INTERVAL = 1.645
BINS = 10

BASELINES: dict[str, Factory] = {
    "persistence": lambda others: Persistence(),
    "smoothed": lambda others: Smoothed(),
    "linear": lambda others: LinearTrend(),
    "discounted": lambda others: Discounted(),
    "power law": lambda others: PowerLaw(),
}
# Without the two that are stronger variants of another: the bar that the specification sets.
PLAIN_BASELINES = ("persistence", "linear", "power law")


class Scores(NamedTuple):
    """What one forecaster did on all windows at one horizon.

    Attributes
    ----------
    workload : list of str
        Of each window.
    raw, smooth : (windows,) ndarray
        Root mean square error of the mean forecast over the window's steps, against the log loss
        and against its centred moving average.
    covered, hit : (windows, horizon) ndarray of bool
        Whether the log loss lay in the 90 % interval, and within `TOLERANCE` of the mean.
    confidence : (windows, horizon) ndarray
        Stated probability of a hit.
    """

    workload: list[str]
    raw: Array
    smooth: Array
    covered: Array
    hit: Array
    confidence: Array


def windows(steps: int) -> range:
    """Steps before which a forecast is made; the longest horizon and its average fit behind."""
    return range(steps // 2, steps - max(HORIZONS) - HALF_WIDTH + 1, STRIDE)


def moving_average(values: Array) -> Array:
    """Centred mean over 2 `HALF_WIDTH` + 1 values, fewer at the ends."""
    kernel = np.ones(2 * HALF_WIDTH + 1)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def score(make: Factory, recordings: Sequence[Recording]) -> dict[int, Scores]:
    """Run a forecaster over all recordings; its scores by horizon."""
    rows: dict[int, list[Any]] = {horizon: [] for horizon in HORIZONS}
    for recording in recordings:
        others = [other for other in recordings if other.workload != recording.workload]
        forecaster = make(others)
        loss = recording.loss.astype(np.float64)
        logs = np.log(loss)
        average = moving_average(logs)
        starts = set(windows(len(logs)))
        for step in range(max(starts, default=-1) + 1):
            if step in starts:
                for horizon in HORIZONS:
                    ahead = slice(step, step + horizon)
                    mean, std = forecaster.forecast(horizon)
                    window = _judged(mean, std, logs[ahead], average[ahead])
                    rows[horizon].append((recording.workload, *window))
            forecaster.observe(
                float(loss[step]),
                float(recording.gradient_norm[step]),
                float(recording.learning_rate[step]),
            )
    return {
        horizon: Scores(
            list(columns[0]), *(np.array(column) for column in columns[1:])
        )
        for horizon, columns in ((h, list(zip(*r, strict=True))) for h, r in rows.items())
    }


def _judged(mean: Array, std: Array, logs: Array, average: Array) -> tuple[Any, ...]:
    error = np.abs(logs - mean)
    with np.errstate(divide="ignore"):
        confidence = erf(TOLERANCE / (np.sqrt(2.0) * std))
    return (
        np.sqrt(np.mean(error**2)),
        np.sqrt(np.mean((average - mean) ** 2)),
        error <= INTERVAL * std,
        error <= TOLERANCE,
        confidence,
    )


def calibration_error(confidence: Array, hit: Array) -> float:
    """Expected calibration error (Naeini et al. 2015): mean gap of confidence and hits, by bin."""
    confidence, hit = confidence.ravel(), hit.ravel()
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    count = np.bincount(place, minlength=BINS)
    stated = np.bincount(place, confidence, minlength=BINS)
    true = np.bincount(place, hit, minlength=BINS)
    # count cancels: a bin's gap of means, weighted by its share of the forecasts.
    return float(np.abs(stated - true).sum() / count.sum())


def compare(mine: Scores, baselines: Mapping[str, Scores]) -> dict[str, Any]:
    """Figures of one forecaster at one horizon, against the baselines at the same windows."""
    result: dict[str, Any] = {"windows": len(mine.workload)}
    for kind in ("raw", "smooth"):
        error = getattr(mine, kind)
        theirs = {name: getattr(scores, kind) for name, scores in baselines.items()}
        plain = [theirs[name] for name in PLAIN_BASELINES if name in theirs]
        result[kind] = {
            "beats": {name: float(np.mean(error < other)) for name, other in theirs.items()},
            "beats_plain": float(np.mean(error < np.min(plain, axis=0))),
            "beats_all": float(np.mean(error < np.min(list(theirs.values()), axis=0))),
            "error_ratio": {
                name: float(np.median(error / np.maximum(other, 1e-12)))
                for name, other in theirs.items()
            },
            "median_error": float(np.median(error)),
            "beats_plain_by_workload": _by_workload(
                mine.workload, error < np.min(plain, axis=0)
            ),
        }
    result["coverage"] = float(mine.covered.mean())
    result["coverage_by_workload"] = _by_workload(mine.workload, mine.covered.mean(axis=1))
    result["calibration_error"] = calibration_error(mine.confidence, mine.hit)
    return result


def _by_workload(workload: list[str], values: Array) -> dict[str, float]:
    names = np.array(workload)
    return {name: float(values[names == name].mean()) for name in sorted(set(workload))}


def skill(
    forecasters: Mapping[str, Factory], recordings: Sequence[Recording]
) -> dict[str, dict[str, Any]]:
    """Figures of every forecaster and baseline, by name and horizon.

    A baseline is compared with the other baselines only.
    """
    scores = {name: score(make, recordings) for name, make in {**BASELINES, **forecasters}.items()}
    return {
        name: {
            str(horizon): compare(
                mine[horizon],
                {other: scores[other][horizon] for other in BASELINES if other != name},
            )
            for horizon in HORIZONS
        }
        for name, mine in scores.items()
    }
