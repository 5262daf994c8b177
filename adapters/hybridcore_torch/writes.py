"""Noticing that somebody else has written into the parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from hybridcore_torch.ranks import local

# By the bytes of an element; as a float one that is no number would differ from itself.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Parameters of which an element is looked at, at most: on a short step each counts.
_SAMPLE = 16


class Writes:
    """Takes note of how parameters are, to tell later whether they have been written.

    By the version that torch counts. What is written through ``.data`` does not change that: of
    parameters in the host's memory an element tells it, as it does where all weights are begun
    anew. On a GPU it would have to be waited for.

    Parameters
    ----------
    parameters : sequence of Parameter
        What is looked at.
    """

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self._parameters = list(parameters)
        at_hand = [p for p in self._parameters if _is_at_hand(p)]
        self._sample = at_hand[:: -(-len(at_hand) // _SAMPLE) or 1]
        self._places: list[int] = []
        # How to read the element of each.
        self._read: list[Callable[[], object]] = []
        self._noted: list[object] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy would have memory of nobody's.
        return vars(self) | {"_places": [], "_read": [], "_noted": None}

    def note(self) -> None:
        """Take note of how they are."""
        self._noted = self._look()

    def forget(self) -> None:
        """Take anything for as it was."""
        self._noted = None

    @property
    def noted(self) -> bool:
        """Whether there is something to hold them against."""
        return self._noted is not None

    @property
    def found(self) -> bool:
        """Whether they have been written since the last note."""
        return self._noted is not None and self._noted != self._look()

    def _look(self) -> list[object]:
        """Versions and elements."""
        found: list[object] = [p._version for p in self._parameters]
        places = [p.data_ptr() for p in self._sample]
        if places != self._places:
            self._places, self._read = places, [_reader(p) for p in self._sample]
        found += [read() for read in self._read]
        return found


def _is_at_hand(parameter: torch.Tensor) -> bool:
    plain = local(parameter) is parameter and parameter.layout is torch.strided
    return plain and not parameter.is_nested and parameter.device.type == "cpu"


def _reader(parameter: torch.Tensor) -> Callable[[], object]:
    """Return what reads an element in the middle, as an integer; 0 where it cannot be had."""
    try:
        values = parameter.detach().view(_INTEGERS[parameter.element_size()])
        # By ``numpy()`` nobody could resize it any more.
        memory = np.from_dlpack(values)
        return functools.partial(memory.item, memory.size // 2) if memory.size else int
    except (KeyError, TypeError, RuntimeError, BufferError):
        return int
