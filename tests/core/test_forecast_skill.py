"""The skill harness and its baselines on series with known answers."""

import math
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
here = "the source tree is not here: this runs on the wheel"
harness = pytest.importorskip("benchmarks.forecast_skill", reason=here)
forecasters = pytest.importorskip("benchmarks.forecasters", reason=here)
recordings = pytest.importorskip("benchmarks.recordings", reason=here)

STEPS = 400


def recording(logs, name="run", workload="made up", batch=32):
    # float32 is what recordings hold; the known answers below are made from what is left.
    loss = np.exp(np.asarray(logs)).astype(np.float32)
    rest = np.ones_like(loss)
    return recordings.Recording(name, workload, {"batch": batch}, loss, rest, rest)


def fed(forecaster, logs):
    for y in logs:
        forecaster.observe(math.exp(y), 1.0, 1.0)
    return forecaster


class Fixed:
    """Forecasts its own series, moved by a bias, with a fixed spread."""

    def __init__(self, logs, bias=0.0, std=1.0):
        self.logs, self.bias, self.std, self.count = logs, bias, std, 0

    def observe(self, loss, gradient_norm, learning_rate):
        assert math.isclose(math.log(loss), self.logs[self.count], abs_tol=1e-6)
        self.count += 1

    def forecast(self, horizon):
        mean = self.logs[self.count : self.count + horizon] + self.bias
        return mean, np.full(horizon, self.std)


def noisy(seed=0, steps=STEPS, std=0.3):
    return std * np.random.default_rng(seed).standard_normal(steps)


# -- the harness --------------------------------------------------------------------------------


def test_windows_lie_in_the_second_half_and_leave_room_ahead():
    starts = list(harness.windows(1000))
    assert starts[0] == 500
    assert set(np.diff(starts)) == {40}
    assert starts[-1] + 75 + harness.HALF_WIDTH <= 1000 < starts[-1] + 40 + 86
    assert list(harness.windows(100)) == []


def test_the_error_is_the_distance_to_the_series():
    logs = noisy()
    scores = harness.score(lambda others: Fixed(logs, bias=0.25), [recording(logs)])
    for horizon, of_it in scores.items():
        assert of_it.covered.shape == (len(harness.windows(STEPS)), horizon)
        np.testing.assert_allclose(of_it.raw, 0.25, atol=1e-6)


def test_the_error_against_the_moving_average_is_that_of_an_obvious_one():
    logs = noisy(1)
    truth = np.array([logs[max(0, k - 10) : k + 11].mean() for k in range(STEPS)])
    scores = harness.score(lambda others: Fixed(logs), [recording(logs)])
    for horizon, of_it in scores.items():
        expected = [
            math.sqrt(np.mean((truth - logs)[start : start + horizon] ** 2))
            for start in harness.windows(STEPS)
        ]
        np.testing.assert_allclose(of_it.smooth, expected, rtol=1e-4)


def test_a_forecaster_sees_what_came_before_and_nothing_else():
    seen = []

    class Watching(Fixed):
        def forecast(self, horizon):
            seen.append((self.count, horizon))
            return super().forecast(horizon)

    logs = noisy(2)
    harness.score(lambda others: Watching(logs), [recording(logs)])
    assert seen == [(k, h) for k in harness.windows(STEPS) for h in harness.HORIZONS]


def test_the_runs_of_its_own_workload_are_held_out():
    logs = noisy(3)
    runs = [recording(logs, n, w) for n, w in (("a", "x"), ("b", "x"), ("c", "y"))]
    given_to = []

    def make(others):
        given_to.append([other.name for other in others])
        return Fixed(logs)

    harness.score(make, runs)
    assert given_to == [["c"], ["c"], ["a", "b"]]


def test_a_perfect_gaussian_forecaster_covers_and_is_calibrated():
    steps, std = 20_000, 0.15
    logs = noisy(4, steps, std)
    known = harness.KnownSignal(np.zeros(steps), std)
    scores = harness.score(lambda others: known, [recording(logs)])[75]
    figures = harness.compare(scores, {"persistence": scores})
    assert figures["coverage"] == pytest.approx(0.90, abs=0.01)
    assert figures["calibration_error"] < 0.015
    # A spread of half the truth: 1.645 / 2 standard deviations cover 59 %.
    mean = Fixed(np.zeros(steps), std=std / 2)
    mean.observe = lambda *step: setattr(mean, "count", mean.count + 1)
    narrow = harness.score(lambda others: mean, [recording(logs)])[75]
    assert narrow.covered.mean() == pytest.approx(0.589, abs=0.015)


