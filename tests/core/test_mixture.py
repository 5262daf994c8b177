"""The mixture of experts against an obvious one; it and the stacking on known series."""

import math

import numpy as np
import pytest
from scipy.optimize import curve_fit

from hybridcore.dynamics.mixture import ExpertMixture
from hybridcore.dynamics.stacking import Stacking
from hybridcore.kernels.cpu import experts as kernel

KNOTS = (1, 2, 3, 5, 8, 15, 25, 45, 75)


def noisy(seed, count, std=0.1):
    k = np.arange(1.0, count + 1.0)
    noise = std * np.random.default_rng(seed).standard_normal(count)
    return np.log(0.1 + 2.0 * k**-0.6) + noise


def fed(logs):
    model = ExpertMixture()
    for y in logs:
        model.observe(float(y))
    return model


# -- against the oracle -------------------------------------------------------------------------


def line_of(y, discount):
    """Mean of t and y, slope and shrunken slope of the discounted line; t = 0 is the newest."""
    t, weight = np.arange(1.0 - len(y), 1.0), discount ** np.arange(len(y) - 1.0, -1.0, -1.0)
    mean_t, mean_y = weight @ t / weight.sum(), weight @ y / weight.sum()
    if len(y) < 2:
        return mean_t, mean_y, 0.0, 0.0
    spread = weight @ (t - mean_t) ** 2
    slope = weight @ ((t - mean_t) * (y - mean_y)) / spread
    residual = weight @ (y - mean_y - slope * (t - mean_t)) ** 2
    variance = residual / (weight.sum() * (1.0 - 2.0 / max(len(y), 3))) / spread
    return mean_t, mean_y, slope, slope * max(1.0 - variance / slope**2, 0.0)


def law(parameters, step):
    return np.logaddexp(parameters[0], parameters[1] - parameters[2] * np.log(step))


class Oracle:
    """The experts from all losses so far; the law's parameters are taken from the kernel."""

    def __init__(self):
        self.y, self.level, self.offsets, self.law = [], 0.0, np.zeros(3), None
        self.said = []
        self.errors, self.misses = np.zeros((9, 17)), np.zeros(9)
        self.sums = np.zeros(9)

    def observe(self, y, parameters):
        for j, h in enumerate(KNOTS):
            if len(self.y) - h < 10:
                continue
            experts, mixed = self.said[len(self.y) - h]
            error = (experts[:, j] - y) ** 2
            if self.sums[j] > 5.0:
                best = max(self.errors[j].min() / self.sums[j], 1e-14)
                error = np.minimum(error, 9.0 * best)
            self.errors[j] = 0.97 * self.errors[j] + error
            self.misses[j] = 0.97 * self.misses[j] + abs(mixed[j] - y)
            self.sums[j] = 0.97 * self.sums[j] + 1.0
        self.y.append(y)
        count = len(self.y)
        self.level += max(0.03, 1.0 / count) * (y - self.level)
        if parameters is not None:
            if self.law is not None:
                self.offsets += law(self.law, count) - law(parameters, count)
            self.law = parameters
            miss = y - law(parameters, count)
            self.offsets += np.maximum([0.1, 0.03, 0.01], 1.0 / count) * (miss - self.offsets)
        experts = self.experts(np.array(KNOTS))
        self.said.append((experts, (self.weights() * experts.T).sum(axis=1)))

    def experts(self, leads):
        lines = [line_of(np.array(self.y), d) for d in (0.8, 0.95, 0.99)]
        rows = [np.full(len(leads), self.level)]
        rows += [my + slope * (leads - mt) for mt, my, slope, _ in lines]
        rows += [my + shrunken * (leads - mt) for mt, my, _, shrunken in lines]
        plain = rows[0] if self.law is None else law(self.law, len(self.y) + leads)
        rows.append(plain)
        rows += [plain + share * offset for share in (0.3, 0.6, 1.0) for offset in self.offsets]
        return np.array(rows)

    def weights(self):
        logs = np.log(self.errors / np.maximum(self.sums, 1e-9)[:, None] + 1e-14)
        logs -= logs.min(axis=1)[:, None]
        for _ in range(9):
            padded = np.vstack((logs[:1], logs, logs[-1:]))
            logs = 0.25 * padded[:-2] + 0.5 * padded[1:-1] + 0.25 * padded[2:]
        weights = np.exp(-20.0 * (logs - logs.min(axis=1)[:, None]))
        if self.law is not None:
            weights[:, 7] *= 30.0
        return weights / weights.sum(axis=1)[:, None]


