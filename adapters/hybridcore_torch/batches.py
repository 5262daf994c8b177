"""The batches of a loader that a hybrid run needs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Generic, TypeVar

Batch = TypeVar("Batch")


class NeedsBatchError(Exception):
    """A step that was to need no batch has to be a real one: copies of the weights are gone."""


class Batches(Generic[Batch]):
    """Iterates over a loader, once an epoch, and takes the steps that need no data by itself.

    Parameters
    ----------
    loader : iterable
        Where batches come from.
    skip : callable
        Takes the next step if it needs no batch, and says whether it did.
    """

    def __init__(self, loader: Iterable[Batch], skip: Callable[[], bool]) -> None:
        self._loader, self._skip = loader, skip

    def __len__(self) -> int:
        """Return the steps that an epoch makes for, predicted ones included."""
        return len(self._loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        """Yield an epoch's batches; a loader with a length makes for as many steps."""
        iterator = iter(self._loader)
        taken = 0
        while taken < _length(self._loader):
            if not self._skip():
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
                yield batch
            taken += 1


def _length(loader: Iterable[object]) -> float:
    """Return the number of batches, infinite where the loader does not know it."""
    if isinstance(loader, Sized):
        # A DataLoader over a dataset without a length has the method, and raises.
        with contextlib.suppress(TypeError):
            return len(loader)
    return math.inf
