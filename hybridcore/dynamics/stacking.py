"""How much of a learned correction is believed: as much as recent ones turned out to be right."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

DISCOUNT = 0.98
# Least number that something is divided by.
TINY = 1e-150


class Stacking:
    """Share in [0, 1] of the corrections at each of some horizons, by discounted least squares.

    That is stacking (Wolpert 1992) of two forecasts, one without and one with the correction. The
    share starts at 0. As in the estimator of James & Stein (1961) the part of it goes that its own
    uncertainty explains.

    Parameters
    ----------
    horizons : tuple of int
        Steps ahead at which corrections are followed, increasing.

    Attributes
    ----------
    shares : (len(horizons),) ndarray of float64
        Shares at these horizons.
    """

    def __init__(self, horizons: tuple[int, ...]) -> None:
        self._horizons = np.array(horizons)
        self._places = np.log(self._horizons)
        self._each = np.arange(len(horizons))
        # Discounted sums of 1, correction^2, correction times miss, and miss^2, by horizon.
        self._sums = np.zeros((4, len(horizons)))
        self.shares = np.zeros(len(horizons))
        # The newest plain forecasts and their corrections, a ring of the longest horizon.
        self._plain = np.full((horizons[-1], len(horizons)), math.nan)
        self._corrections = np.zeros_like(self._plain)
        self._count = 0

    def settle(self, value: float) -> None:
        """Take the value that the step just observed had, and judge the corrections made for it."""
        due = (self._count - self._horizons) % len(self._plain), self._each
        miss, correction = value - self._plain[due], self._corrections[due]
        known = np.isfinite(miss)
        miss = np.where(known, miss, 0.0)
        row = np.array((known, correction * correction, correction * miss, miss * miss))
        self._sums = np.where(known, DISCOUNT * self._sums + row, self._sums)
        n, squares, product, misses = np.maximum(self._sums, 0.0)
        squares = np.maximum(squares, TINY)
        share = product / squares
        # A forecast h steps ahead shares its noise with h others.
        independent = np.maximum(n / self._horizons, 1.0)
        variance = np.maximum(misses - share * product, 0.0) / squares / independent
        self.shares = np.clip(share - variance / np.maximum(share, TINY), 0.0, 1.0)

    def follow(self, plain: ArrayLike, corrections: ArrayLike) -> None:
        """Take what is forecast now at each horizon without correction, and the corrections."""
        slot = self._count % len(self._plain)
        self._plain[slot], self._corrections[slot] = plain, corrections
        self._count += 1

    def share(self, horizon: float) -> float:
        """Share of a correction `horizon` steps ahead, interpolated over the log of it."""
        return float(np.interp(math.log(max(horizon, 1.0)), self._places, self.shares))

    def restart(self) -> None:
        """Forget the forecasts on their way: the weights have moved by other means."""
        self._plain[:] = math.nan

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state as arrays and a number."""
        return {
            "sums": self._sums.copy(),
            "shares": self.shares.copy(),
            "plain": self._plain.copy(),
            "corrections": self._corrections.copy(),
            "count": self._count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        self._sums = np.array(state["sums"], dtype=np.float64)
        self.shares = np.array(state["shares"], dtype=np.float64)
        self._plain[:], self._corrections[:] = state["plain"], state["corrections"]
        self._count = int(state["count"])
