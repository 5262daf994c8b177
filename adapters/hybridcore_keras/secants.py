"""Secant pairs on the model's own device, and the algebra that needs the tensors."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops
from numpy.typing import NDArray

from hybridcore import Secants
from hybridcore_keras.ports import Port
from hybridcore_keras.snapshots import itemsize

# Of the root mean square of a coordinate's gradients, relative to their mean over all coordinates.
_FLOOR = 0.01
_TINY = 1e-37
# What a step at a rate of zero leaves as it was but for running averages of gradients.
_KNOWN = {"SGD", "Adam", "Adamax", "Nadam", "RMSprop", "Adagrad", "Adadelta", "Lion"}
# Vectors beside the pairs: base, its gradient, the metric.
_BESIDE = 3


def affordable(model: Any, wanted: int, room: float) -> int:
    """How many of the pairs `wanted` there is room for, in so many bytes.

    None where the loss of a step is not the whole of what the optimizer lowers, with an
    optimizer that is not known to take a step at a rate of zero well, where a step is more than one
    batch, on several replicas, and where weights are not float32.
    """
    optimizer, variables = model.optimizer, model.trainable_variables
    strategy = getattr(model, "distribute_strategy", None)
    more = (
        type(optimizer).__name__ not in _KNOWN
        or optimizer.loss_scale_factor is not None
        or optimizer.weight_decay
        or optimizer.use_ema
        or optimizer.gradient_accumulation_steps
        or model.steps_per_execution != 1
        or getattr(strategy, "num_replicas_in_sync", 1) != 1
        or any(variable.constraint is not None for variable in variables)
        or {str(variable.dtype) for variable in variables} != {"float32"}
    )
    if more:
        return 0
    size = 4 * sum(int(np.prod(variable.shape)) for variable in variables)
    return max(0, min(wanted, (int(room // size) - _BESIDE) // 2))


class SecantBank:
    """The newest `capacity` pairs of a displacement and the change of the gradient over it.

    Every vector is one flat tensor; see ``hybridcore.quasi_newton`` for what is made of them. The
    metric is the inverse root of the mean square of the gradients that the pairs saw when their
    products were first asked for, as in Adam, and stays until the bank is emptied.

    Parameters
    ----------
    port : Port
        Reads and writes the weights, and holds the gradients of the last pass.
    capacity : int
        Pairs that are kept; an older one makes room for a newer one.
    """

    def __init__(self, port: Port, capacity: int) -> None:
        self._port = port
        self._variables = port.variables
        self._capacity = capacity
        sizes = (math.prod(v.shape) * itemsize(v.dtype) for v in self._variables)
        self._size: int = sum(sizes)
        self._read = port.reader(_flat)
        self._pair = port.compiled(_pair)
        self._add_square = port.compiled(lambda total, new: total + new * new)
        self._as_metric = port.compiled(_metric)
        self._inner_products = port.compiled(_products)
        self._reach = port.writer(lambda *point: (self._reached(*point), None))
        self._put = port.writer(lambda flat: (self._split(flat), None))
        self.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of all vectors, but for what an operation on them takes while it lasts."""
        vectors = len(self._moved) + len(self._changed) + len(self._base or ())
        return self._size * (vectors + (self._metric is not None))

    @property
    def identities(self) -> list[int]:
        """Which variables move."""
        return [id(variable) for variable in self._variables]

    def clear(self) -> None:
        """Forget the base, the pairs and the metric."""
        self._moved: deque[Any] = deque(maxlen=self._capacity)
        self._changed: deque[Any] = deque(maxlen=self._capacity)
        self._base: tuple[Any, Any] | None = None
        # Until it is the metric, the sum of so many squared gradients.
        self._metric: Any = None
        self._squares = 0
        self._is_metric = False

    def take(self) -> None:
        """Make weights and gradients as they are the base, and keep the pair from the last one."""
        weights = self._read()
        gradient, pair = self._pair(weights, self._port.gradients, self._base)
        if pair is not None:
            self._moved.append(pair[0])
            self._changed.append(pair[1])
        if not self._is_metric:
            total = ops.zeros_like(gradient) if self._metric is None else self._metric
            self._metric = self._add_square(total, gradient)
            self._squares += 1
        self._base = weights, gradient

    def products(self) -> Secants:
        """Inner products of the pairs, oldest first, and the gradient at the base."""
        assert self._base is not None
        if not self._is_metric:
            count = ops.convert_to_tensor(float(self._squares), "float32")
            self._metric, self._is_metric = self._as_metric(self._metric, count), True
        moved = self._port.stacked(list(self._moved))
        changes = self._port.stacked([*self._changed, self._base[1]])
        plain, scaled = self._inner_products(moved, changes, self._metric)
        return Secants(*(np.array(ops.convert_to_numpy(p), np.float64) for p in (plain, scaled)))

    def reach(self, coefficients: NDArray[np.float64]) -> None:
        """Put the weights at the base plus `coefficients` (2 k + 1,) of the bank's vectors."""
        if not coefficients.any():
            self.back_to_base()
            return
        assert self._base is not None
        pairs = (self._port.stacked(list(rows)) for rows in (self._moved, self._changed))
        shares = ops.convert_to_tensor(coefficients.astype(np.float32))
        self._reach(*self._base, *pairs, self._metric, shares)

    def back_to_base(self) -> None:
        """Put the weights where the last pair ended."""
        assert self._base is not None
        self._put(self._base[0])

    def state_dict(self) -> dict[str, Any]:
        """Return pairs, base and metric as NumPy arrays."""
        vectors = [*self._moved, *self._changed, *(self._base or ())]
        vectors += [] if self._metric is None else [self._metric]
        rows = [np.array(ops.convert_to_numpy(vector)) for vector in vectors]
        counts = [len(self._moved), self._base is not None, self._squares, self._is_metric]
        return {"rows": rows, "counts": [int(count) for count in counts]}

    def takes(self, state: dict[str, Any]) -> bool:
        """Whether `state` is of as many weights and no more pairs."""
        size = sum(int(np.prod(variable.shape)) for variable in self._variables)
        pairs = state["counts"][0] <= self._capacity
        return pairs and all(np.shape(row) == (size,) for row in state["rows"])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned for the same variables."""
        self.clear()
        pairs, based, self._squares, is_metric = state["counts"]
        rows = [ops.convert_to_tensor(row) for row in state["rows"]]
        self._moved.extend(rows[:pairs])
        self._changed.extend(rows[pairs : 2 * pairs])
        rest = rows[2 * pairs :]
        self._base = (rest[0], rest[1]) if based else None
        self._metric = rest[-1] if based else None
        self._is_metric = bool(is_metric)

    # -- what is compiled -------------------------------------------------------------------

    def _reached(
        self,
        base: Any,
        gradient: Any,
        moved: Any,
        changed: Any,
        metric: Any,
        shares: Any,
    ) -> list[Any]:
        k = ops.shape(moved)[0]
        curved = ops.matmul(shares[k : 2 * k], changed) + shares[2 * k] * gradient
        return self._split(base + metric * curved + ops.matmul(shares[:k], moved))

    def _split(self, flat: Any) -> list[Any]:
        parts, start = [], 0
        for variable in self._variables:
            size = int(np.prod(variable.shape))
            parts.append(ops.reshape(flat[start : start + size], variable.shape))
            start += size
        return parts


def _flat(values: Sequence[Any]) -> Any:
    return ops.concatenate([ops.reshape(value, (-1,)) for value in values])


def _pair(
    weights: Any, gradients: Sequence[Any], base: tuple[Any, Any] | None
) -> tuple[Any, tuple[Any, Any] | None]:
    """Return the gradients as one, and what has changed since `base`."""
    gradient = _flat(gradients)
    return gradient, None if base is None else (weights - base[0], gradient - base[1])


def _metric(total: Any, count: Any) -> Any:
    root = ops.sqrt(total / count)
    metric = 1.0 / (root + _FLOOR * ops.mean(root) + _TINY)
    return metric / ops.mean(metric)


def _products(moved: Any, changes: Any, metric: Any) -> tuple[Any, Any]:
    return (
        ops.matmul(moved, ops.transpose(changes)),
        ops.matmul(changes * metric, ops.transpose(changes)),
    )
