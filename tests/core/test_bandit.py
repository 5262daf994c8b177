"""LinUCB against an explicit weighted ridge solution, and what holds for all inputs."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plays import as_array, discounts, history, names, steady

from hybridcore.bandit import LinUCB


class Oracle:
    """All plays kept in a list; every answer solves the weighted ridge problem from nothing."""

    def __init__(self, arms, dimension, exploration, ridge, discount, period):
        self.arms, self.dimension = arms, dimension
        self.exploration, self.ridge = exploration, ridge
        self.discount, self.period = discount, period
        self.plays = []

    def update(self, arm, context, reward):
        self.plays.append((arm, np.array(context), reward))

    def weight(self, s):
        """Of play `s`: the discount is applied after every whole `period` of updates."""
        ticks = len(self.plays) // self.period - s // self.period
        return self.discount ** (self.period * ticks)

    def values(self, context):
        out = {}
        for arm in self.arms:
            design = self.ridge * np.eye(self.dimension)
            response = np.zeros(self.dimension)
            for s, (played, x, reward) in enumerate(self.plays):
                if played == arm:
                    design = design + self.weight(s) * np.outer(x, x)
                    response = response + self.weight(s) * reward * x
            mean = context @ np.linalg.solve(design, response)
            variance = context @ np.linalg.solve(design, context)
            out[arm] = (mean, self.exploration * math.sqrt(variance))
        return out

    def select(self, context):
        bounds = [sum(value) for value in self.values(context).values()]
        return self.arms[int(np.argmax(bounds))]


# -- exactness ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("dimension", "count"), [(1, 2), (4, 3), (12, 5)])
@pytest.mark.parametrize(
    ("ridge", "discount"), [(1.0, 1.0), (0.05, 0.99), (7.0, 0.96), (0.5, 0.9), (2.0, 0.3)]
)
def test_equals_the_explicit_solution_after_every_update(seed, dimension, count, ridge, discount):
    rng = np.random.default_rng([seed, dimension])
    arms = names(count)
    bandit = LinUCB(arms, dimension, exploration=0.7, ridge=ridge, discount=discount)
    oracle = Oracle(arms, dimension, 0.7, ridge, discount, bandit.period)
    for step in range(90):
        context = rng.normal(size=dimension)
        expected = as_array(oracle.values(context))
        np.testing.assert_allclose(as_array(bandit.values(context)), expected, rtol=0, atol=1e-8)
        bounds = np.sort(expected.sum(axis=1))
        if bounds[-1] - bounds[-2] > 1e-7:
            assert bandit.select(context) == oracle.select(context)
        # The last arm stays cold for a while, then is played like the others.
        arm = arms[rng.integers(count - (step < 50))]
        reward = float(rng.normal())
        bandit.update(arm, context, reward)
        oracle.update(arm, context, reward)


@pytest.mark.parametrize("discount", [0.2, 0.9, 0.93])
def test_a_strong_discount_is_applied_at_every_update(discount):
    assert LinUCB(names(2), 1, discount=discount).period == 1


@pytest.mark.parametrize("discount", [0.94, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0])
def test_a_tick_takes_away_a_tenth_at_most(discount):
    period = LinUCB(names(2), 1, discount=discount).period
    assert discount**period >= 0.9 * (1 - 1e-12)
    assert period == 64 or discount ** (period + 1) < 0.9


@pytest.mark.parametrize("discount", [1.0, 0.999, 0.99])
def test_rounding_does_not_grow_over_many_updates(discount):
    rng = np.random.default_rng(5)
    total, dimension, arms = 100_000, 8, names(3)
    bandit = LinUCB(arms, dimension, discount=discount)
    contexts = rng.normal(size=(total, dimension)) * np.geomspace(1.0, 1e-2, dimension)
    played = rng.integers(3, size=total)
    rewards = contexts @ np.arange(dimension) / dimension + rng.normal(size=total)
    for i, context, reward in zip(played.tolist(), contexts, rewards.tolist(), strict=True):
        bandit.update(arms[i], context, reward)
    ticks = total // bandit.period - np.arange(total) // bandit.period
    weights = discount ** (bandit.period * ticks.astype(float))
    probe = rng.normal(size=dimension)
    for i, value in enumerate(bandit.values(probe).values()):
        x, r, w = contexts[played == i], rewards[played == i], weights[played == i]
        design = np.eye(dimension) + (x * w[:, None]).T @ x
        mean = probe @ np.linalg.solve(design, (w * r) @ x)
        width = math.sqrt(probe @ np.linalg.solve(design, probe))
        np.testing.assert_allclose(value, (mean, width), rtol=0, atol=1e-9)


@pytest.mark.parametrize("ridge", [1.0, 0.3])
def test_agrees_with_mabwiser_step_for_step(ridge):
    mab = pytest.importorskip("mabwiser.mab", reason="mabwiser is not installed")
    rng = np.random.default_rng(11)
    arms, dimension = names(4), 6
    truth = rng.normal(size=(4, dimension)) / math.sqrt(dimension)
    bandit = LinUCB(arms, dimension, exploration=0.8, ridge=ridge, discount=1.0)
    other = mab.MAB(arms, mab.LearningPolicy.LinUCB(alpha=0.8, l2_lambda=ridge))
    # Every arm is played once first: mabwiser takes the ridge for its inverse on an unplayed arm.
    first = rng.normal(size=(4, dimension))
    rewards = (truth * first).sum(axis=1)
    other.fit(arms, rewards, first)
    for arm, context, reward in zip(arms, first, rewards, strict=True):
        bandit.update(arm, context, reward)
    chosen = set()
    for _ in range(300):
        context = rng.normal(size=dimension)
        expected = other.predict_expectations([context])
        got = {arm: sum(value) for arm, value in bandit.values(context).items()}
        assert got == pytest.approx(expected, abs=1e-9)
        arm = bandit.select(context)
        assert arm == other.predict([context])
        chosen.add(arm)
        reward = float(truth[arms.index(arm)] @ context + 0.1 * rng.normal())
        bandit.update(arm, context, reward)
        other.partial_fit([arm], [reward], [context])
    assert chosen == set(arms)


# -- invariants -----------------------------------------------------------------------------------


@steady
@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.integers(1, 9), discounts, st.randoms())
def test_permuting_the_arms_permutes_the_result(seed, count, dimension, discount, random):
    arms = names(count)
    shuffled = random.sample(arms, count)
    one = LinUCB(arms, dimension, discount=discount)
    two = LinUCB(shuffled, dimension, discount=discount)
    for i, context, reward in history(seed, count, dimension, 40):
        a, b = one.values(context), two.values(context)
        assert list(b) == shuffled
        for arm in arms:
            assert a[arm] == pytest.approx(b[arm], abs=1e-12)
        bounds = sorted(sum(value) for value in a.values())
        if bounds[-1] - bounds[-2] > 1e-9:
            assert one.select(context) == two.select(context)
        one.update(arms[i], context, reward)
        two.update(arms[i], context, reward)


@steady
@given(st.integers(0, 2**32 - 1), discounts, st.integers(-3, 3), st.integers(-3, 3))
def test_units_of_reward_and_context(seed, discount, reward_power, context_power):
    reward_unit, context_unit = 2.0**reward_power, 2.0**context_power
    plain = LinUCB(names(3), 4, discount=discount)
    # Contexts and ridge in other units are the same problem, and rewards scale the means alone.
    scaled = LinUCB(names(3), 4, ridge=context_unit**2, discount=discount)
    for i, context, reward in history(seed, 3, 4, 40):
        arm = plain.arms[i]
        plain.update(arm, context, reward)
        scaled.update(arm, context_unit * context, reward_unit * reward)
        expected = as_array(plain.values(context)) * [reward_unit, 1.0]
        got = as_array(scaled.values(context_unit * context))
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-10)


@steady
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), discounts, st.sampled_from([1e-3, 1.0, 1e3]))
def test_a_play_narrows_its_arm_and_no_width_is_negative(seed, dimension, discount, ridge):
    bandit = LinUCB(names(3), dimension, ridge=ridge, discount=discount)
    for i, context, reward in history(seed, 3, dimension, 60):
        arm = bandit.arms[i]
        before = bandit.values(context)
        bandit.update(arm, context, reward)
        after = bandit.values(context)
        # A tick takes away a share of all that was learned before, which may be more than one play.
        if bandit.discount == 1.0 or bandit.state_dict()["since_tick"] > 0:
            assert after[arm][1] < before[arm][1]
        for other in bandit.arms:
            assert 0.0 <= after[other][1] <= np.linalg.norm(context) / math.sqrt(ridge) * (1 + 1e-9)
            if other != arm:
                assert after[other][1] >= before[other][1] * (1 - 1e-9)


def test_exploration_scales_the_width_and_zero_follows_the_mean():
    wide, none = LinUCB(names(3), 4, exploration=2.5), LinUCB(names(3), 4, exploration=0.0)
    plain = LinUCB(names(3), 4)
    for i, context, reward in history(1, 3, 4, 50):
        for bandit in (wide, none, plain):
            bandit.update(bandit.arms[i], context, reward)
        expected = as_array(plain.values(context))
        np.testing.assert_allclose(as_array(wide.values(context)), expected * [1.0, 2.5])
        assert as_array(none.values(context)).tolist() == (expected * [1.0, 0.0]).tolist()
        assert none.select(context) == none.arms[int(np.argmax(expected[:, 0]))]


def test_an_arm_left_alone_returns_to_its_prior():
    bandit = LinUCB(names(3), 3, exploration=0.5, ridge=4.0, discount=0.99)
    context = np.array([1.0, -2.0, 0.5])
    for _ in range(100):
        bandit.update("arm-1", context, 1.0)
    mean, least = bandit.values(context)["arm-1"]
    assert mean == pytest.approx(1.0, abs=0.05)
    widths, means = [], []
    for _ in range(2000):
        bandit.update("arm-0", context, 0.0)
        mean, width = bandit.values(context)["arm-1"]
        means.append(mean)
        widths.append(width)
    assert least < widths[100] < widths[500] < widths[-1]
    assert (np.diff(widths) >= -1e-12).all()
    assert (np.diff(means) <= 1e-12).all()
    assert widths[-1] == pytest.approx(0.5 * np.linalg.norm(context) / 2.0, rel=1e-6)
    assert means[-1] == pytest.approx(0.0, abs=1e-6)


def test_without_discount_nothing_fades():
    bandit = LinUCB(names(3), 2, discount=1.0)
    bandit.update("arm-1", [1.0, 1.0], 1.0)
    before = bandit.values([1.0, 0.0])["arm-1"]
    for _ in range(500):
        bandit.update("arm-0", [1.0, 1.0], 0.0)
    assert bandit.values([1.0, 0.0])["arm-1"] == pytest.approx(before, abs=1e-12)
