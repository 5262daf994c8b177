"""What holds for every extrapolator and every Gram matrix, and what is refused."""

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from hybridcore.extrapolation import EXTRAPOLATORS, anderson, average, dmd, linear, nesterov

# Values passed where accuracy is measured, so that the package's defaults can change freely.
SHARP = 1e-15
NAMES = sorted(EXTRAPOLATORS)

every_extrapolator = pytest.mark.parametrize("name", NAMES)
# Example databases and time limits make a run depend on the machine.
steady = settings(deadline=None, derandomize=True, database=None, max_examples=150)


# ---------------------------------------------------------------------------------------------
# What holds for every extrapolator and every Gram matrix
# ---------------------------------------------------------------------------------------------

seeds = st.integers(0, 2**32 - 1)
counts = st.integers(1, 10)
horizons = st.floats(0.0, 1e4)
KINDS = [
    "generic",
    "ill-conditioned",
    "rank-deficient",
    "constant",
    "duplicated",
    "one-jump",
    "steady",
    "converged",
    "growing",
]


def hostile_snapshots(kind, m, rng):
    cloud = rng.standard_normal((m, 12))
    if kind == "ill-conditioned":
        return cloud * np.logspace(0.0, -14.0, 12)
    if kind == "rank-deficient":
        return cloud[:, :2] @ rng.standard_normal((2, 12))
    if kind == "constant":
        return np.tile(cloud[0], (m, 1))
    if kind == "duplicated":
        return cloud[np.sort(rng.integers(0, m, m))]
    if kind == "one-jump":
        return np.where(np.arange(m)[:, None] < rng.integers(0, m), cloud[0], cloud[-1])
    if kind == "steady":
        return cloud[0] + np.arange(m)[:, None] * rng.standard_normal(12) + 1e-9 * cloud
    if kind == "converged":
        return cloud[0] + 10.0 ** -np.arange(0.0, 3.0 * m, 3.0)[:, None] * cloud
    if kind == "growing":
        return 30.0 ** np.arange(m)[:, None] * cloud
    return cloud


@st.composite
def hostile_grams(draw):
    rng = np.random.default_rng(draw(seeds))
    m = draw(counts)
    snapshots = hostile_snapshots(draw(st.sampled_from(KINDS)), m, rng)
    far = draw(st.sampled_from([None, 0.0, 1e3, 1e9]))
    gram = naive.gram_of(snapshots, origin=None if far is None else far * rng.standard_normal(12))
    if draw(st.booleans()):
        # What a sum in another order, or of lower precision, leaves behind: neither symmetric
        # nor positive semidefinite.
        gram += 1e-15 * np.abs(gram).max() * rng.standard_normal(gram.shape)
    peak = np.abs(gram).max()
    if peak > 0.0:
        gram = gram / peak * 10.0 ** draw(st.floats(-30.0, 30.0))
    return gram


def check_affine(coefficients, m):
    assert coefficients.shape == (m,)
    assert coefficients.dtype == np.float64
    assert np.isfinite(coefficients).all()
    # Rounding of the sum itself grows with the terms; the terms must not grow without bound.
    assert abs(coefficients.sum() - 1.0) <= 1e-14 * m * max(1.0, np.abs(coefficients).max())


@every_extrapolator
@steady
@given(gram=hostile_grams(), horizon=horizons)
def test_coefficients_are_finite_and_sum_to_one(name, gram, horizon):
    check_affine(EXTRAPOLATORS[name](gram, horizon), len(gram))


@steady
@given(gram=hostile_grams(), horizon=horizons, exponent=st.floats(-320.0, 300.0))
def test_no_parameter_value_breaks_the_solvers(gram, horizon, exponent):
    size = max(10.0**exponent, 5e-324)
    coefficients = anderson(gram, horizon, regularization=size)
    check_affine(coefficients, len(gram))
    # |c| <= 1 / sqrt(regularization) by theory; the floor at rounding bounds it for good.
    assert np.abs(coefficients).max() <= 2.0 / np.sqrt(np.finfo(float).eps)
    check_affine(dmd(gram, horizon, tolerance=min(size, 0.999)), len(gram))
    check_affine(dmd(gram, horizon, tolerance=0.0), len(gram))
    check_affine(nesterov(gram, horizon, momentum=min(size, 0.999)), len(gram))


