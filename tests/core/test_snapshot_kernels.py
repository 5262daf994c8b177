"""Kernels for the snapshots of large models, against NumPy."""

import math

import naive
import numpy as np
import pytest

from hybridcore.kernels.cpu import snapshots as kernel
from hybridcore.memory import SCALED

# Of a block and of what is left of one, and less than either.
SIZES = (1, 127, 128, 129, 256, 700, 1024)
ROWS = (2, 3, 6, 10)


def snapshots(size, rows=6, seed=0):
    """Rows that lie near each other, and far from zero."""
    rng = np.random.default_rng(seed)
    centre = rng.standard_normal(size)
    return [(centre + 1e-2 * rng.standard_normal(size)).astype(np.float32) for _ in range(rows)]


def coded(rows, base):
    """Codes and scales of `rows` about `base`, by the kernel, and the displacements they stand for.

    The codes begin as rubbish, as those of a row that is written over.
    """
    blocks = -(-len(base) // SCALED)
    codes = [np.full(blocks * SCALED, 99, np.int8) for _ in rows]
    scales = [np.full(blocks, np.nan, np.float32) for _ in rows]
    for row, *kept in zip(rows, codes, scales, strict=True):
        kernel.encode(row, base, *kept)
    stand_for = [decoded(*kept)[: len(base)] for kept in zip(codes, scales, strict=True)]
    return codes, scales, stand_for


def decoded(codes, scales):
    return codes.astype(np.float64) * np.repeat(scales, SCALED)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", ROWS)
def test_gram_is_that_of_numpy(size, rows):
    taken = snapshots(size, rows)
    out = np.ones((rows, rows))
    kernel.gram(taken, out)
    np.testing.assert_allclose(out - 1.0, naive.gram(taken), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("size", SIZES)
def test_move_is_that_of_numpy_and_reads_no_row_of_weight_zero(size):
    taken = snapshots(size)
    weights = np.array([0.5, 0.0, -1.25, 0.0, 2.0])
    exact = np.array(taken, np.float64)
    expected = exact[-1] + weights @ (exact[:-1] - exact[-1])
    taken[1][:] = taken[3][:] = np.nan
    out = np.full(size, np.nan, np.float32)
    kernel.move(taken, weights, out)
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)
    kernel.move(taken, np.zeros(5), out)
    assert np.array_equal(out, taken[-1])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_codes_are_those_of_numpy(size, scale):
    base, values = (np.float32(scale) * row for row in snapshots(size, 2))
    codes, scales, _ = coded([values], base)
    whole, steps = naive.in_8_bits(values.astype(np.float64) - base)
    np.testing.assert_allclose(scales[0], steps, rtol=1e-4)
    # What lies half-way between two codes may be rounded to either.
    assert np.abs(codes[0] - whole).max() <= 1
    assert np.mean(codes[0] != whole) < 0.01
    assert not codes[0][size:].any()


def test_codes_go_to_both_ends_and_halves_go_to_even():
    values = np.zeros(SCALED, np.float32)
    values[:6] = -127.0, 127.0, 0.5, 1.5, 2.5, -0.5
    codes, scales, _ = coded([values], np.zeros_like(values))
    assert codes[0][:6].tolist() == [-127, 127, 0, 2, 2, 0]
    assert scales[0].tolist() == [1.0]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("size", [1e-39, 1e-45, 0.0])
def test_steps_without_an_inverse_stand_for_nothing(size):
    values = np.full(SCALED, size, np.float32)
    codes, _, (lost,) = coded([values], np.zeros_like(values))
    assert not lost.any()
    assert not codes[0].any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_block_with_what_is_not_finite_is_not_finite(bad):
    values = np.ones(3 * SCALED, np.float32)
    values[SCALED] = bad
    _, _, (kept,) = coded([values], np.zeros_like(values))
    finite = np.isfinite(kept).reshape(3, SCALED)
    assert finite.all(axis=1).tolist() == [True, False, True]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_a_new_base_leaves_every_row_where_it_was(size, rows):
    old, new, *others = snapshots(size, rows + 2)
    codes, scales, stand_for = coded(others, old)
    places = [old + moved for moved in stand_for]
    base = old.copy()
    kernel.rebase(new, base, codes, scales)
    assert np.array_equal(base, new)
    for kept, place in zip(zip(codes, scales, strict=True), places, strict=True):
        moved = place - new
        largest = np.repeat(naive.in_8_bits(moved)[1], SCALED)[:size]
        assert (np.abs(decoded(*kept)[:size] - moved) <= 0.51 * largest + 1e-7).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("base", [None, 0, 3])
def test_gram_of_codes_is_that_of_what_they_stand_for(size, base):
    origin, *rows = snapshots(size, 5)
    codes, scales, stand_for = coded(rows, origin)
    if base is not None:
        stand_for[base] = np.zeros(size)
        codes[base], scales[base] = codes[base - 1], scales[base - 1]
    out = np.ones((4, 4))
    kernel.coded_gram(codes, scales, base, out)
    np.testing.assert_allclose(out - 1.0, naive.gram(stand_for), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_a_move_by_codes_is_that_of_numpy(size, rows):
    base, point, *others = snapshots(size, rows + 2)
    codes, scales, stand_for = coded(others, base)
    weights = np.array([-1.5, 0.5, 0.25])[:rows]
    # The base is a row as well, of weight 0.75.
    away = point.astype(np.float64) - base
    expected = (
        point
        - (weights.sum() + 0.75) * away
        + sum(w * moved for w, moved in zip(weights, stand_for, strict=True))
    )
    out = point.copy()
    kernel.coded_move(out, base, codes, scales, weights, float(weights.sum()) + 0.75, out)
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)
    # Standing still asks nothing of the base.
    base[:] = np.nan
    kernel.coded_move(point, base, codes, scales, 0.0 * weights, 0.0, out)
    assert np.array_equal(out, point)
