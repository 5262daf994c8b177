"""Telling that memory has run out."""

from __future__ import annotations

# What the allocators of the backends say of it, each in words of its own.
_KINDS = {"MemoryError", "OutOfMemoryError", "ResourceExhaustedError"}
_SHORT = ("out of memory", "allocate memory", "not enough memory", "resource_exhausted")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory has run out."""
    if _KINDS & {kind.__name__ for kind in type(error).__mro__}:
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _SHORT)
