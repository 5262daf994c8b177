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

    Vectors are flat, and those that a step is made of the rows of one table, of zeros where there
    is no pair yet, so that nothing is compiled anew for another number of them; see
    ``hybridcore.quasi_newton`` for what is made of them. The metric is the inverse root of the mean
    square of the gradients that the pairs saw when their products were first asked for, as in Adam,
    and stays until the bank is emptied.

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
        self._turn = port.compiled(_turned)
        self._differs = port.reader(lambda weights, flat: ops.any(_flat(weights) != flat))
        self._reach = port.writer(self._reached)
        self._put = port.writer(lambda flat: (self._split(flat), None))
        self.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of all vectors, but for what an operation on them takes while it lasts."""
        if self._held is None:
            return 0
        elsewhere = self.here is not None and self.here is not self.base
        return self._size * (2 * self._capacity + 3 + elsewhere)

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
        # Base, its gradient, the metric, and the table: displacements, and changes of the gradient
        # times the metric. Until there is a metric, the sum of so many squared gradients in its
        # place, and changes as they are.
        self._held: tuple[Any, Any, Any, Any] | None = None
        # Slots of the pairs, oldest first.
        self._order: list[int] = []
        self._squares = 0
        self._is_metric = False
        # By slot, and last those with the gradient at the base.
        slots = self._capacity
        self._plain, self._scaled = np.zeros((slots, slots + 1)), np.zeros((slots + 1, slots + 1))

    def take(self) -> None:
        """Make weights and gradients as they are the base, and keep the pair from the last one."""
        if self._held is None:
            self._held = tuple(self._first(self._port.gradients))
        else:
            full = len(self._order) == self._capacity
            slot = self._order[0] if full else len(self._order)
            places = ops.convert_to_tensor([[slot], [self._capacity + slot]], "int32")
            given = self._port.gradients, *self._held, places
            *held, found = self._next(*given, ops.convert_to_tensor(self._is_metric))
            # Where reading them raises, all is as before.
            products = _wide(found) if self._is_metric else None
            self._held, self._order = tuple(held), [*self._order[full:], slot]
            if products is not None:
                self._keep_products(slot, products)
        self.here = self.base
        self._squares += not self._is_metric

    def products(self) -> Secants:
        """Inner products of the pairs, oldest first, and the gradient at the base."""
        if not self._is_metric:
            assert self._held is not None
            base, gradient, total, table = self._held
            count = ops.convert_to_tensor(float(self._squares), "float32")
            metric, table, *found = self._turn(total, count, gradient, table)
            self._plain, self._scaled = map(_wide, found)
            self._held, self._is_metric = (base, gradient, metric, table), True
        pairs, all_of_them = self._places
        return Secants(self._plain[pairs], self._scaled[all_of_them])

    @property
    def _places(self) -> tuple[Any, Any]:
        """Where products are, oldest first: those of the pairs, and with the gradient's own."""
        # The gradient is in the place of the last change.
        places = [*self._order, self._capacity]
        return np.ix_(self._order, places), np.ix_(places, places)

    def _keep_products(self, slot: int, found: NDArray[np.float64]) -> None:
        """Take in the products of the table with the gradient and with the change in `slot`."""
        (with_gradient, with_change), k = found, self._capacity
        self._plain[:, k] = with_gradient[:k]
        self._scaled[:, k] = self._scaled[k] = with_gradient[k:]
        # Displacements and changes before them are in no direction.
        self._plain[slot, :k] = 0.0
        self._plain[:, slot] = with_change[:k]
        self._scaled[:k, slot] = self._scaled[slot, :k] = with_change[k:-1]

    def reach(self, coefficients: NDArray[np.float64]) -> None:
        """Put the weights at the base plus `coefficients` (2 k + 1,) of the bank's vectors."""
        if not coefficients.any():
            return self.back_to_base()
        assert self._held is not None
        k, slots = len(self._order), self._capacity
        # By slot, and last that of the gradient.
        shares = np.zeros(2 * slots + 1, np.float32)
        shares[self._order] = coefficients[:k]
        shares[slots:][self._order] = coefficients[k:-1]
        shares[-1] = coefficients[-1]
        self.here = self._reach(*self._held, ops.convert_to_tensor(shares))

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
        """Return pairs, base, metric and products as NumPy arrays."""
        rows: list[Any] = []
        if self._held is not None:
            base, gradient, metric, table = self._held
            vectors, k = ops.convert_to_numpy(table), len(self._order)
            rows += [*vectors[:k], *vectors[self._capacity :][:k]]
            rows += [base, gradient, metric]
        rows = [np.array(ops.convert_to_numpy(row)) for row in rows]
        counts = [len(self._order), self._held is not None, self._squares, self._is_metric]
        pairs, all_of_them = self._places
        return {
            "rows": rows,
            "counts": [int(count) for count in counts],
            # In another order sums would differ in the last digit, and found anew the products.
            "order": list(self._order),
            "plain": self._plain[pairs],
            "scaled": self._scaled[all_of_them],
        }

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
        base, gradient, metric = rows[2 * pairs :]
        moved, changed = (rows[i * pairs : (i + 1) * pairs] + unused for i in range(2))
        # States from before there was one hold the oldest first.
        self._order = [int(slot) for slot in state.get("order", range(pairs))]
        self._is_metric = bool(is_metric)
        if "plain" in state:
            of_pairs, of_all = self._places
            self._plain[of_pairs], self._scaled[of_all] = state["plain"], state["scaled"]
        elif is_metric:
            # States from before products were kept hold changes as they were.
            both = np.stack([*changed, gradient])
            products = np.stack(moved) @ both.T, both * metric @ both.T
            self._plain, self._scaled = (one.astype(np.float64) for one in products)
            changed = [metric * change for change in changed]
        table = np.stack([*moved, *changed])
        held = (ops.convert_to_tensor(value) for value in (base, gradient, metric, table))
        self._held = tuple(held)

    # -- what is compiled -------------------------------------------------------------------

    def _begun(self, weights: Sequence[Any], gradients: Sequence[Any]) -> tuple[Any, ...]:
        base, gradient = _flat(weights), _flat(gradients)
        none = ops.zeros((2 * self._capacity, base.shape[0]), base.dtype)
        return base, gradient, gradient * gradient, none

    def _reached(
        self, base: Any, gradient: Any, metric: Any, table: Any, shares: Any
    ) -> tuple[list[Any], Any]:
        flat = base + ops.matmul(shares[:-1], table) + shares[-1] * metric * gradient
        return self._split(flat), flat

    def _split(self, flat: Any) -> list[Any]:
        parts, start = [], 0
        for variable in self._variables:
            size = int(np.prod(variable.shape))
            parts.append(ops.reshape(flat[start : start + size], variable.shape))
            start += size
        return parts


