"""The corrector against a batch ridge regression, on known maps, on noise and on hostile input."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcore.corrector import LEAST_CASES, MOST_EXCESS, RIDGE, Corrector, RecursiveRidge
from hybridcore.residuals import group_scales

steady = settings(deadline=None, derandomize=True, database=None, max_examples=25)
seeds = st.integers(0, 2**32 - 1)
BAD = [np.nan, np.inf, -np.inf]
HOSTILE = [0.0, -0.0, 1e300, -1e300, 1.7e308, 5e-324, -1e-200, 1.0]


def with_cosine(scales):
    """Rows of group_scales from the scales alone."""
    scales = np.asarray(scales, dtype=float)
    return np.stack([scales, np.ones_like(scales)], axis=-1)


# ---------------------------------------------------------------------------------------------
# Recursive ridge regression
# ---------------------------------------------------------------------------------------------


def naive_ridge(contexts, targets, forgetting, query):
    """Weighted ridge regression on the explicit standardised design matrix."""
    n = len(contexts)
    weights = forgetting ** np.arange(n - 1.0, -1.0, -1.0)
    mean = weights @ contexts / weights.sum()
    spread = np.sqrt(weights @ (contexts - mean) ** 2 / weights.sum())
    live = spread > 1e-8 * np.abs(mean)
    design = np.ones((n, 1 + live.sum()))
    design[:, 1:] = ((contexts - mean) / np.where(live, spread, 1.0))[:, live]
    # Ridge as rows of its own, so that the condition number is not squared.
    root = np.sqrt(weights)[:, None]
    stacked = np.vstack([root * design, math.sqrt(RIDGE) * np.eye(design.shape[1])])
    goal = np.vstack([root * targets, np.zeros((design.shape[1], targets.shape[1]))])
    solution = np.linalg.lstsq(stacked, goal, rcond=None)[0]
    z = ((query - mean) / np.where(live, spread, 1.0))[live]
    return np.concatenate([[1.0], z]) @ solution


@steady
@given(
    seed=seeds,
    n=st.integers(1, 120),
    d=st.integers(1, 20),
    forgetting=st.sampled_from([1.0, 0.98, 0.9, 0.5]),
)
def test_the_recursion_equals_a_batch_solution(seed, n, d, forgetting):
    rng = np.random.default_rng(seed)
    scale, shift = 10.0 ** rng.uniform(-4, 4, d), rng.standard_normal(d) * 10.0
    contexts = (rng.standard_normal((n, d)) + shift) * scale
    targets = rng.uniform(-1.0, 1.0, (n, 3))
    ridge = RecursiveRidge(d, 3, forgetting)
    for context, target in zip(contexts, targets, strict=True):
        ridge.update(context, target)
    query = (rng.standard_normal(d) + shift) * scale
    expected = naive_ridge(contexts, targets, forgetting, query)
    assert ridge.predict(query) == pytest.approx(expected, rel=1e-8, abs=1e-8)


def test_features_that_repeat_others_or_never_vary_are_no_trouble():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((30, 2))
    contexts = np.column_stack([x, x[:, 0], np.full(30, 7.0), np.zeros(30)])
    targets = x[:, :1]
    ridge = RecursiveRidge(5, 1, 0.98)
    for context, target in zip(contexts, targets, strict=True):
        ridge.update(context, target)
    for query in (contexts[3], contexts[3] + [0.0, 0.0, 0.0, 5.0, 5.0]):
        expected = naive_ridge(contexts, targets, 0.98, contexts[3])
        assert ridge.predict(query) == pytest.approx(expected, abs=1e-8)


def test_rounding_of_a_constant_feature_is_no_information():
    rng = np.random.default_rng(1)
    with_constant, plain = RecursiveRidge(2, 1, 0.98), RecursiveRidge(1, 1, 0.98)
    for x in rng.standard_normal(20):
        with_constant.update(np.array([x, 1.0 + rng.integers(3) * 2.0**-50]), np.array([x]))
        plain.update(np.array([x]), np.array([x]))
    found = with_constant.predict(np.array([0.5, 1.0 + 1e-9]))
    assert found == pytest.approx(plain.predict(np.array([0.5])), rel=1e-12)


def test_without_a_case_nothing_is_forecast():
    assert RecursiveRidge(3, 2, 0.9).predict(np.ones(3)).tolist() == [0.0, 0.0]


# ---------------------------------------------------------------------------------------------
# What is learned, on contexts that were not seen
# ---------------------------------------------------------------------------------------------


def trial(seed, cases, d, strength, noise, groups=4):
    """Trained corrector, held-out contexts, their true scales, and the error against scale 1."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((d, groups))
    weights *= strength / np.linalg.norm(weights, axis=0)
    contexts = rng.standard_normal((cases + 100, d))
    scales = 1.0 + contexts @ weights + noise * rng.standard_normal((cases + 100, groups))
    scales = np.clip(scales, 0.0, 2.0)
    # Features of very different sizes, as a training state has them.
    contexts = contexts * 10.0 ** np.linspace(-3.0, 3.0, d) + np.linspace(-5.0, 5.0, d)
    corrector = Corrector(groups, d)
    for context, scale in zip(contexts[:cases], scales[:cases], strict=True):
        assert corrector.update(context, with_cosine(scale))
    held, truth = contexts[cases:], scales[cases:]
    found = np.array([corrector.predict(context) for context in held])
    ratio = np.mean((found - truth) ** 2) / np.mean((1.0 - truth) ** 2)
    return corrector, held, truth, ratio


