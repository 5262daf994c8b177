"""Which jump, how far, and how sure: the first decision rule.

A bank of snapshots can be held against itself: forecast its newest snapshots from its older ones
and see how far off the forecast is. Where noise moves the weights, yesterday's displacement says
nothing about tomorrow's and the forecast is no better than standing still; where the trajectory is
smooth it is exact. The test costs no forward pass, since the Gram matrix holds all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hybridcore.extrapolation import EXTRAPOLATORS, FORECASTERS

# An average leads back, not ahead: it serves to judge a jump, not to make one.
ARMS = (*FORECASTERS, "anderson")
BACKTEST_INTERVALS = (1, 2)
# Error of a forecast, relative to the distance moved, at which nothing can be trusted.
WORTHLESS_ERROR = 0.5
MOST_REACH = 8


@dataclass(frozen=True, slots=True)
class Jump:
    """A way through parameter space: an extrapolator and how far it is taken.

    Attributes
    ----------
    extrapolator : str
        Name in :data:`hybridcore.extrapolation.EXTRAPOLATORS`.
    reach : float
        Distance in snapshot intervals, at least 0. Methods without a horizon ignore it.
    """

    extrapolator: str
    reach: float

    def coefficients(self, gram: NDArray[np.float64], share: float = 1.0) -> NDArray[np.float64]:
        """Affine coefficients (m,) of the point after a `share` in [0, 1] of the way.

        A forecast is followed along its own path, which may bend; a method that names one point is
        followed along the straight line to it.
        """
        extrapolate = EXTRAPOLATORS[self.extrapolator]
        if self.extrapolator in FORECASTERS:
            return extrapolate(gram, share * self.reach)
        start = np.zeros(len(gram))
        start[-1] = 1.0
        return start + share * (extrapolate(gram, self.reach) - start)


@dataclass(slots=True)
class Flight:
    """The jump under way: where it started, where it is meant to land, how it goes.

    Attributes
    ----------
    jump : Jump
        Way that is followed.
    horizon : int
        Predicted steps that it stands for.
    log_start, log_target : float
        Log loss at the start, and at the end of the way when it was chosen.
    log_best, best_share : float
        Least log loss on the way so far, and the share of the way at which it was.
    slope : float
        Change of the log loss by one full step before the jump.
    """

    jump: Jump
    horizon: int
    log_start: float
    log_target: float
    slope: float
    log_best: float
    best_share: float = 0.0

    def expected(self, share: float) -> float:
        """Log loss forecast for a `share` of the way."""
        return self.log_start + share * (self.log_target - self.log_start)


def path_confidence(gram: NDArray[np.float64]) -> dict[str, float]:
    """Confidence in [0, 1] in each extrapolator, from how well it forecast the bank's own end.

    ``1 - (error / WORTHLESS_ERROR)^2``, not below 0, with the error of the forecast relative to the
    distance really moved, the worst over ``BACKTEST_INTERVALS``. Methods that name a point instead
    of forecasting a time cannot be tested so: they get the best forecaster's figure, which says
    whether the trajectory is regular at all.

    Parameters
    ----------
    gram : (m, m) ndarray of float64
        Gram matrix of the bank's snapshots, oldest first, m at least 4.
    """
    forecasts = {
        name: min(_backtest(name, gram, ahead) for ahead in BACKTEST_INTERVALS)
        for name in FORECASTERS
    }
    best = max(forecasts.values())
    return {name: forecasts.get(name, best) for name in ARMS}


def _backtest(name: str, gram: NDArray[np.float64], ahead: int) -> float:
    known = len(gram) - ahead
    error = np.zeros(len(gram))
    error[:known] = EXTRAPOLATORS[name](gram[:known, :known], float(ahead))
    error[-1] -= 1.0
    moved = np.zeros(len(gram))
    moved[known - 1], moved[-1] = 1.0, -1.0
    distance = float(moved @ gram @ moved)
    if distance <= 0.0:
        return 0.0
    missed = max(0.0, float(error @ gram @ error)) / distance
    return max(0.0, 1.0 - missed / WORTHLESS_ERROR**2)


def learning_rate_ahead(rates: Sequence[float], horizon: int) -> float:
    """Mean learning rate of the next `horizon` steps over that of the window `rates`.

    The distance that training covers goes with the sum of its learning rates, not with its steps.
    The schedule belongs to the user and is not known ahead: its present trend is continued, never
    below zero.
    """
    window = np.asarray(rates, dtype=np.float64)
    mean = float(window.mean()) if len(window) else 0.0
    if not mean > 0.0 or len(window) < 2:
        return 1.0
    trend = (window[-1] - window[0]) / (len(window) - 1)
    ahead = np.maximum(0.0, window[-1] + trend * np.arange(1, horizon + 1))
    return float(ahead.mean() / mean)
