"""What losses are counted from, so that they have logarithms."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

# Losses of whose sizes the median is taken: fewer than half of them are of points far off.
WINDOW = 41
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
        self._sizes: deque[float] = deque(maxlen=WINDOW)

    def see(self, loss: float) -> None:
        """Take in the loss of a step that computed gradients."""
        if math.isfinite(loss):
            self._lowest = min(self._lowest, loss)
            self._sizes.append(abs(loss))

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
        return max(statistics.median(self._sizes), -self._lowest)

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state as numbers and a list."""
        return {"value": self.value, "lowest": self._lowest, "sizes": list(self._sizes)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        self.value, self._lowest = float(state["value"]), float(state["lowest"])
        self._sizes = deque(state["sizes"], maxlen=WINDOW)