def test_calibration_error_of_known_bins():
    confidence = np.array([0.05, 0.05, 0.95, 0.95, 1.0])
    assert harness.calibration_error(confidence, np.array([0, 0, 1, 1, 1])) == pytest.approx(
        (2 * 0.05 + abs(2.9 - 3.0)) / 5
    )
    assert harness.calibration_error(np.ones(4), np.zeros(4)) == 1.0
    # Right on average within a bin is calibrated.
    assert harness.calibration_error(np.full(10, 0.3), np.arange(10) < 3) == pytest.approx(0.0)


@settings(deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60))
def test_calibration_error_equals_a_loop_over_bins(pairs):
    confidence, hit = np.array([p for p, _ in pairs]), np.array([h for _, h in pairs])
    total = 0.0
    for k in range(10):
        inside = [i for i, p in enumerate(confidence) if min(int(p * 10), 9) == k]
        if inside:
            total += abs(confidence[inside].mean() - hit[inside].mean()) * len(inside)
    assert harness.calibration_error(confidence, hit) == pytest.approx(total / len(pairs))


def scores_of(raw, runs):
    raw = np.array(raw)
    none = np.zeros((len(raw), 5))
    return harness.Scores(runs, ["w"] * len(raw), raw, raw, none, none, none)


def test_shares_ratios_and_won_runs_of_known_errors():
    runs = ["a", "a", "b", "b"]
    mine = scores_of([1.0, 1.0, 1.0, 1.0], runs)
    figures = harness.compare(
        mine,
        {
            "persistence": scores_of([2.0, 2.0, 2.0, 0.5], runs),
            "linear": scores_of([2.0, 0.5, 1.0, 0.5], runs),
            "power law": scores_of([4.0, 4.0, 4.0, 4.0], runs),
            "smoothed": scores_of([0.5, 4.0, 4.0, 4.0], runs),
        },
    )["raw"]
    # A tie is no win.
    assert figures["beats"] == {
        "persistence": 0.75,
        "linear": 0.25,
        "power law": 1.0,
        "smoothed": 0.75,
    }
    assert figures["beats_plain"] == 0.25
    assert figures["beats_all"] == 0.0
    assert figures["error_ratio"]["persistence"] == 0.5
    assert figures["error_ratio"]["power law"] == 0.25
    # By run: mean squares (4, 2.1) against 1, and (2.1, 0.6) against 1.
    assert figures["runs_won"]["persistence"] == 1.0
    assert figures["runs_won"]["linear"] == 0.5


def test_nothing_is_certain_to_win_against_noise():
    # What `ceiling` shows: of white noise about 0, the mean over five steps is often nearer to a
    # line through 50 values than to the truth. P(|n| < |n - d|) for n ~ N(0, 1/5) and
    # d ~ N(0, s^2), s the error of the line: half plus atan(s sqrt(5) / 2) / pi.
    logs = noisy(5, 30_000)
    runs = [recording(logs)]
    known = harness.score(lambda o: harness.KnownSignal(np.zeros(30_000), 0.3), runs)[5]
    line = harness.score(lambda o: forecasters.LinearTrend(), runs)[5]
    t = np.arange(-49.0, 1.0)
    s = math.sqrt(1 / 50 + (3.0 - t.mean()) ** 2 / ((t - t.mean()) ** 2).sum())
    expected = 0.5 + math.atan(s * math.sqrt(5) / 2) / math.pi
    assert 0.55 < expected < 0.65
    assert np.mean(known.raw < line.raw) == pytest.approx(expected, abs=0.06)


def test_the_ceiling_leaves_out_full_batch_runs_and_repeats_exactly():
    trend = np.linspace(2.0, 0.0, STEPS)
    runs = [
        recording(trend + noisy(6), "noisy", "a"),
        recording(trend, "smooth", "b", batch=0),
    ]
    first, second = harness.ceiling(runs), harness.ceiling(runs)
    assert first == second
    assert first["75"]["windows"] == harness.DRAWS * len(harness.windows(STEPS))
    assert first["75"]["raw"]["beats"]["persistence"] > 0.9


