"""Low-rank compression of residuals against PowerSGD written out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcore.residuals import LowRank

steady = settings(deadline=None, derandomize=True, database=None, max_examples=60)
seeds = st.integers(0, 2**32 - 1)
BAD = [np.nan, np.inf, -np.inf]
HOSTILE = [*BAD, 0.0, -0.0, 1e300, -1e300, 1.7e308, 5e-324, 1.0]


# ---------------------------------------------------------------------------------------------
# LowRank
# ---------------------------------------------------------------------------------------------


def naive_powersgd(matrix, error, start):
    """Algorithm 1 of Vogels et al. 2019, one worker: Gram-Schmidt written out."""
    owed = matrix + error
    left = owed @ start
    for j in range(left.shape[1]):
        for i in range(j):
            left[:, j] -= (left[:, i] @ left[:, j]) * left[:, i]
        left[:, j] /= np.linalg.norm(left[:, j])
    right = owed.T @ left
    return left, right, owed - left @ right.T


def best(matrix, rank):
    left, sizes, right = np.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * sizes[:rank]) @ right[:rank]


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_equals_powersgd(rank):
    rng = np.random.default_rng(rank)
    low = LowRank(rank)
    low.compress(rng.standard_normal((12, 7)))
    # The column space is what the algorithm carries over: any basis of it will do.
    error, start = low.error, low.state_dict()["start"]
    for _ in range(30):
        matrix = rng.standard_normal((12, 7))
        found = low.decompress(*low.compress(matrix))
        left, start, error = naive_powersgd(matrix, error, start)
        assert found == pytest.approx(left @ start.T, abs=1e-8)
        assert low.error == pytest.approx(error, abs=1e-8)


@steady
@given(seed=seeds, rank=st.integers(1, 4), n=st.integers(1, 20), m=st.integers(1, 20))
def test_a_matrix_of_low_rank_is_exact(seed, rank, n, m):
    rng = np.random.default_rng(seed)
    low = LowRank(rank)
    for _ in range(6):
        # Now and then less than the rank, down to nothing, in directions that change each time.
        true = rng.integers(0, rank + 1)
        matrix = rng.standard_normal((n, true)) @ rng.standard_normal((true, m))
        left, right = low.compress(matrix)
        assert left.shape == (n, min(rank, n, m))
        assert right.shape == (m, min(rank, n, m))
        assert left.T @ left == pytest.approx(np.eye(left.shape[1]), abs=1e-12)
        assert low.decompress(left, right) == pytest.approx(matrix, abs=1e-9)


def test_what_comes_after_nothing_is_not_overlooked():
    # Alone in the last column: directions that follow the axes would all be at right angles to it.
    low, matrix = LowRank(2), np.zeros((6, 8))
    low.compress(matrix)
    matrix[:, -1] = 1.0 + np.arange(6.0)
    assert low.decompress(*low.compress(matrix)) == pytest.approx(matrix, abs=1e-12)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_warm_start_converges_to_the_best_approximation(rank):
    rng = np.random.default_rng(rank)
    left, _, right = np.linalg.svd(rng.standard_normal((20, 9)), full_matrices=False)
    matrix = (left * 0.5 ** np.arange(9)) @ right
    low = LowRank(rank)
    distance = []
    for _ in range(40):
        # What is owed is then the matrix itself: power iteration without feedback.
        found = low.decompress(*low.compress(matrix - low.error if low.error.size else matrix))
        distance.append(np.linalg.norm(found - best(matrix, rank)))
    assert distance[0] > 1e-3 * np.linalg.norm(matrix)
    assert distance[-1] < 1e-10
    assert distance[5] < 0.1 * distance[0]


@pytest.mark.parametrize("constant", [True, False])
def test_error_feedback_makes_the_sums_agree(constant):
    rng = np.random.default_rng(9)
    matrix = rng.standard_normal((16, 8))
    low, given_sum, found_sum, peak = LowRank(1), 0.0, 0.0, 0.0
    for _ in range(400):
        if not constant:
            matrix = rng.standard_normal((16, 8))
        given_sum = given_sum + matrix
        found_sum = found_sum + low.decompress(*low.compress(matrix))
        assert given_sum - found_sum == pytest.approx(low.error, abs=1e-8)
        peak = max(peak, np.linalg.norm(low.error))
    # The debt stays bounded. Rank 1 alone would have lost most of the sum of a constant stream.
    assert peak < 40.0 * np.linalg.norm(matrix)
    if constant:
        assert np.linalg.norm(given_sum - found_sum) < 0.1 * np.linalg.norm(given_sum)
        alone = np.linalg.norm(matrix - best(matrix, 1)) / np.linalg.norm(matrix)
        assert alone > 0.5


@steady
@given(seed=seeds)
def test_hostile_matrices_leave_everything_finite(seed):
    rng = np.random.default_rng(seed)
    low = LowRank(2)
    for _ in range(4):
        left, right = low.compress(rng.choice(HOSTILE, (5, 4)))
        assert np.isfinite(left).all()
        assert np.isfinite(right).all()
        assert np.isfinite(low.error).all()
    assert np.isfinite(low.compress(np.full((5, 4), np.nan))[1]).all()


def test_what_is_not_finite_counts_as_nothing():
    matrix = np.outer([1.0, 2.0, 3.0], [1.0, 0.0, 2.0])
    holed = matrix.copy()
    holed[0, 0] = np.nan
    matrix[0, 0] = 0.0
    for one, other in zip(LowRank(2).compress(holed), LowRank(2).compress(matrix), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("seen", [0, 1, 3])
def test_the_state_of_a_compression_goes_round(seen):
    rng = np.random.default_rng(seen)
    low, twin = LowRank(2), LowRank(2)
    for _ in range(seen):
        low.compress(np.outer(rng.standard_normal(6), rng.standard_normal(5)))
    state = low.state_dict()
    twin.load_state_dict(state)
    state["error"][:] = state["start"][:] = 9.0
    for _ in range(4):
        matrix = rng.standard_normal((6, 5))
        for one, other in zip(low.compress(matrix), twin.compress(matrix), strict=True):
            assert np.array_equal(one, other)
        assert np.array_equal(low.error, twin.error)


def test_bad_arguments_of_a_compression_are_named():
    for bad in (0, -2, 1.0, False):
        with pytest.raises(ValueError, match=r"^rank must be a positive integer"):
            LowRank(bad)
    low = LowRank(2)
    for shape in ((3,), (0, 3), (2, 2, 2)):
        with pytest.raises(ValueError, match=r"^matrix must have rows and columns"):
            low.compress(np.zeros(shape))
    low.compress(np.ones((3, 2)))
    with pytest.raises(ValueError, match=r"^matrix must have shape \(3, 2\)"):
        low.compress(np.ones((2, 3)))
