"""How well forecasters of the loss do on recorded runs, against simple baselines.

    python -m benchmarks.forecast_skill
    python -m benchmarks.forecast_skill --fresh

starts a forecast every 40 steps in the second half of each recorded run and writes
benchmarks/results/forecast_skill.json, or forecast_skill-fresh.json of runs by which nothing was
chosen. A forecaster sees the run from its first step.
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
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.signal import savgol_filter
from scipy.special import erf

from benchmarks.forecasters import (
    Array,
    Forecaster,
    LinearTrend,
    Mixture,
    Modelled,
    Persistence,
    PowerLaw,
    Smoothed,
)
from benchmarks.recordings import FOLDER, FRESH, Recording, load
from hybridcore.dynamics import LinearDynamics
from hybridcore.dynamics.mlp import MLPDynamics
from hybridcore.dynamics.rssm import RSSMDynamics

# Called with the runs of all other workloads, from which a learned model may start: leaving the
# whole workload out is what makes the run held out. An online model ignores them.
Factory: TypeAlias = Callable[[Sequence[Recording]], Forecaster]

RESULTS = Path(__file__).parent / "results"
HORIZONS = (5, 15, 75)
STRIDE = 40
HALF_WIDTH = 10
TOLERANCE = float(np.log(1.2))
INTERVAL = 1.645
BINS = 10
SIGNAL_WINDOW = 151
DRAWS = 5

BASELINES: dict[str, Factory] = {
    "persistence": lambda others: Persistence(),
    "smoothed": lambda others: Smoothed(),
    "linear": lambda others: LinearTrend(),
    "discounted": lambda others: Modelled(LinearDynamics()),
    "power law": lambda others: PowerLaw(),
}
FORECASTERS: dict[str, Factory] = {
    "mixture": lambda others: Mixture(),
    "mlp": lambda others: Modelled(MLPDynamics()),
    "rssm": lambda others: Modelled(RSSMDynamics()),
}
# Without the two that are stronger variants of another: the bar that the specification sets.
PLAIN_BASELINES = ("persistence", "linear", "power law")


class Scores(NamedTuple):
    """What one forecaster did on all windows at one horizon.

    Attributes
    ----------
    run, workload : list of str
        Of each window.
    raw, smooth : (windows,) ndarray
        Root mean square error of the mean forecast over the window's steps, against the log loss
        and against its centred moving average.
    covered, hit : (windows, horizon) ndarray of bool
        Whether the log loss lay in the 90 % interval, and within `TOLERANCE` of the mean.
    confidence : (windows, horizon) ndarray
        Stated probability of a hit.
    """

    run: list[str]
    workload: list[str]
    raw: Array
    smooth: Array
    covered: Array
    hit: Array
    confidence: Array


Rows: TypeAlias = dict[int, list[tuple[Any, ...]]]


def windows(steps: int) -> range:
    """Steps before which a forecast is made; the longest horizon and its average fit behind."""
    return range(steps // 2, steps - max(HORIZONS) - HALF_WIDTH + 1, STRIDE)


def moving_average(values: Array) -> Array:
    """Centred mean over 2 `HALF_WIDTH` + 1 values, fewer at the ends."""
    kernel = np.ones(2 * HALF_WIDTH + 1)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def score(make: Factory, recordings: Sequence[Recording]) -> dict[int, Scores]:
    """Run a forecaster over all recordings; its scores by horizon."""
    rows: Rows = {horizon: [] for horizon in HORIZONS}
    for recording in recordings:
        others = [other for other in recordings if other.workload != recording.workload]
        _follow(make(others), recording, rows)
    return _collected(rows)


def _follow(forecaster: Forecaster, recording: Recording, rows: Rows) -> None:
    """Let the forecaster see one run, and append what it did to `rows`."""
    loss = recording.loss.astype(np.float64)
    logs = np.log(loss)
    average = moving_average(logs)
    starts = set(windows(len(logs)))
    for step in range(max(starts, default=-1) + 1):
        if step in starts:
            for horizon in HORIZONS:
                ahead = slice(step, step + horizon)
                mean, std = forecaster.forecast(horizon)
                judged = _judged(mean, std, logs[ahead], average[ahead])
                rows[horizon].append((recording.name, recording.workload, *judged))
        forecaster.observe(
            float(loss[step]),
            float(recording.gradient_norm[step]),
            float(recording.learning_rate[step]),
        )


def _collected(rows: Rows) -> dict[int, Scores]:
    scores = {}
    for horizon, windows_of_it in rows.items():
        run, workload, *figures = zip(*windows_of_it, strict=True)
        scores[horizon] = Scores(list(run), list(workload), *(np.array(f) for f in figures))
    return scores


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
    result: dict[str, Any] = {"windows": len(mine.run)}
    for kind in ("raw", "smooth"):
        error: Array = getattr(mine, kind)
        theirs: dict[str, Array] = {name: getattr(s, kind) for name, s in baselines.items()}
        plain = np.min([theirs[name] for name in PLAIN_BASELINES if name in theirs], axis=0)
        own = _by(mine.run, error**2)
        result[kind] = {
            "beats": {name: float(np.mean(error < other)) for name, other in theirs.items()},
            "beats_plain": float(np.mean(error < plain)),
            "beats_all": float(np.mean(error < np.min(list(theirs.values()), axis=0))),
            "beats_by_workload": {
                name: _by(mine.workload, error < other) for name, other in theirs.items()
            },
            "beats_plain_by_workload": _by(mine.workload, error < plain),
            "runs_won": {
                name: float(np.mean([own[run] < e for run, e in _by(mine.run, other**2).items()]))
                for name, other in theirs.items()
            },
            "error_ratio": {
                name: float(np.median(error / np.maximum(other, 1e-12)))
                for name, other in theirs.items()
            },
            "median_error": float(np.median(error)),
        }
    result["coverage"] = float(mine.covered.mean())
    result["coverage_by_workload"] = _by(mine.workload, mine.covered.mean(axis=1))
    result["calibration_error"] = calibration_error(mine.confidence, mine.hit)
    return result


def _by(group: list[str], values: NDArray[Any]) -> dict[str, float]:
    """Mean of the values of each group."""
    names = np.array(group)
    return {name: float(values[names == name].mean()) for name in sorted(set(group))}


def skill(
    forecasters: Mapping[str, Factory], recordings: Sequence[Recording]
) -> dict[str, dict[str, Any]]:
    """Figures of every forecaster and baseline, by name and horizon.

    A baseline is compared with the other baselines only.
    """
    scores = {name: score(make, recordings) for name, make in {**BASELINES, **forecasters}.items()}
    return {name: _compared(name, mine, scores) for name, mine in scores.items()}


def _compared(
    name: str, mine: dict[int, Scores], scores: Mapping[str, dict[int, Scores]]
) -> dict[str, Any]:
    return {
        str(horizon): compare(
            mine[horizon],
            {other: scores[other][horizon] for other in BASELINES if other != name},
        )
        for horizon in HORIZONS
    }


class KnownSignal:
    """Knows the true mean and spread of a run: no forecast has a smaller mean square error."""

    def __init__(self, signal: Array, noise: float) -> None:
        self._signal, self._noise = signal, noise
        self._count = 0

    def observe(self, loss: float, gradient_norm: float, learning_rate: float) -> None:
        self._count += 1

    def forecast(self, horizon: int) -> tuple[Array, Array]:
        ahead = self._signal[self._count : self._count + horizon]
        return ahead, np.full(horizon, self._noise)


def ceiling(recordings: Sequence[Recording], seed: int = 0) -> dict[str, Any]:
    """What a forecaster that knows everything but the noise would reach on the noisy runs.

    Each mini-batch run is taken apart into a smooth signal and noise, the noise is shuffled
    `DRAWS` times, and a forecaster that is told the signal is held against the baselines. The error
    over a few steps is mostly noise, so that even it loses many windows to a guess that is lucky.
    Its shares are no strict bound: a forecast that stays next to a baseline, a little to the side
    of the truth, beats that one more often, by next to nothing.
    """
    random = np.random.default_rng(seed)
    rows: dict[str, Rows] = {
        name: {horizon: [] for horizon in HORIZONS} for name in (*BASELINES, "known signal")
    }
    for recording in recordings:
        if recording.settings["batch"] == 0:
            continue
        logs = np.log(recording.loss.astype(np.float64))
        signal = savgol_filter(logs, SIGNAL_WINDOW, 1)
        for _ in range(DRAWS):
            noise = random.permutation(logs - signal)
            shuffled = recording._replace(loss=np.exp(signal + noise).astype(np.float32))
            _follow(KnownSignal(signal, float(noise.std())), shuffled, rows["known signal"])
            for name, make in BASELINES.items():
                _follow(make(()), shuffled, rows[name])
    scores = {name: _collected(of_it) for name, of_it in rows.items()}
    return _compared("known signal", scores["known signal"], scores)


def _print(console: Console, figures: dict[str, dict[str, Any]], kind: str) -> None:
    title = {"raw": "the log loss", "smooth": "its moving average"}[kind]
    table = Table(title=f"Windows on which a forecast of {title} beats the baselines")
    for column in ("forecaster", "steps", *BASELINES, "plain 3", "all", "error"):
        table.add_column(column, justify="left" if column == "forecaster" else "right")
    for column in ("90 % covers", "calibration"):
        table.add_column(column, justify="right")
    for name, by_horizon in figures.items():
        for horizon, figure in by_horizon.items():
            of_kind = figure[kind]
            shares = [of_kind["beats"].get(other) for other in BASELINES]
            table.add_row(
                name,
                horizon,
                *("" if share is None else f"{share:.2f}" for share in shares),
                f"{of_kind['beats_plain']:.2f}",
                f"{of_kind['beats_all']:.2f}",
                f"{of_kind['median_error']:.3f}",
                f"{figure['coverage']:.3f}",
                f"{figure['calibration_error']:.3f}",
            )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fresh", action="store_true", help="on runs that chose nothing")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    name = "forecast_skill-fresh.json" if arguments.fresh else "forecast_skill.json"
    output = arguments.output or RESULTS / name
    recordings = load(FRESH if arguments.fresh else FOLDER)
    figures = skill(FORECASTERS, recordings)
    best = ceiling(recordings)
    console = Console(width=150)
    for kind in ("raw", "smooth"):
        _print(console, {**figures, "known signal": best}, kind)
    console.print("known signal: told the mean, on the mini-batch runs with their noise shuffled")
    document = {
        "command": "python -m benchmarks.forecast_skill" + " --fresh" * arguments.fresh,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "recordings": [recording.name for recording in recordings],
        "forecasters": figures,
        "ceiling_of_noisy_runs": best,
    }
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    console.print(f"written: {output}")


if __name__ == "__main__":
    main()
