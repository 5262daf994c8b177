"""Stated intervals made honest by how often they have been missed.

Every forecast that has come due was inside its interval or not. After a miss the interval grows,
after a hit it shrinks by so much less that the two balance where nine in ten are hits, whatever the
distribution of the errors and however it drifts (adaptive conformal inference, Gibbs & Candès 2021,
eq. 2, here on the logarithm of the interval's width as in the quantile tracking of Angelopoulos,
Candès & Tibshirani 2023, section 2.1).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from hybridcore.dynamics.protocol import Forecast

COVERAGE = 0.9
# Half-width of the interval of a normal distribution that holds this share, in deviations.
NORMAL_QUANTILE = 1.6448536269514722
RATE = 0.05
LOG_FACTOR_LIMIT = 7.0


class ConformalScale:
    """Factor on the stated standard deviation at each of some horizons.

    Parameters
    ----------
    horizons : tuple of int
        Steps ahead at which forecasts are followed, increasing.
    """

    def __init__(self, horizons: tuple[int, ...]) -> None:
        self._horizons = horizons
        self._places = [math.log(horizon) for horizon in horizons]
        self._log_factors = [0.0] * len(horizons)
        # Forecasts on their way, oldest first.
        self._open: list[deque[tuple[float, float]]] = [deque(maxlen=h) for h in horizons]

    def settle(self, value: float) -> None:
        """Take the value that the step just observed had, and judge the forecasts made for it."""
        for k, waiting in enumerate(self._open):
            if len(waiting) < self._horizons[k]:
                continue
            mean, std = waiting[0]
            if math.isfinite(std):
                width = NORMAL_QUANTILE * std * math.exp(self._log_factors[k])
                missed = float(abs(value - mean) > width)
                moved = self._log_factors[k] + RATE * (missed - (1.0 - COVERAGE))
                self._log_factors[k] = min(max(moved, -LOG_FACTOR_LIMIT), LOG_FACTOR_LIMIT)

    def follow(self, forecasts: Sequence[Forecast]) -> None:
        """Take what is forecast now, one for each horizon."""
        for waiting, forecast in zip(self._open, forecasts, strict=True):
            waiting.append((forecast.mean, forecast.std))

    def factor(self, horizon: float) -> float:
        """Factor on the standard deviation `horizon` steps ahead, interpolated over its log."""
        at = math.log(max(horizon, 1.0))
        return math.exp(float(np.interp(at, self._places, self._log_factors)))

    def restart(self) -> None:
        """Forget the forecasts on their way: the weights have moved by other means."""
        for waiting in self._open:
            waiting.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state as lists of numbers."""
        return {
            "log_factors": list(self._log_factors),
            "open": [[list(pair) for pair in waiting] for waiting in self._open],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        self._log_factors = [float(factor) for factor in state["log_factors"]]
        for waiting, saved in zip(self._open, state["open"], strict=True):
            waiting.clear()
            waiting.extend((float(mean), float(std)) for mean, std in saved)
