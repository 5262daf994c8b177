"""Telling that memory has run out from other errors."""

from __future__ import annotations

import torch

# What torch's allocators say of it, each in words of its own.
_SHORT = ("out of memory", "allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory has run out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _SHORT)