@pytest.mark.parametrize("distance", [0.0, 1e3, 1e6, 1e9, 1e12])
@pytest.mark.parametrize("kind", ["generic", "duplicated"])
@pytest.mark.parametrize("noise", [0.0, 1e-15])
def test_rounding_is_not_taken_for_motion(noise, kind, distance):
    # Far from the origin the Gram matrix holds less and less of the displacements, then nothing.
    # A solver that believes the rounding left over answers with coefficients of 1e15.
    rng = np.random.default_rng(0)
    for m in [3, 4, 6, 10] * 25:
        snapshots = hostile_snapshots(kind, m, rng)
        gram = naive.gram_of(snapshots, origin=distance * rng.standard_normal(12))
        gram += noise * np.abs(gram).max() * rng.standard_normal(gram.shape)
        assert np.abs(anderson(gram, 20.0, regularization=1e-18)).max() < 10.0
        assert np.abs(dmd(gram, 20.0, tolerance=0.0)).max() < 1000.0


@every_extrapolator
@steady
@given(
    matrix=counts.flatmap(
        lambda m: npst.arrays(
            np.float64,
            (m, m),
            elements=st.floats(-1.7e308, 1.7e308) | st.sampled_from([0.0, 1.0, 1e308, -1e308]),
            # Otherwise most elements are one and the same, and their differences vanish.
            fill=st.nothing(),
        )
    ),
    horizon=horizons,
)
def test_any_finite_matrix_is_survived(name, matrix, horizon):
    check_affine(EXTRAPOLATORS[name](matrix, horizon), len(matrix))


@every_extrapolator
@steady
@given(gram=hostile_grams(), horizon=horizons, power=st.integers(-40, 40))
def test_the_unit_of_parameter_space_does_not_matter(name, gram, horizon, power):
    # A power of two scales without rounding, so even where nothing is well conditioned the
    # coefficients must be the same to the last bit.
    scaled = EXTRAPOLATORS[name](gram * 4.0**power, horizon)
    assert scaled.tolist() == EXTRAPOLATORS[name](gram, horizon).tolist()


# Generic snapshots, where the answer is well conditioned, and parameters that keep it so.
TAME = {
    "average": average,
    "linear": linear,
    "nesterov": nesterov,
    "anderson": lambda gram, horizon: anderson(gram, horizon, regularization=1e-6),
    "dmd": lambda gram, horizon: dmd(gram, horizon, tolerance=1e-6),
}


def assert_same(coefficients, expected, digits=1e-7):
    assert np.abs(coefficients - expected).max() <= digits * np.abs(expected).max()


@every_extrapolator
@steady
@given(seed=seeds, m=counts, horizon=st.floats(0.0, 50.0), exponent=st.floats(-15.0, 15.0))
def test_any_scale_of_parameter_space_gives_the_same_coefficients(name, seed, m, horizon, exponent):
    gram = naive.gram_of(np.random.default_rng(seed).standard_normal((m, 2 * m)))
    assert_same(TAME[name](gram * 10.0 ** (2.0 * exponent), horizon), TAME[name](gram, horizon))


@every_extrapolator
@steady
@given(seed=seeds, m=counts, horizon=st.floats(0.0, 50.0))
def test_rotating_parameter_space_changes_nothing(name, seed, m, horizon):
    rng = np.random.default_rng(seed)
    snapshots = rng.standard_normal((m, 2 * m))
    basis = np.linalg.qr(rng.standard_normal((2 * m, 2 * m)))[0]
    turned = TAME[name](naive.gram_of(snapshots @ basis), horizon)
    assert_same(turned, TAME[name](naive.gram_of(snapshots), horizon))


@every_extrapolator
@steady
@given(seed=seeds, m=counts, horizon=st.floats(0.0, 50.0), distance=st.floats(0.0, 100.0))
def test_the_origin_of_the_gram_matrix_does_not_matter(name, seed, m, horizon, distance):
    rng = np.random.default_rng(seed)
    snapshots = rng.standard_normal((m, 2 * m))
    expected = TAME[name](naive.gram_of(snapshots), horizon)
    for origin in (0.0, snapshots[0], snapshots.mean(0), distance * rng.standard_normal(2 * m)):
        # Another origin costs the digits that differences of long vectors lose, no more.
        assert_same(
            TAME[name](naive.gram_of(snapshots, origin=origin), horizon), expected, digits=1e-6
        )


