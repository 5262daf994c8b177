"""The trend of the loss against an oracle, against known series and against hostile ones."""

import math

import contract
import naive
import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcore import Observation
from hybridcore.dynamics import Forecast, LinearDynamics, build
from hybridcore.dynamics.linear import DISCOUNT, LEAST_OBSERVATIONS


def fed(losses):
    return contract.fed(LinearDynamics, losses)


compiled = pytest.mark.skipif(numba.config.DISABLE_JIT, reason="takes minutes uncompiled")


@pytest.mark.parametrize(
    "name", ["linear", pytest.param("mlp", marks=compiled), pytest.param("rssm", marks=compiled)]
)
def test_the_contract(name):
    contract.check_dynamics_model(lambda: build(name, "cpu"))


# -- against the oracle -------------------------------------------------------------------------

SERIES = {
    "noisy": lambda n, rng: np.exp(-0.01 * np.arange(n) + 0.1 * rng.standard_normal(n)),
    "rising": lambda n, rng: np.exp(0.05 * np.arange(n) + 0.3 * rng.standard_normal(n)),
    "walk": lambda n, rng: np.exp(np.cumsum(0.2 * rng.standard_normal(n))),
    "bent": lambda n, rng: 0.1 + 1.0 / (1.0 + np.arange(n)),
    "far": lambda n, rng: 1e30 * np.exp(-0.02 * np.arange(n) + 0.01 * rng.standard_normal(n)),
    "small": lambda n, rng: 1e-30 * np.exp(0.5 * rng.standard_normal(n)),
}


@pytest.mark.parametrize("count", [3, 4, 9, 10, 11, 40, 300])
@pytest.mark.parametrize("name", SERIES)
def test_equals_the_oracle(name, count):
    losses = SERIES[name](count, np.random.default_rng(count))
    logs = np.log(losses)
    level, slope, noise = naive.discounted_line(logs, DISCOUNT)
    model = fed(losses)
    assert model.slope == pytest.approx(slope, rel=1e-6, abs=1e-9)
    assert model.noise == pytest.approx(noise, rel=1e-6, abs=1e-7)
    for horizon in (0, 0.5, 1, 15, 75):
        forecast = model.forecast(horizon)
        assert forecast.mean == pytest.approx(level + slope * horizon, rel=1e-8, abs=1e-7)
        std = naive.discounted_forecast_std(logs, DISCOUNT, horizon)
        assert forecast.std == pytest.approx(std, rel=1e-6, abs=1e-6)


@settings(deadline=None, derandomize=True, database=None, max_examples=100)
@given(st.lists(st.floats(0.001, 1000.0), min_size=3, max_size=50), st.floats(0.0, 100.0))
def test_equals_the_oracle_on_any_series(losses, horizon):
    logs = np.log(losses)
    level, slope, noise = naive.discounted_line(logs, DISCOUNT)
    std = naive.discounted_forecast_std(logs, DISCOUNT, horizon)
    model = fed(losses)
    assert model.slope == pytest.approx(slope, rel=1e-6, abs=1e-7)
    assert model.noise == pytest.approx(noise, rel=1e-5, abs=1e-6)
    assert model.forecast(horizon).mean == pytest.approx(level + slope * horizon, abs=1e-5)
    assert model.forecast(horizon).std == pytest.approx(std, rel=1e-5, abs=1e-5)


# -- series whose future is known ---------------------------------------------------------------


@pytest.mark.parametrize("rate", [-0.1, -0.003, 0.0, 0.02])
@pytest.mark.parametrize("count", [3, 12, 400])
def test_an_exponential_loss_is_forecast_exactly(rate, count):
    losses = 2.5 * np.exp(rate * np.arange(count))
    model = fed(losses)
    assert model.slope == pytest.approx(rate, abs=1e-9)
    # The noise is the root of a difference: half of the digits.
    assert model.noise == pytest.approx(0.0, abs=1e-5)
    for horizon in (0, 1, 15, 75):
        forecast = model.forecast(horizon)
        truth = math.log(2.5) + rate * (count - 1 + horizon)
        assert forecast.mean == pytest.approx(truth, abs=1e-7)
        assert forecast.confidence(0.01) == 1.0


