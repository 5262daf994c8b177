"""What a model of training dynamics has to beat: forecasts of the log loss by simple means.

A forecaster sees one run, step by step, and says where the log loss of the steps to come will lie.
"""

from __future__ import annotations

import math
import warnings
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import OptimizeWarning, curve_fit

from hybridcore import Observation
from hybridcore.dynamics import DynamicsModel
from hybridcore.dynamics.mixture import ExpertMixture

Array: TypeAlias = NDArray[np.float64]

# Past errors from which a baseline takes its spread.
RECENT = 200
SMOOTHING = 0.1
LINE = 50
EVALUATIONS = 200


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
        return _steps(self._model, horizon)


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


class Mixture:
    """What hybridcore's learned models start from."""

    def __init__(self) -> None:
        self._model = ExpertMixture()

    def observe(self, loss: float, gradient_norm: float, learning_rate: float) -> None:
        self._model.observe(math.log(loss))

    def forecast(self, horizon: int) -> tuple[Array, Array]:
        return _steps(self._model, horizon)


def _steps(model: DynamicsModel | ExpertMixture, horizon: int) -> tuple[Array, Array]:
    forecasts = [model.forecast(step) for step in range(1, horizon + 1)]
    return np.array([f.mean for f in forecasts]), np.array([f.std for f in forecasts])


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
