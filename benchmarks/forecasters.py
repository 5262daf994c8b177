"""What a model of training dynamics has to beat: forecasts of the log loss by simple means.

A forecaster sees one run, step by step, and says where the log loss of the steps to come will lie.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import OptimizeWarning, curve_fit

from hybridcore import Observation
from hybridcore.dynamics import DynamicsModel

Array: TypeAlias = NDArray[np.float64]

# Past errors from which a baseline takes its spread.
RECENT = 200
SMOOTHING = 0.1
LINE = 50
EVALUATIONS = 200

# ExpertMixture. Level gain, trend gain and damping of its exponential smoothings.
SMOOTHINGS = ((0.1, 0.0, 1.0), (0.03, 0.0, 1.0), (0.5, 0.1, 1.0), (0.2, 0.05, 0.995))
LINES = (20, 50, 150)
RESIDUAL_GAINS = (0.1, 0.03)
BANDS = ((0, 5), (5, 15), (15, 75))
EVERY = 5
WEIGHT_DISCOUNT = 0.8
STEEPNESS = 30.0
SPREAD_DISCOUNT = 0.97


class Forecaster(Protocol):
    """Forecasts the log loss of one run, online."""

    def observe(self, loss: float, gradient_norm: float, learning_rate: float) -> None:
        """Take the figures of one step; `loss` is finite and positive."""

    def forecast(self, horizon: int) -> tuple[Array, Array]:
        """Mean and standard deviation (horizon,) of the log losses of the next steps."""


class Persistence:
    """The next losses are the last one; the spread is that of recent differences at each lag."""

    def __init__(self) -> None:
        self._logs: list[float] = []

    def observe(self, loss: float, gradient_norm: float, learning_rate: float) -> None:
        self._logs.append(math.log(loss))

    def forecast(self, horizon: int) -> tuple[Array, Array]:
        logs = np.array(self._logs)
        return np.full(horizon, logs[-1]), _spread_of_level(logs, logs, horizon)


class Smoothed:
    """The next losses are the exponential moving average of the log losses."""

    def __init__(self, smoothing: float = SMOOTHING) -> None:
        self._smoothing = smoothing
        self._logs: list[float] = []
        self._levels: list[float] = []

    def observe(self, loss: float, gradient_norm: float, learning_rate: float) -> None:
        y = math.log(loss)
        count = len(self._logs)
        # A plain mean at first: an average that starts at 0 or at the first loss is biased.
        gain = max(self._smoothing, 1.0 / (count + 1))
        level = self._levels[-1] if count else y
        self._logs.append(y)
        self._levels.append(level + gain * (y - level))

    def forecast(self, horizon: int) -> tuple[Array, Array]:
        logs, levels = np.array(self._logs), np.array(self._levels)
        return np.full(horizon, levels[-1]), _spread_of_level(logs, levels, horizon)


class LinearTrend:
    """Least-squares line through the last log losses, with its prediction interval."""

    def __init__(self, window: int = LINE) -> None:
        self._window = window
        self._logs: list[float] = []

    def observe(self, loss: float, gradient_norm: float, learning_rate: float) -> None:
        self._logs.append(math.log(loss))

    def forecast(self, horizon: int) -> tuple[Array, Array]:
        y = np.array(self._logs[-self._window :])
        ahead = np.arange(1.0, horizon + 1.0)
        if len(y) < 3:
            return np.full(horizon, y[-1]), np.full(horizon, np.inf)
        t = np.arange(1.0 - len(y), 1.0)
        centred = t - t.mean()
        energy = float(centred @ centred)
        slope = float(centred @ y) / energy
        residual = y - y.mean() - slope * centred
        noise = math.sqrt(float(residual @ residual) / (len(y) - 2))
        distance = ahead - t.mean()
        leverage = 1.0 / len(y) + distance**2 / energy
        return y.mean() + slope * distance, noise * np.sqrt(1.0 + leverage)


class Modelled:
    """One of hybridcore's own models of the loss."""

    def __init__(self, model: DynamicsModel) -> None:
        self._model = model

    def observe(self, loss: float, gradient_norm: float, learning_rate: float) -> None:
        self._model.observe(Observation(loss, gradient_norm, learning_rate))

    def forecast(self, horizon: int) -> tuple[Array, Array]:
        forecasts = [self._model.forecast(step) for step in range(1, horizon + 1)]
        return np.array([f.mean for f in forecasts]), np.array([f.std for f in forecasts])


