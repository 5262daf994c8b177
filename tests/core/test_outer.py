"""Outer momentum: its snapshots against the recursion itself, and when the engine takes it."""

import copy
import itertools
import json
import math

import numpy as np
import pytest
from descent import Descent, Watched, text
from hypothesis import given, settings
from hypothesis import strategies as st
from secant_descent import PairedDescent

from hybridcore import Action, HybridTrainerConfig, Observation, Phase
from hybridcore.allowance import STANDS_FOR
from hybridcore.controller import Controller
from hybridcore.outer import (
    CHECK,
    INTERVAL,
    MOST_WORTH,
    RATE,
    REACH,
    SELDOM,
    SHARE,
    WEIGHED,
    OuterMomentum,
    hastening,
)
from hybridcore.secant import Stage

NOISY = HybridTrainerConfig(warmup_steps=20)


@pytest.fixture
def trusting(monkeypatch):
    """Outer steps that go on being trusted, whatever they do to the loss."""
    monkeypatch.setattr("hybridcore.outer.UNBEARABLE", 1e9)


def trusted(trust=1.0):
    """Outer momentum that is sure of its `trust`."""
    outer = OuterMomentum(50, 14)
    sure = {"weighed": [10, 0], "trust": [0.05 * (1.0 - trust), 0.0, 1.0, 1.0]}
    outer.load_state_dict(outer.state_dict() | sure)
    assert outer.trust == pytest.approx(trust, abs=1e-12)
    return outer


def by_bank(displacements, rates, capacity=4, trust=1.0):
    """Points after each outer step, by the coefficients over a bank of `capacity` snapshots."""
    outer, x, bank, points = trusted(trust), np.zeros(len(displacements[0])), [], []
    outer.begin()
    for moved, rate in zip(displacements, rates, strict=True):
        x = x + moved
        waits = outer.strength == 0.0
        outer.see(Observation(1.0, learning_rate=rate))
        if waits:
            outer.begin()
            points.append(x)
            continue
        directive = outer.full_step
        assert directive.snapshot
        bank = [*([] if directive.fresh_bank else bank)[1 - capacity :], x]
        outer.take(None)
        if outer.pending:
            move = outer.step()
            outer.stepped()
            assert move.action is Action.MOVE
            assert move.snapshot
            (row,) = move.coefficients
            assert row.sum() == pytest.approx(1.0, abs=1e-12)
            x = row @ np.array(bank[-len(row) :])
            bank = [*bank[1 - capacity :], x]
        points.append(x)
    return points


def by_hand(displacements):
    """The same at a constant rate by the three points of primal averaging, ``y`` among them."""
    y, gap, points = displacements[0], 0.0, [displacements[0]]
    for number, moved in enumerate(displacements[1:], 1):
        z, x = y + SHARE * gap, y - (1.0 - SHARE) * gap
        z = z + REACH * moved
        x = x + min(0.2, 2.0 / (number + 2.0)) * (z - x)
        y, gap = (1.0 - SHARE) * z + SHARE * x, z - x
        points.append(y)
    return points


def by_momentum(displacements, rates, trust):
    """The same under a schedule: the momentum is what an outer step goes beyond its share of d."""
    y, momentum, points, number, strength = 0.0, 0.0, [], -1, 1.0
    push, old, highest, level = 0.0, 0.2, 0.0, INTERVAL
    for step, (moved, rate) in enumerate(zip(displacements, rates, strict=True)):
        number = -1 if strength == 0.0 else number + 1
        level = 0 if step and rates[step - 1] * (1.0 + 1e-6) < rate else level + 1
        highest = max(highest, rate)
        strength = max(0.0, (rate / highest - 0.15) / 0.85) if highest > 0.0 else 1.0
        strength *= trust * (level >= INTERVAL)
        if number < 1 or strength == 0.0:
            y = y + moved
        else:
            new = strength * (rate if rate > 0.0 else 1.0)
            fallen = min(1.0, new / push) if push > 0.0 else 0.0
            weight, push = min(0.2, 2.0 / (number + 2.0)), new
            kept = (1.0 - old) * weight / old * fallen if number > 1 else 0.0
            momentum = kept * momentum + strength * REACH * SHARE * weight * moved
            y, old = y + ((1.0 - strength) + strength * RATE) * moved + momentum, weight
        points.append(y)
    return points


