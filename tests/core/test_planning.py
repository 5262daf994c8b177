"""The decision rule's parts: confidence in a path, the rate ahead, the pace."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcore import HybridTrainerConfig
from hybridcore.extrapolation import EXTRAPOLATORS
from hybridcore.planning import (
    ARMS,
    MOST_PATIENCE,
    Flight,
    Jump,
    Pace,
    learning_rate_ahead,
    missed_scales,
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
    np.testing.assert_allclose(jump.coefficients(matrix[None], 0.0)[0], start, atol=1e-12)
    for share in (0.2, 0.7, 1.0):
        assert jump.coefficients(matrix[None], share)[0].sum() == pytest.approx(1.0, abs=1e-6)


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
    return Flight(Jump("linear", 5.0), 0, 0, 0.0, -fall, slope, log_best=0.0)


def horizon(pace, slope=-0.01, fall=0.3):
    return pace.horizon(pace.steps_for(fall, slope))


def test_pace():
    pace = Pace(HybridTrainerConfig())
    assert horizon(pace, fall=0.3) == 30
    assert horizon(pace, fall=0.01) == 0
    assert horizon(pace, fall=9.0) == 75
    assert horizon(pace, slope=0.1) == 75
    assert [pace.back_off(50) for _ in range(6)] == [50, 100, 200, 400, 800, 800]
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


# -- confidence -----------------------------------------------------------------------------------


def orbit(rates, m, spacing, seed):
    """Snapshots of ``theta' = A theta`` in the basis where A is diagonal."""
    start = np.random.default_rng(seed).normal(size=len(rates))
    return np.array([rates ** (spacing * k) * start for k in range(m)])


@pytest.mark.parametrize("m", [4, 6, 10])
@pytest.mark.parametrize("seed", range(3))
def test_a_slow_smooth_path_is_trusted_by_every_forecaster(m, seed):
    slow = path_confidence(gram(orbit(np.linspace(0.999, 0.9995, 30), m, 8, seed)))
    assert set(slow) == set(ARMS)
    assert min(slow.values()) > 0.95


@pytest.mark.parametrize("m", [4, 6, 10])
def test_a_random_walk_is_trusted_by_none(m):
    for seed in range(10):
        walk = np.random.default_rng([m, seed]).normal(size=(m, 3000)).cumsum(axis=0)
        confidence = path_confidence(gram(walk))
        assert max(confidence.values()) < 0.1, seed


def test_a_path_that_turns_back_is_not_trusted():
    there_and_back = np.array([[0.0], [1.0], [2.0], [3.0], [2.0], [1.0]])
    assert path_confidence(gram(there_and_back))["linear"] == 0.0


def test_the_worst_of_the_two_forecasts_counts():
    # One interval ahead the line meets the last point exactly, two ahead it misses it by far.
    stumbled = np.array([[0.0], [1.0], [2.0], [3.0], [2.0], [2.5]])
    assert path_confidence(gram(stumbled))["linear"] == 0.0


@settings(deadline=None, derandomize=True, database=None, max_examples=100)
@given(st.integers(0, 2**32 - 1), st.integers(4, 10), st.integers(-60, 60), st.booleans())
def test_confidence_is_a_probability_at_any_scale(seed, m, power, walk):
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(m, 20))
    matrix = gram(points.cumsum(axis=0) if walk else points)
    confidence = path_confidence(matrix)
    assert all(0.0 <= value <= 1.0 for value in confidence.values())
    # A power of two scales without rounding.
    assert path_confidence(matrix * 4.0**power) == confidence
    assert confidence["anderson"] == max(v for k, v in confidence.items() if k != "anderson")


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e3, 1e12])
def test_the_unit_of_the_parameters_does_not_matter(scale):
    expected = path_confidence(gram(smooth()))
    assert path_confidence(gram(scale * smooth())) == pytest.approx(expected, abs=1e-6)
    assert min(expected.values()) < max(expected.values())


# -- jumps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARMS)
@pytest.mark.parametrize("reach", [0.0, 3.0, 70.0])
def test_a_jump_ends_where_its_extrapolator_points(name, reach):
    matrix = gram(smooth())
    jump = Jump(name, reach)
    newest = np.zeros(6)
    newest[-1] = 1.0
    assert jump.coefficients(matrix[None], 0.0)[0].tolist() == newest.tolist()
    expected = EXTRAPOLATORS[name](matrix, reach)
    np.testing.assert_allclose(jump.coefficients(matrix[None])[0], expected, rtol=1e-12, atol=1e-12)
    for share in np.linspace(0.0, 1.0, 7):
        size = np.abs(expected).max()
        total = jump.coefficients(matrix[None], share)[0].sum()
        assert total == pytest.approx(1.0, abs=1e-14 * 6 * max(1.0, size))


