"""The random states of Python and NumPy, as arrays and numbers."""

from __future__ import annotations

import random
from typing import Any

import numpy as np


def random_states() -> dict[str, Any]:
    """Return the states of ``random`` and of ``numpy.random``'s global generator."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "python": [version, np.array(words, dtype=np.int64), gauss],
        # Signed, because not every framework has unsigned integers.
        "numpy": [kind, np.array(keys, dtype=np.int64), int(position), int(has_gauss), cached],
    }


def check_random_states(state: dict[str, Any]) -> None:
    """Raise ``ValueError``, ``TypeError`` or ``LookupError`` unless `state` can be restored."""
    random.Random().setstate(_python(state))
    np.random.RandomState().set_state(_numpy(state))  # type: ignore[arg-type]


def restore_random_states(state: dict[str, Any]) -> None:
    """Take back what :func:`random_states` returned."""
    random.setstate(_python(state))
    np.random.set_state(_numpy(state))  # type: ignore[arg-type] # noqa: NPY002


def _python(state: dict[str, Any]) -> tuple[object, ...]:
    version, words, gauss = state["python"]
    return version, tuple(int(word) for word in words), gauss


def _numpy(state: dict[str, Any]) -> tuple[object, ...]:
    kind, keys, *rest = state["numpy"]
    return kind, np.asarray(keys, dtype=np.uint32), *rest