class PowerLaw:
    """``loss = a + b k^-c`` over the whole run so far, fitted in the log by scipy's curve_fit.

    Hestness et al. 2017, eq. 1, with training steps for data. In the log, where the error is
    judged, a residual of the early, large losses does not drown the recent ones. ``a`` and ``b``
    are fitted as logarithms and so stay positive.
    """

    def __init__(self) -> None:
        self._logs: list[float] = []
        self._fitted = 0
        self._parameters = np.zeros(3)
        self._noise = math.inf

    def observe(self, loss: float, gradient_norm: float, learning_rate: float) -> None:
        self._logs.append(math.log(loss))

    def forecast(self, horizon: int) -> tuple[Array, Array]:
        count = len(self._logs)
        if count < 10:
            return np.full(horizon, self._logs[-1]), np.full(horizon, np.inf)
        if self._fitted != count:
            self._fit()
        ahead = np.log(np.arange(count + 1.0, count + horizon + 1.0))
        return power_law(ahead, *self._parameters), np.full(horizon, self._noise)

    def offset(self, gain: float) -> float:
        """Exponentially weighted mean of the residuals of the last fit."""
        if not self._fitted:
            return 0.0
        y = np.array(self._logs[: self._fitted])
        residual = y - power_law(np.log(np.arange(1.0, len(y) + 1.0)), *self._parameters)
        weights = (1.0 - gain) ** np.arange(len(y) - 1.0, -1.0, -1.0)
        return float(weights @ residual / weights.sum())

    def _fit(self) -> None:
        y = np.array(self._logs)
        x = np.log(np.arange(1.0, len(y) + 1.0))
        slope, intercept = np.polyfit(x, y, 1)
        decay = max(-slope, 0.05)
        start = np.array([y[-LINE:].mean() - 1.0, intercept, decay])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", OptimizeWarning)
                fitted, _ = curve_fit(
                    power_law, x, y, start, jac=_power_law_slopes, maxfev=EVALUATIONS
                )
        except RuntimeError:
            # Not converged: the straight line in log-log, a = 0.
            fitted = np.array([-np.inf, intercept, -slope])
        residual = (y - power_law(x, *fitted))[-RECENT:]
        self._parameters, self._fitted = fitted, len(y)
        self._noise = math.sqrt(float(residual @ residual) / len(residual))


class DampedTrend:
    """Holt's exponential smoothing of level and damped trend (Gardner & McKenzie 1985, eq. 1)."""

    def __init__(self, level_gain: float, trend_gain: float, damping: float) -> None:
        self._gains = level_gain, trend_gain
        self._damping = damping
        self._count = 0
        self._level = self._trend = 0.0

    def observe(self, y: float) -> None:
        """Take one log loss."""
        self._count += 1
        level_gain, trend_gain = max(self._gains[0], 1.0 / self._count), self._gains[1]
        trend = self._damping * self._trend
        # The first gain is 1: the level starts at the first value, whatever it was before.
        level = self._level + trend + level_gain * (y - self._level - trend)
        if self._count > 1:
            self._trend = trend + trend_gain * (level - self._level - trend)
        self._level = level

    def mean(self, horizon: int) -> Array:
        """Forecast (horizon,) of the next log losses."""
        damped = np.cumsum(self._damping ** np.arange(1.0, horizon + 1.0))
        return self._level + self._trend * damped


