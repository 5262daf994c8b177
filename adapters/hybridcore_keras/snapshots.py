"""A bank of snapshots on the model's own device, and the algebra that needs the tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from keras import ops, tree
from numpy.typing import NDArray

from hybridcore.memory import CODED, SCALED, Kind
from hybridcore_keras.codes import decode, encode
from hybridcore_keras.groups import Group
from hybridcore_keras.ports import Port

# Columns that are summed in the precision of the weights; over blocks, sums are in float64.
_BLOCK = 16384

# One flat tensor for each bucket, or a tuple of codes in its place.
Flat = list[Any]


class SnapshotBank:
    """The newest `capacity` snapshots of all layer groups, and two more places.

    A snapshot is one flat tensor for each group and dtype, made by a compiled function. In fewer
    bits one of them, the base, is exact, and the others are displacements from it.

    Parameters
    ----------
    groups : list of list of int
        Layer groups, as positions of the trainable variables.
    capacity : int
        Snapshots that are kept; an older one makes room for a newer one.
    port : Port
        Reads and writes the weights.
    kind : {"exact", "bfloat16", "int8"}
        How they are kept: in the weights' own precision or in fewer bits. In fewer bits the weights
        are put where a snapshot is kept, as long as there is a point to come back to.

    Notes
    -----
    The point to come back to, and the place where the weights wait during a probe, are the newest
    snapshot where the weights are there: they take no memory then.
    """

    def __init__(
        self, groups: list[Group], capacity: int, port: Port, kind: Kind = "exact"
    ) -> None:
        self.capacity = capacity
        self.groups = groups
        self.kind = kind
        self._variables = port.variables
        self._buckets: list[list[int]] = []
        self._owners: list[int] = []
        for owner, group in enumerate(groups):
            kinds: dict[str, list[int]] = {}
            for position in group:
                kinds.setdefault(str(self._variables[position].dtype), []).append(position)
            self._buckets.extend(kinds.values())
            self._owners.extend([owner] * len(kinds))
        self._sizes = [sum(self._size(p) for p in bucket) for bucket in self._buckets]
        self._rows: list[Flat] = []
        self._base: Flat | None = None
        self._recovery: Flat | None = None
        self._waiting: Flat | None = None
        self._read = port.reader(self._flatten)
        self._holds = port.reader(self._same)
        self._coded = port.reader(lambda present, base: self._encode(self._flatten(present), base))
        self._recoded = port.compiled(self._recode)
        self._inner_products = port.compiled(self._blocks)
        self._moved = port.writer(lambda *point: (self._combine(*point), None))
        self._moved_on = port.writer(self._combine_and_flatten)
        self._put = port.writer(lambda row, base: (self._split(self._exact(row, base)), None))

    @property
    def identities(self) -> list[int]:
        """Which variables are kept."""
        return [id(variable) for variable in self._variables]

    @property
    def count(self) -> int:
        """Snapshots in the bank."""
        return len(self._rows)

    @property
    def grows(self) -> bool:
        """Whether the next snapshot may take more memory."""
        held = self._recovery is not None or self.kind in CODED
        return held or self.count < self.capacity

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return bytes_of([*self._rows, self._base, self._recovery, self._waiting])

    def take(self, *, fresh: bool, exact: bool = False) -> None:
        """Add the weights as they are; with `fresh`, forget the older snapshots first.

        With `exact` nothing is lost of this one, whatever the kind.
        """
        if fresh:
            self._rows.clear()
            self._base = None if self._recovery is None else self._base
        self._add(exact)

    def _add(self, exact: bool) -> None:
        kept = self._rows[-self.capacity + 1 :]
        if self.kind not in CODED:
            self._rows = [*kept, self._read()]
            return
        dropped = self._rows[: len(self._rows) - len(kept)]
        if exact or self._base is None or any(row is self._base for row in dropped):
            base = self._read()
            if kept:
                assert self._base is not None
                kept = list(self._recoded(kept, self._base, base))
            self._base, self._rows = base, [*kept, base]
            return
        row = self._coded(self._base)
        if self._recovery is not None:
            self._put(row, self._base)
        self._rows = [*kept, row]

    def gram(self) -> NDArray[np.float64]:
        """Inner products of the snapshots about the newest one, (groups, m, m) float64."""
        out = np.zeros((len(self.groups), self.count, self.count))
        if self.count > 1:
            products = self._inner_products(self._rows, self._base)
            for owner, blocks in zip(self._owners, products, strict=True):
                out[owner, :-1, :-1] += ops.convert_to_numpy(blocks).sum(0, dtype=np.float64)
        return out

    def move(self, coefficients: NDArray[np.float64], *, take: bool = False) -> None:
        """Put the weights at `coefficients` (groups or 1, n) of the newest n snapshots.

        Written as the newest snapshot plus displacements, so that standing still is exact; so is
        going to any one of them. With `take`, for which the weights have to be at the newest
        snapshot, the point is the newest from then on.
        """
        rows = self._rows[-coefficients.shape[1] :]
        (alone, *others) = np.flatnonzero(coefficients.any(axis=0)).tolist()
        if not (others or take):
            self._put(rows[alone], self._base)
            return
        if take and self.kind in CODED:
            rows = [*rows[:-1], self._read()]
        groups = np.broadcast_to(coefficients, (len(self.groups), len(rows)))
        weights = ops.convert_to_tensor(groups.astype(np.float32))
        base = self._base
        try:
            if take and self.kind not in CODED:
                row = self._moved_on(rows, base, weights)
                self._rows = [*self._rows[-self.capacity + 1 :], row]
            else:
                self._moved(rows, base, weights)
                if take:
                    self._add(exact=False)
        except BaseException:
            if take:
                self._put(rows[-1], base)
            raise

    def save(self) -> None:
        """Keep the weights as the recovery point."""
        self._recovery = self._keep()

    def restore(self) -> None:
        """Put the weights back to the recovery point."""
        assert self._recovery is not None
        self._put(self._recovery, self._base)

    def forget(self) -> None:
        """Do without the recovery point."""
        self._recovery = None

    def clear(self) -> None:
        """Do without the snapshots, and keep the recovery point."""
        self._rows, self._base = [], None

    @property
    def waits(self) -> bool:
        """Whether weights are set aside."""
        return self._waiting is not None

    def set_aside(self) -> None:
        """Remember the weights for :meth:`put_back`."""
        self._waiting = self._keep(coded=True)

    def put_back(self) -> None:
        """Undo what was done to the weights since :meth:`set_aside`, if that was not done yet."""
        if self._waiting is not None:
            self._put(self._waiting, self._base)
            self._waiting = None

    def _keep(self, *, coded: bool = False) -> Flat:
        """Return the newest snapshot if the weights are there, exactly, or a copy of them."""
        if self._rows and (coded or not _is_coded(self._rows[-1])):
            newest = self._rows[-1]
            if bool(ops.convert_to_numpy(self._holds(newest, self._base))):
                return newest
        return list(self._read())

    def state_dict(self) -> dict[str, Any]:
        """Return the snapshots, the base and the recovery point as lists of NumPy arrays.

        A base or recovery point that is a snapshot is its position.
        """

        def place(row: Flat | None) -> Any:
            for position, kept in enumerate(self._rows):
                if kept is row:
                    return position
            return None if row is None else _as_arrays(row)

        return {
            "kind": self.kind,
            "rows": [_as_arrays(row) for row in self._rows],
            "base": place(self._base),
            "recovery": place(self._recovery),
        }

    def takes(self, state: dict[str, Any]) -> bool:
        """Whether `state` is of the same groups and kind, and of no more snapshots."""
        rows = [*state["rows"], state.get("base"), state["recovery"]]
        return (
            # Before there were kinds, all were exact.
            state.get("kind", "exact") == self.kind
            and len(state["rows"]) <= self.capacity
            and all(self._fits(row, len(state["rows"])) for row in rows)
        )

    def _fits(self, row: Any, rows: int) -> bool:
        if row is None or isinstance(row, int):
            return row is None or 0 <= row < rows
        sizes = [np.size(part["values"] if isinstance(part, dict) else part) for part in row]
        blocks = [-(-size // SCALED) * SCALED for size in self._sizes]
        expected = zip(row, sizes, self._sizes, blocks, strict=False)
        return len(row) == len(self._sizes) and all(
            size == (padded if isinstance(part, dict) and self.kind == "int8" else exact)
            for part, size, exact, padded in expected
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned for the same groups and kind."""

        def place(row: Any) -> Flat | None:
            if row is None:
                return None
            return self._rows[row] if isinstance(row, int) else self._tensors(row)

        self._rows = [self._tensors(row) for row in state["rows"]]
        self._base, self._recovery = place(state.get("base")), place(state["recovery"])

    def _tensors(self, row: Sequence[Any]) -> Flat:
        def tensors(part: Any, bucket: list[int]) -> Any:
            if not isinstance(part, dict):
                return ops.convert_to_tensor(part, self._variables[bucket[0]].dtype)
            values = ops.convert_to_tensor(part["values"], self.kind)
            scales = part["scales"]
            return (values,) if scales is None else (values, ops.convert_to_tensor(scales))

        return [tensors(part, bucket) for part, bucket in zip(row, self._buckets, strict=True)]

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

    def _encode(self, flats: Flat, base: Flat) -> Flat:
        """Return the displacements of `flats` from `base` in fewer bits."""
        pairs = zip(flats, base, strict=True)
        return [encode(wide(flat) - wide(origin), self.kind) for flat, origin in pairs]

    def _recode(self, rows: Sequence[Flat], base: Flat, new: Flat) -> list[Flat]:
        """Return `rows`, displacements from `base` but for itself, as displacements from `new`."""
        moved = [wide(old) - wide(now) for old, now in zip(base, new, strict=True)]
        return [
            [
                encode(self._displacement(row, base, bucket) + moved[bucket], self.kind)
                for bucket in range(len(moved))
            ]
            for row in rows
        ]

    def _displacement(self, row: Flat, origin: Flat, bucket: int) -> Any:
        part = row[bucket]
        if isinstance(part, tuple):
            return decode(part, self._sizes[bucket])
        return wide(part) - wide(origin[bucket])

    def _exact(self, row: Flat, base: Flat | None) -> Flat:
        """Return a flat tensor of the weights' own precision for each bucket of `row`."""
        if base is None or not _is_coded(row):
            return row
        return [
            ops.cast(wide(origin) + self._displacement(row, base, bucket), origin.dtype)
            for bucket, origin in enumerate(base)
        ]

    def _same(self, present: Sequence[Any], row: Flat, base: Flat | None) -> Any:
        pairs = zip(self._flatten(present), self._exact(row, base), strict=True)
        return ops.all(ops.stack([ops.all(ops.equal(now, then)) for now, then in pairs]))

    def _about_newest(self, rows: Sequence[Flat], base: Flat | None, bucket: int) -> list[Any]:
        """Return the displacements of all rows but the newest from it."""
        *older, newest = rows
        if base is None:
            return [wide(row[bucket]) - wide(newest[bucket]) for row in older]
        end = self._displacement(newest, base, bucket)
        return [self._displacement(row, base, bucket) - end for row in older]

    def _blocks(self, rows: Sequence[Flat], base: Flat | None) -> list[Any]:
        out = []
        for bucket in range(len(self._buckets)):
            moved = ops.stack(self._about_newest(rows, base, bucket))
            size = moved.shape[1]
            width = min(_BLOCK, size)
            moved = ops.pad(moved, ((0, 0), (0, -size % width)))
            moved = ops.transpose(ops.reshape(moved, (len(rows) - 1, -1, width)), (1, 0, 2))
            out.append(ops.matmul(moved, ops.transpose(moved, (0, 2, 1))))
        return out

    def _combine_and_flatten(self, *point: Any) -> tuple[list[Any], Flat]:
        values = self._combine(*point)
        return values, self._flatten(values)

    def _combine(self, rows: Sequence[Flat], base: Flat | None, weights: Any) -> list[Any]:
        points = []
        newest = self._exact(rows[-1], base)
        for bucket, owner in enumerate(self._owners):
            point = wide(newest[bucket])
            for index, moved in enumerate(self._about_newest(rows, base, bucket)):
                point = point + ops.cast(weights[owner, index], point.dtype) * moved
            points.append(ops.cast(point, newest[bucket].dtype))
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


def as_numpy(values: Any) -> NDArray[Any]:
    """Copy a tensor; NumPy has no bfloat16 of its own, so that becomes float32."""
    if "bfloat16" in str(values.dtype):
        values = ops.cast(values, "float32")
    return np.array(ops.convert_to_numpy(values))


def bytes_of(tensors: Any) -> int:
    """Bytes of all tensors in nested containers, one that is there twice counted once."""
    distinct = {id(t): t for t in tree.flatten(tensors) if t is not None}
    return sum(math.prod(t.shape) * itemsize(t.dtype) for t in distinct.values())


def itemsize(dtype: Any) -> int:
    """Bytes of an element: the digits of its name are bits."""
    return int("".join(filter(str.isdigit, str(dtype)))) // 8


def _is_coded(row: Flat) -> bool:
    return any(isinstance(part, tuple) for part in row)


def _as_arrays(row: Flat) -> list[Any]:
    def arrays(part: Any) -> Any:
        if not isinstance(part, tuple):
            return as_numpy(part)
        scales = as_numpy(part[1]) if len(part) == 2 else None
        return {"values": as_numpy(part[0]), "scales": scales}

    return [arrays(part) for part in row]
