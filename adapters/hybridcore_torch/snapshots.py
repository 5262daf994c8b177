"""A bank of snapshots on the parameters' own device, and the algebra that needs the tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hybridcore_torch.ranks import Ranks, local

# Few enough columns for the displacements to stay in the cache, and enough for the calls not to
# count.
_BLOCK = 65536


class _Bucket:
    """Parameters of one device and dtype, as rows of one matrix, group after group.

    Of sharded parameters it is the part on this rank.

    Parameters
    ----------
    groups : dict of int to list of Parameter
        By the number of the layer group.
    rows : int
        Places for a copy of them.
    """

    def __init__(self, groups: dict[int, list[torch.nn.Parameter]], rows: int) -> None:
        self.parameters = [local(p) for group in groups.values() for p in group]
        sizes = [p.numel() for p in self.parameters]
        first = self.parameters[0]
        # Zeros, because all rows are saved, and what was in that memory is nobody's business.
        self.rows = torch.zeros(rows, sum(sizes), dtype=first.dtype, device=first.device)
        self.views = [self._split(row) for row in self.rows]
        # Number and columns of each group.
        self.spans: list[tuple[int, int, int]] = []
        start = 0
        for group, parameters in groups.items():
            stop = start + sum(local(p).numel() for p in parameters)
            self.spans.append((group, start, stop))
            start = stop

    def _split(self, row: torch.Tensor) -> list[torch.Tensor]:
        sizes = [p.numel() for p in self.parameters]
        parts = torch.split(row, sizes)
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]

    def store(self, row: int) -> None:
        torch._foreach_copy_(self.views[row], self.parameters)

    def load(self, row: int) -> None:
        torch._foreach_copy_(self.parameters, self.views[row])

    def gram(self, order: Sequence[int], start: int, stop: int) -> torch.Tensor:
        """Inner products of the rows of `order` about the last of them, (m, m) float64."""
        *older, newest = order
        rows = self.rows[:, start:stop]
        out = torch.zeros(len(order), len(order), dtype=torch.float64, device=rows.device)
        moved = wide(rows.new_empty(len(older), min(stop - start, _BLOCK)))
        for columns in _blocks(stop - start):
            origin = wide(rows[newest, columns])
            block = moved[:, : len(origin)]
            for row, displacement in zip(older, block, strict=True):
                torch.sub(rows[row, columns], origin, out=displacement)
            out[:-1, :-1] += block @ block.T
        return out

    def move(self, order: Sequence[int], weights: NDArray[np.float64], into: int | None) -> None:
        """Put the parameters at the newest row plus weighted displacements from it.

        `weights` is (groups, m), or (1, m) where they are the same for all groups. The point is
        left in the row `into`, which must not be one of `order`.
        """
        *older, newest = order
        if into is None:
            point = wide(self.rows[newest]).clone()
        else:
            point = wide(self.rows[into].copy_(self.rows[newest]))
        alike = [(0, 0, len(point))] if len(weights) == 1 else self.spans
        for group, start, stop in alike:
            rows, target = self.rows[:, start:stop], point[start:stop]
            by_row = zip(older, weights[group, :-1].tolist(), strict=True)
            weighted = [(row, weight) for row, weight in by_row if weight]
            for columns in _blocks(stop - start):
                origin, block = wide(rows[newest, columns]), target[columns]
                for row, weight in weighted:
                    block.add_(wide(rows[row, columns]) - origin, alpha=weight)
        if into is None:
            torch._foreach_copy_(self.parameters, self._split(point))
        else:
            self.rows[into].copy_(point)
            self.load(into)


def _blocks(size: int) -> Iterator[slice]:
    for start in range(0, size, _BLOCK):
        yield slice(start, min(size, start + _BLOCK))


def wide(values: torch.Tensor) -> torch.Tensor:
    """Return `values` in float32 at least: half precision cannot hold small displacements."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


