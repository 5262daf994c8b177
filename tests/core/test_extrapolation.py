"""Extrapolators where everything is known, and against oracles."""

import naive
import numpy as np
import pytest
import scipy.linalg
from hypothesis import settings

from hybridcore.extrapolation import EXTRAPOLATORS, anderson, average, dmd, linear, nesterov

# Values passed where accuracy is measured, so that the package's defaults can change freely.
SHARP = 1e-15
NAMES = sorted(EXTRAPOLATORS)

every_extrapolator = pytest.mark.parametrize("name", NAMES)
# Example databases and time limits make a run depend on the machine.
steady = settings(deadline=None, derandomize=True, database=None, max_examples=150)


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
    guess = anderson(naive.gram_of(snapshots), 75.0, regularization=SHARP) @ snapshots
    assert relative(guess - orbit.fixed_point, orbit.fixed_point) < 1e-8


@pytest.mark.parametrize("system", SLOW_SYSTEMS)
def test_anderson_hits_the_fixed_point_of_slow_modes_with_enough_snapshots(system):
    # As far apart as by default. One step apart, these displacements are parallel to more digits
    # than their Gram matrix holds.
    orbit = Affine(SLOW_SYSTEMS[system])
    snapshots = orbit.snapshots(len(orbit.matrix) + 16, spacing=10)
    guess = anderson(naive.gram_of(snapshots), 7.5, regularization=SHARP) @ snapshots
    assert relative(guess - orbit.fixed_point, orbit.fixed_point) < 1e-8
    # The last snapshot must not pass for it because the orbit has settled.
    assert relative(snapshots[-1] - orbit.fixed_point, orbit.fixed_point) > 1e-4


def test_anderson_keeps_the_fixed_point_when_regularization_is_below_rounding():
    # The fixed point lies along the null direction of the displacement Gram: a solver that
    # truncates small eigenvalues throws away exactly that direction.
    orbit = Affine(SYSTEMS["symmetric-3"])
    snapshots = orbit.snapshots(5, spacing=1)
    for regularization in (1e-16, 1e-30, 5e-324):
        guess = anderson(naive.gram_of(snapshots), 0.0, regularization=regularization) @ snapshots
        assert relative(guess - orbit.fixed_point, orbit.fixed_point) < 1e-8


def test_anderson_regularization_leads_from_the_mean_to_the_fixed_point():
    orbit = Affine(SYSTEMS["skewed-3"])
    snapshots = orbit.snapshots(5, spacing=1)
    gram = naive.gram_of(snapshots)
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
    # Slow modes one step apart are nearly parallel, so that it takes more snapshots to tell them
    # apart than there are modes.
    spare = 10 if spacing == 1 and system in SLOW_SYSTEMS else 3
    snapshots = orbit.snapshots(len(orbit.matrix) + spare, spacing)
    last = snapshots[-1]
    truth = orbit.after(last, 75)
    guess = dmd(naive.gram_of(snapshots), horizon, tolerance=1e-14) @ snapshots
    assert relative(guess - truth, truth) < 1e-6
    # A method that stands still must not pass because the orbit has nearly settled.
    assert relative(guess - truth, truth - last) < 1e-5


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
    guess = dmd(naive.gram_of(snapshots), horizon, tolerance=1e-14) @ snapshots
    assert relative(guess - truth, truth - last) < 1e-6


def test_dmd_of_a_long_horizon_arrives_at_the_fixed_point():
    orbit = Affine(SYSTEMS["skewed-3"])
    snapshots = orbit.snapshots(6, spacing=1)
    for horizon in (1e4, 1e12, 1e300):
        guess = dmd(naive.gram_of(snapshots), horizon, tolerance=1e-14) @ snapshots
        assert relative(guess - orbit.fixed_point, orbit.fixed_point) < 1e-8