@settings(deadline=None, derandomize=True, database=None)
@given(
    st.integers(2, 30),
    st.integers(0, 2**32 - 1),
    st.integers(4, 10),
    st.lists(st.sampled_from([0.0, 0.1, 0.15, 0.4, 0.9, 1.0]), min_size=30, max_size=30),
    st.sampled_from([0.1, 0.4, 1.0]),
)
def test_the_bank_holds_all_of_the_recursion(count, seed, capacity, rates, trust):
    displacements = np.random.default_rng(seed).normal(size=(count, 3))
    found = by_bank(displacements, np.full(count, 0.3), capacity)
    np.testing.assert_allclose(found, by_hand(displacements), atol=1e-9)
    risen = [*rates[:2], *sorted(rates[2:])[: count - 2]]
    levels = np.repeat(rates[:2], 15)[:count]
    for schedule in (rates[:count], sorted(rates[:count], reverse=True), risen, levels):
        found = by_bank(displacements, schedule, capacity, trust)
        np.testing.assert_allclose(found, by_momentum(displacements, schedule, trust), atol=1e-9)


def test_they_leave_the_weights_alone_where_the_rate_has_fallen():
    rates = np.concatenate((np.ones(50), np.linspace(1.0, 0.15, 20), np.full(30, 0.1)))
    displacements = np.random.default_rng(0).normal(size=(100, 3))
    steps = np.diff(by_bank(displacements, rates), axis=0)
    np.testing.assert_allclose(steps[-30:], displacements[-30:], atol=1e-9)
    pushed = np.abs(steps - displacements[1:]).mean(axis=1)
    assert pushed[60:68].mean() < pushed[40:49].mean()


def test_a_steady_displacement_is_continued_less_far_than_it_says():
    points = by_bank(np.ones((2000, 1)), np.ones(2000))
    steps = np.diff(np.array(points).ravel())
    assert steps.max() <= 1.0 + MOST_WORTH
    # The mean of i with weights that grow like i goes two thirds as fast as i.
    assert steps[-1] == pytest.approx(REACH * (1.0 - SHARE + SHARE * 2.0 / 3.0), rel=1e-3)


