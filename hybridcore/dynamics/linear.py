"""A local linear trend of the log loss, fitted by discounted least squares."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from hybridcore.dynamics.protocol import Forecast
from hybridcore.types import Observation

DISCOUNT = 0.95
LEAST_OBSERVATIONS = 10


@dataclass(slots=True)
class LinearDynamics:
    """Discounted least-squares line through the log losses (Brown 1963, ch. 9).

    The weight of a loss falls by ``DISCOUNT`` with each later one, a memory of about 20 steps, and
    time runs backwards from the newest loss, so that its intercept is the level now. The fit is
    exact from moments that are updated in a dozen multiplications a step.

    Attributes
    ----------
    count : int
        Losses seen since the last restart.
    weight, time, time2 : float
        Discounted sums of 1, t and t^2, with t = 0 for the newest loss and negative before.
    value, value2, product : float
        Discounted sums of y, y^2 and t y, with y the log loss less `origin`.
    origin : float
        Log loss about which y is taken, so that small differences keep their digits.
    """

    count: int = 0
    weight: float = 0.0
    time: float = 0.0
    time2: float = 0.0
    value: float = 0.0
    value2: float = 0.0
    product: float = 0.0
    origin: float = 0.0

    def observe(self, observation: Observation) -> None:
        """Take what one full step showed; ignored where the loss is not finite and positive."""
        loss = observation.loss
        if not 0.0 < loss < math.inf:
            return
        y = math.log(loss)
        if self.count == 0:
            self.origin = y
        y -= self.origin
        d = DISCOUNT
        # Older losses move one step into the past: t -> t - 1.
        self.time2 = d * (self.time2 - 2.0 * self.time + self.weight)
        self.time = d * (self.time - self.weight)
        self.product = d * (self.product - self.value)
        self.weight = d * self.weight + 1.0
        self.value = d * self.value + y
        self.value2 = d * self.value2 + y * y
        self.count += 1

    @property
    def slope(self) -> float:
        """Change of the log loss that one more full step is expected to make."""
        return self._fit()[1]

    @property
    def noise(self) -> float:
        """Standard deviation of one log loss about its trend; infinite while nothing is known."""
        return self._fit()[2]

    @property
    def is_stable(self) -> bool:
        """True once the trend is known and does not rise beyond its own uncertainty."""
        if self.count < LEAST_OBSERVATIONS:
            return False
        _, slope, noise = self._fit()
        spread = self.time2 - self.time * self.time / self.weight
        return slope <= 2.0 * noise / math.sqrt(spread) + 1e-12

    def forecast(self, horizon: float) -> Forecast:
        """Forecast of the log loss `horizon` full steps after the last one observed.

        The variance is that of a new observation about a fitted line: the noise, the uncertainty of
        the level, and that of the slope, which grows with the square of the horizon.
        """
        level, slope, noise = self._fit()
        if not math.isfinite(noise):
            return Forecast(level, math.inf)
        centre = self.time / self.weight
        spread = self.time2 - self.time * self.time / self.weight
        leverage = 1.0 / self.weight + (horizon - centre) ** 2 / spread
        return Forecast(level + slope * horizon, noise * math.sqrt(1.0 + leverage))

    def restart(self) -> None:
        """Forget the trend: the weights have moved by other means than full steps."""
        self.load_state_dict(LinearDynamics().state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state as plain numbers."""
        return {name: getattr(self, name) for name in self.__slots__}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, state[field.name])

    def _fit(self) -> tuple[float, float, float]:
        """Level at the newest loss, slope per step, and residual standard deviation."""
        if self.count < 3:
            level = self.origin + (self.value / self.weight if self.weight else 0.0)
            return level, 0.0, math.inf
        mean_t = self.time / self.weight
        mean_y = self.value / self.weight
        spread = self.time2 - self.time * mean_t
        covariance = self.product - self.time * mean_y
        slope = covariance / spread
        residual = max(0.0, self.value2 - self.value * mean_y - slope * covariance)
        # Two of the effective observations are spent on the line itself.
        effective = max(self.weight * (1.0 - 2.0 / self.count), 1e-12)
        return self.origin + mean_y - slope * mean_t, slope, math.sqrt(residual / effective)