def _wide(found: Any) -> NDArray[np.float64]:
    return np.array(ops.convert_to_numpy(found), np.float64)


def _flat(values: Sequence[Any]) -> Any:
    return ops.concatenate([ops.reshape(value, (-1,)) for value in values])


def _moved_on(
    weights: Sequence[Any],
    gradients: Sequence[Any],
    base: Any,
    gradient: Any,
    metric: Any,
    table: Any,
    places: Any,
    is_metric: Any,
) -> tuple[Any, ...]:
    """Make `weights` and `gradients` the base, and what is between the two a pair."""
    here, slope = _flat(weights), _flat(gradients)
    both, step = ops.stack((slope, slope - gradient)), here - base
    turned = ops.where(is_metric, metric, 1.0) * both
    metric = ops.where(is_metric, metric, metric + slope * slope)
    table = ops.scatter_update(table, places, ops.stack((step, turned[1])))
    # As rows: as columns it takes TensorFlow twice as long.
    found = [ops.matmul(both, ops.transpose(rows)) for rows in (table, turned[:1])]
    return here, slope, metric, table, ops.concatenate(found, axis=1)


def _turned(total: Any, count: Any, gradient: Any, table: Any) -> tuple[Any, ...]:
    """Make the metric, bring the changes in `table` into it, and find all products of the pairs."""
    k = table.shape[0] // 2
    root = ops.sqrt(total / count)
    metric = 1.0 / (root + _FLOOR * ops.mean(root) + _TINY)
    metric = metric / ops.mean(metric)
    changes = ops.concatenate((table[k:], gradient[None]))
    turned, columns = changes * metric, ops.transpose(changes)
    table = ops.concatenate((table[:k], turned[:-1]))
    return metric, table, ops.matmul(table[:k], columns), ops.matmul(turned, columns)
