"""Buffers (running statistics and the like), kept and put back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import torch
from torch import nn

Kept: TypeAlias = list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor, torch.Tensor]]


def keep(modules: Iterable[nn.Module]) -> Kept:
    """Copy the buffers of `modules`, their children excluded."""
    return [
        (module._buffers, name, buffer, buffer.detach().clone())
        for module in modules
        if module._buffers
        for name, buffer in module._buffers.items()
        # What was expanded shares its memory with itself, and cannot be written in place.
        if buffer is not None and (0 not in buffer.stride() or buffer.numel() < 2)
    ]


@torch.no_grad()
def put_back(kept: Kept) -> None:
    """Undo what was done to the buffers since :func:`keep`, new tensors in their place included."""
    for registry, name, buffer, copy in kept:
        buffer.copy_(copy)
        registry[name] = buffer