class SnapshotBank:
    """The newest `capacity` snapshots of all layer groups, and two more places.

    Parameters
    ----------
    groups : list of list of Parameter
        Layer groups; every parameter once.
    capacity : int
        Snapshots that are kept; an older one makes room for a newer one.
    ranks : Ranks, optional
        Adds up the Gram matrices of all ranks.

    Attributes
    ----------
    count : int
        Snapshots in the bank.

    Notes
    -----
    Memory is ``capacity + 2`` copies of the parameters, made once: the bank, the recovery point,
    and the place where the weights wait during a probe.
    """

    def __init__(
        self, groups: list[list[torch.nn.Parameter]], capacity: int, ranks: Ranks | None = None
    ) -> None:
        self.capacity = capacity
        self._ranks = ranks
        self._recovery, self._waiting = capacity, capacity + 1
        self._order: list[int] = []
        self._groups = len(groups)
        kinds: dict[
            tuple[torch.device, torch.dtype, float], dict[int, list[torch.nn.Parameter]]
        ] = {}
        for number, group in enumerate(groups):
            for p in group:
                share = 1.0 if ranks is None else ranks.share(p)
                same = kinds.setdefault((p.device, p.dtype, share), {})
                same.setdefault(number, []).append(p)
        self._buckets = [_Bucket(same, capacity + 2) for same in kinds.values()]
        self._shares = [share for _, _, share in kinds]

    @property
    def count(self) -> int:
        """Snapshots in the bank."""
        return len(self._order)

    @property
    def _spans(self) -> list[list[tuple[int, int, int]]]:
        return [list(bucket.spans) for bucket in self._buckets]

    @torch.no_grad()
    def take(self, *, fresh: bool) -> None:
        """Add the weights as they are; with `fresh`, forget the older snapshots first."""
        if fresh:
            self._order.clear()
        row = self._next_row()
        for bucket in self._buckets:
            bucket.store(row)
        self._order = [*self._order, row][-self.capacity :]

    def _next_row(self) -> int:
        """Row of the oldest snapshot in a full bank, else one that is free."""
        if len(self._order) == self.capacity:
            return self._order[0]
        return next(i for i in range(self.capacity) if i not in self._order)

    @torch.no_grad()
    def gram(self) -> NDArray[np.float64]:
        """Inner products of the snapshots about the newest one, (groups, m, m) float64.

        Products are summed in blocks, in the precision of the parameters inside a block and in
        float64 over blocks: nearly as exact as float64 throughout, at a fraction of its time.
        """
        out = torch.zeros(self._groups, self.count, self.count, dtype=torch.float64)
        for bucket, share in zip(self._buckets, self._shares, strict=True):
            for group, start, stop in bucket.spans:
                out[group] += share * bucket.gram(self._order, start, stop).cpu()
        return (out if self._ranks is None else self._ranks.add(out)).numpy()

    @torch.no_grad()
    def move(self, coefficients: NDArray[np.float64], *, take: bool = False) -> None:
        """Put the weights at `coefficients` (groups or 1, n) of the newest n snapshots.

        Written as the newest snapshot plus displacements, so that standing still is exact. With
        `take` the point is the newest snapshot from then on.
        """
        order = self._order[-coefficients.shape[1] :]
        row = self._next_row() if take else None
        for bucket in self._buckets:
            if row in order:
                bucket.move(order, coefficients, None)
                bucket.store(row)
            else:
                bucket.move(order, coefficients, row)
        if row is not None:
            self._order = [*self._order, row][-self.capacity :]

    @torch.no_grad()
    def save(self) -> None:
        """Keep the weights as the recovery point."""
        for bucket in self._buckets:
            bucket.store(self._recovery)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the weights back to the recovery point."""
        for bucket in self._buckets:
            bucket.load(self._recovery)

    @torch.no_grad()
    def return_to_newest(self) -> None:
        """Put the weights back to the newest snapshot, where a move began."""
        for bucket in self._buckets:
            bucket.load(self._order[-1])

    @torch.no_grad()
    def set_aside(self) -> None:
        """Remember the weights for :meth:`put_back`."""
        for bucket in self._buckets:
            bucket.store(self._waiting)

    @torch.no_grad()
    def put_back(self) -> None:
        """Undo what was done to the weights since :meth:`set_aside`."""
        for bucket in self._buckets:
            bucket.load(self._waiting)

    def state_dict(self) -> dict[str, Any]:
        """Return the snapshots and the recovery point, cloned."""
        rows = [bucket.rows[: self._recovery + 1].clone() for bucket in self._buckets]
        return {"order": list(self._order), "rows": rows, "spans": self._spans}

    def takes(self, state: dict[str, Any]) -> bool:
        """Whether `state` is of the same groups and capacity."""
        shapes = [bucket.rows[: self._recovery + 1].shape for bucket in self._buckets]
        alike = [rows.shape for rows in state["rows"]] == shapes
        return alike and state["spans"] == self._spans

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned for the same groups."""
        for bucket, saved in zip(self._buckets, state["rows"], strict=True):
            bucket.rows[: self._recovery + 1].copy_(saved)
        self._order = list(state["order"])
