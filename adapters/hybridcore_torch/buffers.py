"""Buffers (running statistics and the like), kept and put back."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from hybridcore_torch.ranks import local

# Elements from which on a buffer is not copied in vain, and how many of those tell whether it has
# changed where its version does not, as it was written through ``.data``.
LARGE, SAMPLE = 2**18, 1024


class _Mark(NamedTuple):
    """What tells whether a large buffer has changed."""

    buffer: weakref.ref[torch.Tensor]
    version: int
    sample: torch.Tensor

    def is_of(self, buffer: torch.Tensor) -> bool:
        """Whether that is `buffer`, and as it was."""
        same = self.buffer() is buffer and self.version == buffer._version
        return same and torch.equal(self.sample, _sample(buffer))


class KeptBuffer(NamedTuple):
    """A buffer, its place and a copy; of a large one what tells whether it has changed too."""

    registry: dict[str, torch.Tensor | None]
    name: str
    buffer: torch.Tensor
    copy: torch.Tensor
    mark: _Mark | None


Kept = list[KeptBuffer]


class BufferWatch:
    """Copies the buffers that passes change.

    Large ones that were the same at the last look are tables and frozen weights: they are left out
    for as long as they stay so, and what the pass in which one changes first does to it stays.
    """

    def __init__(self) -> None:
        # By registry and name.
        self._marks: dict[tuple[int, str], _Mark] = {}

    def keep(self, modules: Iterable[nn.Module]) -> Kept:
        """Copy the buffers of `modules`, their children excluded, that may change."""
        kept = []
        for module in modules:
            registry = module._buffers
            for name, buffer in registry.items() if registry else ():
                if buffer is None or not can_come_back(buffer):
                    continue
                mark = None
                if buffer.numel() >= LARGE:
                    key = id(registry), name
                    before = self._marks.get(key)
                    if before is not None and before.is_of(buffer):
                        continue
                    mark = _Mark(weakref.ref(buffer), buffer._version, _sample(buffer))
                    self._marks[key] = mark
                kept.append(KeptBuffer(registry, name, buffer, buffer.detach().clone(), mark))
        return kept


@torch.no_grad()
def put_back(kept: Kept) -> None:
    """Undo what was done to the buffers since they were kept, new tensors in their place too."""
    for registry, name, buffer, copy, mark in kept:
        if mark is None or not mark.is_of(buffer):
            buffer.copy_(copy)
        registry[name] = buffer


def can_come_back(buffer: torch.Tensor) -> bool:
    """Whether `buffer` can be written in place as a whole."""
    if buffer.layout is not torch.strided or buffer.is_nested or buffer.is_inference():
        return False
    # What was expanded shares its memory with itself.
    return 0 not in buffer.stride() or buffer.numel() < 2


def _sample(buffer: torch.Tensor) -> torch.Tensor:
    """Copy of elements of `buffer` from all over it."""
    values = local(buffer.detach())
    if values.is_contiguous():
        values = values.view(-1)
    values = values[:: max(1, values.shape[0] // SAMPLE)]
    while values.dim() > 1:
        values = values.select(-1, 0)
    return values.clone()
