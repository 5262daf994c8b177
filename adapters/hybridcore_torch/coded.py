"""Copies of the parameters of one device and dtype: one exact, the others in fewer bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hybridcore_torch import codes
from hybridcore_torch.buckets import Groups, inner_products, wide
from hybridcore_torch.ranks import local


@dataclass(frozen=True, slots=True)
class Block:
    """Some values of a parameter: where they are in it, in the exact row and in the codes."""

    group: int
    parameter: torch.Tensor
    start: int
    size: int
    base: int
    coded: int

    def read(self) -> torch.Tensor:
        """Return the values, in float32 at least."""
        if not self.parameter.is_contiguous():
            return wide(self.parameter.reshape(-1))
        return wide(self.parameter.view(-1)[self.start : self.start + self.size])

    def write(self, values: torch.Tensor) -> None:
        """Put `values` in their place."""
        if not self.parameter.is_contiguous():
            self.parameter.copy_(values.view(self.parameter.shape))
        else:
            self.parameter.view(-1)[self.start : self.start + self.size].copy_(values)


class CodedBucket:
    """Parameters of one device and dtype: the base, an exact row, and displacements of the others.

    Displacements are from the origin, which is where the first row was. What is lost of them is
    relative to how far the weights have moved, and not to the weights. Of sharded parameters it is
    the part on this rank.

    Parameters
    ----------
    groups : dict of int to list of Parameter
        By the number of the layer group.
    kind : {"bfloat16", "int8"}
        Of the displacements; :func:`hybridcore_torch.codes.encode` says what is lost.
    """

    # Values that are worked on at a time, a multiple of what shares a scale.
    _longest = 2048 * codes.BLOCK

    def __init__(self, groups: Groups, kind: str) -> None:
        self.parameters = [local(p) for group in groups.values() for p in group]
        self._kind = kind
        first = self.parameters[0]
        self._dtype, self._device = first.dtype, first.device
        self.spans: list[tuple[int, int, int]] = []
        self._blocks: list[Block] = []
        base = coded = 0
        for group, parameters in groups.items():
            begin = base
            for p in map(local, parameters):
                most = self._longest if p.is_contiguous() else max(1, p.numel())
                for start in range(0, p.numel(), most):
                    size = min(most, p.numel() - start)
                    self._blocks.append(Block(group, p, start, size, base, coded))
                    base, coded = base + size, coded + codes.padded(size)
            self.spans.append((group, begin, base))
        self.size, self._coded_size = base, coded
        self._widest = max((codes.padded(block.size) for block in self._blocks), default=0)
        # The row that is exact, and that whose displacement is none.
        self._base: torch.Tensor | None = None
        self._at: int | None = None
        self._origin: int | None = None
        self._codes: dict[int, codes.Codes] = {}
        # Memory of rows that were forgotten, for those to come.
        self._free: list[codes.Codes] = []
        # Exact copies of what is no snapshot.
        self._spare: dict[int, torch.Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        rows = (*self._codes.values(), *self._free)
        tensors = [t for row in rows for t in row if t is not None]
        tensors += self._spare.values()
        tensors += [] if self._base is None else [self._base]
        return sum(t.nbytes for t in tensors)

    def store(self, row: int, *, exact: bool = False) -> None:
        """Make `row` a copy of the parameters; with `exact`, or if it is the base, the base."""
        if self._base is None:
            self._base = torch.zeros(self.size, dtype=self._dtype, device=self._device)
        alone = self._at is None or (self._at == row and not self._codes)
        if alone:
            self._origin = row
        elif row != self._origin and row not in self._codes:
            self._codes[row] = self._empty()
        exact = alone or exact or row == self._at
        scratch = self._scratch(2)
        for block in self._blocks:
            # Where the origin is stored anew the others are seen from there. The base stays, so
            # that the newest row is known wherever an outer step is interrupted.
            away = None if alone else self._away(block, scratch)
            if away is not None and row == self._origin:
                for other in self._codes:
                    moved = self._moved(other, block, scratch[1]).sub_(away)
                    codes.encode(moved, self._coded(other, block))
            elif away is not None:
                codes.encode(away, self._coded(row, block))
            if exact:
                self._in_base(block).copy_(block.read())
        self._at = row if exact else self._at

    def _away(self, block: Block, scratch: torch.Tensor) -> torch.Tensor:
        """Displacement of the parameters from the origin, in the first of two rows of `scratch`."""
        base = wide(self._in_base(block))
        away = torch.sub(block.read(), base, out=scratch[0, : block.size])
        if self._at is not None and self._at != self._origin:
            away.add_(self._moved(self._at, block, scratch[1]))
        return away

    def forget(self) -> None:
        """Do without all snapshots: the next one is the base."""
        self._free += self._codes.values()
        self._codes, self._at, self._origin = {}, None, None

    def load(self, row: int) -> None:
        """Put the parameters where `row` is."""
        scratch = self._scratch(2)
        for block in self._blocks:
            block.write(self._point(row, block, scratch))

    def holds(self, row: int) -> bool:
        """Whether the parameters are what :meth:`load` of `row` would give, bit for bit."""
        scratch = self._scratch(2)
        return all(
            torch.equal(block.read(), wide(self._point(row, block, scratch).to(self._dtype)))
            for block in self._blocks
        )

    def keep(self, row: int) -> None:
        """Make `row`, which is of no snapshot, an exact copy of the parameters."""
        kept = torch.zeros(self.size, dtype=self._dtype, device=self._device)
        for block in self._blocks:
            self._part(kept, block).copy_(block.read())
        self._spare[row] = kept

    def copy(self, row: int, to: int) -> None:
        """Make `to`, which is of no snapshot, a copy of `row`."""
        kept = torch.zeros(self.size, dtype=self._dtype, device=self._device)
        scratch = self._scratch(2)
        for block in self._blocks:
            self._part(kept, block).copy_(self._point(row, block, scratch))
        self._spare[to] = kept

    def drop(self, kept: set[int]) -> None:
        """Free all rows but those in `kept`."""
        if self._at not in kept:
            # Rows are not known without it.
            self.forget()
            self._base = None
        self._free = []
        self._spare = {row: values for row, values in self._spare.items() if row in kept}

    def gram(self, order: Sequence[int], start: int, stop: int) -> torch.Tensor:
        """Inner products of the rows of `order` about the last of them, (m, m) float64."""
        *older, newest = order
        scratch = self._scratch(len(order))
        out = torch.zeros(len(order), len(order), dtype=torch.float64, device=self._device)
        for block in self._blocks:
            if start <= block.base < stop:
                away = self._moved(newest, block, scratch[-1])
                for row, displacement in zip(older, scratch, strict=False):
                    self._moved(row, block, displacement).sub_(away)
                out[:-1, :-1] += inner_products(scratch[:-1, : block.size])
        return out

    def move(self, order: Sequence[int], weights: NDArray[np.float64], into: int | None) -> None:
        """Put the parameters at the newest row plus weighted displacements from it.

        `weights` is (groups, m), or (1, m) where they are the same for all groups. With `into` the
        parameters have to be at the newest row, exactly, and that row is made a copy of the point.
        """
        scratch = self._scratch(4)
        for block in self._blocks:
            row = weights[0] if len(weights) == 1 else weights[block.group]
            self._move_block(order, row[:-1], block, scratch, at_newest=into is not None)
        if into is not None:
            self.store(into)

    def _move_block(
        self,
        order: Sequence[int],
        weights: NDArray[np.float64],
        block: Block,
        scratch: torch.Tensor,
        *,
        at_newest: bool,
    ) -> None:
        *older, newest = order
        if at_newest:
            point = scratch[2, : block.size].copy_(block.read())
            away = self._away(block, scratch)
        else:
            point = self._point(newest, block, scratch[1:])
            away = self._moved(newest, block, scratch[0])
        for other, weight in zip(older, weights.tolist(), strict=True):
            if weight:
                point.add_(self._moved(other, block, scratch[3]).sub_(away), alpha=weight)
        block.write(point)

    def state_dict(self, rows: Sequence[int | None]) -> dict[str, Any]:
        """Return the rows as they are; `rows` are the snapshots and the recovery point."""
        recovery = self._spare.get(-1 if rows[-1] is None else rows[-1])
        return {
            "at": self._at,
            "origin": self._origin,
            "base": None if self._base is None else self._base.clone(),
            "numbers": list(self._codes),
            "values": [row.values.clone() for row in self._codes.values()],
            "scales": [
                row.scales.clone() for row in self._codes.values() if row.scales is not None
            ],
            "recovery": None if recovery is None else recovery.clone(),
        }

    def load_state_dict(self, state: dict[str, Any], recovery: int) -> None:
        """Take back what :meth:`state_dict` returned."""
        self._at, self._base = state["at"], state["base"]
        # States from before the two could differ have no origin.
        self._origin = state.get("origin", self._at)
        if self._base is not None:
            self._base = self._base.to(self._device, copy=True)
        self._codes, self._spare, self._free = {}, {}, []
        for index, row in enumerate(state["numbers"]):
            made = self._codes[int(row)] = self._empty()
            made.values.copy_(state["values"][index])
            if made.scales is not None:
                made.scales.copy_(state["scales"][index])
        if state["recovery"] is not None:
            self._spare[recovery] = state["recovery"].to(self._device, copy=True)

    def takes(self, state: object, rows: int) -> bool:
        """Whether `state` is of a bucket like this one."""
        if not isinstance(state, dict):
            return False
        base, values = state["base"], state["values"]
        there = {*map(int, state["numbers"]), -1 if state["at"] is None else state["at"]}
        kinds = {str(v.dtype).removeprefix("torch.") for v in values}
        return (
            all(v.shape == (self._coded_size,) for v in values)
            and kinds <= {self._kind}
            and (base is None or base.shape == (self.size,))
            and max(there) < rows - 1
        )

    def _empty(self) -> codes.Codes:
        """Return a row of zeros."""
        if self._free:
            row = self._free.pop()
            (row.values if row.scales is None else row.scales).zero_()
            return row
        return codes.empty(self._coded_size, self._kind, self._device)

    @staticmethod
    def _part(row: torch.Tensor, block: Block) -> torch.Tensor:
        return row[block.base : block.base + block.size]

    def _in_base(self, block: Block) -> torch.Tensor:
        assert self._base is not None
        return self._part(self._base, block)

    def _coded(self, row: int, block: Block) -> codes.Codes:
        return codes.part(self._codes[row], block.coded, block.size)

    def _scratch(self, rows: int) -> torch.Tensor:
        """Return memory to work on a block in: new temporaries would cost more than the work."""
        dtype = torch.promote_types(self._dtype, torch.float32)
        return torch.empty(rows, self._widest, dtype=dtype, device=self._device)

    def _moved(self, row: int, block: Block, out: torch.Tensor) -> torch.Tensor:
        """Displacement of `row` from the origin, in the memory of `out`."""
        if row == self._origin:
            return out[: block.size].zero_()
        return codes.decode(self._coded(row, block), out[: codes.padded(block.size)])[: block.size]

    def _point(self, row: int, block: Block, scratch: torch.Tensor) -> torch.Tensor:
        """Values of `row`, in float32 at least, in the first of two rows of `scratch`."""
        point = scratch[0, : block.size]
        if row in self._spare:
            return point.copy_(self._part(self._spare[row], block))
        point.copy_(self._in_base(block))
        if self._at is not None and row != self._at:
            point.add_(self._moved(row, block, scratch[1]))
            point.sub_(self._moved(self._at, block, scratch[1]))
        return point