def test_a_forecast_bends_and_a_target_is_approached_straight():
    points = orbit(np.array([0.5, 0.9]), 6, 1, 0)
    matrix = gram(points)
    half = Jump("dmd", 4.0).coefficients(matrix[None], 0.5)[0] @ points
    # Half of the way in time is where the path is by then.
    np.testing.assert_allclose(half, orbit(np.array([0.5, 0.9]), 8, 1, 0)[-1], atol=1e-6)
    target = Jump("anderson", 4.0).coefficients(matrix[None], 1.0)[0] @ points
    middle = Jump("anderson", 4.0).coefficients(matrix[None], 0.5)[0] @ points
    np.testing.assert_allclose(middle, (points[-1] + target) / 2.0, atol=1e-12)


def test_a_flight_expects_the_way_between_start_and_target():
    way = flight(fall=0.4)
    assert [way.expected(share) for share in (0.0, 0.5, 1.0)] == pytest.approx([0.0, -0.2, -0.4])


# -- learning rate --------------------------------------------------------------------------------


def cosine(total):
    return 0.5 * (1.0 + np.cos(np.pi * np.arange(total + 1) / total))


@pytest.mark.parametrize("progress", [0.0, 0.1, 0.3, 0.5, 0.7, 0.85])
def test_a_cosine_schedule_is_met_to_a_few_percent(progress):
    rates = cosine(3000)
    now = 40 + int(progress * 2900)
    truth = rates[now : now + 75].mean() / rates[now - 40 : now].mean()
    assert learning_rate_ahead(rates[now - 40 : now], 75) == pytest.approx(truth, rel=0.03)


def test_a_schedule_that_ends_inside_the_horizon_is_not_continued_below_zero():
    rates = np.maximum(0.0, 1.0 - np.arange(200) / 100.0)
    truth = rates[80:155].mean() / rates[40:80].mean()
    assert learning_rate_ahead(rates[40:80], 75) == pytest.approx(truth, rel=0.01)


@pytest.mark.parametrize("rates", [[], [1e-3], [0.0] * 40, [math.nan] * 40, [1e-3, math.nan]])
def test_without_a_rate_nothing_is_scaled(rates):
    assert learning_rate_ahead(rates, 75) == 1.0


def test_a_warm_up_of_the_rate_is_continued_and_its_unit_does_not_matter():
    rising = np.arange(1.0, 41.0)
    truth = np.arange(41.0, 51.0).mean() / rising.mean()
    for unit in (1e-12, 1.0, 1e12):
        assert learning_rate_ahead(unit * rising, 10) == pytest.approx(truth)


# -- pace -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [HybridTrainerConfig(), HybridTrainerConfig.memory_saver()])
def test_a_horizon_stays_within_the_settings(config):
    for fall in (0.0, 1e-9, 0.05, 0.3, 5.0, 1e6):
        for slope in (-10.0, -0.01, -1e-12, 0.0, 0.3):
            for worth in (math.nan, 0.0, 33.3, 1e9):
                pace = Pace(config)
                pace.worth = worth
                steps = horizon(pace, slope, fall)
                assert isinstance(steps, int)
                assert 0 <= steps <= config.horizon


def test_a_jump_stands_for_what_it_is_worth_and_not_at_all_below_its_settling_steps():
    config = HybridTrainerConfig(min_full_steps=60)
    pace = Pace(config)
    assert config.snapshot_interval == 10
    worths = {0.05: 0, 0.099: 0, 0.101: 10, 0.2: 20, 0.744: 74, 3.0: 75}
    assert {fall: horizon(pace, fall=fall) for fall in worths} == worths
    # Where full steps make no progress, a jump that does is worth a whole horizon.
    assert horizon(pace, 0.0, 0.05) == config.horizon
    # What jumps turned out to be worth counts as much as what this one promises.
    pace.worth = 33.0
    assert horizon(pace, fall=0.05) == 33


def test_each_attempt_in_vain_doubles_the_wait_up_to_a_limit():
    pace = Pace(HybridTrainerConfig())
    assert [pace.back_off(16) for _ in range(7)] == [16, 32, 64, 128, 256, 256, 256]
    assert pace.back_off(50) == 800


def test_a_path_that_stays_irregular_is_looked_at_every_200_steps():
    pace, waits = Pace(HybridTrainerConfig()), []
    for _ in range(5):
        pace.look_later(taken=10)
        waits.append(pace.wait)
    assert waits == [60, 110, 210, 210, 210]


def test_a_horizon_shorter_than_the_interval_wins():
    config = HybridTrainerConfig(horizon=5, correction_interval=15)
    assert horizon(Pace(config)) == 5


