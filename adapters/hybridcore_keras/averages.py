"""The running average of the weights, on the model's own device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from keras import ops
from numpy.typing import NDArray

from hybridcore_keras.ports import Port
from hybridcore_keras.snapshots import bytes_of, wide


class WeightAverage:
    """One copy of the trainable variables that follows them; half precision in float32.

    Parameters
    ----------
    port : Port
        Reads the weights while ``fit`` runs.
    """

    def __init__(self, port: Port) -> None:
        self._variables = port.variables
        self._read = port.reader(lambda present: [wide(value) for value in present])
        self._towards = port.reader(_towards)
        self._values: list[Any] = []
        self.shown = False

    @property
    def nbytes(self) -> int:
        """Bytes of it."""
        return bytes_of(self._values)

    @property
    def identities(self) -> list[int]:
        """Which variables are averaged."""
        return [id(variable) for variable in self._variables]

    def add(self, weight: float) -> None:
        """Move the average towards the weights as they are, by `weight` in [0, 1] of the way."""
        if weight < 1.0 and self._values:
            share = ops.convert_to_tensor(weight, "float32")
            self._values = list(self._towards(self._values, share))
        else:
            self._values = list(self._read())

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the average into the variables, and what was there back; not while ``fit`` runs."""
        raw = [ops.copy(variable.value) for variable in self._variables]
        for variable, value in zip(self._variables, self._values, strict=True):
            variable.assign(ops.cast(value, variable.dtype))
        self.shown = True
        try:
            yield
        finally:
            for variable, value in zip(self._variables, raw, strict=True):
                variable.assign(value)
            self.shown = False

    def state_dict(self) -> list[NDArray[Any]]:
        """Return the average as NumPy arrays."""
        return [np.array(ops.convert_to_numpy(value)) for value in self._values]

    def takes(self, state: Sequence[NDArray[Any]]) -> bool:
        """Whether `state` has the shapes of the variables."""
        return [np.shape(v) for v in state] == [tuple(v.shape) for v in self._variables]

    def load_state_dict(self, state: Sequence[NDArray[Any]]) -> None:
        """Take back what :meth:`state_dict` returned."""
        self._values = [ops.convert_to_tensor(value) for value in state]


def _towards(present: Sequence[Any], values: Sequence[Any], share: Any) -> list[Any]:
    return [
        value + ops.cast(share, value.dtype) * (wide(now) - value)
        for value, now in zip(values, present, strict=True)
    ]
