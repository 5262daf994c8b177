"""The extrapolators against theory, against explicit-space oracles, and against hostile input."""

import naive
import numpy as np
import pytest
import scipy.linalg
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


def gram_of(snapshots, origin=None):
    offset = snapshots - (snapshots[-1] if origin is None else origin)
    return offset @ offset.T


def relative(error, size):
    return np.linalg.norm(error) / np.linalg.norm(size)


# ---------------------------------------------------------------------------------------------
# theta' = A theta + b, where everything is known
# ---------------------------------------------------------------------------------------------


def rotation(radius, angle):
    cos, sin = np.cos(angle), np.sin(angle)
    return radius * np.array([[cos, -sin], [sin, cos]])


def symmetric(*values):
    rng = np.random.default_rng(len(values))
    basis = np.linalg.qr(rng.standard_normal((len(values), len(values))))[0]
    return basis @ np.diag(values) @ basis.T


def skewed(*blocks):
    """Non-normal: the blocks in a basis that is not orthogonal."""
    core = scipy.linalg.block_diag(*blocks)
    rng = np.random.default_rng(len(core))
    basis = np.eye(len(core)) + 0.4 * rng.standard_normal(core.shape)
    return basis @ core @ np.linalg.inv(basis)


class Affine:
    """The iteration theta' = A theta + b, its orbit and its fixed point."""

    def __init__(self, matrix, seed=0):
        rng = np.random.default_rng(seed)
        self.matrix = matrix
        self.shift, self.start = rng.standard_normal((2, len(matrix)))
        self.fixed_point = np.linalg.solve(np.eye(len(matrix)) - matrix, self.shift)

    def after(self, point, steps):
        for _ in range(steps):
            point = self.matrix @ point + self.shift
        return point

    def snapshots(self, count, spacing):
        points = [self.start]
        while len(points) < count:
            points.append(self.after(points[-1], spacing))
        return np.array(points)


SYSTEMS = {
    "symmetric-2": symmetric(0.3, 0.9),
    "symmetric-3": symmetric(-0.5, 0.4, 0.95),
    "symmetric-5": symmetric(-0.8, -0.3, 0.2, 0.6, 0.95),
    "symmetric-7": symmetric(-0.9, -0.6, -0.3, 0.02, 0.3, 0.6, 0.95),
    "skewed-2": skewed(0.3, 0.9),
    "skewed-3": skewed(-0.5, 0.4, 0.95),
    "skewed-6": skewed(-0.9, -0.5, -0.2, 0.2, 0.6, 0.95),
    "complex-pair": skewed(rotation(0.95, 0.6)),
    "complex-pair-and-real": skewed(rotation(0.95, 0.6), 0.7),
    "two-complex-pairs": skewed(rotation(0.95, 0.6), rotation(0.9, 1.5), 0.5),
}
# Smooth decay, as in training: nearly parallel displacements, which a Gram matrix sees squared.
SLOW_SYSTEMS = {
    "slow-symmetric-2": symmetric(0.99, 0.999),
    "slow-symmetric-4": symmetric(0.7, 0.9, 0.97, 0.995),
    "slow-skewed-4": skewed(0.7, 0.9, 0.97, 0.995),
    "slow-complex": skewed(rotation(0.98, 0.3), 0.9),
    "defective": skewed(np.array([[0.97, 1.0], [0.0, 0.97]])),
}


@pytest.mark.parametrize("spare", [0, 1])
@pytest.mark.parametrize("system", SYSTEMS)
def test_anderson_hits_the_fixed_point(system, spare):
    orbit = Affine(SYSTEMS[system])
    modes = len(orbit.matrix)
    snapshots = orbit.snapshots(modes + 2 + spare, spacing=1)
    guess = anderson(gram_of(snapshots), 75.0, regularization=SHARP) @ snapshots
    assert relative(guess - orbit.fixed_point, orbit.fixed_point) < 1e-8


def test_anderson_keeps_the_fixed_point_when_regularization_is_below_rounding():
    # The fixed point lies along the null direction of the displacement Gram: a solver that
    # truncates small eigenvalues throws away exactly that direction.
    orbit = Affine(SYSTEMS["symmetric-3"])
    snapshots = orbit.snapshots(5, spacing=1)
    for regularization in (1e-16, 1e-30, 5e-324):
        guess = anderson(gram_of(snapshots), 0.0, regularization=regularization) @ snapshots
        assert relative(guess - orbit.fixed_point, orbit.fixed_point) < 1e-8


