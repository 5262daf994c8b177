"""What losses are counted from, so that they have logarithms."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

# Newest losses by which it is decided, of which fewer than half are of points far off, and how many
# of them have to lie low, as a single one can be anything.
WINDOW, LOW = 41, 3
# Sizes that lie between a low loss and a new floor, and the fewest between it and an old one.
DEPTH, LEAST_DEPTH = 4.0, 1.0


class Floor:
    """Zero while losses are not negative, and then as far below them as they are large.

    How far a loss has still to fall is not known, so its logarithm says less here than where it
    cannot fall below zero: what is made of it compares falls at about the same loss.

    Attributes
    ----------
    value : float
        What losses are counted from, at most 0.
    """

    def __init__(self) -> None:
        self.value = 0.0
        self._losses: deque[float] = deque(maxlen=WINDOW)
        # Losses until none of them is negative any more: on a short step a search for one counts.
        self._negative = 0

    def see(self, loss: float) -> None:
        """Take in the finite loss of a step that computed gradients."""
        self._losses.append(loss)
        if loss < 0.0:
            self._negative = WINDOW
        elif self._negative:
            self._negative -= 1

    @property
    def is_near(self) -> bool:
        """Whether losses come so close to it that it should be lowered."""
        if not self._negative:
            return False
        low, size = self._low, self._size
        near = low < 0.0 and low - self.value < LEAST_DEPTH * size
        return near and math.isfinite(low - DEPTH * size)

    def lower(self) -> float:
        """Lower it; return by how much, which is what losses above it have risen by."""
        before = self.value
        self.value = self._low - DEPTH * self._size
        return before - self.value

    @property
    def _low(self) -> float:
        return sorted(self._losses)[LOW - 1] if len(self._losses) >= LOW else 0.0

    @property
    def _size(self) -> float:
        return max(statistics.median(map(abs, self._losses)), -self._low)

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state as a number and a list."""
        return {"value": self.value, "losses": list(self._losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        self.value = float(state["value"])
        self._losses.clear()
        self._negative = 0
        for loss in state["losses"]:
            self.see(loss)
