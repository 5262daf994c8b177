"""Noticing that somebody else has written into the parameters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from hybridcore_torch.ranks import local

# By the bytes of an element; as a float one that is no number would differ from itself.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Writes:
    """Takes note of how parameters are, to tell later whether they have been written.

    By the version that torch counts, and by where they lie in memory. What is written through
    ``.data`` in place changes neither: of parameters in the host's memory an element tells that,
    as it does where all weights are begun anew. On a GPU it would have to be waited for.

    Parameters
    ----------
    parameters : sequence of Parameter
        What is looked at.
    """

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self._parameters = list(parameters)
        self._plain = [p for p in self._parameters if local(p) is p]
        self._places: list[int] = []
        self._memory: list[tuple[NDArray[np.generic], int]] = []
        # Versions and elements.
        self._noted: tuple[list[int], list[int]] | None = None

    def note(self) -> None:
        """Take note of how they are."""
        places = self._present_places()
        if places != self._places:
            self._places = places
            self._memory = [found for p in self._plain if (found := _element(p)) is not None]
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
        if versions != self._present_versions() or self._places != self._present_places():
            # The memory may be gone.
            return True
        return elements != self._present_elements()

    def _present_versions(self) -> list[int]:
        return [p._version for p in self._parameters]

    def _present_places(self) -> list[int]:
        return [p.data_ptr() for p in self._plain]

    def _present_elements(self) -> list[int]:
        # One each, as on a short step each counts.
        return [values.item(at) for values, at in self._memory]


def _element(parameter: torch.Tensor) -> tuple[NDArray[np.generic], int] | None:
    """Its memory, and an element in the middle; None where that is not at hand."""
    integer, size = _INTEGERS.get(parameter.element_size()), parameter.numel()
    at_hand = parameter.device.type == "cpu" and parameter.layout is torch.strided
    if integer is None or not size or not at_hand or parameter.is_nested:
        return None
    # By ``numpy()`` nobody could resize it any more.
    return np.from_dlpack(parameter.detach().view(integer)), size // 2
