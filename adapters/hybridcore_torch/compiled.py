"""Copies of many parameters in float32 on the CPU, by kernels that read each number once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.autograd.graph import increment_version

from hybridcore.kernels.cpu import snapshots
from hybridcore_torch.buckets import ExactBucket
from hybridcore_torch.coded import Block, CodedBucket

_LONGEST = 2**20


class CompiledExactBucket(ExactBucket):
    """Copies in their own precision."""

    _longest = _LONGEST
    # Kernels read the first row last, when the point would have taken its place.
    _small = 0

    def _copy_into(self, row: int) -> None:
        if all(p.is_contiguous() for p in self.parameters):
            # As fast as memory, which copying each of them is not.
            torch.cat([p.view(-1) for p in self.parameters], out=self.rows[row])
        else:
            super()._copy_into(row)

    def _add_products(self, order: Sequence[int], start: int, stop: int, out: torch.Tensor) -> None:
        snapshots.gram(self._arrays(order, slice(start, stop)), out.numpy())

    def _write(
        self,
        order: Sequence[int],
        weights: NDArray[np.float64],
        columns: slice,
        point: torch.Tensor,
    ) -> None:
        snapshots.move(self._arrays(order, columns), weights[:-1], point.numpy())
        increment_version(point)

    def _arrays(self, order: Sequence[int], columns: slice) -> list[NDArray[np.float32]]:
        return [self.rows[row][columns].numpy() for row in order]


class CompiledCodedBucket(CodedBucket):
    """One exact copy, the others in 8 bits."""

    _longest = _LONGEST

    def _encode(self, row: int, block: Block) -> None:
        kept, scales = self._arrays(row, block)
        snapshots.encode(_live(block).numpy(), self._in_base(block).numpy(), kept, scales)

    def _rebase_block(self, block: Block) -> None:
        rows = [self._arrays(row, block) for row in self._codes]
        live, base = _live(block).numpy(), self._in_base(block).numpy()
        snapshots.rebase(live, base, [kept for kept, _ in rows], [scales for _, scales in rows])

    def _add_products(self, order: Sequence[int], block: Block, out: torch.Tensor) -> None:
        base = order.index(self._at) if self._at in order else None
        # Something has to stand where the base is; it has no part in the products.
        other = next(iter(self._codes))
        rows = [self._arrays(other if row == self._at else row, block) for row in order]
        snapshots.coded_gram(
            [kept for kept, _ in rows], [scales for _, scales in rows], base, out.numpy()
        )

    def _move_block(
        self, order: Sequence[int], weights: NDArray[np.float64], block: Block, *, at_newest: bool
    ) -> None:
        *older, newest = order
        live, base = _live(block), self._in_base(block)
        weighted = [
            (*self._arrays(row, block), weight)
            for row, weight in zip(older, weights.tolist(), strict=True)
            if weight and row != self._at
        ]
        total = float(weights.sum())
        if at_newest or newest == self._at:
            point = live if at_newest else base
        else:
            point = self._point(newest, block)
            # Its displacement is known better than from the rounded point.
            weighted.append((*self._arrays(newest, block), -total))
            total = 0.0
        snapshots.coded_move(
            point.numpy(),
            base.numpy(),
            [kept for kept, _, _ in weighted],
            [scales for _, scales, _ in weighted],
            np.array([weight for _, _, weight in weighted]),
            total,
            live.numpy(),
        )
        increment_version(live)
        if not block.parameter.is_contiguous():
            block.write(live)

    def _arrays(self, row: int, block: Block) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        kept = self._coded(row, block)
        assert kept.scales is not None
        return kept.values.numpy(), kept.scales.numpy()


def _live(block: Block) -> torch.Tensor:
    """Return the parameters' own memory, or a copy where they are not contiguous."""
    return block.read().contiguous()
