"""Secant pairs on the model's own device, and the algebra that needs the tensors."""

from __future__ import annotations

import math
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
# Of Keras's own: what a step at a rate of zero leaves as it was but for averages of gradients.
_KNOWN = {"SGD", "Adam", "Adamax", "Nadam", "RMSprop", "Adagrad", "Adadelta", "Lion"}
# Vectors beside the pairs: base, its gradient, the metric, the point that was reached last.
_BESIDE = 4


def affordable(model: Any, wanted: int, room: float) -> int:
    """How many of the pairs `wanted` there is room for, in so many bytes.

    None where the loss of a step is not the whole of what the optimizer lowers, with an
    optimizer that is not known to take a step at a rate of zero well, where a step is more than one
    batch, on several replicas, and where weights are not float32.
    """
    optimizer, variables = model.optimizer, model.trainable_variables
    strategy = getattr(model, "distribute_strategy", None)
    kind = type(optimizer)
    more = (
        kind.__name__ not in _KNOWN
        or kind.__module__.partition(".")[0] != "keras"
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

    Vectors are flat, and pairs the rows of two tensors, of zeros where there is none yet, so that
    nothing is compiled anew for another number of them; see ``hybridcore.quasi_newton`` for what
    is made of them. The metric is the inverse root of the mean square of the gradients that the
    pairs saw when their products were first asked for, as in Adam, and stays until the bank is
    emptied.

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
        self._first = port.reader(self._begun)
        self._next = port.reader(_moved_on)
        self._add_square = port.compiled(lambda total, new: total + new * new)
        self._as_metric = port.compiled(_metric)
        self._inner_products = port.compiled(_products)
        self._differs = port.reader(lambda weights, flat: ops.any(_flat(weights) != flat))
        self._reach = port.writer(self._reached)
        self._put = port.writer(lambda flat: (self._split(flat), None))
        self.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of all vectors, but for what an operation on them takes while it lasts."""
        if self._held is None:
            return 0
        beside = (self._metric, None if self.here is self._held[0] else self.here)
        return self._size * (2 * self._capacity + 2 + sum(one is not None for one in beside))

    @property
    def identities(self) -> list[int]:
        """Which variables move."""
        return [id(variable) for variable in self._variables]

    @property
    def is_empty(self) -> bool:
        """Whether there is no base yet."""
        return self._held is None

    def clear(self) -> None:
        """Forget the base, the pairs and the metric."""
        # Where the weights were put last, flat; None where they have moved on since.
        self.here: Any = None
        # Base, its gradient, displacements, changes of the gradient.
        self._held: tuple[Any, Any, Any, Any] | None = None
        # Rows of the pairs, oldest first.
        self._order: list[int] = []
        # Until it is the metric, the sum of so many squared gradients.
        self._metric: Any = None
        self._squares = 0
        self._is_metric = False

    def take(self) -> None:
        """Make weights and gradients as they are the base, and keep the pair from the last one."""
        if self._held is None:
            self._held = tuple(self._first(self._port.gradients))
        else:
            full = len(self._order) == self._capacity
            row = self._order[0] if full else len(self._order)
            place = ops.convert_to_tensor([[row]], "int32")
            held = tuple(self._next(self._port.gradients, *self._held, place))
            self._held, self._order = held, [*self._order[full:], row]
        self.here, gradient = self._held[:2]
        if not self._is_metric:
            total = ops.zeros_like(gradient) if self._metric is None else self._metric
            self._metric = self._add_square(total, gradient)
            self._squares += 1

    def products(self) -> Secants:
        """Inner products of the pairs, oldest first, and the gradient at the base."""
        assert self._held is not None
        if not self._is_metric:
            count = ops.convert_to_tensor(float(self._squares), "float32")
            self._metric, self._is_metric = self._as_metric(self._metric, count), True
        _, *vectors = self._held
        found = self._inner_products(*vectors, self._metric)
        plain, scaled = (np.array(ops.convert_to_numpy(one), np.float64) for one in found)
        # The gradient is in the place of the last change.
        places = [*self._order, self._capacity]
        return Secants(plain[np.ix_(self._order, places)], scaled[np.ix_(places, places)])

    def reach(self, coefficients: NDArray[np.float64]) -> None:
        """Put the weights at the base plus `coefficients` (2 k + 1,) of the bank's vectors."""
        if not coefficients.any():
            self.back_to_base()
            return
        assert self._held is not None
        k, shares = len(self._order), np.zeros((2, self._capacity), np.float32)
        shares[0, self._order], shares[1, self._order] = coefficients[:k], coefficients[k:-1]
        steepest = np.array(coefficients[-1], np.float32)
        point = *self._held, self._metric, *map(ops.convert_to_tensor, (shares, steepest))
        self.here = self._reach(*point)

    def back_to_base(self) -> None:
        """Put the weights where the last pair ended."""
        self.put(self.base)

    def put(self, weights: Any) -> None:
        """Write flat `weights` into the variables."""
        self._put(weights)
        self.here = weights

    def is_there(self) -> bool:
        """Whether the weights are where they were put last, if they were."""
        return self.here is None or not bool(self._differs(self.here))

    @property
    def base(self) -> Any:
        """Weights where the last pair ended, flat."""
        assert self._held is not None
        return self._held[0]

    def state_dict(self) -> dict[str, Any]:
        """Return pairs, base and metric as NumPy arrays."""
        rows: list[Any] = []
        if self._held is not None:
            base, gradient, *pairs = self._held
            for one in pairs:
                rows += list(ops.convert_to_numpy(one)[: len(self._order)])
            rows += [base, gradient, self._metric]
        rows = [np.array(ops.convert_to_numpy(row)) for row in rows]
        counts = [len(self._order), self._held is not None, self._squares, self._is_metric]
        # In another order their sums would differ in the last digit.
        order = list(self._order)
        return {"rows": rows, "counts": [int(count) for count in counts], "order": order}

    def takes(self, state: dict[str, Any]) -> bool:
        """Whether `state` is of as many weights and no more pairs."""
        size = sum(int(np.prod(variable.shape)) for variable in self._variables)
        pairs = state["counts"][0] <= self._capacity
        return pairs and all(np.shape(row) == (size,) for row in state["rows"])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned for the same variables."""
        self.clear()
        pairs, based, self._squares, is_metric = state["counts"]
        if not based:
            return
        rows = [np.asarray(row) for row in state["rows"]]
        unused = [np.zeros_like(rows[-1])] * (self._capacity - pairs)
        moved, changed = (rows[i * pairs : (i + 1) * pairs] + unused for i in range(2))
        held = (*rows[2 * pairs : 2 * pairs + 2], np.stack(moved), np.stack(changed))
        base, gradient, moved, changed = (ops.convert_to_tensor(value) for value in held)
        self._held = base, gradient, moved, changed
        # States from before there was one hold the oldest first.
        self._order = [int(row) for row in state.get("order", range(pairs))]
        self._metric, self._is_metric = ops.convert_to_tensor(rows[-1]), bool(is_metric)

    # -- what is compiled -------------------------------------------------------------------

    def _begun(self, weights: Sequence[Any], gradients: Sequence[Any]) -> tuple[Any, ...]:
        base = _flat(weights)
        none = ops.zeros((self._capacity, base.shape[0]), base.dtype)
        return base, _flat(gradients), none, none

    def _reached(
        self,
        base: Any,
        gradient: Any,
        moved: Any,
        changed: Any,
        metric: Any,
        shares: Any,
        steepest: Any,
    ) -> tuple[list[Any], Any]:
        curved = ops.matmul(shares[1], changed) + steepest * gradient
        flat = base + metric * curved + ops.matmul(shares[0], moved)
        return self._split(flat), flat

    def _split(self, flat: Any) -> list[Any]:
        parts, start = [], 0
        for variable in self._variables:
            size = int(np.prod(variable.shape))
            parts.append(ops.reshape(flat[start : start + size], variable.shape))
            start += size
        return parts


def _flat(values: Sequence[Any]) -> Any:
    return ops.concatenate([ops.reshape(value, (-1,)) for value in values])


def _moved_on(
    weights: Sequence[Any],
    gradients: Sequence[Any],
    base: Any,
    gradient: Any,
    moved: Any,
    changed: Any,
    place: Any,
) -> tuple[Any, ...]:
    """Make `weights` and `gradients` the base, and what is between the two the pair at `place`."""
    here, slope = _flat(weights), _flat(gradients)
    moved = ops.scatter_update(moved, place, (here - base)[None])
    changed = ops.scatter_update(changed, place, (slope - gradient)[None])
    return here, slope, moved, changed


def _metric(total: Any, count: Any) -> Any:
    root = ops.sqrt(total / count)
    metric = 1.0 / (root + _FLOOR * ops.mean(root) + _TINY)
    return metric / ops.mean(metric)


def _products(gradient: Any, moved: Any, changed: Any, metric: Any) -> tuple[Any, Any]:
    changes = ops.concatenate((changed, gradient[None]))
    others = ops.transpose(changes)
    return ops.matmul(moved, others), ops.matmul(changes * metric, others)
