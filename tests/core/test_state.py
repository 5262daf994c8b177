"""The training state against an oracle that recomputes it all, hostile numbers and real runs."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from naive_state import loss_and_gradients, network, normalised, values

from hybridcore.state import FEATURES, LIMIT, MEMORY, TrainingState
from hybridcore.types import Observation

steady = settings(deadline=None, derandomize=True, database=None)
NAMES = [feature.name for feature in FEATURES]


def gram_of(positions):
    """Inner products of snapshots (groups, m, parameters) about the newest."""
    moved = positions - positions[:, -1:]
    return moved @ moved.transpose(0, 2, 1)


def random_history(rng, n=120, groups=8, every=20, restarts=0.02, noise=0.2):
    trend = np.cumsum(0.05 * rng.standard_normal(n)) - 0.01 * np.arange(n)
    loss = 3.0 * np.exp(trend + noise * rng.standard_normal(n))
    norm = np.exp(0.5 * trend + noise * rng.standard_normal(n))
    rate = 1e-3 * np.where(rng.uniform(size=n) < 0.9, 1.0, rng.uniform(0.1, 2.0, n))
    grams = [None] * n
    for t in range(n if every is None else every, n, every or n):
        grams[t] = gram_of(np.cumsum(rng.standard_normal((groups, rng.integers(1, 7), 30)), axis=1))
    restarted = rng.uniform(size=n) < restarts
    restarted[0] = False
    return list(zip(loss, norm, rate, grams, restarted, strict=True))


def feed(state, history):
    """Raw and normalised features of every step."""
    raw, out = [], []
    for loss, norm, rate, gram, restarted in history:
        if restarted:
            state.restart()
        state.update(Observation(loss, norm, rate, gram=gram))
        raw.append(state.values())
        out.append(state.features().copy())
    return np.array(raw), np.array(out)


# ---------------------------------------------------------------------------------------------
# Against the oracle
# ---------------------------------------------------------------------------------------------


def test_every_feature_is_named_and_described():
    assert len(FEATURES) == len(set(NAMES)) == 64
    for feature in FEATURES:
        assert feature.unit in {"log", "std", "1"}
        assert feature.range[0] < feature.range[1]
        assert len(feature.description) > 10
    assert [bool(f.substitute) for f in FEATURES] == [False] * 48 + [True] * 16


@pytest.mark.parametrize("groups", [1, 3, 8, 11])
@pytest.mark.parametrize("every", [7, 20, None])
@pytest.mark.parametrize("noise", [0.3, 1e-4])
def test_values_equal_those_of_the_oracle(groups, every, noise):
    rng = np.random.default_rng([groups, every or 0, int(noise > 0.1)])
    history = random_history(rng, groups=groups, every=every, noise=noise)
    raw, _ = feed(TrainingState(), history)
    expected = values(history)
    for i, name in enumerate(NAMES):
        np.testing.assert_allclose(
            raw[:, i], expected[:, i], rtol=1e-9, atol=1e-9, err_msg=name, verbose=False
        )


def test_what_is_missing_counts_as_unchanged():
    rng = np.random.default_rng(5)
    history = random_history(rng, every=None)
    bad = [math.nan, math.inf, -1.0, 0.0]
    broken = []
    for t, (loss, norm, rate, gram, restarted) in enumerate(history):
        loss = -loss if t % 11 == 4 else loss
        norm = bad[t % 4] if t % 7 == 3 else norm
        rate = bad[t % 4] if t % 5 == 2 else rate
        broken.append((loss, norm, rate, gram, restarted))
    raw, _ = feed(TrainingState(), broken)
    np.testing.assert_allclose(raw, values(broken), rtol=1e-9, atol=1e-9)


def test_wild_numbers_are_clipped():
    history = random_history(np.random.default_rng(8), every=None)
    wild = []
    for t, (loss, norm, rate, gram, restarted) in enumerate(history):
        loss *= {30: 1e9, 70: 1e-9}.get(t, 1.0)
        norm *= {40: 1e-12, 71: 1e20}.get(t, 1.0)
        rate *= {50: 1e-60, 90: 1e60}.get(t, 1.0)
        wild.append((loss, norm, rate, gram, restarted))
    raw, _ = feed(TrainingState(), wild)
    np.testing.assert_allclose(raw, values(wild), rtol=1e-9, atol=1e-8)


def test_a_bad_batch_is_left_out():
    history = random_history(np.random.default_rng(6), n=40)
    state, other = TrainingState(), TrainingState()
    for loss, norm, rate, gram, _ in history:
        state.update(Observation(loss, norm, rate, gram=gram))
        other.update(Observation(loss, norm, rate, gram=gram))
        other.update(Observation(math.nan, norm, rate))
        other.update(Observation(math.inf, norm, rate))
        other.update(Observation(loss, norm, rate, applied=False))
    assert np.array_equal(state.features(), other.features())


@pytest.mark.parametrize("every", [None, 20])
def test_normalisation_equals_weights_over_the_whole_history(every):
    history = random_history(np.random.default_rng(7), n=1300, every=every)
    raw, out = feed(TrainingState(), history)
    changes = (t for t, row in enumerate(history) if row[3] is not None and len(row[3][0]) > 2)
    first = next(changes, 10)
    assert not out[:11, :40].any()
    for stop in (12, 40, 400, 1000, 1300):
        expected = normalised(raw[10:stop, :40], MEMORY, LIMIT)
        np.testing.assert_allclose(out[stop - 1, :40], expected, rtol=1e-6, atol=1e-6)
        if stop > first:
            expected = normalised(raw[first:stop, 48:], MEMORY, LIMIT)
            np.testing.assert_allclose(out[stop - 1, 48:], expected, rtol=1e-6, atol=1e-6)
    centres = np.array([-2, -1, -1, -2, 6, 6, 6, 0.5])
    widths = np.array([2, 2, 2, 3, 2, 2, 2, 0.25])
    expected = np.clip((raw[:, 40:48] - centres) / widths, -LIMIT, LIMIT)
    np.testing.assert_allclose(out[:, 40:48], expected, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------
# What the features mean
# ---------------------------------------------------------------------------------------------


def by_name(state):
    return dict(zip(NAMES, state.values().tolist(), strict=True))


def test_a_straight_line_has_its_slope_as_trend_and_no_noise():
    state = TrainingState()
    for t in range(5000):
        state.update(Observation(math.exp(-0.002 * t), math.exp(0.001 * t), 0.1))
    got = by_name(state)
    for s in (2, 8, 64, 256):
        assert got[f"loss_trend_{s}"] == pytest.approx(-0.002 * (s - 1), rel=1e-6)
    assert got["norm_trend_64"] == pytest.approx(0.063, rel=1e-6)
    assert got["loss_curvature_32"] == pytest.approx(0.0, abs=1e-9)
    assert got["loss_noise_16"] < -20.0
    assert got["loss_roughness_16"] < -20.0
    assert got["rate_steps"] == pytest.approx(math.log(5000))


def test_noise_and_its_shape_are_measured():
    rng = np.random.default_rng(0)
    state, collected = TrainingState(), []
    for t, e in enumerate(0.1 * rng.standard_normal(4000)):
        state.update(Observation(math.exp(e), math.exp(2.0 * e), 0.1))
        if t > 500:
            collected.append(by_name(state))
    mean = {name: np.mean([row[name] for row in collected]) for name in NAMES}
    # The forecast of each value is uncertain too: at a long scale by little.
    assert math.exp(mean["loss_noise_128"]) == pytest.approx(0.1, rel=0.05)
    assert mean["loss_roughness_128"] == pytest.approx(math.log(3.0), abs=0.05)
    assert mean["loss_norm_correlation_128"] == pytest.approx(1.0, abs=1e-6)
    assert abs(mean["loss_skewness_64"]) < 0.2
    assert abs(mean["loss_persistence_32"]) < 0.15


def test_oscillation_is_rougher_than_noise():
    state = TrainingState()
    for t in range(400):
        state.update(Observation(1.0 + 0.1 * (-1.0) ** t, 1.0, 0.1))
    assert by_name(state)["loss_roughness_16"] == pytest.approx(math.log(4.0), abs=1e-3)


def test_a_jump_stays_out_of_the_trends_but_not_of_the_level():
    plain, jumped = TrainingState(), TrainingState()
    rng = np.random.default_rng(1)
    logs = 0.1 * rng.standard_normal(200)
    # What the loss does across a restart is unknown: here it would not have changed.
    logs[100] = logs[99]
    for t, y in enumerate(logs):
        if t == 100:
            jumped.restart()
        plain.update(Observation(math.exp(y), 1.0, 0.1))
        jumped.update(Observation(math.exp(y - (t >= 100)), 1.0, 0.1))
    before, after = by_name(plain), by_name(jumped)
    assert after["loss_level"] == pytest.approx(before["loss_level"] - 1.0)
    assert after["recency"] == 32 / 132
    same = [name for name in NAMES[:38] if name != "loss_record"]
    for name in same:
        assert after[name] == pytest.approx(before[name], rel=1e-9, abs=1e-9), name


@pytest.mark.parametrize("first", [1e-12, 0.0])
def test_a_warm_up_from_next_to_nothing_does_not_blind_the_levels(first):
    rng = np.random.default_rng(2)
    state, collected = TrainingState(), []
    for t in range(400):
        rate = 0.1 * min(1.0, first + t / 50)
        state.update(Observation(math.exp(-0.01 * t), math.exp(rng.standard_normal()), rate))
        collected.append(state.features().copy())
    out = np.array(collected)[60:]
    assert np.abs(out[:, 40:48]).max() < LIMIT
    assert out[:, 40:48].std(axis=0).min() > 0.05


def test_displacements_in_a_line_that_double():
    positions = np.array([0.0, 1.0, 3.0, 7.0])[None, :, None] * np.ones((8, 1, 5))
    positions[3, :, 0] *= 0.0
    positions[4] = 2.0
    state = TrainingState()
    state.update(Observation(1.0, 1.0, 0.1, gram=gram_of(positions)))
    got = by_name(state)
    for g in (1, 2, 3, 4, 6, 7, 8):
        assert got[f"displacement_cosine_{g}"] == pytest.approx(1.0)
        assert got[f"displacement_growth_{g}"] == pytest.approx(math.log(4 / math.sqrt(7)))
    assert got["displacement_cosine_5"] == got["displacement_growth_5"] == 0.0


# ---------------------------------------------------------------------------------------------
# Real runs
# ---------------------------------------------------------------------------------------------


def train(widths, n, rate, batch=None, momentum=0.9, every=None, jump=None):
    """History of a run on scikit-learn's digits; at `jump` the weights become the bank's mean."""
    datasets = pytest.importorskip("sklearn.datasets")
    x, labels = datasets.load_digits(return_X_y=True)
    x = x / 16.0
    rng = np.random.default_rng(0)
    parameters = network(rng, widths)
    velocity = [np.zeros_like(p) for p in parameters]
    bank, history = [], []
    for t in range(n):
        rows = slice(None) if batch is None else rng.integers(len(x), size=batch)
        loss, gradients = loss_and_gradients(parameters, x[rows], labels[rows])
        norm = math.sqrt(sum(np.sum(g * g) for g in gradients))
        for p, v, g in zip(parameters, velocity, gradients, strict=True):
            v[:] = momentum * v + g
            p -= rate(t) * v
        gram = None
        if every and t % 5 == 4:
            bank = [*bank[-5:], [p.copy() for p in parameters]]
            if t % every == every - 1:
                gram = np.stack([
                    gram_of(np.array([s[i].ravel() for s in bank])[None])[0]
                    for i in range(len(parameters))
                ])  # fmt: skip
        history.append((loss, norm, rate(t), gram, jump is not None and t > 0 and t % jump == 0))
        if jump and t % jump == jump - 1:
            for i, p in enumerate(parameters):
                p[:] = np.mean([s[i] for s in bank], axis=0)
    return history


RUNS = {
    "full batch": lambda: train((64, 32, 32, 32, 10), 400, lambda t: 0.05, every=20),
    "mini-batch, cosine, jumps": lambda: train(
        (64, 32, 10), 600, lambda t: 0.1 * (0.51 + 0.49 * math.cos(math.pi * t / 600)),
        batch=32, every=30, jump=150,
    ),
    "logistic regression": lambda: train((64, 10), 400, lambda t: 0.5, momentum=0.0),
    "mini-batch, no Gram": lambda: train((64, 32, 10), 600, lambda t: 0.1, batch=32),
}  # fmt: skip


@pytest.fixture(scope="module")
def real():
    return {name: feed(TrainingState(), run())[1] for name, run in RUNS.items()}


@pytest.mark.parametrize("run", RUNS)
def test_no_feature_is_constant_on_a_real_run(real, run):
    deviation = real[run].std(axis=0)
    assert {n: d for n, d in zip(NAMES, deviation, strict=True) if d <= 0.05} == {}


def test_no_two_features_say_the_same_on_all_real_runs(real):
    least = np.min([np.abs(np.corrcoef(out.T)) for out in real.values()], axis=0)
    pairs = np.argwhere(np.triu(least > 0.999, 1))
    assert [(NAMES[i], NAMES[j]) for i, j in pairs] == []


# ---------------------------------------------------------------------------------------------
# Properties
# ---------------------------------------------------------------------------------------------

hostile = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, -0.0, 1e300, -1e300, 5e-324, 1.7e308, 1.0]),
)
grams = st.one_of(
    st.none(),
    st.tuples(st.integers(0, 9), st.integers(0, 5)).flatmap(
        lambda s: hnp.arrays(np.float64, (s[0], s[1], s[1]), elements=hostile)
    ),
)
steps = st.lists(st.tuples(hostile, hostile, hostile, grams, st.booleans()), max_size=40)


@steady
@given(sequence=steps, warm=st.booleans())
def test_hostile_numbers_leave_everything_finite(sequence, warm):
    state = TrainingState()
    if warm:
        feed(state, random_history(np.random.default_rng(0), n=30))
    for loss, norm, rate, gram, restarted in sequence:
        if restarted:
            state.restart()
        state.update(Observation(loss, norm, rate, gram=gram))
        assert np.isfinite(state.features()).all()
        assert np.abs(state.features()).max() <= LIMIT
        assert np.isfinite(state.state_dict()["state"]).all()
        for feature, value in zip(FEATURES, state.values(), strict=True):
            low, high = feature.range
            assert low - 1e-6 <= value <= high + 1e-6, feature.name


@steady
@given(before=steps, after=steps)
def test_the_state_goes_round(before, after):
    state, twin = TrainingState(), TrainingState()
    feed(state, before)
    saved = {key: value.tolist() for key, value in state.state_dict().items()}
    twin.load_state_dict(json.loads(json.dumps(saved)))
    assert np.array_equal(twin.features(), state.features())
    first, second = feed(state, after), feed(twin, after)
    assert np.array_equal(first[0], second[0])
    assert np.array_equal(first[1], second[1])


@steady
@given(
    seed=st.integers(0, 2**32 - 1),
    of_loss=st.floats(-200.0, 200.0),
    of_norm=st.floats(-200.0, 200.0),
    of_rate=st.floats(-200.0, 200.0),
    of_weights=st.floats(-100.0, 100.0),
)
def test_constant_factors_change_nothing(seed, of_loss, of_norm, of_rate, of_weights):
    history = random_history(np.random.default_rng(seed), n=60)
    a, b, c, d = (math.exp(x) for x in (of_loss, of_norm, of_rate, of_weights))
    scaled = [
        (a * loss, b * norm, c * rate, None if gram is None else d * gram, restarted)
        for loss, norm, rate, gram, restarted in history
    ]
    expected, got = feed(TrainingState(), history)[1], feed(TrainingState(), scaled)[1]
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_features_are_a_read_only_view_of_float32():
    state = TrainingState()
    view = state.features()
    assert view.dtype == np.float32
    assert view.shape == (64,)
    assert not view.any()
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1.0
    feed(state, random_history(np.random.default_rng(0), n=10))
    assert view.any()


def test_arguments_are_not_changed_and_states_are_copies():
    state = TrainingState()
    gram = gram_of(np.random.default_rng(0).standard_normal((8, 4, 6)))
    before = gram.copy()
    state.update(Observation(1.0, 1.0, 1.0, gram=gram))
    assert np.array_equal(gram, before)
    state.state_dict()["state"][:] = 7.0
    assert not np.array_equal(state.state_dict()["state"], np.full_like(state.values(), 7.0))


def test_a_state_of_another_size_changes_nothing():
    state = TrainingState()
    feed(state, random_history(np.random.default_rng(0), n=10))
    before = state.state_dict()
    for key in before:
        broken = state.state_dict()
        broken[key] = broken[key][:-1]
        with pytest.raises(ValueError, match=f"^{key} has the shape .* another version"):
            state.load_state_dict(broken)
        assert all(np.array_equal(before[k], state.state_dict()[k]) for k in before)


@pytest.mark.parametrize("shape", [(3, 3), (2, 3, 4)])
def test_a_gram_of_another_shape_is_named(shape):
    with pytest.raises(ValueError, match=r"^gram must have the shape \(groups, m, m\)"):
        TrainingState().update(Observation(1.0, 1.0, 1.0, gram=np.zeros(shape)))
