"""The running average of weights: its weights against a direct sum, and when it is taken."""

import numpy as np
import pytest
from descent import BRISK, Watched
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcore import Action, Engine, HybridTrainerConfig, Observation, Phase
from hybridcore.averaging import DECAY, INTERVAL, Averaging


def feed(averaging, values):
    mean = 0.0
    for value in values:
        mean += averaging.weight(INTERVAL) * (value - mean)
        averaging.add()
    return mean


@pytest.mark.parametrize("count", [1, 2, 7, 40, 300])
def test_it_is_the_polynomial_mean_of_all_values(count):
    # Shamir & Zhang's recursion unrolled: value i counts binomial(i + DECAY - 1, DECAY), which
    # grows like i^DECAY.
    values = np.random.default_rng(count).normal(size=count)
    shares = np.array([np.prod([float(i + k) for k in range(DECAY)]) for i in range(1, count + 1)])
    assert feed(Averaging(), values) == pytest.approx(shares @ values / shares.sum(), abs=1e-12)


@pytest.mark.parametrize("before", [0, 50, 1000])
def test_after_a_restart_it_is_the_plain_mean_until_it_is_long_enough(before):
    averaging = Averaging()
    feed(averaging, np.full(before, 1e6))
    averaging.restart()
    values = np.random.default_rng(before).normal(size=max(1, (before + DECAY) // (DECAY + 1)))
    assert feed(averaging, values) == pytest.approx(values.mean(), abs=1e-9)


@settings(deadline=None, derandomize=True, database=None)
@given(st.lists(st.booleans(), max_size=200))
def test_weights_are_shares_and_a_constant_stays(restarts):
    averaging, mean = Averaging(), 3.0
    for restart in restarts:
        if restart:
            averaging.restart()
        weight = averaging.weight(INTERVAL)
        assert 0.0 < weight <= 1.0
        mean += weight * (3.0 - mean)
        averaging.add()
    assert mean == 3.0


@settings(deadline=None, derandomize=True, database=None)
@given(st.integers(0, 10**6))
def test_it_is_due_after_the_steps_that_it_says(taken):
    averaging = Averaging()
    assert averaging.until_due(taken) == 0
    assert averaging.weight(taken + 1) == 1.0
    averaging.add()
    until = averaging.until_due(taken)
    assert [averaging.weight(taken + 1 + i) > 0 for i in range(until + 1)] == [False] * until + [
        True
    ]


def test_the_engine_averages_real_steps_and_leaves_jumps_out():
    descent = Watched(BRISK)
    descent.run(400)
    full = [d for d in descent.directives if d.action is Action.FULL]
    weights = [d.average for d in full if d.average]
    assert len(weights) > 0.8 * len(full) / INTERVAL - 10
    # Each validated jump begins a new average, which at first is the newest weights alone.
    actions = [d.action for d in descent.directives]
    ends = actions.count(Action.SAVE) - (descent.engine.phase in (Phase.PREDICT, Phase.CORRECT))
    assert ends > 2
    assert weights.count(1.0) == 1 + ends - actions.count(Action.ROLLBACK)
    assert not any(d.average for d in descent.directives if d.learning_rate_scale != 1.0)


def test_without_averaging_nothing_is_averaged():
    descent = Watched(HybridTrainerConfig(averaging=False))
    descent.run(300)
    assert not any(d.average for d in descent.directives)
    assert descent.engine.counters.predicted_steps > 0


def test_a_bad_batch_is_not_averaged():
    engine = Engine(HybridTrainerConfig())
    for step in range(4 * INTERVAL):
        directive = engine.next()
        # Every other averaging meets a bad batch, which leaves the weights where they were.
        bad = bool(directive.average) and step % 2 == 0
        engine.observe(Observation(loss=1.0, gradient_norm=1.0, applied=not bad))
    assert engine.phase is Phase.WARMUP
    state = engine.state_dict()["controller"]
    assert state["average"]["count"] == 1 + state["counts"][0] // INTERVAL
