"""Coverage of corrected intervals on errors of known and of changing distribution."""

import math

import numpy as np
import pytest

from hybridcore.dynamics import Forecast
from hybridcore.dynamics.conformal import COVERAGE, NORMAL_QUANTILE, ConformalScale


def covered(errors, stds, horizon=5):
    """Whether each error lay in its corrected interval, as of when it was forecast."""
    scale = ConformalScale((horizon,))
    promised, inside = [], []
    for step, error in enumerate(errors):
        scale.settle(float(error))
        if step >= horizon:
            inside.append(abs(error) <= promised[step - horizon])
        promised.append(NORMAL_QUANTILE * stds[step] * scale.factor(horizon))
        scale.follow([Forecast(0.0, float(stds[step]))])
    return np.array(inside)


NOISES = {
    "gaussian": lambda rng, n: rng.normal(size=n),
    "student-2": lambda rng, n: rng.standard_t(2, n),
    "uniform": lambda rng, n: rng.uniform(-1, 1, n),
    "exponential": lambda rng, n: rng.exponential(size=n),
    "growing": lambda rng, n: rng.normal(size=n) * np.geomspace(0.1, 10.0, n),
}


@pytest.mark.parametrize("stated", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("name", NOISES)
def test_nine_in_ten_are_covered_whatever_the_errors(name, stated):
    errors = NOISES[name](np.random.default_rng(0), 4000)
    inside = covered(errors, np.full(4000, stated))[1000:]
    assert 0.87 < inside.mean() < 0.93


def test_the_long_run_share_is_that_of_the_update_exactly():
    # Every miss adds RATE * COVERAGE and every hit takes RATE * (1 - COVERAGE): a factor that
    # stays bounded leaves no other share.
    errors = np.random.default_rng(1).standard_t(3, 20_000)
    assert covered(errors, np.ones(20_000)).mean() == pytest.approx(COVERAGE, abs=0.005)


def test_each_horizon_has_its_own_factor_and_between_them_it_is_interpolated():
    scale = ConformalScale((2, 32))
    rng = np.random.default_rng(2)
    walk = np.cumsum(rng.normal(size=5000))
    for value in walk:
        scale.settle(float(value))
        # Both state a deviation of 1, and after h steps it is the root of h.
        scale.follow([Forecast(float(value), 1.0)] * 2)
    assert scale.factor(2) == pytest.approx(math.sqrt(2), rel=0.35)
    assert scale.factor(32) == pytest.approx(math.sqrt(32), rel=0.5)
    assert scale.factor(8) == pytest.approx(math.sqrt(scale.factor(2) * scale.factor(32)))
    assert scale.factor(0) == scale.factor(1) == scale.factor(2)
    assert scale.factor(1e9) == scale.factor(32)


def test_forecasts_across_a_restart_do_not_count():
    scale = ConformalScale((3,))
    for _ in range(3):
        scale.follow([Forecast(0.0, 1.0)])
    scale.restart()
    scale.settle(1e9)
    assert scale.factor(3) == 1.0


def test_what_is_not_known_is_not_judged():
    scale = ConformalScale((1,))
    for mean, std, value in ((0.0, math.inf, 5.0), (math.nan, 1.0, 5.0), (0.0, 1.0, math.nan)):
        scale.follow([Forecast(mean, std)])
        scale.settle(value)
        assert math.isfinite(scale.factor(1))
    for _ in range(10_000):
        scale.follow([Forecast(0.0, 1e-300)])
        scale.settle(1e300)
    assert scale.factor(1) < 2000.0


def test_a_copy_from_the_state_goes_on_alike():
    rng = np.random.default_rng(3)
    one, two = ConformalScale((1, 4)), ConformalScale((1, 4))
    for value in rng.normal(size=100):
        one.settle(value)
        one.follow([Forecast(0.1, 0.5), Forecast(0.0, 2.0)])
    two.load_state_dict(one.state_dict())
    for value in rng.normal(size=100):
        for scale in (one, two):
            scale.settle(value)
            scale.follow([Forecast(0.1, 0.5), Forecast(0.0, 2.0)])
        assert two.state_dict() == one.state_dict()
        assert two.factor(2.0) == one.factor(2.0)