def test_a_steady_displacement_is_never_continued_further_than_they_reach():
    # Momentum must not be what is left of the full steps, once those count for more of a step.
    for fall in (50, 200, 1000):
        rates = np.concatenate((np.ones(50), np.linspace(1.0, 0.0, fall)))
        steps = np.diff(np.array(by_bank(np.ones((50 + fall, 1)), rates)).ravel())
        assert steps.max() <= REACH
        np.testing.assert_allclose(steps[-fall // 10 :], 1.0)


def test_they_wait_while_the_rate_rises():
    outer = OuterMomentum(50, 14)
    outer.begin()
    # From zero too, but not for rounding.
    level = [0.3] * (INTERVAL - 1)
    rates = [0.0, 0.1, 0.2, 0.3, *level, 0.3 * (1.0 + 1e-9), 0.4]
    for step, rate in enumerate(rates):
        outer.see(Observation(1.0, learning_rate=rate))
        assert (outer.strength > 0.0) == (step in (0, len(rates) - 2))


def rising(config):
    """A run whose learning rate rises over the first 400 steps, and from the 800th to the 900th."""
    descent = Watched(config, noise=0.3)
    carry_out, counters = descent.carry_out, descent.engine.counters

    def scheduled(directive, bad):
        rate = min(counters.steps, 400) + min(max(counters.steps - 800, 0), 100)
        return carry_out(directive, bad)._replace(learning_rate=rate / 1000.0)

    descent.carry_out = scheduled
    return descent


def test_a_run_whose_rate_rises_is_the_plain_one_until_it_stops():
    descent = rising(NOISY)
    plain = rising(HybridTrainerConfig(warmup_steps=20, outer_momentum=False))
    moved = []
    for count in (400, 400, 20, 80, 200):
        before = descent.engine.counters.outer_steps
        descent.run(count)
        plain.run(count)
        moved.append(descent.engine.counters.outer_steps - before)
        assert np.array_equal(descent.x, plain.x) == (len(moved) == 1)
    assert moved[0] == moved[3] == 0
    assert moved[1] > 0.5 * 400 / INTERVAL
    assert moved[4] > 0.5 * 200 / INTERVAL


def test_noise_is_averaged_down():
    # Fast directions forget where they are within an interval: each displacement leads from the
    # point to a new one that knows nothing of it.
    noise = np.random.default_rng(0).normal(size=20_000)
    outer, bank, x, left = trusted(), [], 0.0, []
    outer.begin()
    for target in noise:
        bank = [*([] if outer.full_step.fresh_bank else bank)[-3:], target]
        outer.take(None)
        if outer.pending:
            (row,) = outer.step().coefficients
            outer.stepped()
            x = float(row @ bank[-len(row) :])
            bank = [*bank[-3:], x]
            left.append(x)
    assert np.std(left) < np.std(noise)


@pytest.mark.parametrize("share", [1e-4, 0.01, 0.05, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("forgetting", [1.0, 3.0, math.inf])
@pytest.mark.parametrize("batches", [1, 7, 40])
def test_a_hastened_average_is_one_in_which_each_batch_counts_for_more(share, forgetting, batches):
    plain = faster = 5.0
    counts = max(share, min(share * forgetting, 0.1))
    for _ in range(batches):
        plain, faster = plain + share * (2.0 - plain), faster + counts * (2.0 - faster)
    times = hastening(share, forgetting, batches)
    assert times >= 1.0
    assert 5.0 + times * (plain - 5.0) == pytest.approx(faster)
    assert hastening(0.0, forgetting, batches) == hastening(share, forgetting, 0) == 1.0
    assert hastening(1.0 - 0.9, forgetting, batches) == 1.0


def test_averages_forget_faster_from_the_first_outer_step_to_the_last():
    outer = trusted(0.9)
    outer.begin()
    for count, rate in enumerate([1.0] * 40 + [0.5] * 20):
        before = outer.forgetting
        assert count > 1 or before == 1.0
        outer.see(Observation(1.0, learning_rate=rate))
        # Not in each step, or it would matter when they are read.
        assert outer.forgetting == before
        outer.take(None)
        if outer.pending:
            outer.step()
            outer.stepped()
            assert outer.forgetting == pytest.approx(1.0 + 9.0 * outer.strength)
        if rate == 1.0 and count > 1:
            assert outer.forgetting == pytest.approx(9.1)
    outer.see(Observation(1.0, learning_rate=0.1))
    assert outer.annealed
    # Steps may be predicted for the fall of the rate, but there are no outer steps any more.
    outer.coast()
    assert outer.active
    assert outer.forgetting == 1.0


def test_a_state_resumes_exactly():
    first, second = OuterMomentum(50, 14), OuterMomentum(50, 14)
    first.begin()
    for count in range(12):
        for outer in (first, second):
            if outer.to_be_weighed:
                outer.stepped(1.0)
                outer.weigh(1.0 + count % 3)
        first.see(Observation(1.0 + count % 2, learning_rate=1.0 / (100 + count)))
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert json.dumps(second.state_dict()) == json.dumps(first.state_dict())
        for outer in (first, second):
            outer.take(None)
        assert first.pending == second.pending == (count > 0)
        if first.pending:
            moves = [outer.step().coefficients for outer in (first, second)]
            first.stepped()
            assert np.array_equal(*moves)
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    first.see(Observation(1.0, learning_rate=0.5))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for outer in (first, second):
        for _ in range(INTERVAL - 1):
            outer.see(Observation(1.0, learning_rate=0.5))
        assert outer.strength == 0.0
        outer.see(Observation(1.0, learning_rate=0.5))
        assert outer.strength == first.trust
    assert first.trust < 0.5
    first.stop()
    assert not first.active
    assert not first.pending


# -- in the engine ----------------------------------------------------------------------------


def outer_moves(descent):
    return [d for d in descent.directives if d.action is Action.MOVE and d.snapshot]


@pytest.mark.parametrize("averaging", [True, False])
@pytest.mark.parametrize("snapshots", [4, 6, 10])
def test_noisy_work_gets_outer_steps(averaging, snapshots):
    config = HybridTrainerConfig(warmup_steps=20, averaging=averaging, snapshots=snapshots)
    descent = Watched(config, noise=0.3)
    descent.run(1000)
    counters = descent.engine.counters
    assert counters.outer_steps == len(outer_moves(descent))
    assert 1000 / INTERVAL * 0.6 < counters.outer_steps < 1000 / INTERVAL
    # A move is followed by the full step of the same turn, or by predicted ones, and at times
    # it is between two probes of the batch.
    actions, weighed = [d.action for d in descent.directives], 0
    for index, directive in enumerate(descent.directives[:-2]):
        if directive.action is Action.MOVE and directive.snapshot:
            here, there = descent.directives[index - 1], descent.directives[index + 1]
            assert here.own_batch == there.own_batch
            if there.own_batch:
                assert here.coefficients is there.coefficients is None
                weighed += 1
            assert actions[index + 1 + there.own_batch] in (Action.FULL, Action.SKIP)
    assert weighed - WEIGHED == pytest.approx((counters.outer_steps - WEIGHED) / SELDOM, abs=1.0)
    assert counters.probes <= 2 * weighed + 10


@pytest.mark.parametrize("floor", [1e-3, -1.0])
@pytest.mark.parametrize(
    "settings", [{}, {"min_full_steps": 200}, {"horizon": 5}, {"correction_interval": 9}]
)
def test_outer_steps_stand_for_predicted_ones(settings, floor, trusting):
    config = HybridTrainerConfig(warmup_steps=20, **settings)
    descent = Watched(config, noise=0.3)
    carry_out, phases, mean, worth = descent.carry_out, [], None, 0.0

    def watched(directive, bad):
        nonlocal mean, worth
        seen = carry_out(directive, bad)
        if directive.action is Action.MOVE:
            worth += STANDS_FOR * descent.engine.controller.outer.strength
        if directive.action is Action.FULL:
            mean = seen.loss if mean is None else mean + (seen.loss - mean) / INTERVAL
        return seen

    descent.carry_out = watched
    for step in range(1500):
        if step == 700:
            descent.floor = floor
        phases.append(descent.step())
        if phases[-1] is Phase.PREDICT:
            assert descent.engine.forecast_loss == pytest.approx(mean, rel=1e-9)
    outer, counters = descent.engine.controller.outer, descent.engine.counters
    assert outer.active
    assert counters.rollbacks == 0
    assert all(d.own_batch for d in descent.directives if d.action is Action.PROBE)
    spans = [(phase, len(list(steps))) for phase, steps in itertools.groupby(phases)]
    predicted = [count for phase, count in spans[:-1] if phase is Phase.PREDICT]
    most = min(config.horizon, config.correction_interval - 1)
    assert len(predicted) > 4
    assert max(predicted) <= most
    # Two for each outer step at full strength, but for what a segment does not hold.
    assert 0.8 * STANDS_FOR * counters.outer_steps < worth
    expected = min(worth, most * (len(predicted) + 1))
    assert expected - 2 * most <= counters.predicted_steps <= expected


def test_when_they_are_read_changes_nothing_in_them(trusting, monkeypatch):
    runs, turns, turn = [], [], Controller.turn
    monkeypatch.setattr(Controller, "turn", lambda self: turns.append(self.phase) or turn(self))
    for looks in (False, True):
        descent, seen = Descent(NOISY, noise=0.3), []
        for _ in range(1000):
            phase = descent.step()
            seen.append((phase, descent.engine.forecast_loss, descent.engine.touches_weights))
            if looks:
                assert descent.engine.counters.steps == len(seen)
        assert np.isfinite([loss for phase, loss, _ in seen if phase is Phase.PREDICT]).all()
        runs.append((repr(seen), text(descent.engine.state_dict())))
    assert runs[0] == runs[1]
    # The first of each flight is taken in the turn of a full step, and only the last in its own.
    phases = [phase for phase, *_ in seen]
    flights = sum(a is not b is Phase.PREDICT for a, b in itertools.pairwise(phases))
    assert 0 < 2 * flights - 2 <= turns.count(Phase.PREDICT) <= 2 * flights


@pytest.mark.parametrize("into", range(8))
def test_a_state_from_among_them_resumes_exactly(into, trusting):
    first = Descent(NOISY, noise=0.3)
    while first.engine.phase is not Phase.PREDICT:
        first.step()
    for _ in range(into):
        assert first.step() is Phase.PREDICT
    second = Descent(NOISY, noise=0.3)
    second.engine.load_state_dict(json.loads(text(first.engine.state_dict())))
    second.x, second.bank, second.random = first.x, first.bank, copy.deepcopy(first.random)
    # Nor is anything left of what an engine was in before.
    before = Descent(NOISY, noise=0.3).engine.state_dict()
    used = copy.deepcopy(second.engine)
    used.controller.prediction_error = 1.0
    used.load_state_dict(before)
    assert used.prediction_error is None
    assert math.isnan(used.forecast_loss)
    for _ in range(100):
        assert first.step() is second.step()
        assert repr(first.engine.forecast_loss) == repr(second.engine.forecast_loss)
    assert np.array_equal(first.x, second.x)


@pytest.mark.parametrize("batches", [24, 36, 60, 72, 78, 120, 360])
def test_no_batch_of_an_epoch_is_left_out_for_good(batches, trusting):
    descent = Watched(NOISY, noise=0.3)
    used = np.zeros(batches)
    for step in range(100 * batches):
        used[step % batches] += descent.step() is not Phase.PREDICT
    assert used.sum() < 0.9 * 100 * batches
    assert used.min() > 0.65 * 100


def test_they_stand_for_fewer_as_they_fade(trusting, monkeypatch):
    monkeypatch.setattr("hybridcore.allowance.PAID", 0.0)
    descent = Watched(NOISY, noise=0.3)
    descent.run(500)
    outer, counters = descent.engine.controller.outer, descent.engine.counters
    at_first, descent.rate = counters.predicted_steps, 0.18125
    descent.run(480)
    assert 0.9 < outer.trust <= 1.0
    assert outer.strength == pytest.approx(0.25 * outer.trust)
    gained = descent.engine.counters.predicted_steps - at_first
    assert gained == pytest.approx(480 / (INTERVAL + 0.5) * 0.5, abs=7)


def test_they_are_at_least_an_interval_apart():
    descent = Watched(NOISY, noise=0.3)
    descent.run(1000)
    gaps, since = [], 0
    for directive in descent.directives:
        since += directive.action is Action.FULL
        if directive.action is Action.MOVE:
            gaps.append(since)
            since = 0
    assert set(gaps[1:]) >= {INTERVAL}
    assert min(gaps) >= INTERVAL


def test_they_go_on_while_the_path_is_irregular():
    """No look at the path takes their momentum, however calm the loss is meanwhile."""
    descent = Watched(NOISY, noise=0.3)
    outer = descent.engine.controller.outer
    while not outer.active:
        descent.step()
    for _ in range(1500):
        descent.step()
        assert outer.active


def test_smooth_work_is_left_to_jumps():
    descent = Watched()
    descent.run(400)
    assert descent.engine.counters.predicted_steps > 100
    assert not outer_moves(descent)


def test_the_setting_turns_them_off():
    descent = Watched(HybridTrainerConfig(warmup_steps=20, outer_momentum=False), noise=0.3)
    descent.run(1000)
    assert descent.engine.counters.outer_steps == 0


def test_slow_directions_get_further():
    """Far from the minimum, the slow directions are ahead of the plain run's."""
    ahead = []
    for seed in range(5):
        ends = []
        for outer in (True, False):
            config = HybridTrainerConfig(warmup_steps=20, outer_momentum=outer)
            descent = Watched(config, noise=0.3, seed=seed)
            descent.x *= 30.0
            descent.run(1000)
            slow = descent.curvature < 0.02
            ends.append(float(descent.curvature[slow] @ descent.x[slow] ** 2))
        ahead.append(ends[0] < ends[1])
    assert sum(ahead) >= 4


def test_a_bad_batch_where_one_is_due_only_postpones_it():
    descent = Watched(NOISY, noise=0.3)
    descent.run(400)
    outer = descent.engine.controller.outer
    while outer.pending or not outer.active or outer.until_due(descent.engine.controller.taken):
        descent.step()
    before = descent.x
    descent.step(bad=True)
    assert np.array_equal(descent.x, before)
    assert not outer.pending
    count = descent.engine.counters.outer_steps
    descent.run(3 * INTERVAL)
    assert descent.engine.counters.outer_steps > count
    assert np.isfinite(descent.x).all()


@pytest.mark.parametrize("cut", range(150, 560, 23))
def test_a_run_resumes_exactly(cut):
    whole = Watched(NOISY, noise=0.3)
    whole.run(600)
    first, second = Watched(NOISY, noise=0.3), Watched(NOISY, noise=0.3)
    first.run(cut)
    second.engine.load_state_dict(json.loads(text(first.engine.state_dict())))
    second.x, second.bank, second.saved = first.x, first.bank, first.saved
    second.random, second.held = first.random, first.held
    second.last_phase, second.begun = first.last_phase, first.begun
    second.run(600 - cut)
    assert np.array_equal(second.x, whole.x)
    assert whole.engine.counters.outer_steps == second.engine.counters.outer_steps > 0


def test_the_interval_of_the_speedup_allows_for_them():
    descent = Watched(NOISY, noise=0.3)
    descent.run(1000)
    statistics = descent.engine.statistics()
    low, high = statistics.measured_speedup_interval
    assert statistics.outer_steps > 0
    assert low < statistics.measured_speedup < 1.05
    most = 1.0 + MOST_WORTH * INTERVAL * statistics.outer_steps / statistics.steps
    assert 1.3 < 0.9 * most < high
    assert f"{statistics.outer_steps} outer steps" in str(statistics)


def test_other_parameters_end_them():
    descent = Watched(NOISY, noise=0.3)
    descent.run(400)
    while not descent.engine.controller.outer.active:
        descent.step()
    descent.engine.regroup()
    descent.bank = []
    outer = descent.engine.controller.outer
    assert not outer.active
    assert descent.engine.phase is Phase.FULL
    descent.run(300)
    assert np.isfinite(descent.x).all()


@pytest.mark.parametrize(
    ("turn", "straight"), [(0.0, True), (0.6, True), (0.7, False), (2.0, False)]
)
def test_a_straight_path_ends_them(turn, straight):
    outer, random = OuterMomentum(50, 14), np.random.default_rng(0)
    outer.begin()
    older = random.normal(size=20)
    across = random.normal(size=20)
    across -= older * (across @ older) / (older @ older)
    newer = np.cos(turn) * older / np.linalg.norm(older) + np.sin(turn) * across / np.linalg.norm(
        across
    )
    points = np.array([np.zeros(20), older, older + random.normal(size=20)])
    bank = np.array([random.normal(size=20), *points, points[-1] + 3.0 * newer])
    gram = ((bank - bank[-1]) @ (bank - bank[-1]).T)[None]
    asked = []
    for _ in range(20):
        asked.append(outer.full_step.gram)
        if asked[-1]:
            break
        assert not outer.take(None)
        if outer.pending:
            outer.stepped()
    assert asked.count(False) == CHECK
    assert outer.take(gram) == straight
    assert outer.active != straight


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("older", [-1e-9, 0.0])
def test_a_path_that_stands_still_is_not_straight(older):
    """Rounding of the Gram matrix can take a squared length below zero."""
    outer = OuterMomentum(50, 14)
    outer.begin()
    while not outer.full_step.gram:
        outer.take(None)
        if outer.pending:
            outer.stepped()
    assert not outer.take(np.diag([0.0, older, 1.0, 0.0])[None])
    assert outer.active


def test_they_come_back_where_a_straight_path_led_to_no_jump():
    descent = Descent(NOISY, noise=0.3)
    outer = descent.engine.controller.outer
    while not outer.active:
        descent.step()
    outer.straight = True
    outer.stop()
    controller = descent.engine.controller
    controller.pace.wait = controller.taken + controller.config.min_full_steps
    descent.run(100)
    assert not outer.active
    descent.run(100)
    assert outer.active
    assert descent.engine.counters.rollbacks == 0


def test_the_path_is_held_against_itself_now_and_then():
    outer = OuterMomentum(50, 14)
    outer.begin()
    checked = []
    # The first snapshot only marks where the path begins.
    for number in range(201):
        directive = outer.full_step
        if directive.gram:
            checked.append(number)
        # A path that turns back, so that it is never straight.
        points = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
        outer.take((points @ points.T)[None] if directive.gram else None)
        if outer.pending:
            outer.stepped()
    assert checked == [5, 10, 20, 40, 80, 120, 160, 200]


def test_one_that_is_not_taken_where_it_was_due_has_them_begin_anew():
    outer = OuterMomentum(50, 14)
    outer.begin()
    outer.take(None)
    assert not outer.full_step.fresh_bank
    # A loss below zero rises in the very step that ends the displacement.
    outer.strength = 0.0
    outer.take(None)
    assert not outer.pending
    outer.strength = 1.0
    assert outer.full_step.fresh_bank
    outer.take(None)
    outer.take(None)
    assert outer.pending
    assert outer.step().coefficients.shape == (1, 2)


def test_the_rates_of_all_parameter_groups_count():
    def strengths(rates):
        outer, found = OuterMomentum(50, 14), []
        outer.begin()
        for first, *others in rates:
            outer.see(Observation(1.0, 1.0, first, other_rates=tuple(others)))
            found.append(outer.strength)
        return np.array(found)

    level = [(0.1, 0.0, 0.2)] * 20
    assert (strengths(level)[10:] > 0.0).all()
    # While the rate of one of them rises there are none.
    rising = [(0.1, 0.0, 0.02 * (1 + step)) for step in range(10)]
    assert not strengths(rising + level)[1:19].any()
    # They fade with the highest, and one that is not trained has no say.
    for fallen in ((0.0, 0.025), (0.025, 0.0), (0.025, 0.025)):
        highest = tuple(8.0 * rate for rate in fallen)
        assert not strengths([highest] * 20 + [fallen])[-1]
        half = tuple(4.0 * rate for rate in fallen)
        assert 0.0 < strengths([highest] * 20 + [half])[-1] < strengths([highest] * 21)[-1]


class Staying(PairedDescent):
    """Noisy batches, of which two in a row are the same from a step on."""

    stays = False

    def carry_out(self, directive, bad=False):
        seen = super().carry_out(directive, bad)
        secant = self.engine._controller.secant
        if self.stays and directive.at_mark and secant.stage is Stage.CHECK:
            return seen._replace(loss=secant._marked)
        return seen


def test_they_end_where_a_batch_stays_for_some_steps():
    descent = Staying(HybridTrainerConfig(warmup_steps=20), noise=0.3)
    descent.run(400)
    outer, secant = descent.engine.controller.outer, descent.engine.controller.secant
    assert outer.active
    assert not secant.repeats
    descent.stays = True
    while not secant.repeats:
        assert outer.active
        descent.step()
    moves = descent.engine.counters.outer_steps
    descent.run(90)
    assert not outer.active
    assert descent.engine.counters.outer_steps == moves
    other = descent.resumed()
    assert other.engine.controller.secant.repeats
    # Another look finds that they differ again.
    descent.stays = False
    while secant.repeats:
        descent.step()
    descent.run(100)
    assert outer.active