# Largest mean squared error, relative to that of scale 1. Noise alone is 0.1 of it.
@pytest.mark.parametrize(
    ("cases", "d", "most"), [(30, 4, 0.35), (100, 4, 0.25), (60, 16, 0.4), (250, 64, 0.5)]
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_linear_map_is_learned(cases, d, most, seed):
    assert trial(seed, cases, d, strength=0.3, noise=0.1)[3] < most


@steady
@given(seed=seeds, cases=st.integers(25, 60), d=st.integers(1, 8), noise=st.floats(0.0, 0.2))
def test_a_linear_map_beats_no_correction(seed, cases, d, noise):
    assert trial(seed, cases, d, strength=0.3, noise=noise)[3] < 1.0


@steady
@given(seed=seeds, cases=st.integers(1, 120), d=st.integers(1, 40), noise=st.floats(0.01, 1.0))
def test_noise_is_left_alone(seed, cases, d, noise):
    assert trial(seed, cases, d, strength=0.0, noise=noise)[3] <= 1.10


@pytest.mark.parametrize("constant", [0.3, 1.6])
def test_a_constant_miss_is_corrected(constant):
    rng = np.random.default_rng(0)
    corrector = Corrector(2, 3)
    for _ in range(40):
        corrector.update(rng.standard_normal(3), with_cosine([constant, 1.0]))
    found = corrector.predict(rng.standard_normal(3))
    assert found == pytest.approx([constant, 1.0], abs=0.15)
    assert found[1] == 1.0


def test_a_local_miss_is_found_by_its_neighbours():
    # A parity: no linear map explains any of it.
    rng = np.random.default_rng(1)
    corrector = Corrector(1, 2)

    def case():
        x = rng.choice([-1.0, 1.0], 2) + 0.1 * rng.standard_normal(2)
        return x, 1.0 + 0.5 * np.sign(x[0] * x[1])

    for _ in range(120):
        x, scale = case()
        corrector.update(x, with_cosine([scale]))
    for _ in range(20):
        x, scale = case()
        assert corrector.predict(x)[0] == pytest.approx(scale, abs=0.2)


def test_confidence_grows_with_evidence_and_fades_when_it_stops():
    rng = np.random.default_rng(2)
    corrector = Corrector(1, 2)
    grown = []
    for _ in range(60):
        x = rng.standard_normal(2)
        corrector.update(x, with_cosine([1.0 + 0.4 * math.tanh(x[0])]))
        grown.append(corrector.confidence[0])
    assert grown[LEAST_CASES - 1] == 0.0
    assert grown[9] < grown[19] < grown[59]
    assert grown[59] > 0.8
    for _ in range(300):
        corrector.update(rng.standard_normal(2), with_cosine([rng.choice([0.5, 1.5])]))
    assert corrector.confidence[0] < 0.3


def test_a_context_unlike_any_other_is_not_corrected():
    corrector, held, _, _ = trial(3, 100, 4, strength=0.3, noise=0.05)
    centre, spread = held.mean(axis=0), held.std(axis=0)
    distances = [
        np.abs(corrector.predict(centre + away * spread) - 1.0).max() for away in (1, 10, 100, 1e3)
    ]
    assert distances[0] > 0.1
    assert distances[1] > distances[2] > distances[3]
    assert distances[3] < 1e-3


@pytest.mark.parametrize("cases", range(LEAST_CASES))
def test_few_cases_correct_nothing(cases):
    corrector = Corrector(3, 2)
    for i in range(cases):
        corrector.update([i, -i], with_cosine([0.2, 0.2, 0.2]))
    assert corrector.predict([1.0, -1.0]).tolist() == [1.0, 1.0, 1.0]
    assert corrector.confidence.tolist() == [0.0, 0.0, 0.0]


def test_groups_do_not_disturb_each_other():
    rng = np.random.default_rng(4)
    both, alone = Corrector(2, 3), Corrector(1, 3)
    for _ in range(40):
        x = rng.standard_normal(3)
        scale = 1.0 + 0.3 * math.tanh(x[1])
        both.update(x, with_cosine([scale, rng.uniform(0.0, 2.0)]))
        alone.update(x, with_cosine([scale]))
    for x in rng.standard_normal((5, 3)):
        assert both.predict(x)[0] == pytest.approx(alone.predict(x)[0], rel=1e-9)


def test_factors_beyond_the_bounds_count_as_the_bounds():
    rng = np.random.default_rng(6)
    wild, cut = Corrector(2, 3), Corrector(2, 3)
    for x in rng.standard_normal((30, 3)):
        far = 10.0 ** rng.uniform(1.0, 9.0)
        wild.update(x, with_cosine([far, -far]))
        cut.update(x, with_cosine([2.0, 0.0]))
    for x in rng.standard_normal((5, 3)):
        assert np.array_equal(wild.predict(x), cut.predict(x))


def test_what_group_scales_returns_is_taken():
    rng = np.random.default_rng(5)
    theta = rng.standard_normal((2, 4, 20))
    gram = theta @ theta.swapaxes(1, 2)
    predicted = np.tile([-1.0, 0.0, 0.0, 1.0], (2, 1))
    corrector = Corrector(2, 3)
    for x in rng.standard_normal((30, 3)):
        residual = group_scales(gram, predicted, 0.5 * predicted)
        assert corrector.update(x, residual)
    assert corrector.predict(x) == pytest.approx([0.5, 0.5], abs=0.1)


# ---------------------------------------------------------------------------------------------
# Micro-corrections
# ---------------------------------------------------------------------------------------------

log_losses = st.floats(-50.0, 50.0)
shares = st.floats(0.0, 1.0)


def test_the_rule_of_refinement():
    refine = Corrector(1, 1).refine
    assert refine(0.4, -1.0, -1.0) == refine(0.4, -1.0, -3.0) == 1.0
    # 0.4 of the way took half of the excess allowed: 0.4 more of the 0.6 left may be taken.
    assert refine(0.4, 0.0, MOST_EXCESS / 2.0) == pytest.approx(0.4 / 0.6)
    # Half of the way took half of it: all of the rest.
    assert refine(0.5, 0.0, MOST_EXCESS / 2.0) == pytest.approx(1.0)
    assert refine(0.9, 0.0, 0.99 * MOST_EXCESS) == pytest.approx(0.9 * (1 / 0.99 - 1) / 0.1)
    assert refine(0.5, 0.0, MOST_EXCESS) == refine(0.5, 0.0, 5.0) == 0.0
    # Before a fifth of the way the excess counts as if it had taken a fifth.
    assert refine(0.0, 0.0, MOST_EXCESS / 2.0) == pytest.approx(0.2)
    assert refine(1.0, 0.0, MOST_EXCESS / 2.0) == 1.0


@steady
@given(share=shares, expected=log_losses, excesses=st.lists(st.floats(-1.0, 1.0), min_size=2))
def test_refinement_never_rises_with_the_excess(share, expected, excesses):
    factors = [Corrector.refine(share, expected, expected + e) for e in sorted(excesses)]
    assert all(0.0 <= factor <= 1.0 for factor in factors)
    assert factors == sorted(factors, reverse=True)


@steady
@given(share=shares, expected=log_losses, excess=st.floats(1e-6, 1.0))
def test_after_refinement_the_projected_excess_is_allowed(share, expected, excess):
    factor = Corrector.refine(share, expected, expected + excess)
    # Growing in proportion to the way, no more than is allowed at the end, or no way at all.
    at_end = excess * (1.0 + factor * (1.0 - share) / max(share, 0.2))
    assert factor == 0.0 or at_end <= MOST_EXCESS * (1.0 + 1e-6)


@pytest.mark.parametrize("bad", BAD)
def test_refinement_stops_where_a_number_is_not_finite(bad):
    assert Corrector.refine(bad, 0.0, 0.0) == 0.0
    assert Corrector.refine(0.5, bad, 0.0) == 0.0
    assert Corrector.refine(0.5, 0.0, bad) == 0.0


@steady
@given(share=st.floats(), expected=st.floats(), seen=st.floats())
def test_refinement_of_hostile_numbers(share, expected, seen):
    assert 0.0 <= Corrector.refine(share, expected, seen) <= 1.0


# ---------------------------------------------------------------------------------------------
# Hostile numbers, state, arguments
# ---------------------------------------------------------------------------------------------


@steady
@given(seed=seeds, cases=st.integers(0, 30), d=st.integers(1, 5))
def test_hostile_numbers_leave_scales_in_range(seed, cases, d):
    rng = np.random.default_rng(seed)
    corrector = Corrector(2, d)
    for i in range(cases):
        context = rng.standard_normal(d) if i % 3 else rng.choice(HOSTILE, d)
        corrector.update(context, rng.choice(HOSTILE, (2, 2)))
        for query in (context, rng.choice(HOSTILE, d), rng.choice([*BAD, 1.0], d)):
            scales = corrector.predict(query)
            assert ((scales >= 0.0) & (scales <= 2.0)).all()
        assert ((corrector.confidence >= 0.0) & (corrector.confidence <= 1.0)).all()


@pytest.mark.parametrize("bad", BAD)
def test_what_is_not_finite_teaches_nothing(bad):
    corrector, held, _, _ = trial(0, 30, 4, strength=0.3, noise=0.1)
    before = [corrector.predict(x) for x in held]
    good = np.ones((4, 2))
    assert not corrector.update([1.0, bad, 1.0, 1.0], good)
    good[2, 1] = bad
    assert not corrector.update(held[0], good)
    assert np.array_equal([corrector.predict(x) for x in held], before)
    assert corrector.predict([1.0, bad, 1.0, 1.0]).tolist() == [1.0] * 4


def flat(state):
    for value in state.values():
        if isinstance(value, dict):
            yield from flat(value)
        else:
            assert isinstance(value, int | float | np.ndarray)
            yield value


@pytest.mark.parametrize("cases", [0, 1, LEAST_CASES, 40, 300])
def test_the_state_goes_round(cases):
    corrector, held, truth, _ = trial(cases, cases, 3, strength=0.3, noise=0.1)
    state = corrector.state_dict()
    twin = Corrector(4, 3)
    twin.load_state_dict(state)
    for value in flat(state):
        if isinstance(value, np.ndarray):
            value[...] = 9.0
    for x, scale in zip(held[:20], truth, strict=False):
        assert np.array_equal(corrector.predict(x), twin.predict(x))
        corrector.update(x, with_cosine(scale))
        twin.update(x, with_cosine(scale))
    for one, other in zip(flat(corrector.state_dict()), flat(twin.state_dict()), strict=True):
        assert np.array_equal(one, other)


def test_the_state_of_another_shape_is_refused():
    corrector = Corrector(2, 3)
    for other in (Corrector(3, 3), Corrector(2, 4)):
        with pytest.raises(ValueError, match=r"^scores and ridge must be those of 2 groups and 3"):
            corrector.load_state_dict(other.state_dict())


def test_inputs_are_not_changed():
    context, residual = np.arange(3.0), with_cosine([5.0, -1.0])
    before = residual.copy()
    context.setflags(write=False)
    residual.setflags(write=False)
    corrector = Corrector(2, 3)
    for _ in range(8):
        corrector.update(context, residual)
    corrector.predict(context)
    assert np.array_equal(residual, before)


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "2"])
def test_bad_sizes_are_named(value):
    with pytest.raises(ValueError, match=r"^groups must be a positive integer"):
        Corrector(value, 2)
    with pytest.raises(ValueError, match=r"^dimension must be a positive integer"):
        Corrector(2, value)


@pytest.mark.parametrize("value", [0.0, -0.5, 1.01, np.nan, np.inf])
def test_a_bad_forgetting_is_named(value):
    with pytest.raises(ValueError, match=r"^forgetting must lie in \(0, 1\]"):
        Corrector(2, 2, forgetting=value)


def test_bad_shapes_are_named():
    corrector = Corrector(2, 3)
    with pytest.raises(ValueError, match=r"^context must have shape \(3,\)"):
        corrector.predict([1.0, 2.0])
    with pytest.raises(ValueError, match=r"^context must have shape \(3,\)"):
        corrector.update([1.0, 2.0], np.ones((2, 2)))
    with pytest.raises(ValueError, match=r"^residual must have shape \(2, 2\)"):
        corrector.update([1.0, 2.0, 3.0], [1.0, 1.0])
