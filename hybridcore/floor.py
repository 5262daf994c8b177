"""What losses are counted from, so that they have logarithms."""

from __future__ import annotations

import math
from typing import Any

# Weight of the newest loss in the mean size of losses.
NEWEST = 0.05
# Sizes that lie between the lowest loss and a new floor, and the fewest between it and an old one.
DEPTH, LEAST_DEPTH = 4.0, 1.0


class Floor:
    """Zero while no loss is negative, and then as far below the losses as they are large.

    How far a loss has still to fall is not known, so its logarithm says less here than where it
    cannot fall below zero: what is made of it compares falls at about the same loss.

    Attributes
    ----------
    value : float
        What losses are counted from, at most 0.
    """

    def __init__(self) -> None:
        self.value = 0.0
        self._lowest = math.inf
        self._mean_size = math.nan

    def see(self, loss: float) -> None:
        """Take in the loss of a step that computed gradients."""
        if not math.isfinite(loss):
            return
        self._lowest = min(self._lowest, loss)
        known, size = not math.isnan(self._mean_size), abs(loss)
        self._mean_size = self._mean_size + NEWEST * (size - self._mean_size) if known else size

    @property
    def is_near(self) -> bool:
        """Whether losses come so close to it that it should be lowered."""
        return self._lowest < 0.0 and self._lowest - self.value < LEAST_DEPTH * self._size

    def lower(self) -> float:
        """Lower it; return by how much, which is what losses above it have risen by."""
        before = self.value
        self.value = self._lowest - DEPTH * self._size
        return before - self.value

    @property
    def _size(self) -> float:
        return max(self._mean_size, -self._lowest)

    def state_dict(self) -> dict[str, float]:
        """Return the whole state as plain numbers."""
        return {"value": self.value, "lowest": self._lowest, "mean_size": self._mean_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        self.value = float(state["value"])
        self._lowest, self._mean_size = float(state["lowest"]), float(state["mean_size"])
