"""What every implementation of a protocol must do, to be called from its own tests.

``check_dynamics_model(make)`` takes a function without arguments that builds a new model, and
raises ``AssertionError`` at the first promise of ``hybridcore.dynamics.DynamicsModel`` that the
model breaks.
"""

import copy
import inspect
import json
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcore import Observation

NO_LOSSES = [math.nan, math.inf, -math.inf, 0.0, -0.0, -1e-300, -3.0]
HORIZONS = [0, 1, 15, 75, 1000]


def check_dynamics_model(make):
    for check in (
        check_documented,
        check_nothing_known,
        check_hostile_losses,
        check_state_round_trip,
        check_restart,
        check_asking_changes_nothing,
        check_same_losses_same_answers,
        check_stability,
        check_finite_always,
    ):
        check(make)


def fed(make, losses):
    model = make()
    for loss in losses:
        model.observe(observed(loss))
    return model


def observed(loss):
    """What a full step of that loss shows; the norm follows the loss as it often does."""
    norm = math.sqrt(abs(loss)) if math.isfinite(loss) else math.nan
    return Observation(loss=float(loss), gradient_norm=norm, learning_rate=1e-3)


def noisy_series(seed, count=80, slope=-0.01, noise=0.05):
    rng = np.random.default_rng(seed)
    return np.exp(slope * np.arange(count) + noise * rng.standard_normal(count))


def answers(model):
    """Everything that the engine asks of a model."""
    forecasts = [model.forecast(horizon) for horizon in HORIZONS]
    return (
        model.slope,
        model.noise,
        model.is_stable,
        [(f.mean, f.std, f.confidence(0.2)) for f in forecasts],
    )


def check_documented(make):
    model = make()
    assert inspect.getdoc(type(model))
    for name in ("observe", "forecast", "restart", "state_dict", "load_state_dict"):
        assert inspect.getdoc(getattr(type(model), name)), name


def check_nothing_known(make):
    model = make()
    assert not model.is_stable
    assert model.noise == math.inf
    for horizon in HORIZONS:
        forecast = model.forecast(horizon)
        assert math.isfinite(forecast.mean)
        assert forecast.std == math.inf
        assert forecast.confidence(0.2) == 0.0
    assert not fed(make, [1.0]).is_stable


def same(one, two):
    """Whether two states are equal to the last bit, NaN equal to itself."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return np.array_equal(one, two, equal_nan=isinstance(np.asarray(one).flat[0], np.floating))


def check_hostile_losses(make):
    for count in (0, 1, 2, 40):
        model = fed(make, noisy_series(1, count))
        before = copy.deepcopy(model.state_dict())
        for loss in NO_LOSSES:
            model.observe(observed(loss))
            assert same(model.state_dict(), before), loss


def check_state_round_trip(make):
    series = noisy_series(2, 120)
    for count in (0, 1, 2, 3, 50, 100):
        model = fed(make, series[:count])
        # Through text, as a checkpoint would: plain numbers survive that to the last bit.
        saved = json.loads(json.dumps(model.state_dict(), default=lambda array: array.tolist()))
        restored = make()
        restored.load_state_dict(saved)
        assert same(restored.state_dict(), model.state_dict())
        assert answers(restored) == answers(model)
        for loss in series[count:]:
            model.observe(observed(loss))
            restored.observe(observed(loss))
            assert answers(restored) == answers(model)


def check_restart(make):
    model = fed(make, noisy_series(3))
    model.restart()
    assert not model.is_stable
    assert model.forecast(10).confidence(0.2) == 0.0
    # What is forgotten has no say in what is learned next.
    series = noisy_series(4, slope=-0.02, noise=0.01)
    for loss in series:
        model.observe(observed(loss))
    fresh = fed(make, series)
    assert math.isclose(model.slope, fresh.slope, rel_tol=0.2)
    assert math.isclose(model.forecast(15).mean, fresh.forecast(15).mean, abs_tol=0.05)


def check_asking_changes_nothing(make):
    model = fed(make, noisy_series(5))
    before = copy.deepcopy(model.state_dict())
    assert answers(model) == answers(model)
    assert same(model.state_dict(), before)
    # A state that is handed out is a copy: what the model does later does not reach it.
    handed_out = model.state_dict()
    model.observe(observed(0.5))
    assert same(handed_out, before)


def check_same_losses_same_answers(make):
    series = noisy_series(6)
    assert answers(fed(make, series)) == answers(fed(make, series))


def check_stability(make):
    steps = np.arange(200)
    for noise in (0.0, 0.03):
        wobble = noise * np.random.default_rng(7).standard_normal(200)
        assert fed(make, np.exp(-0.02 * steps + wobble)).is_stable
        assert not fed(make, np.exp(0.02 * steps + wobble)).is_stable
    assert fed(make, np.full(200, 0.7)).is_stable
    # A run that fell and now rises is no longer stable.
    assert not fed(make, np.exp(0.01 * np.abs(steps - 120.0))).is_stable


losses = st.floats(1e-300, 1e300) | st.floats(0.01, 10.0) | st.sampled_from([*NO_LOSSES, 5e-324])


def check_finite_always(make):
    @settings(deadline=None, derandomize=True, database=None, max_examples=150)
    @given(st.lists(losses, max_size=60), st.floats(0.0, 1e4))
    def check(series, horizon):
        model = fed(make, series)
        forecast = model.forecast(horizon)
        assert math.isfinite(model.slope)
        assert math.isfinite(forecast.mean)
        # Infinite is a statement, "nothing is known"; NaN is none.
        assert model.noise >= 0.0
        assert forecast.std >= 0.0
        assert 0.0 <= forecast.confidence(0.2) <= 1.0
        assert isinstance(model.is_stable, bool)

    check()
