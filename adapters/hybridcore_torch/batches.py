"""How many batches a loader has."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sized


def length(loader: Iterable[object]) -> float:
    """Return the number of batches, infinite where the loader does not know it."""
    if isinstance(loader, Sized):
        # A DataLoader over a dataset without a length has the method, and raises.
        with contextlib.suppress(TypeError):
            return len(loader)
    return math.inf