@every_extrapolator
@pytest.mark.parametrize("m", [2, 3, 5, 10])
def test_an_asymmetric_gram_counts_as_its_symmetric_part(name, m):
    # Which triangle holds the rounding of a float32 product must not matter.
    rng = np.random.default_rng(m)
    gram = naive.gram_of(rng.standard_normal((m, 2 * m)))
    noise = 1e-4 * rng.standard_normal((m, m))
    expected = TAME[name](gram + (noise + noise.T) / 2.0, 7.5)
    assert_same(TAME[name](gram + noise, 7.5), expected, digits=1e-9)


@every_extrapolator
@steady
@given(gram=hostile_grams(), horizon=horizons)
def test_the_input_is_not_changed(name, gram, horizon):
    before = gram.copy()
    gram.setflags(write=False)
    EXTRAPOLATORS[name](gram, horizon)
    assert np.array_equal(gram, before)


@pytest.mark.parametrize("name", ["anderson", "dmd"])
def test_snapshots_that_do_not_move_leave_the_solvers_at_the_last(name):
    # About a far origin the displacements are rounding, and about a snapshot exact zeros.
    for gram in (np.zeros((4, 4)), np.full((4, 4), 0.1), 0.1 + 1e-17 * np.eye(4)):
        assert EXTRAPOLATORS[name](gram, 5.0).tolist() == [0.0, 0.0, 0.0, 1.0]


@every_extrapolator
def test_lists_and_float32_are_taken(name):
    gram = naive.gram_of(np.arange(12.0).reshape(4, 3) ** 2)
    expected = EXTRAPOLATORS[name](gram, 2.0).tolist()
    assert EXTRAPOLATORS[name](gram.tolist(), 2.0).tolist() == expected
    assert EXTRAPOLATORS[name](gram.astype(np.float32), 2).tolist() == expected


# ---------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------

# An argument is named as a word: "horizon" inside another message must not do.
BAD_GRAMS = {
    "not-square": np.ones((3, 2)),
    "vector": np.ones(3),
    "scalar": np.float64(1.0),
    "stack": np.ones((2, 2, 2)),
    "empty": np.empty((0, 0)),
    "nan": np.array([[1.0, np.nan], [np.nan, 1.0]]),
    "inf": np.diag([1.0, np.inf, 1.0]),
}


@every_extrapolator
@pytest.mark.parametrize("kind", BAD_GRAMS)
def test_a_bad_gram_is_named(name, kind):
    with pytest.raises(ValueError, match=r"^gram must be"):
        EXTRAPOLATORS[name](BAD_GRAMS[kind], 1.0)


@every_extrapolator
@pytest.mark.parametrize("horizon", [-1.0, -1e-9, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("m", [1, 2, 5])
def test_a_bad_horizon_is_named(name, horizon, m):
    with pytest.raises(ValueError, match=r"^horizon must be"):
        EXTRAPOLATORS[name](np.eye(m), horizon)


# Small m as well: a shortcut for few snapshots must not skip the check.
@pytest.mark.parametrize("m", [1, 2, 5])
@pytest.mark.parametrize(
    ("extrapolator", "option", "values"),
    [
        (nesterov, "momentum", [-0.1, 1.0, 1.5, np.nan, np.inf]),
        (anderson, "regularization", [0.0, -1e-9, np.nan, np.inf]),
        (dmd, "tolerance", [-1e-9, 1.0, 2.0, np.nan, np.inf]),
    ],
)
def test_a_bad_option_is_named(extrapolator, option, values, m):
    for value in values:
        with pytest.raises(ValueError, match=rf"^{option} must"):
            extrapolator(np.eye(m), 1.0, **{option: value})


def test_the_table_lists_the_public_functions():
    assert list(EXTRAPOLATORS.items()) == [
        ("average", average),
        ("linear", linear),
        ("nesterov", nesterov),
        ("anderson", anderson),
        ("dmd", dmd),
    ]