def test_skill_repeats_exactly_and_never_compares_with_itself():
    runs = [recording(noisy(7) - np.log1p(np.arange(STEPS)))]
    judged = {"mixture": harness.FORECASTERS["mixture"]}
    first = harness.skill(judged, runs)
    assert first == harness.skill(judged, runs)
    assert set(first) == {*harness.BASELINES, "mixture"}
    for name, by_horizon in first.items():
        assert set(by_horizon["5"]["raw"]["beats"]) == set(harness.BASELINES) - {name}


# -- the forecasters ----------------------------------------------------------------------------


def test_lines_continue_a_line_exactly():
    logs = 1.0 - 0.01 * np.arange(200)
    expected = 1.0 - 0.01 * np.arange(200, 275)
    for name in ("linear", "discounted"):
        mean, std = fed(harness.BASELINES[name]([]), logs).forecast(75)
        np.testing.assert_allclose(mean, expected, atol=1e-7)
        assert (std < 1e-4).all()


def test_the_line_is_that_of_polyfit_and_its_spread_that_of_scipy():
    from scipy import stats

    logs = noisy(8, 90)
    mean, std = fed(forecasters.LinearTrend(), logs).forecast(10)
    t, y, ahead = np.arange(50), logs[-50:], np.arange(50, 60)
    np.testing.assert_allclose(mean, np.polyval(np.polyfit(t, y, 1), ahead), atol=1e-9)
    fit = stats.linregress(t, y)
    noise = fit.stderr * math.sqrt(((t - t.mean()) ** 2).sum())
    level = fit.stderr * math.sqrt(((t - t.mean()) ** 2).sum() / 50)
    expected = np.sqrt(noise**2 + level**2 + (fit.stderr * (ahead - t.mean())) ** 2)
    np.testing.assert_allclose(std, expected, rtol=1e-9)


@pytest.mark.parametrize(("a", "b", "c"), [(0.1, 3.0, 0.7), (0.5, 1.0, 0.3), (1e-4, 2.0, 1.5)])
def test_the_power_law_is_found(a, b, c):
    def law(k):
        return np.log(a + b * k**-c)

    mean, std = fed(forecasters.PowerLaw(), law(np.arange(1.0, 501.0))).forecast(75)
    np.testing.assert_allclose(mean, law(np.arange(501.0, 576.0)), atol=1e-6)
    assert (std < 1e-6).all()


def test_levels():
    logs = noisy(9, 300)
    mean, std = fed(forecasters.Persistence(), logs).forecast(3)
    assert mean == pytest.approx([logs[-1]] * 3)
    # The difference of two draws has twice their variance.
    np.testing.assert_allclose(std, 0.3 * math.sqrt(2), rtol=0.15)
    mean, _ = fed(forecasters.Smoothed(0.1), logs).forecast(3)
    level = logs[0]
    for count, y in enumerate(logs[1:], start=2):
        level += max(0.1, 1 / count) * (y - level)
    assert mean == pytest.approx([level] * 3)


uncompiled = pytest.mark.skipif(numba.config.DISABLE_JIT, reason="takes minutes uncompiled")
every_forecaster = pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, id=name, marks=[uncompiled] if name == "rssm" else [])
        for name, make in (harness.BASELINES | harness.FORECASTERS).items()
    ],
)


@every_forecaster
def test_forecasts_have_their_shape_from_the_first_step(make):
    forecaster = make([])
    for step, y in enumerate(noisy(11, 60)):
        forecaster.observe(math.exp(y), 1.0, 1.0)
        if step in (0, 1, 2, 9, 10, 59):
            for horizon in (1, 5, 100):
                mean, std = forecaster.forecast(horizon)
                assert mean.shape == std.shape == (horizon,)
                assert np.isfinite(mean).all()
                assert (std >= 0.0).all()


@every_forecaster
def test_asking_changes_no_later_answer(make):
    logs = noisy(12, 200)
    asked, silent = make([]), make([])
    for y in logs:
        for forecaster in (asked, silent):
            forecaster.observe(math.exp(y), 1.0, 1.0)
        asked.forecast(7)
    for mine, other in zip(asked.forecast(75), silent.forecast(75), strict=True):
        np.testing.assert_array_equal(mine, other)
