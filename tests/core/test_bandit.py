"""LinUCB against an explicit weighted ridge solution, another library, and what it is for."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcore.bandit import CONTEXT_LIMIT, NO_PREDICTION, REWARD_LIMIT, RIDGE_RANGE, LinUCB
from hybridcore.errors import CheckpointError

steady = settings(deadline=None, derandomize=True, database=None, max_examples=60)


def names(count):
    """`count` arms, the one that must be there in the middle."""
    arms = [f"arm-{i}" for i in range(count - 1)]
    return [*arms[: count // 2], NO_PREDICTION, *arms[count // 2 :]]


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


def as_array(values):
    return np.array(list(values.values()))


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


def history(seed, count, dimension, length):
    rng = np.random.default_rng(seed)
    for _ in range(length):
        yield int(rng.integers(count)), rng.normal(size=dimension), float(rng.normal())


discounts = st.sampled_from([1.0, 0.99, 0.96, 0.7])


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


# -- choices --------------------------------------------------------------------------------------


def test_ties_go_to_the_first_arm_that_is_allowed():
    bandit = LinUCB(["a", NO_PREDICTION, "b", "c"], 2)
    context = [1.0, 2.0]
    assert bandit.select(context) == "a"
    assert bandit.select(context, ["c", "b"]) == NO_PREDICTION
    assert bandit.select(context, ["c", "a"]) == "a"
    assert bandit.select(context, []) == NO_PREDICTION
    bandit.update("c", context, 5.0)
    assert bandit.select(context) == "c"
    assert bandit.select(context, {"a", "b"}) == "a"
    bandit.update("a", context, -5.0)
    bandit.update(NO_PREDICTION, context, -5.0)
    assert bandit.select(context, ("b", "a")) == "b"


def test_asking_changes_nothing_and_inputs_are_left_alone():
    bandit = LinUCB(names(3), 3)
    context = np.array([1e3, -1e3, 1.0])
    kept = context.copy()
    bandit.update("arm-0", context, 1.0)
    before = bandit.state_dict()
    bandit.select(context)
    bandit.values(context)
    assert context.tolist() == kept.tolist()
    assert_same_state(bandit.state_dict(), before)


def run(bandit, reward_of, steps, dimension, seed):
    """Play `steps` rounds; which arms were chosen, and the reward that each choice missed."""
    rng = np.random.default_rng(seed)
    chosen, missed = [], []
    for step in range(steps):
        context = rng.normal(size=dimension)
        context /= np.linalg.norm(context)
        expected = reward_of(step, context)
        arm = bandit.select(context)
        i = bandit.arms.index(arm)
        bandit.update(arm, context, expected[i] + 0.1 * rng.normal())
        chosen.append(arm)
        missed.append(expected.max() - expected[i])
    return chosen, np.array(missed)


@pytest.mark.parametrize("seed", range(3))
def test_regret_grows_slower_than_time_and_beats_uniform_choice(seed):
    truth = np.random.default_rng([seed, 1]).normal(size=(6, 5))
    bandit = LinUCB(names(6), 5, exploration=0.5, discount=1.0)
    _, missed = run(bandit, lambda _, x: truth @ x, 3000, 5, seed)
    contexts = np.random.default_rng(seed).normal(size=(3000, 5))
    contexts /= np.linalg.norm(contexts, axis=1)[:, None]
    rewards = contexts @ truth.T
    uniform = (rewards.max(axis=1) - rewards.mean(axis=1)).sum()
    assert missed.sum() < 0.1 * uniform
    # Twice the time in each stretch, and yet not twice the regret.
    first, second, third = missed[:750].sum(), missed[750:1500].sum(), missed[1500:].sum()
    assert second < 0.7 * first
    assert third < 0.7 * (first + second)


@pytest.mark.parametrize("seed", range(5))
def test_after_a_change_the_discounted_bandit_goes_over_to_the_better_arm(seed):
    def chosen(discount):
        rng = np.random.default_rng(seed)
        bandit = LinUCB([NO_PREDICTION, "jump"], 2, exploration=0.3, discount=discount)
        for step in range(700):
            context = [1.0, 0.2 * rng.normal()]
            arm = bandit.select(context)
            worth = 1.0 if step < 500 else -1.0
            bandit.update(arm, context, (arm == "jump") * worth + 0.1 * rng.normal())
            yield arm

    forgetful, faithful = list(chosen(0.95)), list(chosen(1.0))
    for arms in (forgetful, faithful):
        assert arms[400:500].count("jump") >= 90
    # The weight of 500 good jumps is 20; 14 bad ones turn the mean, fewer than twice as many the
    # bound, and an arm that lost is tried again every now and then.
    assert NO_PREDICTION in forgetful[500:528]
    assert forgetful[528:].count(NO_PREDICTION) >= 0.85 * 172
    # The one that forgets nothing still has its good memories.
    assert faithful[500:].count("jump") >= 180


def test_when_predicting_does_not_pay_it_settles_on_not_predicting():
    def reward_of(_, x):
        return np.array([-0.5, -0.3, 0.0, -0.2, -0.6])

    arms = names(5)
    assert arms[2] == NO_PREDICTION
    # Rewards do not depend on the context: its first entry is constant, as a model needs it.
    bandit = LinUCB(arms, 4, exploration=0.1, discount=0.99)
    rng = np.random.default_rng(0)
    chosen = []
    for step in range(600):
        context = np.concatenate(([1.0], 0.2 * rng.normal(size=3)))
        arm = bandit.select(context)
        bandit.update(arm, context, reward_of(step, context)[arms.index(arm)])
        chosen.append(arm)
    assert chosen[100:].count(NO_PREDICTION) >= 0.9 * 500


# -- state ----------------------------------------------------------------------------------------


def assert_same_state(one, two):
    assert one.keys() == two.keys()
    for key, value in one.items():
        if isinstance(value, np.ndarray):
            assert value.tobytes() == two[key].tobytes()
        else:
            assert value == two[key]


@pytest.mark.parametrize("discount", [1.0, 0.99, 0.9])
@pytest.mark.parametrize("length", [0, 7, 163])
def test_a_restored_bandit_goes_on_bitwise_the_same(discount, length):
    one, two = (LinUCB(names(5), 6, discount=discount) for _ in range(2))
    for i, context, reward in history(3, 5, 6, length):
        one.update(one.arms[i], context, reward)
    state = one.state_dict()
    two.load_state_dict(state)
    assert_same_state(two.state_dict(), state)
    for _, context, reward in history(4, 5, 6, 200):
        arm = one.select(context)
        assert two.select(context) == arm
        assert one.values(context) == two.values(context)
        one.update(arm, context, reward)
        two.update(arm, context, reward)
    assert_same_state(one.state_dict(), two.state_dict())
    # The one that was handed out did not change.
    again = LinUCB(names(5), 6, discount=discount)
    for i, context, reward in history(3, 5, 6, length):
        again.update(again.arms[i], context, reward)
    assert_same_state(again.state_dict(), state)


def test_a_state_survives_json():
    one, two = LinUCB(names(4), 3), LinUCB(names(4), 3)
    for i, context, reward in history(8, 4, 3, 37):
        one.update(one.arms[i], context, reward)
    state = one.state_dict()
    plain = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in state.items()}
    two.load_state_dict(json.loads(json.dumps(plain)))
    assert_same_state(two.state_dict(), state)


@pytest.mark.parametrize(
    ("broken", "match"),
    [
        ({"arms": [NO_PREDICTION, "arm-0", "arm-1"]}, "arms"),
        ({"gram": np.zeros((3, 4, 4))}, "gram"),
        ({"response": np.full((3, 2), math.nan)}, "response"),
        ({"inverse": np.full((3, 2, 2), math.inf)}, "inverse"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(broken, match):
    bandit = LinUCB(names(3), 2)
    bandit.update("arm-0", [1.0, 2.0], 1.0)
    before = bandit.state_dict()
    with pytest.raises(CheckpointError, match=match):
        bandit.load_state_dict(LinUCB(names(3), 2).state_dict() | broken)
    assert_same_state(bandit.state_dict(), before)


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_teaches_nothing_and_predicts_nothing(bad):
    bandit = LinUCB(names(3), 2)
    bandit.update("arm-0", [1.0, 2.0], 1.0)
    bandit.update(NO_PREDICTION, [1.0, 2.0], -1.0)
    assert bandit.select([1.0, 2.0], ["arm-0"]) == "arm-0"
    before = bandit.state_dict()
    bandit.update("arm-0", [1.0, bad], 1.0)
    bandit.update("arm-0", [1.0, 2.0], bad)
    assert_same_state(bandit.state_dict(), before)
    assert bandit.select([bad, 2.0]) == NO_PREDICTION
    assert bandit.select([bad, 2.0], ["arm-0"]) == NO_PREDICTION
    assert set(bandit.values([bad, 2.0]).values()) == {(0.0, 0.0)}


hostile = st.sampled_from([0.0, -0.0, 5e-324, 1e-200, 1.0, -1.0, 1e3, -1e3, 1e150, 1e300, -1e300])


@settings(steady, max_examples=100)
@given(
    st.lists(st.tuples(st.integers(0, 2), hostile, hostile, hostile, hostile), max_size=80),
    discounts,
    st.sampled_from(RIDGE_RANGE),
)
def test_huge_values_stay_finite(plays, discount, ridge):
    bandit = LinUCB(names(3), 3, ridge=ridge, discount=discount)
    for i, *context, reward in plays * 3:
        bandit.update(bandit.arms[i], context, reward)
        got = as_array(bandit.values(context))
        assert np.isfinite(got).all()
        assert (got[:, 1] >= 0.0).all()
        assert bandit.select(context) in bandit.arms


@pytest.mark.parametrize("discount", [1.0, 0.99])
def test_the_worst_contexts_for_long(discount):
    bandit = LinUCB(names(2), 12, ridge=RIDGE_RANGE[0], discount=discount)
    for step in range(10_000):
        context = np.full(12, 1e300)
        context[step % 12] *= -1.0 if step < 5000 else 1.0
        bandit.update("arm-0", context, 1e300)
    got = as_array(bandit.values(np.arange(12.0)))
    assert np.isfinite(got).all()
    assert (got[:, 1] > 0.0).all()


@pytest.mark.parametrize("seed", range(20))
def test_sums_that_outgrow_the_ridge(seed):
    # What 1e12 plays at nearly one context leave: the ridge is lost in the rounding of its sums.
    rng = np.random.default_rng(seed)
    context = rng.choice([-CONTEXT_LIMIT, CONTEXT_LIMIT], size=6) * rng.uniform(0.5, 1.0, size=6)
    bandit = LinUCB(names(2), 6, ridge=RIDGE_RANGE[0], discount=1.0)
    state = bandit.state_dict()
    state["gram"][0] = 1e12 * np.outer(context, context)
    bandit.load_state_dict(state)
    for _ in range(2 * bandit.period + 5):
        bandit.update("arm-0", context * (1.0 + 1e-9 * rng.normal(size=6)), 1.0)
        got = as_array(bandit.values(context))
        assert np.isfinite(got).all()
        assert (got[:, 1] >= 0.0).all()


def test_values_beyond_the_limits_count_as_the_limits():
    one, two = LinUCB(names(2), 2), LinUCB(names(2), 2)
    one.update("arm-0", [1e300, -3.0], -1e300)
    two.update("arm-0", [CONTEXT_LIMIT, -3.0], -REWARD_LIMIT)
    assert_same_state(one.state_dict(), two.state_dict())
    assert one.values([1e9, 1.0]) == two.values([CONTEXT_LIMIT, 1.0])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"arms": ["a", "b"]}, "add 'none'"),
        ({"arms": []}, "add 'none'"),
        ({"arms": [NO_PREDICTION, "a", "a"]}, "repeated"),
        ({"arms": "none"}, "sequence of str"),
        ({"arms": [NO_PREDICTION, 1]}, "sequence of str"),
        ({"dimension": 0}, "dimension"),
        ({"dimension": 2.0}, "dimension"),
        ({"dimension": True}, "dimension"),
        ({"exploration": -0.1}, "exploration"),
        ({"exploration": math.inf}, "exploration"),
        ({"ridge": 0.0}, "ridge"),
        ({"ridge": math.nan}, "ridge"),
        ({"ridge": 1e7}, "ridge"),
        ({"discount": 0.0}, "discount"),
        ({"discount": 1.01}, "discount"),
        ({"discount": math.nan}, "discount"),
    ],
)
def test_wrong_arguments_are_named(arguments, match):
    with pytest.raises(ValueError, match=match):
        LinUCB(**({"arms": [NO_PREDICTION, "a"], "dimension": 2} | arguments))


def test_unknown_arms_and_other_shapes_are_named():
    bandit = LinUCB(names(2), 2)
    before = bandit.state_dict()
    with pytest.raises(ValueError, match="arm must be one of"):
        bandit.update("nobody", [1.0, 2.0], 1.0)
    with pytest.raises(ValueError, match="arm must be one of"):
        bandit.select([1.0, 2.0], ["nobody"])
    for call in (bandit.select, bandit.values, lambda x: bandit.update("arm-0", x, 1.0)):
        for context in ([1.0], [[1.0, 2.0]], 1.0):
            with pytest.raises(ValueError, match="context must have shape"):
                call(context)
    assert_same_state(bandit.state_dict(), before)


def test_learning_loads_neither_scipy_nor_numba():
    code = (
        "import sys; from hybridcore.bandit import LinUCB; b = LinUCB(['none', 'a'], 2);"
        "[b.update('a', [1.0, 2.0], 1.0) for _ in range(70)];"
        "print([m for m in ('scipy.linalg', 'numba') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
