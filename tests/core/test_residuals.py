"""Residuals of layer groups and the store of past ones."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from hybridcore.residuals import LEAST_VARIATION, LowRank, ResidualStore, group_scales

steady = settings(deadline=None, derandomize=True, database=None, max_examples=60)
seeds = st.integers(0, 2**32 - 1)
BAD = [np.nan, np.inf, -np.inf]
HOSTILE = [*BAD, 0.0, -0.0, 1e300, -1e300, 1.7e308, 5e-324, 1.0]


def displacements(rng, groups, m):
    """Coefficient rows that sum to 0."""
    rows = rng.standard_normal((groups, m))
    return rows - rows.mean(axis=1, keepdims=True)


# ---------------------------------------------------------------------------------------------
# group_scales
# ---------------------------------------------------------------------------------------------


@steady
@given(seed=seeds, m=st.integers(2, 10), exponent=st.floats(-100.0, 100.0), far=st.booleans())
def test_scales_equal_those_of_parameter_space(seed, m, exponent, far):
    rng = np.random.default_rng(seed)
    size, groups = 40, 3
    theta = rng.standard_normal((groups, m, size)) * 10.0**exponent
    predicted, actual = displacements(rng, groups, m), displacements(rng, groups, m)
    origin = theta[:, :1] * 30.0 if far else theta[:, -1:]
    gram = np.einsum("gis,gjs->gij", theta - origin, theta - origin)
    found = group_scales(gram, predicted, actual)
    assert found.shape == (groups, 2)
    for g in range(groups):
        p, a = predicted[g] @ theta[g], actual[g] @ theta[g]
        # The factor of a least-squares problem in the explicit space.
        factor = np.linalg.lstsq(p[:, None] / 10.0**exponent, a / 10.0**exponent, rcond=None)[0][0]
        cosine = (p / np.linalg.norm(p)) @ (a / np.linalg.norm(a))
        assert found[g] == pytest.approx([factor, cosine], rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("factor", [-2.0, 0.0, 0.3, 1.0, 7.0])
def test_a_known_factor_is_found(factor):
    rng = np.random.default_rng(1)
    theta = rng.standard_normal((1, 5, 30))
    predicted = displacements(rng, 1, 5)
    found = group_scales(theta @ theta.swapaxes(1, 2), predicted, factor * predicted)
    assert found[0] == pytest.approx([factor, np.sign(factor)], abs=1e-12)


def test_the_newest_coefficient_is_what_makes_a_row_sum_to_zero():
    rng = np.random.default_rng(2)
    gram = np.array([np.cov(rng.standard_normal((4, 9))) for _ in range(2)])
    predicted, actual = displacements(rng, 2, 4), displacements(rng, 2, 4)
    expected = group_scales(gram, predicted, actual)
    predicted[:, -1], actual[:, -1] = 17.0, np.nan
    assert np.array_equal(group_scales(gram, predicted, actual), expected)


def test_an_asymmetric_gram_counts_as_its_symmetric_part():
    rng = np.random.default_rng(3)
    gram = rng.standard_normal((2, 4, 4)) + 6.0 * np.eye(4)
    predicted, actual = displacements(rng, 2, 4), displacements(rng, 2, 4)
    symmetric = (gram + gram.swapaxes(1, 2)) / 2.0
    expected = group_scales(symmetric, predicted, actual)
    assert group_scales(gram, predicted, actual) == pytest.approx(expected, rel=1e-12)


def test_what_is_not_known_asks_for_no_correction():
    eye, step = np.eye(3)[None], np.array([[-1.0, 0.0, 1.0]])
    still = np.zeros((1, 3))
    nothing = [[1.0, 0.0]]
    assert group_scales(eye, still, step).tolist() == nothing
    assert group_scales(eye, step, still).tolist() == [[0.0, 0.0]]
    assert group_scales(np.zeros((1, 3, 3)), step, step).tolist() == nothing
    # Snapshots that are equal, far from the origin: their differences are rounding.
    assert group_scales(np.full((1, 3, 3), 0.1), step, step).tolist() == nothing
    rounding = 0.1 + 1e-17 * np.diag([1.0, 2.0, 3.0])[None]
    assert group_scales(rounding, step, step).tolist() == nothing
    assert group_scales(np.ones((1, 1, 1)), [[0.0]], [[0.0]]).tolist() == nothing
    for bad in BAD:
        two = np.stack([np.eye(3), np.eye(3)])
        two[0, 1, 1] = bad
        rows = np.tile(step, (2, 1))
        found = group_scales(two, rows, rows)
        assert found.tolist() == [[1.0, 0.0], [pytest.approx(1.0), pytest.approx(1.0)]]


@steady
@given(seed=seeds, m=st.integers(1, 6))
def test_hostile_numbers_give_finite_scales(seed, m):
    rng = np.random.default_rng(seed)
    gram = rng.choice(HOSTILE, (4, m, m))
    predicted, actual = rng.choice(HOSTILE, (2, 4, m))
    found = group_scales(gram, predicted, actual)
    assert np.isfinite(found).all()
    assert (np.abs(found[:, 1]) <= 1.0).all()
    # The same without what is not finite, so that the numbers themselves are reached.
    tame = [np.where(np.isfinite(x), x, 1e300) for x in (gram, predicted, actual)]
    assert np.isfinite(group_scales(*tame)).all()


@pytest.mark.parametrize("shape", [(3, 3), (2, 3, 4), (2, 0, 0), ()])
def test_a_bad_gram_is_named(shape):
    with pytest.raises(ValueError, match=r"^gram must have shape"):
        group_scales(np.zeros(shape), np.zeros((2, 3)), np.zeros((2, 3)))


def test_bad_coefficients_are_named():
    good = np.zeros((2, 3))
    for bad in (np.zeros((3, 2)), np.zeros(3), np.zeros((2, 3, 1))):
        with pytest.raises(ValueError, match=r"^predicted must have shape \(2, 3\)"):
            group_scales(np.zeros((2, 3, 3)), bad, good)
        with pytest.raises(ValueError, match=r"^actual must have shape \(2, 3\)"):
            group_scales(np.zeros((2, 3, 3)), good, bad)


# ---------------------------------------------------------------------------------------------
# ResidualStore
# ---------------------------------------------------------------------------------------------


def filled(rng, count, capacity, d=5, scale=1.0):
    store = ResidualStore(capacity)
    contexts = rng.standard_normal((count, d)) * scale
    residuals = rng.standard_normal((count, 3, 2))
    for context, residual in zip(contexts, residuals, strict=True):
        assert store.add(context, residual)
    return store, contexts, residuals


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 20])
def test_the_newest_are_kept(count):
    store, contexts, residuals = filled(np.random.default_rng(count), count, 8)
    assert len(store) == min(count, 8)
    kept = list(range(max(0, count - 8), count))
    for number in kept:
        assert np.array_equal(store.contexts[number % 8], contexts[number])
        assert np.array_equal(store.residuals[number % 8], residuals[number])
    assert store.contexts.shape == (len(kept), 5)


@steady
@given(seed=seeds, count=st.integers(2, 40), k=st.integers(1, 50), d=st.integers(1, 64))
def test_nearest_equals_scipy(seed, count, k, d):
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.uniform(-9.0, 9.0, d)
    store, _, _ = filled(rng, count, 16, d, scale)
    query = rng.standard_normal(d) * scale
    kept = store.contexts
    spread = np.maximum(kept.std(axis=0), LEAST_VARIATION * np.abs(kept).max(axis=0))
    expected = cdist(query[None], kept, "seuclidean", V=spread**2)[0]
    indices, distances, residuals = store.nearest(query, k)
    assert len(indices) == min(k, len(store))
    assert distances == pytest.approx(np.sort(expected)[:k], rel=1e-9)
    assert distances == pytest.approx(expected[indices], rel=1e-9)
    assert np.array_equal(residuals, store.residuals[indices])


def test_a_feature_that_never_changes_does_not_disturb_the_order():
    rng = np.random.default_rng(4)
    store, plain = ResidualStore(), ResidualStore()
    for x in rng.standard_normal((30, 4)):
        plain.add(x, [0.0])
        store.add([*x, 7.0, 0.0], [0.0])
    query = rng.standard_normal(4)
    expected = plain.nearest(query, 30)
    same = store.nearest([*query, 7.0, 0.0], 30)
    assert np.array_equal(same[0], expected[0])
    assert same[1] == pytest.approx(expected[1], rel=1e-12)
    # Where it changes for the first time, everything is far, and in the same order.
    moved = store.nearest([*query, 8.0, 0.0], 30)
    assert np.array_equal(moved[0], expected[0])
    assert moved[1].min() > 10.0 * expected[1].max()


def test_rounding_of_a_constant_feature_is_no_difference():
    store = ResidualStore()
    for i, x in enumerate((0.0, 1.0, 2.0)):
        store.add([x, 1.0 + 1e-15 * i], [x])
    assert store.nearest([1.1, 1.0 + 9e-15], 1)[2].tolist() == [[1.0]]


def test_equal_distances_come_by_slot():
    store = ResidualStore()
    for sign in (1.0, -1.0, 1.0, -1.0):
        store.add([sign], [sign])
    assert store.nearest([0.0], 3)[0].tolist() == [0, 1, 2]
    assert store.nearest([1.0], 4)[0].tolist() == [0, 2, 1, 3]
    for i in range(60):
        store.add([(-1.0) ** i], [0.0])
    assert store.nearest([1.0], 40)[0].tolist() == [*range(0, 64, 2), *range(1, 17, 2)]


def test_an_empty_store_has_nothing_near():
    store = ResidualStore()
    for result in (
        store.nearest([1.0, 2.0], 3),
        filled(np.random.default_rng(0), 3, 8)[0].nearest([np.nan] * 5, 2),
    ):
        assert [len(part) for part in result] == [0, 0, 0]
    assert len(store) == 0


def test_what_is_not_finite_is_not_kept():
    store = ResidualStore()
    for bad in BAD:
        assert not store.add([1.0, bad], [1.0])
        assert not store.add([1.0, 1.0], [bad])
    assert len(store) == 0
    # Nor does it fix the shapes.
    assert store.add([1.0, 2.0, 3.0], [1.0])


@steady
@given(seed=seeds, k=st.integers(1, 5))
def test_hostile_numbers_give_finite_distances(seed, k):
    rng = np.random.default_rng(seed)
    store = ResidualStore(4)
    for _ in range(6):
        store.add(rng.choice(HOSTILE[3:], 3), rng.choice(HOSTILE[3:], 2))
    indices, distances, residuals = store.nearest(rng.choice(HOSTILE[3:], 3), k)
    assert len(indices) == min(k, 4)
    assert np.isfinite(distances).all()
    assert (np.diff(distances) >= 0.0).all()
    assert np.isfinite(residuals).all()


@pytest.mark.parametrize("count", [0, 1, 5, 8, 9, 21])
def test_the_state_of_a_store_goes_round(count):
    rng = np.random.default_rng(count)
    store, _, _ = filled(rng, count, 8)
    twin = ResidualStore(8)
    twin.add([1.0], [2.0])
    twin.load_state_dict(store.state_dict())
    for _ in range(12):
        query, context, residual = rng.standard_normal(5), rng.standard_normal(5), [[0.0, 1.0]] * 3
        for one, other in zip(store.nearest(query, 4), twin.nearest(query, 4), strict=True):
            assert np.array_equal(one, other)
        assert store.add(context, residual) is twin.add(context, residual) is True


def test_the_state_of_a_store_is_a_copy():
    store, contexts, _ = filled(np.random.default_rng(0), 5, 8)
    state = store.state_dict()
    state["contexts"][:] = 9.0
    twin = ResidualStore(8)
    twin.load_state_dict(state)
    state["contexts"][:] = 8.0
    assert np.array_equal(store.contexts, contexts)
    assert (twin.contexts == 9.0).all()
    with pytest.raises(ValueError, match="read-only"):
        store.contexts[0] = 1.0


def test_the_state_of_another_capacity_is_refused():
    store, _, _ = filled(np.random.default_rng(0), 9, 8)
    other, contexts, _ = filled(np.random.default_rng(1), 3, 16)
    with pytest.raises(ValueError, match="capacity 16"):
        other.load_state_dict(store.state_dict())
    assert np.array_equal(other.contexts, contexts)


def test_bad_arguments_of_a_store_are_named():
    for bad in (0, -1, 1.5, True, "8"):
        with pytest.raises(ValueError, match=r"^capacity must be a positive integer"):
            ResidualStore(bad)
    store = ResidualStore()
    with pytest.raises(ValueError, match=r"^context must be a vector"):
        store.add([[1.0]], [1.0])
    store.add([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match=r"^context must have shape \(2,\)"):
        store.add([1.0], [1.0])
    with pytest.raises(ValueError, match=r"^residual must have shape \(1,\)"):
        store.add([1.0, 2.0], [1.0, 2.0])
    with pytest.raises(ValueError, match=r"^context must have shape \(2,\)"):
        store.nearest([1.0, 2.0, 3.0], 1)
    with pytest.raises(ValueError, match=r"^k must be a positive integer"):
        store.nearest([1.0, 2.0], 0)
    assert len(store) == 1


def test_inputs_are_not_changed():
    rng = np.random.default_rng(0)
    gram, rows = np.stack([np.eye(4)] * 2), displacements(rng, 2, 4)
    context, matrix = rng.standard_normal(3), rng.standard_normal((5, 4))
    for array in (gram, rows, context, matrix):
        array.setflags(write=False)
    group_scales(gram, rows, rows)
    store = ResidualStore(2)
    for _ in range(3):
        store.add(context, rows)
        store.nearest(context, 1)
        LowRank(1).compress(matrix)
