"""Simple forecasts of the log loss, weighted by how well each has done lately."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybridcore.dynamics.protocol import Forecast
from hybridcore.kernels.cpu import experts as kernel

KNOTS = kernel.KNOTS
# Standard deviation of a normal distribution over its mean absolute deviation.
NORMAL = math.sqrt(math.pi / 2.0)


class ExpertMixture:
    """Base of the learned models: where the log loss will be, by several simple means at once.

    The experts are the level; discounted lines, as they are and with a slope shrunken by its own
    uncertainty; and the power law ``a + b k^-c`` through the whole run (Hestness et al. 2017, eq.
    1), by itself and moved by shares of its recent misses. All see every step, and each is charged
    the squared error of its forecasts at nine leads. The weights at a lead are
    ``error ** -STEEPNESS`` of discounted errors: inverse-error combination (Bates & Granger 1969),
    made steep, and ``LAW_PRIOR`` times that for the law by itself, once it is fitted and knows
    where a restart has led. The spread is that of a normal distribution with the mean absolute
    error that the mixture itself had. The law keeps counts and sums in bins of log steps, so that a
    step costs the same however many there were.

    - *Predicts* the log loss of full steps to come, and how far off that may be.
    - *Pays* in forecasts: 15 steps ahead its error is below a line's on 75 % of the windows of 54
      runs by which nothing was chosen, and below a power law's on 71 %
      (``benchmarks/results/forecast_skill-fresh.json``).
    - *Hurts* at the start of a process: its kernel compiles when first used.
    - *Costs* one call of that kernel a step, the same however long the run is.
    - *Source*: Hestness et al. 2017, equation 1; Bates & Granger 1969.
    """

    def __init__(self) -> None:
        self._state = np.zeros(kernel.STATE_SIZE)
        self._ring = np.zeros((kernel.RING, kernel.LEADS, kernel.EXPERTS + 1))
        self._weights = np.zeros((kernel.LEADS, kernel.EXPERTS))
        self._experts = np.zeros(kernel.EXPERTS)

    def observe(self, log_loss: float) -> None:
        """Take the finite log loss of one full step."""
        kernel.step(log_loss, self._state, self._ring, self._weights)

    def forecast(self, horizon: float) -> Forecast:
        """Forecast of the log loss `horizon` full steps after the last one observed.

        The spread is infinite in the first steps after a restart, and at horizons at which no
        forecast has come due yet.
        """
        state = self._state
        if state[kernel.SINCE_RESTART] == 0.0:
            return Forecast(0.0, math.inf)
        mean = self.mean(horizon)
        spreads = self._spreads()
        if not math.isfinite(spreads[-1]):
            known = np.isfinite(spreads)
            if not known.any() or horizon > KNOTS[known][-1]:
                return Forecast(mean, math.inf)
            spreads = spreads[known]
        at = math.log(max(horizon, 1.0))
        return Forecast(mean, float(np.interp(at, kernel.PLACES[: len(spreads)], spreads)))

    def mean(self, horizon: float) -> float:
        """Mean of :meth:`forecast` alone, once a step was observed; cheaper."""
        return kernel.forecast(float(horizon), self._state, self._weights, self._experts)

    def at_knots(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Means and spreads at ``KNOTS`` after the last step, copies, all at once."""
        slot = (int(self._state[kernel.COUNT]) - 1) % kernel.RING
        means = self._state[kernel.ORIGIN] + self._ring[slot, :, kernel.EXPERTS]
        return means, self._spreads()

    def restart(self) -> None:
        """Forget level and lines: the weights have moved by other means than full steps.

        The experts' records stay, and so does the law of the whole run, which moves to the level
        of the first steps to come.
        """
        self._state[kernel.SINCE_RESTART] = 0.0
        self._state[kernel.WEIGHT : kernel.ERROR] = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state as arrays, copies."""
        return {name: array.copy() for name, array in self._arrays().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        for name, array in self._arrays().items():
            array[:] = state[name]

    def _spreads(self) -> NDArray[np.float64]:
        """Return standard deviations at the knots, infinite where nothing is known."""
        weights = self._state[kernel.ERROR_WEIGHT : kernel.MISS]
        misses = self._state[kernel.MISS : kernel.BIN_COUNT]
        spreads: NDArray[np.float64] = np.full(kernel.LEADS, math.inf)
        settled = self._state[kernel.SINCE_RESTART] >= kernel.SETTLING
        np.divide(NORMAL * misses, weights, out=spreads, where=settled & (weights > 0.0))
        return spreads

    def _arrays(self) -> dict[str, NDArray[np.float64]]:
        return {"state": self._state, "ring": self._ring, "weights": self._weights}
