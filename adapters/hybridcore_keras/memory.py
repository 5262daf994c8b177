"""What the model takes, and when memory is out."""

from __future__ import annotations

from math import prod
from typing import Any

from hybridcore.memory import Size
from hybridcore_keras.snapshots import itemsize

# What the allocators of the backends say of it, each in words of its own.
_KINDS = {"MemoryError", "OutOfMemoryError", "ResourceExhaustedError"}
_SHORT = ("out of memory", "allocate memory", "not enough memory", "resource_exhausted")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory has run out."""
    if _KINDS & {kind.__name__ for kind in type(error).__mro__}:
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _SHORT)


def size_of(model: Any) -> Size:
    """Size of the trainable weights of `model` and of its optimizer's state, until built as Adam's.

    Where they are makes no difference: nothing is kept in the memory of a GPU's host here.
    """
    counts = [(prod(v.shape), itemsize(v.dtype)) for v in model.trainable_variables]
    weights = float(sum(count * size for count, size in counts))
    state = 2.0 * weights
    if model.optimizer.built:
        # Iterations and rate are no copies of anything.
        held = [v for v in model.optimizer.variables if len(v.shape)]
        state = float(sum(prod(v.shape) * itemsize(v.dtype) for v in held))
    return Size(float(sum(count for count, _ in counts)), weights, state, on_gpu=False)
