"""Displacements in fewer bits: bfloat16, or 8 bits with a scale for each block."""

from __future__ import annotations

from typing import NamedTuple

import torch

from hybridcore.memory import SCALED

BLOCK = SCALED
_STEPS = 127
_LEAST = torch.finfo(torch.float32).tiny


class Codes(NamedTuple):
    """A row of values in fewer bits.

    Attributes
    ----------
    values : (n,) tensor of bfloat16 or int8
        n is a multiple of `BLOCK`.
    scales : (n / BLOCK,) tensor of float32 or None
        What one step of the 8 bits stands for; None for bfloat16.
    """

    values: torch.Tensor
    scales: torch.Tensor | None


def padded(size: int) -> int:
    """Least multiple of `BLOCK` that `size` values fit into."""
    return -(-size // BLOCK) * BLOCK


def empty(size: int, kind: str, device: torch.device) -> Codes:
    """Codes of `size` zeros, a multiple of `BLOCK`; `kind` is ``"bfloat16"`` or ``"int8"``."""
    if kind == "bfloat16":
        return Codes(torch.zeros(size, dtype=torch.bfloat16, device=device), None)
    scales = torch.zeros(size // BLOCK, dtype=torch.float32, device=device)
    return Codes(torch.zeros(size, dtype=torch.int8, device=device), scales)


def encode(values: torch.Tensor, codes: Codes) -> None:
    """Write `values`, floating-point (k,), over the first `padded(k)` of `codes`.

    In 8 bits the error is at most 1/254 of the largest magnitude in the block, in bfloat16 at most
    1/256 of the value itself, both beside the rounding of float32. A block that holds what is not
    finite is not finite as a whole. `values` may be overwritten.
    """
    size = padded(len(values))
    if codes.scales is None:
        codes.values[: len(values)].copy_(values)
        return
    wide = values.float()
    if len(wide) < size:
        wide = torch.nn.functional.pad(wide, (0, size - len(wide)))
    blocks = wide.view(-1, BLOCK)
    scales = codes.scales[: size // BLOCK]
    # A norm of order infinity would take ten times as long, and aminmax too. A step has a
    # reciprocal, and no value is more than 127 of them, not even where that was rounded up.
    torch.maximum(blocks.amax(dim=1), blocks.amin(dim=1).neg_(), out=scales)
    scales.mul_(1.0 / _STEPS).clamp_min_(_LEAST)
    blocks.mul_(scales.reciprocal().unsqueeze(1)).round_()
    codes.values[:size].copy_(wide)


def decode(codes: Codes, out: torch.Tensor) -> torch.Tensor:
    """Write all values of `codes` to `out`, floating-point, and return it."""
    out.copy_(codes.values)
    if codes.scales is not None:
        out.view(-1, BLOCK).mul_(codes.scales.unsqueeze(1))
    return out


def part(codes: Codes, start: int, size: int) -> Codes:
    """Codes of `size` values from `start` on, a multiple of `BLOCK`, in the same memory."""
    end = start + padded(size)
    scales = None if codes.scales is None else codes.scales[start // BLOCK : end // BLOCK]
    return Codes(codes.values[start:end], scales)
