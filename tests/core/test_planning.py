"""The decision rule's parts: confidence in a path, the rate ahead, the pace."""

import math

import numpy as np
import pytest

from hybridcore import HybridTrainerConfig
from hybridcore.planning import (
    ARMS,
    MOST_PATIENCE,
    Flight,
    Jump,
    Pace,
    learning_rate_ahead,
    path_confidence,
)


def gram(points):
    moved = points - points[-1]
    return moved @ moved.T


def smooth(m=6, seed=0):
    random = np.random.default_rng(seed)
    modes, rates = random.normal(size=(5, 40)), np.linspace(0.7, 0.99, 5)
    return np.array([(rates**k) @ modes for k in range(m)])


def test_confidence_tells_a_path_from_a_random_walk():
    assert path_confidence(gram(smooth()))["dmd"] > 0.99
    for seed in range(20):
        walk = np.random.default_rng(seed).normal(size=(6, 2000)).cumsum(axis=0)
        assert max(path_confidence(gram(walk)).values()) < 0.2


def test_confidence_hostile():
    assert set(path_confidence(np.zeros((6, 6))).values()) == {0.0}
    for scale in (1e-20, 1.0, 1e20):
        got = path_confidence(scale * gram(smooth()))
        assert got == pytest.approx(path_confidence(gram(smooth())), abs=1e-6)


@pytest.mark.parametrize("name", ARMS)
def test_a_jump_begins_where_the_weights_are(name):
    matrix = gram(smooth())
    jump = Jump(name, 5.0)
    start = np.zeros(6)
    start[-1] = 1.0
    np.testing.assert_allclose(jump.coefficients(matrix, 0.0), start, atol=1e-12)
    for share in (0.2, 0.7, 1.0):
        assert jump.coefficients(matrix, share).sum() == pytest.approx(1.0, abs=1e-6)


def test_rate_ahead():
    steps = np.arange(1000)
    assert learning_rate_ahead(np.full(40, 3e-3), 75) == pytest.approx(1.0)
    linear = 1e-2 * (1 - steps / 1000)
    truth = linear[501:576].mean() / linear[461:501].mean()
    assert learning_rate_ahead(linear[461:501], 75) == pytest.approx(truth, rel=1e-6)
    cosine = 1e-2 * 0.5 * (1 + np.cos(np.pi * steps / 1000))
    truth = cosine[501:576].mean() / cosine[461:501].mean()
    assert learning_rate_ahead(cosine[461:501], 75) == pytest.approx(truth, rel=0.02)
    assert learning_rate_ahead([], 75) == learning_rate_ahead([0.0, 0.0], 75) == 1.0
    assert learning_rate_ahead(linear[-40:], 75) >= 0.0


def flight(slope=-0.01, fall=0.3):
    return Flight(Jump("linear", 5.0), 0, 0.0, -fall, slope, log_best=0.0)


def test_pace():
    pace = Pace(HybridTrainerConfig())
    assert pace.horizon(flight(fall=0.3)) == 30
    assert pace.horizon(flight(fall=0.01)) == 15
    assert pace.horizon(flight(fall=9.0)) == 75
    assert pace.horizon(flight(slope=0.1)) == 75
    assert [pace.back_off() for _ in range(6)] == [50, 100, 200, 400, 800, 800]
    assert pace.patience == MOST_PATIENCE
    pace.reward(flight(), progress=1.0, spent=16, probes=9)
    assert pace.patience == MOST_PATIENCE // 2
    assert pace.wait == 50
    assert pace.worth == pytest.approx(84.0)
    pace.reward(flight(), progress=0.0, spent=16, probes=9)
    assert pace.wait == 50 * MOST_PATIENCE // 2
    assert pace.arm_values["linear"] == pytest.approx((84.0 - 16.0) / 2)
    other = Pace(HybridTrainerConfig())
    other.load_state_dict(pace.state_dict())
    assert vars(other) == vars(pace)
    assert math.isnan(Pace(HybridTrainerConfig()).worth)
