"""Noticing that somebody else has written into the parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

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
        self._memory: list[NDArray[np.generic]] = []
        self._noted: tuple[list[int], list[int]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy would have memory of nobody's.
        return vars(self) | {"_places": [], "_memory": [], "_noted": None}

    def note(self) -> None:
        """Take note of how they are."""
        self._noted = self._present_versions(), self._present_elements()

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
        if self._noted is None:
            return False
        versions, elements = self._noted
        return versions != self._present_versions() or elements != self._present_elements()

    def _present_versions(self) -> list[int]:
        return [p._version for p in self._parameters]

    def _present_elements(self) -> list[int]:
        places = [p.data_ptr() for p in self._sample]
        if places != self._places:
            self._places, self._memory = places, [_memory_of(p) for p in self._sample]
        return [values.item(values.size // 2) for values in self._memory if values.size]


def _is_at_hand(parameter: torch.Tensor) -> bool:
    plain = local(parameter) is parameter and parameter.layout is torch.strided
    return plain and not parameter.is_nested and parameter.device.type == "cpu"


def _memory_of(parameter: torch.Tensor) -> NDArray[np.generic]:
    """Its values as integers, in its own memory; none where that cannot be had."""
    try:
        values = parameter.detach().view(_INTEGERS[parameter.element_size()])
        # By ``numpy()`` nobody could resize it any more.
        return np.from_dlpack(values)
    except (KeyError, RuntimeError, BufferError):
        return np.empty(0, np.int8)