class ExpertMixture:
    """Simple forecasts, weighted by how well each did lately at leads like these.

    The experts are levels, damped trends, lines, and power laws (of the whole run, moved to the
    recent level, and of its second half). Every `EVERY` steps all of them forecast; when the steps
    have passed, each is charged its mean square error. Within a band of leads the weights are
    ``error ** -STEEPNESS`` of a discounted mean error: inverse-error combination (Bates & Granger
    1969), made steep. The spread at a lead is that of a normal distribution with the discounted
    mean absolute error that the mixture itself made there: losses have heavy tails, and a mean
    square would state too little confidence in the bulk.
    """

    def __init__(self) -> None:
        self._logs: list[float] = []
        self._smoothings = [DampedTrend(*gains) for gains in SMOOTHINGS]
        self._lines = [LinearTrend(window) for window in LINES]
        self._law = PowerLaw()
        experts = len(SMOOTHINGS) + len(LINES) + len(RESIDUAL_GAINS) + 1
        self._errors = np.zeros((len(BANDS), experts))
        self._weight_sums = np.zeros(len(BANDS))
        self._misses = np.zeros(BANDS[-1][1])
        self._spread_sums = np.zeros(BANDS[-1][1])
        self._pending: list[deque[tuple[int, Array, Array]]] = [deque() for _ in BANDS]

    def observe(self, loss: float, gradient_norm: float, learning_rate: float) -> None:
        y = math.log(loss)
        self._logs.append(y)
        for smoothing in self._smoothings:
            smoothing.observe(y)
        for line in self._lines:
            line.observe(loss, gradient_norm, learning_rate)
        self._law.observe(loss, gradient_norm, learning_rate)
        self._charge()
        if len(self._logs) % EVERY == 0:
            experts = self._experts(BANDS[-1][1])
            made = len(self._logs), experts, self._mixed(experts)
            for pending in self._pending:
                pending.append(made)

    def forecast(self, horizon: int) -> tuple[Array, Array]:
        # Leads beyond the last band take the spread of its end.
        leads = np.minimum(np.arange(horizon), BANDS[-1][1] - 1)
        sums = self._spread_sums[leads]
        with np.errstate(divide="ignore", invalid="ignore"):
            absolute = np.where(sums > 0.0, self._misses[leads] / sums, np.inf)
        spread = math.sqrt(math.pi / 2.0) * absolute
        return self._mixed(self._experts(horizon)), spread

    def _experts(self, horizon: int) -> Array:
        means = [smoothing.mean(horizon) for smoothing in self._smoothings]
        means += [line.forecast(horizon)[0] for line in self._lines]
        law = self._law.forecast(horizon)[0]
        means += [law + self._law.offset(gain) for gain in RESIDUAL_GAINS]
        means.append(self._recent_law(horizon))
        return np.array(means)

    def _recent_law(self, horizon: int) -> Array:
        """Straight line in log-log through the second half of the run."""
        count = len(self._logs)
        y = np.array(self._logs[count // 2 :])
        x = np.log(np.arange(count // 2 + 1.0, count + 1.0))
        centred = x - x.mean()
        energy = float(centred @ centred)
        slope = float(centred @ y) / energy if energy > 0.0 else 0.0
        ahead = np.log(np.arange(count + 1.0, count + horizon + 1.0))
        mean: Array = y.mean() + slope * (ahead - x.mean())
        return mean

    def _mixed(self, experts: Array) -> Array:
        mixed = np.empty(experts.shape[1])
        for band, (first, end) in enumerate(BANDS):
            ahead = slice(first, None if band == len(BANDS) - 1 else end)
            errors = self._errors[band] / max(self._weight_sums[band], 1.0)
            # Below the rounding of float32 losses no expert is better than another.
            ratio = (errors + 1e-14) / (errors.min() + 1e-14)
            weights = ratio**-STEEPNESS
            mixed[ahead] = weights @ experts[:, ahead] / weights.sum()
        return mixed

    def _charge(self) -> None:
        for band, (first, end) in enumerate(BANDS):
            pending = self._pending[band]
            while pending and pending[0][0] + end <= len(self._logs):
                made, experts, mixed = pending.popleft()
                real = np.array(self._logs[made + first : made + end])
                error = np.mean((experts[:, first:end] - real) ** 2, axis=1)
                self._errors[band] = WEIGHT_DISCOUNT * self._errors[band] + error
                self._weight_sums[band] = WEIGHT_DISCOUNT * self._weight_sums[band] + 1.0
                own = slice(first, end)
                miss = np.abs(mixed[own] - real)
                self._misses[own] = SPREAD_DISCOUNT * self._misses[own] + miss
                self._spread_sums[own] = SPREAD_DISCOUNT * self._spread_sums[own] + 1.0


def power_law(log_step: Array, log_a: float, log_b: float, decay: float) -> Array:
    """``log(a + b k^-decay)`` at the logarithms of the steps k."""
    return np.logaddexp(log_a, log_b - decay * log_step)


def _power_law_slopes(log_step: Array, log_a: float, log_b: float, decay: float) -> Array:
    falling = log_b - decay * log_step
    share = np.exp(falling - np.logaddexp(log_a, falling))
    return np.stack([1.0 - share, share, -share * log_step], axis=1)


def _spread_of_level(logs: Array, levels: Array, horizon: int) -> Array:
    """Root mean square of ``logs[k + lead] - levels[k]`` over recent k, for each lead."""
    spread = np.full(horizon, np.inf)
    for lead in range(1, min(horizon, len(logs) - 1) + 1):
        recent = (logs[lead:] - levels[:-lead])[-RECENT:]
        spread[lead - 1] = math.sqrt(float(recent @ recent) / len(recent))
    return spread
