"""Buffers (running statistics and the like), kept and put back."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from hybridcore.outer import hastening
from hybridcore_torch.ranks import local

# Elements from which on a buffer is not copied in vain, and how many of those tell whether it has
# changed where its version does not, as it was written through ``.data``.
LARGE, SAMPLE = 2**18, 1024


@dataclass(slots=True)
class _Mark:
    """How a large buffer was when last looked at, and whether it has ever changed."""

    buffer: weakref.ref[torch.Tensor]
    version: int
    sample: torch.Tensor
    changes: bool = False

    def look(self, buffer: torch.Tensor) -> bool:
        """Return whether `buffer`, which this is of, has changed so far."""
        if not self.changes:
            same = self.version == buffer._version and torch.equal(self.sample, _sample(buffer))
            self.changes = not same
        return self.changes


class KeptBuffer(NamedTuple):
    """A buffer, its place and a copy; of a large one its mark too."""

    registry: dict[str, torch.Tensor | None]
    name: str
    buffer: torch.Tensor
    copy: torch.Tensor
    mark: _Mark | None


Kept = list[KeptBuffer]


class BufferWatch:
    """Copies the buffers that passes change.

    Large ones that have not changed since they were first looked at are tables and frozen weights:
    they are left out. One that changes later is copied from the next look on, and what was done to
    it until then stays.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._marks: weakref.WeakKeyDictionary[nn.Module, dict[str, _Mark]]
        self._marks = weakref.WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        # Weak references cannot be pickled, and a copy looks at buffers of its own.
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget()

    def keep(self, modules: Iterable[nn.Module]) -> Kept:
        """Copy the buffers of `modules`, their children excluded, that may change."""
        kept = []
        for module in modules:
            registry = module._buffers
            for name, buffer in registry.items() if registry else ():
                if buffer is None or not can_come_back(buffer):
                    continue
                if buffer.numel() < LARGE:
                    kept.append(KeptBuffer(registry, name, buffer, buffer.detach().clone(), None))
                    continue
                marks = self._marks.setdefault(module, {})
                mark = marks.get(name)
                if mark is None or mark.buffer() is not buffer:
                    mark = _Mark(weakref.ref(buffer), buffer._version, _sample(buffer))
                elif not mark.look(buffer):
                    continue
                kept.append(KeptBuffer(registry, name, buffer, buffer.detach().clone(), mark))
                marks[name] = mark
        return kept


@torch.no_grad()
def put_back(kept: Kept) -> None:
    """Undo what was done to the buffers since they were kept, new tensors in their place too."""
    for registry, name, buffer, copy, mark in kept:
        if mark is not None:
            mark.look(buffer)
        buffer.copy_(copy)
        if mark is not None:
            mark.version = buffer._version
        registry[name] = buffer


@torch.no_grad()
def hasten(kept: Kept, norms: Iterable[Any], forgetting: float) -> None:
    """Have the averages of batch norm forget faster, by :func:`hybridcore.outer.hastening`.

    Parameters
    ----------
    kept : list of KeptBuffer
        How they were before the batches.
    norms : iterable of Module
        Layers of batch norm.
    """
    before = {(id(one.registry), one.name): one.copy for one in kept}
    for layer in norms:
        place = id(layer._buffers)
        count = before.get((place, "num_batches_tracked"))
        if count is None:
            continue
        # A momentum of None is for the mean of all batches.
        batches = int(layer.num_batches_tracked - count)
        times = hastening(layer.momentum or 0.0, forgetting, batches)
        for name in ("running_mean", "running_var"):
            copy = before.get((place, name))
            # None is of one that cannot be written in place.
            if copy is not None and times > 1.0:
                getattr(layer, name).sub_(copy).mul_(times).add_(copy)


def can_come_back(buffer: torch.Tensor) -> bool:
    """Whether `buffer` can be written in place as a whole."""
    if buffer.layout is not torch.strided or buffer.is_nested or buffer.is_inference():
        return False
    # What was expanded shares its memory with itself.
    return 0 not in buffer.stride() or buffer.numel() < 2


def _sample(buffer: torch.Tensor) -> torch.Tensor:
    """Copy of elements of `buffer` from all over it, as they lie in memory."""
    values = local(buffer.detach())
    strides = values.stride()
    values = values.permute(sorted(range(values.dim()), key=lambda d: -strides[d]))
    if values.is_contiguous():
        values = values.view(-1)
    values = values[:: max(1, values.shape[0] // SAMPLE)]
    while values.dim() > 1:
        values = values.select(-1, 0)
    return values.clone()
