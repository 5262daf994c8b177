"""What the engine asks of a model of the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from hybridcore.types import Observation


@dataclass(frozen=True, slots=True)
class Forecast:
    """Distribution of the logarithm of a future loss.

    Attributes
    ----------
    mean : float
        Expected log loss.
    std : float
        Standard deviation of the log loss, at least 0; infinite while nothing is known.
    """

    mean: float
    std: float

    def confidence(self, tolerance: float) -> float:
        """Probability in [0, 1] that the log loss comes to lie within `tolerance` of the mean."""
        if not math.isfinite(self.std):
            return 0.0
        return math.erf(tolerance / (math.sqrt(2.0) * self.std)) if self.std > 0.0 else 1.0


class DynamicsModel(Protocol):
    """Learns the trajectory of the loss from full steps and forecasts full steps to come."""

    @property
    def slope(self) -> float:
        """Change of the log loss that one more full step is expected to make."""

    @property
    def noise(self) -> float:
        """Standard deviation of one log loss about its trend."""

    @property
    def is_stable(self) -> bool:
        """True once the trend is known and does not rise beyond its own uncertainty."""

    def observe(self, observation: Observation) -> None:
        """Take what one full step showed; ignored where the loss is not finite and positive."""

    def forecast(self, horizon: float) -> Forecast:
        """Forecast of the log loss `horizon` full steps after the last one observed."""

    def restart(self) -> None:
        """Forget the trend: the weights have moved by other means than full steps."""

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state as numbers, lists and arrays."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""


@runtime_checkable
class DeltaHead(Protocol):
    """A model that also learns how far extrapolations miss, layer group by layer group."""

    def teach_delta(self, missed: NDArray[np.float64]) -> None:
        """Take the factor and the cosine (groups, 2) by which one extrapolation missed."""

    def delta(self) -> NDArray[np.float64]:
        """Factors (groups,) on the displacements of the next one, 1 where it is right as it is."""
