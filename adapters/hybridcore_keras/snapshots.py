"""A bank of snapshots on the model's own device, and the algebra that needs the tensors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from keras import ops
from numpy.typing import NDArray

from hybridcore_keras.groups import Group
from hybridcore_keras.ports import Port

# Columns that are summed in the precision of the weights; over blocks, sums are in float64.
_BLOCK = 16384

Flat = list[Any]


class SnapshotBank:
    """The newest `capacity` snapshots of all layer groups, and two more places.

    A snapshot is one flat tensor for each group and dtype, made by a compiled function.

    Parameters
    ----------
    groups : list of list of int
        Layer groups, as positions of the trainable variables.
    capacity : int
        Snapshots that are kept; an older one makes room for a newer one.
    port : Port
        Reads and writes the weights.
    """

    def __init__(self, groups: list[Group], capacity: int, port: Port) -> None:
        self.capacity = capacity
        self.groups = groups
        self._port = port
        self._variables = port.variables
        self._buckets: list[list[int]] = []
        self._owners: list[int] = []
        for owner, group in enumerate(groups):
            kinds: dict[str, list[int]] = {}
            for position in group:
                kinds.setdefault(str(self._variables[position].dtype), []).append(position)
            self._buckets.extend(kinds.values())
            self._owners.extend([owner] * len(kinds))
        self._rows: list[Flat] = []
        self._recovery: Flat | None = None
        self._waiting: Flat | None = None
        self._read = port.reader(self._flatten)
        self._inner_products = port.compiled(self._blocks)
        self._combined = port.compiled(self._combine)
        self._parts = port.compiled(self._split)

    @property
    def identities(self) -> list[int]:
        """Which variables are kept."""
        return [id(variable) for variable in self._variables]

    @property
    def count(self) -> int:
        """Snapshots in the bank."""
        return len(self._rows)

    def take(self, *, fresh: bool) -> None:
        """Add the weights as they are; with `fresh`, forget the older snapshots first."""
        if fresh:
            self._rows.clear()
        self._rows.append(self._read())
        del self._rows[: -self.capacity]

    def gram(self) -> NDArray[np.float64]:
        """Inner products of the snapshots about the newest one, (groups, m, m) float64."""
        out = np.zeros((len(self.groups), self.count, self.count))
        if self.count > 1:
            for owner, blocks in zip(self._owners, self._inner_products(self._rows), strict=True):
                out[owner, :-1, :-1] += ops.convert_to_numpy(blocks).sum(0, dtype=np.float64)
        return out

    def move(self, coefficients: NDArray[np.float64]) -> None:
        """Put the weights at `coefficients` (groups or 1, n) of the newest n snapshots.

        Written as the newest snapshot plus displacements, so that standing still is exact.
        """
        rows = self._rows[-coefficients.shape[1] :]
        groups = np.broadcast_to(coefficients, (len(self.groups), len(rows)))
        weights = ops.convert_to_tensor(groups.astype(np.float32))
        self._port.assign(self._combined(rows, weights))

    def save(self) -> None:
        """Keep the weights as the recovery point."""
        self._recovery = self._read()

    def restore(self) -> None:
        """Put the weights back to the recovery point."""
        self._port.assign(self._parts(self._recovery))

    def set_aside(self) -> None:
        """Remember the weights for :meth:`put_back`."""
        self._waiting = self._read()

    def put_back(self) -> None:
        """Undo what was done to the weights since :meth:`set_aside`, if that was not done yet."""
        if self._waiting is not None:
            self._port.assign(self._parts(self._waiting))
            self._waiting = None

    def state_dict(self) -> dict[str, Any]:
        """Return the snapshots and the recovery point as NumPy arrays."""
        kept = self._recovery
        return {
            "rows": [[_copied(flat) for flat in row] for row in self._rows],
            "recovery": None if kept is None else [_copied(flat) for flat in kept],
        }

    def takes(self, state: dict[str, Any]) -> bool:
        """Whether `state` is of the same groups and capacity."""
        sizes = [sum(self._size(p) for p in bucket) for bucket in self._buckets]
        rows = state["rows"] + ([] if state["recovery"] is None else [state["recovery"]])
        return len(state["rows"]) <= self.capacity and all(
            [np.size(flat) for flat in row] == sizes for row in rows
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned for the same groups."""
        self._rows = [self._tensors(row) for row in state["rows"]]
        kept = state["recovery"]
        self._recovery = None if kept is None else self._tensors(kept)

    def _tensors(self, row: Sequence[NDArray[Any]]) -> Flat:
        kinds = [self._variables[bucket[0]].dtype for bucket in self._buckets]
        return [ops.convert_to_tensor(flat, kind) for flat, kind in zip(row, kinds, strict=True)]

    def _size(self, position: int) -> int:
        return int(np.prod(self._variables[position].shape))

    # -- what is compiled -------------------------------------------------------------------

    def _flatten(self, values: Sequence[Any]) -> Flat:
        return [
            ops.concatenate([ops.reshape(values[position], (-1,)) for position in bucket])
            for bucket in self._buckets
        ]

    def _split(self, flats: Sequence[Any]) -> list[Any]:
        values: list[Any] = [None] * len(self._variables)
        for flat, bucket in zip(flats, self._buckets, strict=True):
            ends = list(accumulate(self._size(position) for position in bucket))
            parts = ops.split(flat, ends[:-1]) if len(bucket) > 1 else [flat]
            for position, part in zip(bucket, parts, strict=True):
                values[position] = ops.reshape(part, self._variables[position].shape)
        return values

    def _blocks(self, rows: Sequence[Flat]) -> list[Any]:
        out = []
        for bucket in range(len(self._buckets)):
            newest = wide(rows[-1][bucket])
            moved = ops.stack([wide(row[bucket]) - newest for row in rows[:-1]])
            size = moved.shape[1]
            width = min(_BLOCK, size)
            moved = ops.pad(moved, ((0, 0), (0, -size % width)))
            moved = ops.transpose(ops.reshape(moved, (len(rows) - 1, -1, width)), (1, 0, 2))
            out.append(ops.matmul(moved, ops.transpose(moved, (0, 2, 1))))
        return out

    def _combine(self, rows: Sequence[Flat], weights: Any) -> list[Any]:
        points = []
        for bucket, owner in enumerate(self._owners):
            newest = wide(rows[-1][bucket])
            point = newest
            for index, row in enumerate(rows[:-1]):
                weight = ops.cast(weights[owner, index], newest.dtype)
                point = point + weight * (wide(row[bucket]) - newest)
            points.append(ops.cast(point, rows[-1][bucket].dtype))
        values = self._split(points)
        # A jump may leave the set that a constraint allows, as a step of an optimizer may.
        return [
            value if variable.constraint is None else variable.constraint(value)
            for value, variable in zip(values, self._variables, strict=True)
        ]


def wide(values: Any) -> Any:
    """Return `values` in float32 at least: half precision cannot hold small displacements."""
    half = any(name in str(values.dtype) for name in ("float16", "bfloat16"))
    return ops.cast(values, "float32") if half else values


def _copied(flat: Any) -> NDArray[Any]:
    return np.array(ops.convert_to_numpy(flat))