@pytest.mark.parametrize("factor", [1e-20, 0.1, 1e20])
def test_the_unit_of_the_loss_does_not_matter(factor):
    losses = contract.noisy_series(0)
    model, scaled = fed(losses), fed(factor * losses)
    assert scaled.slope == pytest.approx(model.slope, rel=1e-7)
    assert scaled.noise == pytest.approx(model.noise, rel=1e-7)
    shift = math.log(factor)
    assert scaled.forecast(20).mean - shift == pytest.approx(model.forecast(20).mean, abs=1e-9)


@pytest.mark.parametrize("horizon", [1, 5, 15])
@pytest.mark.parametrize("count", [20, 50, 200])
def test_ninety_percent_intervals_cover_about_ninety_percent(horizon, count):
    rng = np.random.default_rng([horizon, count])
    runs, inside = 600, 0
    for _ in range(runs):
        slope, noise = rng.uniform(-0.03, 0.0), rng.uniform(0.01, 0.2)
        line = slope * np.arange(count + horizon)
        series = line + noise * rng.standard_normal(count + horizon)
        forecast = fed(np.exp(series[:count])).forecast(horizon)
        inside += abs(series[-1] - forecast.mean) <= 1.6449 * forecast.std
    # A memory of 20 losses knows the noise to some 15 %, which costs coverage; 600 runs scatter by
    # 1.2 points.
    assert 0.82 <= inside / runs <= 0.95


def test_the_trend_follows_a_bend():
    losses = np.exp(np.concatenate([-0.05 * np.arange(100), np.full(100, -5.0)]))
    assert fed(losses[:100]).slope == pytest.approx(-0.05)
    assert abs(fed(losses).slope) < 0.002


# -- stability and confidence -------------------------------------------------------------------


def test_nothing_is_stable_before_enough_losses():
    for count in range(LEAST_OBSERVATIONS):
        assert not fed(np.full(count, 1.0)).is_stable
    assert fed(np.full(LEAST_OBSERVATIONS, 1.0)).is_stable


def test_a_rise_within_its_own_uncertainty_is_not_held_against_a_run():
    rng = np.random.default_rng(0)
    stable = [fed(np.exp(0.2 * rng.standard_normal(60))).is_stable for _ in range(200)]
    # Two standard errors leave one flat series in forty out, more with a short memory.
    assert np.mean(stable) > 0.85


def test_confidence_is_the_normal_probability():
    assert Forecast(1.0, 0.1).confidence(0.1) == pytest.approx(0.6826895)
    assert Forecast(-3.0, 0.1).confidence(0.196) == pytest.approx(0.9500042)
    assert Forecast(0.0, 0.0).confidence(0.1) == 1.0
    assert Forecast(0.0, math.inf).confidence(0.1) == 0.0
    assert Forecast(0.0, 1e300).confidence(0.1) == pytest.approx(0.0, abs=1e-12)


def test_confidence_falls_with_horizon_and_noise():
    calm, wild = (fed(contract.noisy_series(8, noise=noise)) for noise in (0.05, 0.2))
    near, far = (calm.forecast(horizon).confidence(0.2) for horizon in (5, 75))
    assert near > far
    assert near > wild.forecast(5).confidence(0.2)


def test_what_was_fed_before_a_restart_leaves_no_trace():
    model = fed(contract.noisy_series(9))
    model.restart()
    assert model.state_dict() == LinearDynamics().state_dict()


# -- the contract can be broken -----------------------------------------------------------------


class Believes(LinearDynamics):
    """Takes losses that are none."""

    def observe(self, observation):
        """Take anything."""
        loss = observation.loss
        super().observe(Observation(abs(loss) if math.isfinite(loss) and loss else 1.0))


class Forgets(LinearDynamics):
    """Loses a part of its state."""

    def state_dict(self):
        """Return the state but for one number."""
        return super().state_dict() | {"product": 0.0}


class Optimist(LinearDynamics):
    """Is always stable."""

    is_stable = True


class Blind(LinearDynamics):
    """Answers before it has seen anything."""

    def forecast(self, horizon):
        """Return the same for everything."""
        return Forecast(0.0, 0.1)


@pytest.mark.parametrize("broken", [Believes, Forgets, Optimist, Blind])
def test_the_contract_notices(broken):
    with pytest.raises(AssertionError):
        contract.check_dynamics_model(broken)