def test_anderson_regularization_leads_from_the_mean_to_the_fixed_point():
    orbit = Affine(SYSTEMS["skewed-3"])
    snapshots = orbit.snapshots(5, spacing=1)
    gram = gram_of(snapshots)
    strong = anderson(gram, 0.0, regularization=1e12)
    assert strong == pytest.approx([0.0, 0.25, 0.25, 0.25, 0.25], abs=1e-9)
    moves = np.diff(snapshots, axis=0)
    mixed = [
        anderson(gram, 0.0, regularization=size)[1:] @ moves for size in (1e2, 1e-2, 1e-6, 1e-10)
    ]
    left = [np.linalg.norm(move) for move in mixed]
    assert left == sorted(left, reverse=True)
    assert left[-1] < 1e-6 * left[0]


@pytest.mark.parametrize(("spacing", "horizon"), [(1, 75.0), (5, 15.0)])
@pytest.mark.parametrize("system", SYSTEMS | SLOW_SYSTEMS)
def test_dmd_follows_the_trajectory_75_steps_ahead(system, spacing, horizon):
    orbit = Affine((SYSTEMS | SLOW_SYSTEMS)[system])
    snapshots = orbit.snapshots(len(orbit.matrix) + 3, spacing)
    last = snapshots[-1]
    truth = orbit.after(last, 75)
    guess = dmd(gram_of(snapshots), horizon, tolerance=1e-14) @ snapshots
    # Four slow modes one step apart differ by less than the square root of eps, and a Gram matrix
    # sees the square of that.
    blurred = spacing == 1 and system in ("slow-symmetric-4", "slow-skewed-4")
    bound = 1e-4 if blurred else 1e-6
    assert relative(guess - truth, truth) < bound
    # A method that stands still must not pass because the orbit has nearly settled.
    assert relative(guess - truth, truth - last) < 10.0 * bound


@pytest.mark.parametrize("horizon", [0.25, 1.0, 7.5, 12.75])
@pytest.mark.parametrize("spacing", [1, 10])
def test_dmd_of_a_fraction_lies_on_the_continuous_trajectory(spacing, horizon):
    values = np.array([0.5, 0.9, 0.98])
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
    orbit = Affine(basis @ np.diag(values) @ basis.T)
    snapshots = orbit.snapshots(6, spacing)
    last = snapshots[-1]
    flow = basis @ np.diag(values ** (horizon * spacing)) @ basis.T
    truth = orbit.fixed_point + flow @ (last - orbit.fixed_point)
    guess = dmd(gram_of(snapshots), horizon, tolerance=1e-14) @ snapshots
    assert relative(guess - truth, truth - last) < 1e-6


def test_dmd_of_a_long_horizon_arrives_at_the_fixed_point():
    orbit = Affine(SYSTEMS["skewed-3"])
    snapshots = orbit.snapshots(6, spacing=1)
    for horizon in (1e4, 1e12, 1e300):
        guess = dmd(gram_of(snapshots), horizon, tolerance=1e-14) @ snapshots
        assert relative(guess - orbit.fixed_point, orbit.fixed_point) < 1e-8


def test_dmd_drops_rounding_whatever_the_tolerance():
    # More snapshots than modes: the surplus directions hold nothing but rounding.
    orbit = Affine(SYSTEMS["symmetric-3"])
    snapshots = orbit.snapshots(10, spacing=1)
    truth = orbit.after(snapshots[-1], 75)
    for tolerance in (0.0, 1e-30):
        coefficients = dmd(gram_of(snapshots), 75.0, tolerance=tolerance)
        assert np.abs(coefficients).max() < 1e3
        assert relative(coefficients @ snapshots - truth, truth) < 1e-6


