"""The running average of the weights, on the parameters' own device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from hybridcore_torch.buckets import wide
from hybridcore_torch.ranks import local


class WeightAverage:
    """One copy of the parameters that follows them; half precision is averaged in float32.

    Parameters
    ----------
    parameters : sequence of Parameter
        What is averaged; the average starts where they are.

    Attributes
    ----------
    values : list of Tensor
        The average.
    shown : bool
        True while the parameters hold it.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self._parameters = [local(p) for p in parameters]
        self.values = [wide(p.detach()).clone() for p in self._parameters]
        self.shown = False

    @property
    def nbytes(self) -> int:
        """Bytes of the average."""
        return sum(v.nbytes for v in self.values)

    @torch.no_grad()
    def add(self, weight: float) -> None:
        """Move the average towards the weights as they are, by `weight` in [0, 1] of the way."""
        present = [wide(p.detach()) for p in self._parameters]
        if weight == 1.0:
            torch._foreach_copy_(self.values, present)
        else:
            torch._foreach_lerp_(self.values, present, weight)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the average into the parameters, and what was there back at the end."""
        raw = [p.detach().clone() for p in self._parameters]
        try:
            self._put(self.values)
            self.shown = True
            yield
        finally:
            try:
                self._take_down(raw)
            except BaseException:
                # An interrupt in the midst of it.
                self._take_down(raw)
                raise

    def _take_down(self, raw: list[torch.Tensor]) -> None:
        self._put(raw)
        self.shown = False

    @torch.no_grad()
    def _put(self, values: list[torch.Tensor]) -> None:
        torch._foreach_copy_(self._parameters, values)
        # Around the block, autocast would go on with what it has cast of others.
        torch.clear_autocast_cache()