def test_success_halves_the_patience_and_failure_doubles_it():
    pace = Pace(HybridTrainerConfig())
    seen = []
    for progress in [0.0, 0.0, 0.0, 3.0, 3.0, 3.0, 3.0, 0.0]:
        pace.reward(flight(), progress, 16, 9)
        seen.append((pace.patience, pace.wait))
    assert seen == [(2, 50), (4, 100), (8, 200), (4, 50), (2, 50), (1, 50), (1, 50), (2, 50)]


def test_progress_that_full_steps_would_have_made_as_well_is_no_success():
    # 16 full steps and 9 probes at a third are worth 19 full steps, a fall of 0.19.
    for progress, patience in ((0.191, 1), (0.189, 2)):
        pace = Pace(HybridTrainerConfig())
        pace.reward(flight(slope=-0.01), progress, 16, 9)
        assert pace.patience == patience


def test_an_arm_is_worth_the_full_steps_that_it_saved():
    pace = Pace(HybridTrainerConfig())
    pace.reward(flight(slope=-0.01), 0.5, 16, 9)
    assert pace.arm_values == {"linear": pytest.approx(34.0)}
    assert pace.worth == pytest.approx(34.0)
    pace.reward(flight(slope=-0.01), 0.0, 3, 6)
    # A failure costs the arm what was spent; a horizon is never negative.
    assert pace.arm_values == {"linear": pytest.approx((34.0 - 3.0) / 2.0)}
    assert pace.worth == pytest.approx(17.0)


def test_a_fresh_pace_survives_a_checkpoint():
    pace = Pace(HybridTrainerConfig())
    state = json.loads(json.dumps(pace.state_dict()))
    other = Pace(HybridTrainerConfig())
    other.back_off(50)
    other.reward(flight(), 1.0, 16, 9)
    other.load_state_dict(state)
    assert json.dumps(other.state_dict()) == json.dumps(pace.state_dict())
    # The arms that were handed out are a copy.
    handed_out = other.state_dict()
    other.reward(flight(), 1.0, 16, 9)
    assert handed_out["arms"] == {}


def test_an_arm_is_rewarded_for_what_it_is_better_than_the_others():
    pace = Pace(HybridTrainerConfig())
    way = flight(slope=-0.01)
    way.promise = 30.0
    # The first has nothing to be better than.
    assert pace.reward(way, 0.62, 16, 9) == 0.0
    assert pace.surprise == pytest.approx(math.log(63.0 / 31.0))
    assert pace.reward(way, 0.62, 16, 9) == pytest.approx(0.0)
    assert pace.reward(way, 0.0, 16, 9) == pytest.approx(math.log(1.0 / 63.0))


# -- groups ---------------------------------------------------------------------------------------


def test_groups_are_scaled_about_the_newest_snapshot():
    grams = np.stack([gram(smooth()), 3.0 * gram(smooth())])
    plain = Jump("linear", 5.0).coefficients(grams)
    assert np.array_equal(plain[0], plain[1])
    got = Jump("linear", 5.0, (0.0, 2.0)).coefficients(grams)
    start = np.zeros(6)
    start[-1] = 1.0
    np.testing.assert_allclose(got[0], start, atol=1e-12)
    np.testing.assert_allclose(got[1] - start, 2.0 * (plain[1] - start), atol=1e-12)


def test_missed_scales_are_least_squares_factors_of_the_displacements():
    rng = np.random.default_rng(0)
    points = [np.cumsum(rng.normal(size=(6, 20)), axis=0) for _ in range(3)]
    grams = np.stack([p @ p.T for p in points])
    got = missed_scales(grams, "linear")
    for group, (scale, cosine) in zip(points, got, strict=True):
        # Forecast of the newest snapshot from the oldest four, two intervals ahead.
        predicted = 2.0 * (group[3] - group[0]) / 3.0
        actual = group[5] - group[3]
        assert scale == pytest.approx(np.linalg.lstsq(predicted[:, None], actual)[0][0])
        length = np.linalg.norm(predicted) * np.linalg.norm(actual)
        assert cosine == pytest.approx(predicted @ actual / length)


@pytest.mark.parametrize("excess", [0.0, 0.05, 0.1, 0.15])
def test_what_noise_explains_does_not_shorten_the_way(excess):
    ways = []
    for margin in (0.0, 0.02):
        flight = Flight(Jump("linear", 5.0), 30, 30, 0.0, -0.9, -0.03, log_best=0.0)
        seen = flight.expected(1.0 / 3.0) + excess + margin
        ways.append((flight.correct(10, seen, margin), flight.last))
    assert ways[0] == ways[1]
    assert (ways[0][1] == 30) == (excess <= 0.05)
