"""A bank of snapshots, and what is done with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hybridcore.memory import CODED, Kind
from hybridcore_torch.buckets import ExactBucket, Groups
from hybridcore_torch.coded import CodedBucket
from hybridcore_torch.ranks import Ranks


class SnapshotBank:
    """The newest `capacity` snapshots of all layer groups, and a point to come back to.

    Parameters
    ----------
    groups : list of list of Parameter
        Layer groups; every parameter once.
    capacity : int
        Snapshots that are kept; an older one makes room for a newer one.
    ranks : Ranks, optional
        Adds up the Gram matrices of all ranks.
    kind : {"exact", "bfloat16", "int8", "host"}
        How they are kept: in the parameters' own precision, in fewer bits, or exactly and in the
        host's memory. In fewer bits the weights are put where a snapshot is kept, as long as there
        is a point to come back to.

    Attributes
    ----------
    count : int
        Snapshots in the bank.

    Notes
    -----
    A row is made when it is first needed. The point to come back to, and the place where the
    weights wait during a probe, are that of the newest snapshot where the weights are there.
    """

    def __init__(
        self,
        groups: list[list[torch.nn.Parameter]],
        capacity: int,
        ranks: Ranks | None = None,
        kind: Kind = "exact",
    ) -> None:
        self.capacity = capacity
        self.kind = kind
        self._ranks = ranks
        self._recovery: int | None = None
        self._waiting: int | None = None
        self._order: list[int] = []
        self._groups = len(groups)
        kinds: dict[tuple[torch.device, torch.dtype, float], Groups] = {}
        for number, group in enumerate(groups):
            for p in group:
                share = 1.0 if ranks is None else ranks.share(p)
                same = kinds.setdefault((p.device, p.dtype, share), {})
                same.setdefault(number, []).append(p)
        self._buckets = [_bucket(same, kind) for same in kinds.values()]
        self._shares = [share for _, _, share in kinds]

    @property
    def count(self) -> int:
        """Snapshots in the bank."""
        return len(self._order)

    @property
    def grows(self) -> bool:
        """Whether the next snapshot may take more memory."""
        held = self._recovery is not None or self.kind in CODED
        return held or self.count < self.capacity

    @property
    def nbytes(self) -> int:
        """Bytes on the parameters' own device."""
        return sum(bucket.nbytes for bucket in self._buckets)

    @property
    def _spans(self) -> list[list[tuple[int, int, int]]]:
        return [list(bucket.spans) for bucket in self._buckets]

    @torch.no_grad()
    def take(self, *, fresh: bool, exact: bool = False) -> None:
        """Add the weights as they are; with `fresh`, forget the older snapshots first.

        With `exact` nothing is lost of this one, whatever the kind.
        """
        if fresh:
            self._order.clear()
            for bucket in self._buckets if self._recovery is None else ():
                if isinstance(bucket, CodedBucket):
                    bucket.forget()
        row = self._next_row()
        for bucket in self._buckets:
            bucket.store(row, exact=exact)
            if self._recovery is not None and isinstance(bucket, CodedBucket):
                bucket.load(row)
        self._order = [*self._order, row][-self.capacity :]

    def _next_row(self) -> int:
        """Row of the oldest snapshot in a full bank, else one that is free."""
        if len(self._order) == self.capacity:
            row = self._order[0]
        else:
            free = [i for i in range(self.capacity) if i not in self._order]
            row = min(free, key=lambda i: i == self._recovery)
        if row == self._recovery:
            for bucket in self._buckets:
                bucket.copy(row, self.capacity)
            self._recovery = self.capacity
        return row

    @torch.no_grad()
    def gram(self) -> NDArray[np.float64]:
        """Inner products of the snapshots about the newest one, (groups, m, m) float64.

        Products are summed in blocks, in the precision of the parameters inside a block and in
        float64 over blocks: nearly as exact as float64 throughout, at a fraction of its time.
        """
        shape = self._groups, self.count, self.count
        # There wherever the user makes tensors by default.
        out = torch.zeros(shape, dtype=torch.float64, device="cpu")
        for bucket, share in zip(self._buckets, self._shares, strict=True):
            for group, start, stop in bucket.spans:
                out[group] += share * bucket.gram(self._order, start, stop).cpu()
        return (out if self._ranks is None else self._ranks.add(out)).numpy()

    @torch.no_grad()
    def move(self, coefficients: NDArray[np.float64], *, take: bool = False) -> None:
        """Put the weights at `coefficients` (groups or 1, n) of the newest n snapshots.

        Written as the newest snapshot plus displacements, so that standing still is exact; so is
        going to any one of them. With `take`, for which the weights have to be at the newest
        snapshot, the point is the newest from then on.
        """
        order = self._order[-coefficients.shape[1] :]
        columns = zip(*coefficients.tolist(), strict=True)
        (alone, *others) = [i for i, column in enumerate(columns) if any(column)]
        if not (others or take):
            self._load(order[alone])
            return
        row = self._next_row() if take else None
        for bucket in self._buckets:
            bucket.move(order, coefficients, row)
        if row is not None:
            self._order = [*self._order, row][-self.capacity :]

    @torch.no_grad()
    def save(self) -> None:
        """Keep the weights as the recovery point."""
        self.forget()
        self._recovery = self._keep(self.capacity)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the weights back to the recovery point."""
        assert self._recovery is not None
        self._load(self._recovery)

    def forget(self) -> None:
        """Do without the recovery point."""
        if self._recovery == self.capacity:
            self._drop(self.capacity)
        self._recovery = None

    def clear(self) -> None:
        """Do without the snapshots, and keep the recovery point."""
        if self._recovery is not None and self._recovery != self.capacity:
            for bucket in self._buckets:
                bucket.copy(self._recovery, self.capacity)
            self._recovery = self.capacity
        self._order.clear()
        self._drop(*range(self.capacity))

    @torch.no_grad()
    def return_to_newest(self) -> None:
        """Put the weights back to the newest snapshot, where a move began."""
        self._load(self._order[-1])

    @property
    def waits(self) -> bool:
        """Whether weights are set aside."""
        return self._waiting is not None

    @torch.no_grad()
    def set_aside(self) -> None:
        """Remember the weights for :meth:`put_back`."""
        self._waiting = self._keep(self.capacity + 1)

    @torch.no_grad()
    def put_back(self) -> None:
        """Undo what was done to the weights since :meth:`set_aside`, once."""
        if self._waiting is None:
            return
        self._load(self._waiting)
        # Before the row is gone: an interrupt may fall in between.
        self._waiting = None
        self._drop(self.capacity + 1)

    def _load(self, row: int) -> None:
        for bucket in self._buckets:
            bucket.load(row)

    def _keep(self, spare: int) -> int:
        """Row that holds the weights as they are: the newest snapshot's, or else the `spare`."""
        if self._order and all(bucket.holds(self._order[-1]) for bucket in self._buckets):
            return self._order[-1]
        for bucket in self._buckets:
            bucket.keep(spare)
        return spare

    def _drop(self, *rows: int) -> None:
        kept = set(range(self.capacity + 2)) - set(rows)
        for bucket in self._buckets:
            bucket.drop(kept)

    def state_dict(self) -> dict[str, Any]:
        """Return the snapshots and the recovery point, cloned."""
        numbers = [row if row in self._order else None for row in range(self.capacity)]
        rows = [bucket.state_dict([*numbers, self._recovery]) for bucket in self._buckets]
        state = {"order": list(self._order), "rows": rows, "spans": self._spans}
        return state | {"kind": self.kind, "recovery": self._recovery}

    def takes(self, state: dict[str, Any]) -> bool:
        """Whether `state` is of the same groups, capacity and kind."""
        pairs = zip(self._buckets, state["rows"], strict=False)
        alike = len(self._buckets) == len(state["rows"]) and all(
            bucket.takes(saved, self.capacity + 1) for bucket, saved in pairs
        )
        return alike and state["spans"] == self._spans

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned for the same groups."""
        self._order = list(state["order"])
        # Before rows were shared, the recovery point had one of its own.
        self._recovery = state.get("recovery", self.capacity)
        for bucket, saved in zip(self._buckets, state["rows"], strict=True):
            if isinstance(bucket, CodedBucket):
                bucket.load_state_dict(saved, self.capacity)
                continue
            if self._recovery is not None and self._recovery not in self._order:
                # It is saved last, wherever it was.
                self._recovery = self.capacity
            own = [self.capacity] if self._recovery == self.capacity else []
            bucket.load_state_dict(saved, [*self._order, *own])


def _bucket(groups: Groups, kind: Kind) -> ExactBucket | CodedBucket:
    return CodedBucket(groups, kind) if kind in CODED else ExactBucket(groups, kind == "host")