def test_dmd_lets_no_mode_grow():
    line = np.cumsum(1.3 ** np.arange(6.0))[:, None] * np.array([[3.0, -4.0]])
    guess = dmd(gram_of(line), 40.0, tolerance=1e-12) @ line
    # Put on the unit circle, a growing real mode keeps its last velocity.
    assert guess == pytest.approx(line[-1] + 40.0 * (line[-1] - line[-2]), rel=1e-6)

    spiral = np.array([np.linalg.matrix_power(rotation(1.2, 0.5), k)[0] for k in range(6)])
    longest = np.linalg.norm(spiral[-1] - spiral[-2])
    for horizon in (10.0, 1e3, 1e6):
        guess = dmd(gram_of(spiral), horizon, tolerance=1e-12) @ spiral
        # A rotating velocity of constant length L turns on a circle of diameter L / sin(angle / 2).
        assert np.linalg.norm(guess - spiral[-1]) < 1.01 * longest / np.sin(0.25)


def test_dmd_resolves_eigenvalues_close_to_one():
    # 1 - ratio is far below the square root of eps, and the horizon short: the geometric sum is
    # horizon to first order, and its digits must not be lost in 1 - ratio ** horizon.
    for ratio in (1.0 - 1e-9, 1.0, 1.0 - 1e-12):
        line = np.cumsum(ratio ** np.arange(4.0))[:, None]
        guess = dmd(gram_of(line), 8.0, tolerance=1e-12) @ line
        assert guess == pytest.approx(line[-1] + 8.0, rel=1e-7)


# ---------------------------------------------------------------------------------------------
# average, linear, nesterov: closed forms
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 2, 4, 10])
def test_average_removes_noise_at_the_rate_one_over_m(m):
    rng = np.random.default_rng(m)
    size, sigma = 20_000, 0.3
    target = rng.standard_normal(size)
    snapshots = target + sigma * rng.standard_normal((m, size))
    variance = np.mean((average(gram_of(snapshots), 3.0) @ snapshots - target) ** 2)
    # The estimate itself scatters by sqrt(2 / size) = 1 %; allow five of those.
    assert variance == pytest.approx(sigma**2 / m, rel=5.0 * np.sqrt(2.0 / size))


@pytest.mark.parametrize("m", [2, 3, 6, 10])
@pytest.mark.parametrize("horizon", [0.0, 0.4, 1.0, 7.5, 200.0])
def test_constant_velocity_is_continued_exactly(m, horizon):
    rng = np.random.default_rng(m)
    start, velocity = rng.standard_normal((2, 7))
    snapshots = start + np.arange(m)[:, None] * velocity
    truth = start + (m - 1 + horizon) * velocity
    gram = gram_of(snapshots)
    guesses = [linear(gram, horizon), dmd(gram, horizon, tolerance=1e-12)]
    guesses += [nesterov(gram, horizon, momentum=momentum) for momentum in (0.0, 0.5, 0.99)]
    for coefficients in guesses:
        assert coefficients @ snapshots == pytest.approx(truth, rel=1e-10, abs=1e-10)


def test_nesterov_follows_the_recent_part_of_an_unsteady_velocity():
    snapshots = np.array([[0.0], [5.0], [6.0]])  # moved by 5, then by 1
    gram = gram_of(snapshots)
    assert nesterov(gram, 2.0, momentum=0.0) @ snapshots == pytest.approx([8.0])
    assert nesterov(gram, 3.0, momentum=0.5) @ snapshots == pytest.approx([13.0])  # (2.5 + 1) / 1.5
    assert linear(gram, 2.0) @ snapshots == pytest.approx([12.0])


@every_extrapolator
@pytest.mark.parametrize("horizon", [0.0, 3.0])
def test_one_snapshot_is_its_own_prediction(name, horizon):
    for gram in ([[0.0]], [[4.0]]):
        assert EXTRAPOLATORS[name](gram, horizon).tolist() == [1.0]


