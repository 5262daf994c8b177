"""What LinUCB chooses, beside another library and where it must find its way; state; bad input."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plays import as_array, discounts, history, names, steady

from hybridcore.bandit import CONTEXT_LIMIT, NO_PREDICTION, REWARD_LIMIT, RIDGE_RANGE, LinUCB
from hybridcore.errors import CheckpointError

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
