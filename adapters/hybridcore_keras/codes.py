"""Displacements in fewer bits: bfloat16, or 8 bits with a scale for each block."""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import ops

from hybridcore.memory import SCALED

_STEPS = 127.0


def encode(values: Any, kind: str) -> tuple[Any, ...]:
    """Return `values` (n,) in fewer bits; `kind` is ``"bfloat16"`` or ``"int8"``.

    In 8 bits the error is at most 1/254 of the largest magnitude in a block of 256 values, in
    bfloat16 at most 1/256 of the value itself, both beside the rounding of float32. A block that
    holds what is not finite is not finite as a whole.

    Returns
    -------
    tuple of tensor
        bfloat16 (n,), or int8 (b, 256) and the float32 scales (b, 1) of b blocks.
    """
    if kind == "bfloat16":
        return (ops.cast(values, "bfloat16"),)
    values = ops.cast(values, "float32")
    blocks = ops.reshape(ops.pad(values, ((0, -values.shape[0] % SCALED),)), (-1, SCALED))
    sizes = ops.abs(blocks)
    # A largest element says nothing reliable of one that is not a number.
    finite = ops.isfinite(ops.sum(sizes, axis=1, keepdims=True))
    scales = ops.max(sizes, axis=1, keepdims=True) / _STEPS
    scales = ops.where(finite, scales, ops.full_like(scales, np.nan))
    # A step so small that float32 has no number for its inverse stands for nothing.
    steps = 1.0 / scales
    steps = ops.where(ops.isfinite(steps), steps, ops.zeros_like(steps))
    codes = ops.clip(ops.round(blocks * steps), -_STEPS, _STEPS)
    codes = ops.where(finite, codes, ops.zeros_like(codes))
    return ops.cast(codes, "int8"), scales


def decode(codes: tuple[Any, ...], size: int) -> Any:
    """Return the `size` values that `codes` stand for, in float32."""
    values = ops.cast(codes[0], "float32")
    if len(codes) == 2:
        values = ops.reshape(values * codes[1], (-1,))[:size]
    return values