@pytest.mark.parametrize("name", ["linear", "nesterov", "dmd"])
def test_horizon_zero_stays_at_the_last_snapshot(name):
    snapshots = np.random.default_rng(0).standard_normal((5, 9))
    coefficients = EXTRAPOLATORS[name](gram_of(snapshots), 0.0)
    assert coefficients.tolist() == [0.0, 0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("name", ["average", "anderson"])
def test_targets_do_not_depend_on_the_horizon(name):
    gram = gram_of(np.random.default_rng(0).standard_normal((5, 9)))
    near, far = (EXTRAPOLATORS[name](gram, horizon) for horizon in (0.0, 500.0))
    assert near.tolist() == far.tolist()


# ---------------------------------------------------------------------------------------------
# The same answer as the oracles, which see the snapshots themselves
# ---------------------------------------------------------------------------------------------

CASES = [
    ("average", {}, [0.0, 3.0]),
    ("linear", {}, [0.0, 1.0, 7.5]),
    ("nesterov", {"momentum": 0.0}, [1.0, 7.5]),
    ("nesterov", {"momentum": 0.5}, [0.0, 7.5]),
    ("nesterov", {"momentum": 0.9}, [7.5]),
    ("anderson", {"regularization": 1.0}, [1.0]),
    ("anderson", {"regularization": 1e-4}, [1.0]),
    ("anderson", {"regularization": 1e-8}, [1.0]),
    ("dmd", {"tolerance": 1e-10}, [0.0, 1.0, 7.0, 40.0]),
    ("dmd", {"tolerance": 1e-1}, [1.0, 7.0]),
]


@pytest.mark.parametrize("m", range(1, 11))
@pytest.mark.parametrize("size", [1, 3, 40])
@pytest.mark.parametrize(
    ("name", "options", "horizons"), CASES, ids=[f"{case[0]}-{case[1]}" for case in CASES]
)
def test_equals_the_oracle(name, options, horizons, m, size):
    rng = np.random.default_rng([m, size])
    for walk in (False, True):
        snapshots = rng.standard_normal((m, size))
        if walk:
            snapshots = np.cumsum(snapshots, axis=0)
        for horizon in horizons:
            expected = getattr(naive, name)(snapshots, horizon, **options)
            coefficients = EXTRAPOLATORS[name](gram_of(snapshots), horizon, **options)
            assert coefficients.shape == (m,)
            assert coefficients.dtype == np.float64
            error = np.abs(coefficients @ snapshots - expected).max()
            assert error < 1e-6 * np.abs(snapshots).max(), (walk, horizon)


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
    gram = gram_of(snapshots, origin=None if far is None else far * rng.standard_normal(12))
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
        gram = gram_of(snapshots, origin=distance * rng.standard_normal(12))
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
    gram = gram_of(np.random.default_rng(seed).standard_normal((m, 2 * m)))
    assert_same(TAME[name](gram * 10.0 ** (2.0 * exponent), horizon), TAME[name](gram, horizon))


@every_extrapolator
@steady
@given(seed=seeds, m=counts, horizon=st.floats(0.0, 50.0))
def test_rotating_parameter_space_changes_nothing(name, seed, m, horizon):
    rng = np.random.default_rng(seed)
    snapshots = rng.standard_normal((m, 2 * m))
    basis = np.linalg.qr(rng.standard_normal((2 * m, 2 * m)))[0]
    turned = TAME[name](gram_of(snapshots @ basis), horizon)
    assert_same(turned, TAME[name](gram_of(snapshots), horizon))


@every_extrapolator
@steady
@given(seed=seeds, m=counts, horizon=st.floats(0.0, 50.0), distance=st.floats(0.0, 100.0))
def test_the_origin_of_the_gram_matrix_does_not_matter(name, seed, m, horizon, distance):
    rng = np.random.default_rng(seed)
    snapshots = rng.standard_normal((m, 2 * m))
    expected = TAME[name](gram_of(snapshots), horizon)
    for origin in (0.0, snapshots[0], snapshots.mean(0), distance * rng.standard_normal(2 * m)):
        # Another origin costs the digits that differences of long vectors lose, no more.
        assert_same(TAME[name](gram_of(snapshots, origin=origin), horizon), expected, digits=1e-6)


@every_extrapolator
@pytest.mark.parametrize("m", [2, 3, 5, 10])
def test_an_asymmetric_gram_counts_as_its_symmetric_part(name, m):
    # Which triangle holds the rounding of a float32 product must not matter.
    rng = np.random.default_rng(m)
    gram = gram_of(rng.standard_normal((m, 2 * m)))
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
    gram = gram_of(np.arange(12.0).reshape(4, 3) ** 2)
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
