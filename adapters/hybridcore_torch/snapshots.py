"""A bank of snapshots on the parameters' own device, and the algebra that needs the tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

# Few enough columns for the displacements to stay in the cache.
_BLOCK = 16384


class _Bucket:
    """Parameters of one group with one device and dtype, as rows of one matrix."""

    def __init__(self, parameters: list[torch.nn.Parameter], rows: int) -> None:
        self.parameters: list[torch.Tensor] = list(parameters)
        size = sum(p.numel() for p in parameters)
        first = parameters[0]
        self.rows = torch.empty(rows, size, dtype=first.dtype, device=first.device)
        self.views = [self._split(row) for row in self.rows]

    def _split(self, row: torch.Tensor) -> list[torch.Tensor]:
        sizes = [p.numel() for p in self.parameters]
        parts = torch.split(row, sizes)
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]

    def store(self, row: int) -> None:
        torch._foreach_copy_(self.views[row], self.parameters)

    def load(self, row: int) -> None:
        torch._foreach_copy_(self.parameters, self.views[row])

    def gram(self, order: Sequence[int]) -> torch.Tensor:
        """Inner products of the rows of `order` about the last of them, (m, m) float64."""
        newest, older = self.rows[order[-1]], list(order[:-1])
        out = torch.zeros(len(order), len(order), dtype=torch.float64, device=self.rows.device)
        for start in range(0, self.rows.shape[1], _BLOCK):
            columns = slice(start, start + _BLOCK)
            moved = wide(self.rows[older, columns]) - wide(newest[columns])
            out[:-1, :-1] += moved @ moved.T
        return out

    def move(self, order: Sequence[int], weights: Sequence[float]) -> None:
        """Put the parameters at the newest row plus weighted displacements from it."""
        newest = wide(self.rows[order[-1]])
        point = newest.clone()
        for row, weight in zip(order[:-1], weights[:-1], strict=True):
            if weight != 0.0:
                point.add_(wide(self.rows[row]) - newest, alpha=weight)
        torch._foreach_copy_(self.parameters, self._split(point))


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

    Attributes
    ----------
    count : int
        Snapshots in the bank.

    Notes
    -----
    Memory is ``capacity + 2`` copies of the parameters, made once: the bank, the recovery point,
    and the place where the weights wait during a probe.
    """

    def __init__(self, groups: list[list[torch.nn.Parameter]], capacity: int) -> None:
        self.capacity = capacity
        self._recovery, self._waiting = capacity, capacity + 1
        self._order: list[int] = []
        self._buckets: list[list[_Bucket]] = []
        for group in groups:
            kinds: dict[tuple[torch.device, torch.dtype], list[torch.nn.Parameter]] = {}
            for p in group:
                kinds.setdefault((p.device, p.dtype), []).append(p)
            self._buckets.append([_Bucket(same, capacity + 2) for same in kinds.values()])

    @property
    def count(self) -> int:
        """Snapshots in the bank."""
        return len(self._order)

    @property
    def _all(self) -> list[_Bucket]:
        return [bucket for group in self._buckets for bucket in group]

    @torch.no_grad()
    def take(self, *, fresh: bool) -> None:
        """Add the weights as they are; with `fresh`, forget the older snapshots first."""
        if fresh:
            self._order.clear()
        if len(self._order) == self.capacity:
            row = self._order.pop(0)
        else:
            row = next(i for i in range(self.capacity) if i not in self._order)
        for bucket in self._all:
            bucket.store(row)
        self._order.append(row)

    @torch.no_grad()
    def gram(self) -> NDArray[np.float64]:
        """Inner products of the snapshots about the newest one, (groups, m, m) float64.

        Products are summed in blocks, in the precision of the parameters inside a block and in
        float64 over blocks: nearly as exact as float64 throughout, at a fraction of its time.
        """
        out = np.zeros((len(self._buckets), self.count, self.count))
        for index, group in enumerate(self._buckets):
            for bucket in group:
                out[index] += bucket.gram(self._order).cpu().numpy()
        return out

    @torch.no_grad()
    def move(self, coefficients: NDArray[np.float64]) -> None:
        """Put the weights at `coefficients` (groups or 1, n) of the newest n snapshots.

        Written as the newest snapshot plus displacements, so that standing still is exact.
        """
        order = self._order[-coefficients.shape[1] :]
        rows = np.broadcast_to(coefficients, (len(self._buckets), len(order)))
        for weights, group in zip(rows.tolist(), self._buckets, strict=True):
            for bucket in group:
                bucket.move(order, weights)

    @torch.no_grad()
    def save(self) -> None:
        """Keep the weights as the recovery point."""
        for bucket in self._all:
            bucket.store(self._recovery)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the weights back to the recovery point."""
        for bucket in self._all:
            bucket.load(self._recovery)

    @torch.no_grad()
    def set_aside(self) -> None:
        """Remember the weights for :meth:`put_back`."""
        for bucket in self._all:
            bucket.store(self._waiting)

    @torch.no_grad()
    def put_back(self) -> None:
        """Undo what was done to the weights since :meth:`set_aside`."""
        for bucket in self._all:
            bucket.load(self._waiting)

    def state_dict(self) -> dict[str, Any]:
        """Return the snapshots and the recovery point, cloned."""
        rows = [bucket.rows[: self._recovery + 1].clone() for bucket in self._all]
        return {"order": list(self._order), "rows": rows}

    def takes(self, state: dict[str, Any]) -> bool:
        """Whether `state` is of the same groups and capacity."""
        shapes = [bucket.rows[: self._recovery + 1].shape for bucket in self._all]
        return [rows.shape for rows in state["rows"]] == shapes

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned for the same groups."""
        for bucket, saved in zip(self._all, state["rows"], strict=True):
            bucket.rows[: self._recovery + 1].copy_(saved)
        self._order = list(state["order"])
