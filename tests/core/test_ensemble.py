"""The ensemble against the NumPy oracle of one member, and what it must keep and may not change."""

import math

import naive_rssm as naive
import numpy as np
import pytest

from hybridcore.dynamics.rssm.ensemble import MOST_DELTA, PATHS, UPDATE_INTERVAL, RSSMEnsemble
from hybridcore.dynamics.rssm.params import Sizes, split
from hybridcore.kernels.cpu import rssm

# Small enough to run uncompiled.
SMALL = Sizes(features=5, latent=3, categoricals=2, classes=3, outputs=4)


def make(seed=0, **options):
    return RSSMEnsemble(seed, **{"members": 3, "sizes": SMALL, **options})


def stream(seed, count):
    """Features and changes; no step led to the first."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(count, SMALL.features)).astype(np.float32)
    changes = -0.02 + 0.05 * rng.normal(size=count)
    changes[:1] = math.nan
    return zip(features, changes, strict=True)


def fed(count, seed=0, **options):
    ensemble = make(**options)
    for features, change in stream(seed, count):
        ensemble.observe(features, float(change))
    return ensemble


def same(one, two):
    return one.keys() == two.keys() and all(
        np.array_equal(one[k], two[k], equal_nan=not isinstance(one[k], int)) for k in one
    )


def answers(ensemble, horizon=12):
    return [*ensemble.forecast(horizon), ensemble.delta()]


@pytest.mark.parametrize("count", [0, 1, 7, 30])
@pytest.mark.parametrize("horizon", [1, 9])
def test_a_forecast_is_the_oracle_s_over_members_and_paths(count, horizon):
    ensemble = fed(count)
    state = ensemble.state_dict()
    uniforms = np.empty((3, horizon, PATHS, SMALL.categoricals), np.float32)
    rssm.fill_uniforms(state["generators"], uniforms.reshape(3, -1))
    means, variances = np.empty((2, 3, PATHS, horizon))
    for m in range(3):
        p = naive.parts(split(state["params"][m], SMALL), SMALL)
        for path in range(PATHS):
            hidden, classes = state["hidden"][m].astype(float), state["classes"][m]
            means[m, path], variances[m, path], _ = naive.rollout(
                hidden, classes, uniforms[m, :, path], p, SMALL.classes
            )
    unit = 1.0 if math.isnan(state["unit"]) else state["unit"]
    mean, aleatoric, epistemic = ensemble.forecast(horizon)
    of_member = means.mean(axis=1)
    np.testing.assert_allclose(mean, unit * of_member.mean(axis=0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(epistemic, unit**2 * of_member.var(axis=0), rtol=1e-3, atol=1e-9)
    # The law of total variance: what lies within members and between them is all there is.
    total = variances.mean(axis=(0, 1)) + means.var(axis=(0, 1))
    np.testing.assert_allclose(aleatoric + epistemic, unit**2 * total, rtol=1e-3, atol=1e-9)


def test_a_shorter_forecast_is_the_beginning_of_a_longer_one():
    first, second = fed(20), fed(20)
    long, short = first.forecast(15), second.forecast(4)
    for whole, part in zip(long, short, strict=True):
        np.testing.assert_array_equal(whole[:4], part)
    for whole, part in zip(first.forecast(4), short, strict=True):
        np.testing.assert_array_equal(whole, part)


@pytest.mark.parametrize("cut", [0, 1, 5, 13, 40])
def test_a_copy_from_the_state_goes_on_bitwise_the_same(cut):
    one = fed(cut)
    two = make(seed=9)
    state = one.state_dict()
    two.load_state_dict(state)
    assert same(two.state_dict(), state)
    for features, change in stream(5, 30):
        one.observe(features, float(change))
        two.observe(features, float(change))
        for a, b in zip(answers(one), answers(two), strict=True):
            np.testing.assert_array_equal(a, b)
    assert same(one.state_dict(), two.state_dict())
    assert cut == 0 or not same(one.state_dict(), state)


def test_asking_changes_nothing():
    asked, left_alone = make(), make()
    for features, change in stream(2, 40):
        for ensemble in (asked, left_alone):
            ensemble.observe(features, float(change))
        asked.forecast(3)
        asked.forecast(20)
        asked.delta()
    assert same(asked.state_dict(), left_alone.state_dict())


def test_seeds_and_members_differ_and_repeat():
    one, again, other = fed(60), fed(60), fed(60, seed=0, members=3)
    assert same(one.state_dict(), again.state_dict())
    assert same(one.state_dict(), other.state_dict())
    third = make(seed=1)
    assert not np.array_equal(third.state_dict()["params"], make().state_dict()["params"])
    state = one.state_dict()
    # Own weights, own windows, own draws.
    for name in ("params", "first", "generators"):
        rows = state[name]
        assert all(not np.array_equal(rows[0], row) for row in rows[1:]), name
    assert (one.forecast(5).epistemic > 0.0).all()


def test_it_learns_every_few_steps_once_there_is_a_window():
    ensemble = make()
    for count, (features, change) in enumerate(stream(0, 41), 1):
        before = ensemble.updates
        ensemble.observe(features, float(change))
        assert ensemble.updates == before + (count % UPDATE_INTERVAL == 0 and count > 5)


def test_learning_finds_what_the_features_foretell():
    ensemble = RSSMEnsemble(0, members=2, sizes=SMALL)
    rng = np.random.default_rng(0)
    errors, last = [], None
    for _ in range(2500):
        x = rng.choice([-1.0, 1.0])
        if last is not None:
            change = 0.1 * last + 0.005 * rng.normal()
            errors.append((ensemble.forecast(1).mean[0] - change) ** 2)
        else:
            change = math.nan
        ensemble.observe([x, 0.0, 0.0, 0.0, 1.0], change)
        last = x
    assert np.mean(errors[-300:]) < 0.5 * np.mean(errors[:300])
    assert np.mean(errors[-300:]) < 0.5 * 0.1**2


def test_the_delta_head_learns_its_targets_and_starts_neutral():
    ensemble = make()
    np.testing.assert_allclose(ensemble.delta(), [1.0, 0.5, 1.0, 1.0], atol=1e-6)
    target = [0.7, 0.9, 1.3, 0.4]
    for features, change in stream(0, 1500):
        ensemble.observe(features, float(change))
        ensemble.teach_delta(target)
    assert np.abs(ensemble.delta() - target).max() < 0.15


def test_what_is_not_finite_teaches_nothing_about_deltas():
    ensemble = fed(10)
    before = ensemble.state_dict()
    ensemble.teach_delta([math.nan, 1.0, 1.0, 1.0])
    assert same(ensemble.state_dict(), before)
    ensemble.teach_delta([1e300, -5.0, 1.0, 1.0])
    taught = ensemble.state_dict()["replay_deltas"][9]
    assert taught.tolist() == [MOST_DELTA, 0.0, 1.0, 1.0]
    make().teach_delta([1.0] * 4)  # before the first step there is nothing to teach


HOSTILE = [math.nan, math.inf, -math.inf, 0.0, 1e300, -1e300, 5e-324, 1.0, -1.0]


@pytest.mark.parametrize("seed", range(3))
def test_hostile_numbers_leave_everything_finite(seed):
    ensemble = fed(12)
    rng = np.random.default_rng(seed)
    with np.errstate(over="ignore"):
        for _ in range(60):
            features = rng.choice(HOSTILE, SMALL.features)
            ensemble.observe(features, float(rng.choice(HOSTILE)))
            for values in answers(ensemble):
                assert np.isfinite(values).all()
    for name, array in ensemble.state_dict().items():
        assert np.isfinite(array).all(), name


def test_one_wild_change_hardly_moves_the_unit():
    calm, hit = fed(100), fed(100)
    hit.observe(np.zeros(5), 1e9)
    assert hit.unit < 2.0 * calm.unit


def test_a_state_of_another_size_is_refused_and_changes_nothing():
    ensemble = fed(20)
    before = ensemble.state_dict()
    with pytest.raises(ValueError, match=r"params must have shape .* another size"):
        ensemble.load_state_dict(make(members=2).state_dict())
    assert same(ensemble.state_dict(), before)


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", -1), ("seed", 1.0), ("members", 0), ("members", True), ("steps", 0), ("steps", "3")],
)
def test_bad_arguments_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least"):
        RSSMEnsemble(**{name: value})


def test_an_unknown_device_is_named():
    with pytest.raises(ValueError, match="device must be 'auto', 'cpu' or 'cuda'"):
        RSSMEnsemble(device="gpu")