def test_dmd_drops_rounding_whatever_the_tolerance():
    # More snapshots than modes: the surplus directions hold nothing but rounding.
    orbit = Affine(SYSTEMS["symmetric-3"])
    snapshots = orbit.snapshots(10, spacing=1)
    truth = orbit.after(snapshots[-1], 75)
    for tolerance in (0.0, 1e-30):
        coefficients = dmd(naive.gram_of(snapshots), 75.0, tolerance=tolerance)
        assert np.abs(coefficients).max() < 1e3
        assert relative(coefficients @ snapshots - truth, truth) < 1e-6


def test_dmd_lets_no_mode_grow():
    line = np.cumsum(1.3 ** np.arange(6.0))[:, None] * np.array([[3.0, -4.0]])
    guess = dmd(naive.gram_of(line), 40.0, tolerance=1e-12) @ line
    # Put on the unit circle, a growing real mode keeps its last velocity.
    assert guess == pytest.approx(line[-1] + 40.0 * (line[-1] - line[-2]), rel=1e-6)

    spiral = np.array([np.linalg.matrix_power(rotation(1.2, 0.5), k)[0] for k in range(6)])
    longest = np.linalg.norm(spiral[-1] - spiral[-2])
    for horizon in (10.0, 1e3, 1e6):
        guess = dmd(naive.gram_of(spiral), horizon, tolerance=1e-12) @ spiral
        # A rotating velocity of constant length L turns on a circle of diameter L / sin(angle / 2).
        assert np.linalg.norm(guess - spiral[-1]) < 1.01 * longest / np.sin(0.25)


def test_dmd_resolves_eigenvalues_close_to_one():
    # 1 - ratio is far below the square root of eps, and the horizon short: the geometric sum is
    # horizon to first order, and its digits must not be lost in 1 - ratio ** horizon.
    for ratio in (1.0 - 1e-9, 1.0, 1.0 - 1e-12):
        line = np.cumsum(ratio ** np.arange(4.0))[:, None]
        guess = dmd(naive.gram_of(line), 8.0, tolerance=1e-12) @ line
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
    variance = np.mean((average(naive.gram_of(snapshots), 3.0) @ snapshots - target) ** 2)
    # The estimate itself scatters by sqrt(2 / size) = 1 %; allow five of those.
    assert variance == pytest.approx(sigma**2 / m, rel=5.0 * np.sqrt(2.0 / size))


@pytest.mark.parametrize("m", [2, 3, 6, 10])
@pytest.mark.parametrize("horizon", [0.0, 0.4, 1.0, 7.5, 200.0])
def test_constant_velocity_is_continued_exactly(m, horizon):
    rng = np.random.default_rng(m)
    start, velocity = rng.standard_normal((2, 7))
    snapshots = start + np.arange(m)[:, None] * velocity
    truth = start + (m - 1 + horizon) * velocity
    gram = naive.gram_of(snapshots)
    guesses = [linear(gram, horizon), dmd(gram, horizon, tolerance=1e-12)]
    guesses += [nesterov(gram, horizon, momentum=momentum) for momentum in (0.0, 0.5, 0.99)]
    for coefficients in guesses:
        assert coefficients @ snapshots == pytest.approx(truth, rel=1e-10, abs=1e-10)


def test_nesterov_follows_the_recent_part_of_an_unsteady_velocity():
    snapshots = np.array([[0.0], [5.0], [6.0]])  # moved by 5, then by 1
    gram = naive.gram_of(snapshots)
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
    coefficients = EXTRAPOLATORS[name](naive.gram_of(snapshots), 0.0)
    assert coefficients.tolist() == [0.0, 0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("name", ["average", "anderson"])
def test_targets_do_not_depend_on_the_horizon(name):
    gram = naive.gram_of(np.random.default_rng(0).standard_normal((5, 9)))
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
            coefficients = EXTRAPOLATORS[name](naive.gram_of(snapshots), horizon, **options)
            assert coefficients.shape == (m,)
            assert coefficients.dtype == np.float64
            error = np.abs(coefficients @ snapshots - expected).max()
            assert error < 1e-6 * np.abs(snapshots).max(), (walk, horizon)
