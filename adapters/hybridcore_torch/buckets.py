"""Copies of the parameters of one device and dtype."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from hybridcore_torch.ranks import local

Groups = dict[int, list[torch.nn.Parameter]]
# Values over which a sum of products is taken in the precision of its terms.
_PART = 4096


def wide(values: torch.Tensor) -> torch.Tensor:
    """Return `values` in float32 at least: half precision cannot hold small displacements."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def inner_products(rows: torch.Tensor) -> torch.Tensor:
    """Return those of `rows` (m, n), as (m, m) float64: in their own precision over parts only."""
    m, n = rows.shape
    if rows.is_cuda:
        return sums_of_products(rows)
    # With `out`, as autocast around the step would make them of half precision.
    if n <= _PART:
        return torch.mm(rows, rows.T, out=rows.new_empty(m, m)).double()
    whole = n - n % _PART
    parts = rows[:, :whole].view(m, n // _PART, _PART).transpose(0, 1)
    products = torch.bmm(parts, parts.transpose(1, 2), out=parts.new_empty(len(parts), m, m))
    rest = rows[:, whole:]
    return products.sum(0, dtype=torch.float64) + torch.mm(rest, rest.T, out=rest.new_empty(m, m))


def sums_of_products(rows: torch.Tensor) -> torch.Tensor:
    """Return the same without a matrix product, for which TensorFloat-32 may be on."""
    return torch.stack([(rows * row).sum(1, dtype=torch.float64) for row in rows])


class ExactBucket:
    """Parameters of one device and dtype, as rows in their own precision, group after group.

    Of sharded parameters it is the part on this rank. A row is made when it is first stored.

    Parameters
    ----------
    groups : dict of int to list of Parameter
        By the number of the layer group.
    host : bool
        Keep the rows in the host's memory, pinned; they are copied there beside the next steps, by
        way of one row on the device.
    """

    # Columns that are worked on at a time: few enough for the displacements to stay in the last
    # cache, and enough for the calls not to count.
    _longest = 2**18
    # Values up to which a whole row more, for a moment, is worth less than the calls that it saves.
    _small = 2**20

    def __init__(self, groups: Groups, host: bool = False) -> None:
        self.parameters = [local(p) for group in groups.values() for p in group]
        self._sizes = [p.numel() for p in self.parameters]
        first = self.parameters[0]
        self._dtype, self._device = first.dtype, first.device
        self._link = _Link(first.new_empty(sum(self._sizes))) if host and first.is_cuda else None
        self.rows: dict[int, torch.Tensor] = {}
        # Views of them in the shapes of the parameters, which take longer to make than to copy.
        self._views: dict[int, list[torch.Tensor]] = {}
        # Number and columns of each group.
        self.spans: list[tuple[int, int, int]] = []
        start = 0
        for group, parameters in groups.items():
            stop = start + sum(local(p).numel() for p in parameters)
            self.spans.append((group, start, stop))
            start = stop

    @property
    def size(self) -> int:
        """Values of a row."""
        return sum(self._sizes)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows that are on the parameters' own device."""
        rows = [self._link.staged] if self._link is not None else list(self.rows.values())
        return sum(row.nbytes for row in rows)

    def store(self, row: int, *, exact: bool = False) -> None:
        """Make `row` a copy of the parameters, which is always `exact` here."""
        if row not in self.rows:
            self._hold(row, self._new_row())
        if self._link is None:
            torch._foreach_copy_(self._views[row], self.parameters)
        else:
            self._link.wait()
            torch._foreach_copy_(self._split(self._link.staged), self.parameters)
            self._link.send(self.rows[row])

    def load(self, row: int) -> None:
        """Put the parameters where `row` is."""
        self._wait()
        torch._foreach_copy_(self.parameters, self._views[row])

    def holds(self, row: int) -> bool:
        """Whether the parameters are where `row` is, bit for bit."""
        self._wait()
        pairs = zip(self.parameters, self._views[row], strict=True)
        return all(torch.equal(p, kept.to(p.device)) for p, kept in pairs)

    def keep(self, row: int) -> None:
        """Make `row`, which is of no snapshot, an exact copy of the parameters."""
        self.store(row)

    def copy(self, row: int, to: int) -> None:
        """Make `to`, which is of no snapshot, a copy of `row`."""
        self._wait()
        self._hold(to, self.rows[row].clone())

    def drop(self, kept: set[int]) -> None:
        """Free all rows but those in `kept`."""
        self._wait()
        for row in set(self.rows) - kept:
            del self.rows[row], self._views[row]

    def gram(self, order: Sequence[int], start: int, stop: int) -> torch.Tensor:
        """Inner products of the rows of `order` about the last of them, (m, m) float64."""
        self._wait()
        out = torch.zeros(len(order), len(order), dtype=torch.float64, device=self._device)
        self._add_products(order, start, stop, out)
        return out

    def _add_products(self, order: Sequence[int], start: int, stop: int, out: torch.Tensor) -> None:
        *older, newest = order
        shape = (len(older), min(stop - start, self._longest))
        moved = wide(torch.empty(shape, dtype=self._dtype, device=self._device))
        for columns in self._blocks(start, stop):
            origin = wide(self._part(newest, columns))
            block = moved[:, : len(origin)]
            for row, displacement in zip(older, block, strict=True):
                torch.sub(self._part(row, columns), origin, out=displacement)
            out[:-1, :-1] += inner_products(block)

    def move(self, order: Sequence[int], weights: NDArray[np.float64], into: int | None) -> None:
        """Put the parameters at the newest row plus weighted displacements from it.

        `weights` is (groups, m), or (1, m) where they are the same for all groups. The point is
        left in the row `into`, which may be the first of `order`.
        """
        self._wait()
        if self.size > self._small or self._link is not None:
            self._move_by_parts(order, weights)
            if into is not None:
                self.store(into)
            return
        if into is not None and into not in self.rows:
            self._hold(into, self._new_row())
        # The first row is read first, so that the point may take its place.
        point = wide(self.rows[order[-1] if into is None else into])
        if into is None:
            point = torch.empty_like(point)
        alike = [(0, 0, len(point))] if len(weights) == 1 else self.spans
        for group, start, stop in alike:
            for columns in self._blocks(start, stop):
                self._write(order, weights[group], columns, point[columns])
        if into is not None:
            self.rows[into].copy_(point)
        views = self._split(point) if into is None else self._views[into]
        torch._foreach_copy_(self.parameters, views)

    def _move_by_parts(self, order: Sequence[int], weights: NDArray[np.float64]) -> None:
        """Move without a copy of all of it: the same arithmetic, parameter by parameter."""
        start, spans = 0, iter(self.spans)
        group, _, end = next(spans)
        for p, size in zip(self.parameters, self._sizes, strict=True):
            while start >= end and size:
                group, _, end = next(spans)
            row = weights[0] if len(weights) == 1 else weights[group]
            flat = p.view(-1) if p.is_contiguous() else wide(p.new_empty(size))
            for columns in self._blocks(start, start + size):
                target = flat[columns.start - start : columns.stop - start]
                point = wide(target)
                self._write(order, row, columns, point)
                if point is not target:
                    target.copy_(point)
            if not p.is_contiguous():
                p.copy_(flat.view(p.shape))
            start += size

    def _write(
        self,
        order: Sequence[int],
        weights: NDArray[np.float64],
        columns: slice,
        point: torch.Tensor,
    ) -> None:
        """Write the newest row's `columns` and weighted displacements from it to `point`."""
        *older, newest = order
        start = origin = wide(self._part(newest, columns))
        for row, weight in zip(older, weights[:-1].tolist(), strict=True):
            if weight:
                moved = wide(self._part(row, columns)) - origin
                start = torch.add(start, moved, alpha=weight, out=point)
        if start is origin:
            point.copy_(origin)

    def state_dict(self, rows: Sequence[int | None]) -> torch.Tensor:
        """Return `rows` as a matrix; of None a row of zeros."""
        self._wait()
        out = torch.zeros(len(rows), self.size, dtype=self._dtype, device=self._device)
        for values, row in zip(out, rows, strict=True):
            if row in self.rows:
                values.copy_(self.rows[row])
        return out

    def load_state_dict(self, state: torch.Tensor, rows: Sequence[int]) -> None:
        """Take back those `rows` of what :meth:`state_dict` returned."""
        for row in rows:
            self._hold(row, self._new_row().copy_(state[row]))

    def takes(self, state: object, rows: int) -> bool:
        """Whether `state` is of a bucket like this one, with so many rows."""
        return isinstance(state, torch.Tensor) and tuple(state.shape) == (rows, self.size)

    def _new_row(self) -> torch.Tensor:
        if self._link is None:
            return torch.empty(self.size, dtype=self._dtype, device=self._device)
        return torch.empty(self.size, dtype=self._dtype, pin_memory=True)

    def _hold(self, row: int, values: torch.Tensor) -> None:
        self.rows[row], self._views[row] = values, self._split(values)

    def _part(self, row: int, columns: slice) -> torch.Tensor:
        part = self.rows[row][columns]
        return part if self._link is None else part.to(self._device, non_blocking=True)

    def _blocks(self, start: int, stop: int) -> Iterator[slice]:
        for begin in range(start, stop, self._longest):
            yield slice(begin, min(stop, begin + self._longest))

    def _split(self, row: torch.Tensor) -> list[torch.Tensor]:
        parts = torch.split(row, self._sizes)
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]

    def _wait(self) -> None:
        if self._link is not None:
            self._link.wait()


class _Link:
    """The way of one row at a time from a GPU to the host, beside what the GPU does next.

    Parameters
    ----------
    staged : Tensor
        Where the row waits on the GPU.
    """

    def __init__(self, staged: torch.Tensor) -> None:
        self.staged = staged
        self._stream = torch.cuda.Stream(staged.device)  # type: ignore[no-untyped-call]

    def send(self, row: torch.Tensor) -> None:
        """Begin to copy what is staged to `row`, which is pinned."""
        self._stream.wait_stream(torch.cuda.current_stream(self.staged.device))
        with torch.cuda.stream(self._stream):
            row.copy_(self.staged, non_blocking=True)

    def wait(self) -> None:
        """Wait until the last row has arrived."""
        self._stream.synchronize()