def test_it_is_the_mixture_of_an_obvious_one():
    series = noisy(0, 160)
    series[100] += 3.0  # one wild batch
    model, oracle = ExpertMixture(), Oracle()
    for count, y in enumerate(series, start=1):
        model.observe(float(y))
        parameters = model.state_dict()["state"][[kernel.LOG_FLOOR, kernel.LOG_SCALE, kernel.DECAY]]
        oracle.observe(y - series[0], parameters if count >= 20 else None)
        means, stds = model.at_knots()
        np.testing.assert_allclose(means, series[0] + oracle.said[-1][1], rtol=1e-7, atol=1e-8)
        known = (oracle.sums > 0.0) & (count >= 10)
        np.testing.assert_array_equal(np.isfinite(stds), known)
        expected = math.sqrt(math.pi / 2.0) * oracle.misses[known] / oracle.sums[known]
        np.testing.assert_allclose(stds[known], expected, rtol=1e-6)
    for j, h in enumerate(KNOTS):
        assert model.forecast(h).mean == pytest.approx(means[j], rel=1e-12)
        assert model.forecast(h).std == pytest.approx(stds[j], rel=1e-12)
    # Between the knots weights go over the log of the lead, beyond the last they stay.
    share = math.log(20 / 15) / math.log(25 / 15)
    weights = (1.0 - share) * oracle.weights()[5] + share * oracle.weights()[6]
    between = series[0] + weights @ oracle.experts(np.array([20]))[:, 0]
    assert model.forecast(20).mean == pytest.approx(between, abs=1e-8)
    beyond = series[0] + oracle.weights()[-1] @ oracle.experts(np.array([500]))[:, 0]
    assert model.forecast(500).mean == pytest.approx(beyond, abs=1e-8)


@pytest.mark.parametrize("std", [0.0, 0.2])
def test_the_law_is_that_of_scipy(std):
    count = 600
    series = noisy(1, count, std)
    state = fed(series).state_dict()["state"]
    steps = np.arange(1.0, count + 1.0)

    def curve(k, floor, scale, decay):
        return law((floor, scale, decay), k)

    expected, _ = curve_fit(curve, steps, series, (-3.0, 1.0, 0.5))
    got = state[[kernel.LOG_FLOOR, kernel.LOG_SCALE, kernel.DECAY]]
    ours = series[0] + law(got, steps)
    # Steps share bins, so the fits are not quite the same.
    np.testing.assert_allclose(ours[1:], curve(steps, *expected)[1:], atol=0.01)


# -- on known series ------------------------------------------------------------------------------


def test_it_finds_the_expert_that_is_right():
    line = 5.0 - 0.02 * np.arange(475)
    model = fed(line[:400])
    for h in (1, 20, 75):
        assert model.forecast(h).mean == pytest.approx(line[399 + h], abs=1e-3)
    curve = 1.0 - 0.5 * np.log(np.arange(1.0, 876.0))
    model = fed(curve[:800])
    for h in (1, 20, 75):
        assert model.forecast(h).mean == pytest.approx(curve[799 + h], abs=1e-3)
    # Of pure noise the best forecast is its mean.
    model = fed(0.3 * np.random.default_rng(10).standard_normal(1500))
    for h in (1, 20, 75):
        forecast = model.forecast(h)
        assert abs(forecast.mean) < 0.12
        assert forecast.std == pytest.approx(0.3, rel=0.25)


def test_the_law_has_no_more_weight_than_others_before_it_knows_better():
    model = ExpertMixture()
    for count in range(1, kernel.SETTLING):
        model.observe(-0.05 * count)
        assert abs(model.mean(0.0) + 0.05 * count) < 0.017 * count
    # Where a restart has led the law has not seen yet: about half of the experts are of it.
    model = fed(noisy(2, 300, 0.01))
    before = model.mean(0.0)
    model.restart()
    for count in range(1, kernel.SETTLING):
        fall = 1.0 + 0.05 * count
        model.observe(before - fall)
        assert abs(model.mean(0.0) - before + fall) < 0.6 * fall


def test_after_a_restart_it_starts_from_the_new_level():
    model = fed(noisy(2, 300, 0.01))
    model.restart()
    assert model.forecast(5).std == math.inf
    for count in range(1, 13):
        model.observe(-7.0)
        assert math.isfinite(model.forecast(1).std) == (count >= kernel.SETTLING)
    assert model.forecast(0).mean == pytest.approx(-7.0, abs=0.1)
    assert model.forecast(75).mean == pytest.approx(-7.0, abs=0.3)


# -- stacking -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("truth", "expected"), [(1.0, 1.0), (0.5, 0.5), (0.0, 0.0), (-1.0, 0.0)])
def test_corrections_are_believed_as_far_as_they_were_right(truth, expected):
    rng = np.random.default_rng(0)
    stacking = Stacking((1, 4))
    corrections = rng.standard_normal((2000, 2))
    for k in range(2000):
        if k >= 4:
            # What the correction of 4 steps ago foretold, of a plain forecast of 2.
            stacking.settle(2.0 + truth * corrections[k - 4, 1] + 0.05 * rng.standard_normal())
        stacking.follow((2.0, 2.0), corrections[k])
    assert stacking.shares[1] == pytest.approx(expected, abs=0.03)
    assert stacking.shares[0] < 0.1
    assert stacking.share(4.0) == stacking.share(50.0) == stacking.shares[1]


def test_what_was_foretold_before_a_restart_is_not_judged():
    stacking = Stacking((2,))
    for _ in range(3):
        stacking.follow((0.0,), (1.0,))
    stacking.restart()
    for _ in range(2):
        stacking.settle(1.0)
        stacking.follow((0.0,), (1.0,))
    assert stacking.shares[0] == 0.0
    for _ in range(20):
        stacking.settle(1.0)
        stacking.follow((0.0,), (1.0,))
    assert stacking.shares[0] == pytest.approx(1.0)
