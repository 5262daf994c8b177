"""Passes over the snapshots of a large model, each number read from memory once.

Most of their time they wait for memory: all but the exact inner products, which take half as long
again, are as fast as a plain copy of what they read and write. An ordinary step calls none of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybridcore.kernels.cpu import jit, part, sums
from hybridcore.memory import SCALED

# Rows that one compilation is for.
MOST = 10
# A float32 from 2^23 on has no digits behind the point, so that adding this rounds what is near 0
# to whole numbers, half to even, and leaves them in the last bits.
_ROUNDING = np.float32(1.5 * 2**23)
_ROUNDED = int(np.float32(1.5 * 2**23).view(np.int32))
_MAGNITUDE = np.int32(0x7FFFFFFF)
_STEPS = 127
# Values that inner products are summed over at a time: few enough for the displacements of all rows
# to stay in the nearest cache.
_WIDTH = 128


def gram(rows: list[NDArray[np.float32]], out: NDArray[np.float64]) -> None:
    """Add the inner products of `rows` about the last of them to `out`.

    Parameters
    ----------
    rows : list of (n,) float32
        Contiguous; at most `MOST`.
    out : (m, m) float64
        m = ``len(rows)``. Sums are float32 within 128 values, and float64 over them.
    """
    half = np.zeros_like(out)
    _gram(_filled(rows), len(rows), half)
    _add_both_halves(half, out)


@sums
def _gram(rows: Any, count: int, half: NDArray[np.float64]) -> None:
    origin = rows[count - 1]
    moved = np.empty((count, _WIDTH), np.float32)
    for start in range(0, len(origin), _WIDTH):
        newest = origin[start : start + _WIDTH]
        width = len(newest)
        if width < _WIDTH:
            moved[:] = 0.0
        for i in range(count - 1):
            row = rows[i][start : start + _WIDTH]
            mine = moved[i]
            for k in range(width):
                mine[k] = row[k] - newest[k]
            for j in range(i + 1):
                other = moved[j]
                product = np.float32(0.0)
                for k in range(_WIDTH):
                    product += mine[k] * other[k]
                half[i, j] += product


def move(
    rows: list[NDArray[np.float32]], weights: NDArray[np.float64], out: NDArray[np.float32]
) -> None:
    """Write the last of `rows` plus weighted displacements of the others from it.

    Parameters
    ----------
    rows : list of (n,) float32
        Contiguous; at most `MOST`.
    weights : (m - 1,) float64
        Rounded to float32. What has the weight 0 is not read.
    out : (n,) float32
        Written.
    """
    _move(_filled(rows), len(rows), weights.astype(np.float32), out)


def _add_both_halves(half: NDArray[np.float64], out: NDArray[np.float64]) -> None:
    out += half + np.tril(half, -1).T


def _filled(rows: list[NDArray[Any]]) -> tuple[NDArray[Any], ...]:
    """Return `rows` and as many more that nothing reads as one compilation needs."""
    return (*rows, *rows[:1] * (MOST - len(rows)))


@jit
def _move(rows: Any, count: int, weights: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    origin = rows[count - 1]
    for start in range(0, len(origin), SCALED):
        newest, target = origin[start : start + SCALED], out[start : start + SCALED]
        width = len(newest)
        for k in range(width):
            target[k] = newest[k]
        for i in range(count - 1):
            weight = weights[i]
            if weight != 0.0:
                row = rows[i][start : start + SCALED]
                for k in range(width):
                    target[k] += weight * (row[k] - newest[k])


@part
def _write_codes(
    moved: NDArray[np.float32],
    bits: NDArray[np.int32],
    codes: NDArray[np.int8],
    scales: NDArray[np.float32],
    block: int,
) -> None:
    """Write a block of displacements; `bits` are the same memory as `moved`, which is lost."""
    # Magnitudes are in the order of their bits, in which NaN is above all numbers.
    top = np.int32(0)
    for k in range(SCALED):
        top = max(top, bits[k] & _MAGNITUDE)
    bits[SCALED] = top
    step = moved[SCALED] / np.float32(_STEPS)
    scales[block] = step
    inverse = np.float32(1.0) / step
    # A step so small that float32 has no number for its inverse stands for nothing.
    if not np.isfinite(inverse):
        inverse = np.float32(0.0)
    for k in range(SCALED):
        moved[k] = moved[k] * inverse + _ROUNDING
    target = codes[block * SCALED : (block + 1) * SCALED]
    for k in range(SCALED):
        target[k] = min(max(bits[k] - _ROUNDED, -_STEPS), _STEPS)


@jit
def encode(
    values: NDArray[np.float32],
    base: NDArray[np.float32],
    codes: NDArray[np.int8],
    scales: NDArray[np.float32],
) -> None:
    """Write ``values - base`` in 8 bits, with a scale for each `SCALED` values.

    Parameters
    ----------
    values, base : (n,) float32
        A block of them that holds what is not finite is not finite as a whole.
    codes : (n or more, rounded up to blocks) int8
        Written: -127 to 127, rounded half to even.
    scales : (blocks,) float32
        Written: what one step stands for.
    """
    moved = np.zeros(SCALED + 1, np.float32)
    bits = moved.view(np.int32)
    for block in range(len(scales)):
        start = block * SCALED
        mine, origin = values[start : start + SCALED], base[start : start + SCALED]
        width = len(mine)
        for k in range(width):
            moved[k] = mine[k] - origin[k]
        moved[width:SCALED] = 0.0
        _write_codes(moved, bits, codes, scales, block)


def rebase(
    values: NDArray[np.float32],
    base: NDArray[np.float32],
    codes: list[NDArray[np.int8]],
    scales: list[NDArray[np.float32]],
) -> None:
    """Put the base where `values` are, and write the displacements of the rows from there.

    Parameters
    ----------
    values : (n,) float32
    base : (n,) float32
        Written.
    codes, scales : lists of arrays
        At most `MOST`, as of :func:`encode`.
    """
    if codes:
        _rebase(values, base, _filled(codes), _filled(scales), len(codes))
    else:
        base[:] = values


@jit
def _rebase(
    values: NDArray[np.float32], base: NDArray[np.float32], codes: Any, scales: Any, count: int
) -> None:
    away = np.zeros(SCALED, np.float32)
    moved = np.zeros(SCALED + 1, np.float32)
    bits = moved.view(np.int32)
    for block in range(len(scales[0])):
        start = block * SCALED
        mine, origin = values[start : start + SCALED], base[start : start + SCALED]
        width = len(mine)
        for k in range(width):
            away[k] = origin[k] - mine[k]
            origin[k] = mine[k]
        away[width:] = 0.0
        for row in range(count):
            kept = codes[row][start : start + SCALED]
            step = scales[row][block]
            for k in range(SCALED):
                moved[k] = np.float32(kept[k]) * step + away[k]
            _write_codes(moved, bits, codes[row], scales[row], block)


def coded_gram(
    codes: list[NDArray[np.int8]],
    scales: list[NDArray[np.float32]],
    base: int | None,
    out: NDArray[np.float64],
) -> None:
    """Add the inner products of rows in 8 bits about the last of them to `out`.

    Parameters
    ----------
    codes, scales : lists of arrays
        At most `MOST`, as of :func:`encode`.
    base : int or None
        Which of the rows is the base, whose codes and scales have no part in the products.
    out : (m, m) float64
        Sums are float32 within 256 values, and float64 over them.
    """
    half = np.zeros_like(out)
    which = -1 if base is None else base
    _coded_gram(_filled(codes), _filled(scales), len(codes), which, half)
    _add_both_halves(half, out)


@sums
def _coded_gram(codes: Any, scales: Any, count: int, base: int, half: NDArray[np.float64]) -> None:
    moved = np.zeros((count, SCALED), np.float32)
    for block in range(len(scales[count - 1])):
        start = block * SCALED
        newest = moved[count - 1]
        if base != count - 1:
            kept, step = codes[count - 1][start : start + SCALED], scales[count - 1][block]
            for k in range(SCALED):
                newest[k] = np.float32(kept[k]) * step
        for i in range(count - 1):
            mine = moved[i]
            step = np.float32(0.0) if i == base else scales[i][block]
            kept = codes[i][start : start + SCALED]
            for k in range(SCALED):
                mine[k] = np.float32(kept[k]) * step - newest[k]
            for j in range(i + 1):
                other = moved[j]
                product = np.float32(0.0)
                for k in range(SCALED):
                    product += mine[k] * other[k]
                half[i, j] += product


def coded_move(
    point: NDArray[np.float32],
    base: NDArray[np.float32],
    codes: list[NDArray[np.int8]],
    scales: list[NDArray[np.float32]],
    weights: NDArray[np.float64],
    total: float,
    out: NDArray[np.float32],
) -> None:
    """Write `point` plus weighted displacements of rows in 8 bits from it.

    Parameters
    ----------
    point, base : (n,) float32
    codes, scales : lists of arrays
        At most `MOST`, as of :func:`encode`.
    weights : (rows,) float64
        Rounded to float32.
    total : float
        Sum of the weights, with that of the base where it is one of the rows. Where it is 0 the
        base is not read.
    out : (n,) float32
        Written. It may be `point`.
    """
    if not codes:
        np.copyto(out, point + np.float32(total) * (base - point) if total else point)
        return
    small = weights.astype(np.float32)
    _coded_move(
        point, base, _filled(codes), _filled(scales), len(codes), small, np.float32(total), out
    )


@jit
def _coded_move(
    point: NDArray[np.float32],
    base: NDArray[np.float32],
    codes: Any,
    scales: Any,
    count: int,
    weights: NDArray[np.float32],
    total: np.float32,
    out: NDArray[np.float32],
) -> None:
    moved = np.zeros(SCALED, np.float32)
    for block in range(len(scales[0])):
        start = block * SCALED
        mine, origin = point[start : start + SCALED], base[start : start + SCALED]
        target = out[start : start + SCALED]
        width = len(mine)
        moved[:] = 0.0
        if total != 0.0:
            for k in range(width):
                moved[k] = total * (origin[k] - mine[k])
        for row in range(count):
            kept, step = codes[row][start : start + SCALED], weights[row] * scales[row][block]
            for k in range(SCALED):
                moved[k] += np.float32(kept[k]) * step
        for k in range(width):
            target[k] = mine[k] + moved[k]
