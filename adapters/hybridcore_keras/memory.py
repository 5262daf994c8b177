"""Making do with fewer copies of the weights where memory runs out."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hybridcore_keras.callback import HybridCallback

logger = logging.getLogger("hybridcore")

# Snapshots without which nothing can be extrapolated.
FEWEST = 4
# What the allocators of the backends say of it, each in words of its own.
_KINDS = {"MemoryError", "OutOfMemoryError", "ResourceExhaustedError"}
_SHORT = ("out of memory", "allocate memory", "not enough memory", "resource_exhausted")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory has run out."""
    if _KINDS & {kind.__name__ for kind in type(error).__mro__}:
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _SHORT)


def make_room(callback: HybridCallback, error: BaseException) -> bool:
    """Drop the copies of the weights, if `error` says that memory has run out.

    Weights that are elsewhere for a probe are put back, and a jump that cannot be validated any
    more is taken back.

    Returns
    -------
    bool
        False if memory has not run out, or if there is nothing here that could be done without.
    """
    room, bank = callback.engine.snapshots, callback._bank
    if not is_out_of_memory(error) or not (room or callback._averages):
        return False
    if bank is not None:
        bank.drop()
    if callback.engine.may_roll_back and callback._recovery is not None:
        callback._roll_back()
    if room:
        room = room - 1 if room > FEWEST else 0
        text = f"{room} snapshots" if room else "no snapshots and no jumps"
    else:
        callback._averages, text = False, "no average"
    # Not the text: TensorFlow's is a page.
    kind = type(error).__name__
    logger.warning("memory has run out (%s), so from now on there are %s", kind, text)
    callback._bank = callback._average = None
    callback._room = room
    return True
