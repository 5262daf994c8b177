"""Steps that may be left out: what earns them, at which rate, and when they are taken."""

import itertools
import json
import math

import numpy as np
import pytest
from descent import Watched
from hypothesis import given
from hypothesis import strategies as st

from hybridcore import Action, HybridTrainerConfig, Phase
from hybridcore.allowance import PAID, STANDS_FOR, Allowance
from hybridcore.types import Directive

FULL = Directive(Action.FULL)
NOISY = HybridTrainerConfig(warmup_steps=20)
UNIT = st.floats(0.0, 1.0)
STAGES = st.lists(st.tuples(UNIT, UNIT, UNIT), min_size=1, max_size=60)


@pytest.fixture
def trusting(monkeypatch):
    """Outer steps that go on being trusted, whatever they do to the loss."""
    monkeypatch.setattr("hybridcore.outer.UNBEARABLE", 1e9)


def lived(stages, interval=10, full_steps=50, most=14):
    """Full steps and flights in turn: each scale with its share, and steps between flights."""
    allowance = Allowance(interval, full_steps, most)
    scales, flights, since = [], [], 0
    for stage in stages:
        allowance.earn(*stage)
        for _ in range(interval):
            if allowance.until_due == 0:
                allowance.begin()
                flights.append((since, allowance.ahead))
                allowance.ahead, since = 0, -1
            scale = allowance.full_step(FULL, 1.0).scale_at(stage[2])
            scales.append((scale, stage[2]))
            since += 1
            allowance.see()
            if since == 0:
                allowance.settled()
    return scales, flights


@given(STAGES, st.integers(4, 80), st.integers(0, 80))
def test_what_is_left_out_was_stood_for_or_paid(stages, full_steps, most):
    scales, flights = lived(stages, full_steps=full_steps, most=most)
    paid = sum(scale - 1.0 for scale, _ in scales)
    earned = paid + sum(STANDS_FOR * strength for strength, _, _ in stages)
    left_out = sum(count for _, count in flights)
    # To the schedule's own path: what full steps were longer is not less than what was left out.
    assert left_out <= earned + 1e-9
    for scale, share in scales:
        assert 1.0 <= scale <= 1.0 + PAID / 10 + 1e-12
        assert scale * share <= 1.0 + 1e-12


@given(STAGES, st.integers(4, 80), st.integers(0, 80))
def test_flights_are_as_long_and_as_far_apart_as_is_allowed(stages, full_steps, most):
    _, flights = lived(stages, full_steps=full_steps, most=most)
    for since, count in flights:
        assert since >= full_steps
        assert 1 <= count <= most


@given(st.floats(0.0, 1.0), UNIT, UNIT)
def test_nothing_is_paid_at_the_highest_rate_or_without_trust(strength, trust, share):
    allowance = Allowance(10, 50, 14)
    allowance.earn(strength, trust, 1.0)
    assert allowance.paid == 0.0
    assert allowance.full_step(FULL, 1.0) is FULL
    allowance.earn(strength, min(trust, 0.5), share)
    assert allowance.paid == 0.0


def test_at_a_low_rate_and_full_trust_flights_are_paid_for_and_full():
    scales, flights = lived([(0.0, 1.0, 0.1)] * 400)
    paid = sum(scale - 1.0 for scale, _ in scales)
    lengths = [count for _, count in flights[1:]]
    assert np.mean(lengths) > 13.5
    assert sum(count for _, count in flights) > 0.95 * paid
    gaps = [since for since, _ in flights[1:]]
    assert min(gaps) >= 50
    assert max(gaps) <= 63
    assert len(set(gaps)) > 8


@pytest.mark.parametrize(
    ("trust", "share", "strength", "expected"),
    [
        (1.0, 0.1, 0.0, 140 / 56.25),
        (1.0, 0.1, 0.5, 140 / 56.25 - 1.0),
        (0.6, 0.1, 0.0, 0.8),
        (1.0, 1.0 / 1.05, 0.0, 0.5),
        (1.0, 0.0, 0.0, 140 / 56.25),
        (0.5, 0.1, 0.0, 0.0),
        (1.0, 0.1, 1.0, 140 / 56.25 - 2.0),
    ],
)
def test_the_rate_pays_for_what_trust_the_highest_rate_and_flights_leave(
    trust, share, strength, expected
):
    allowance = Allowance(10, 50, 14)
    allowance.earn(strength, trust, share)
    assert allowance.paid == pytest.approx(expected, abs=1e-12)
    assert allowance.full_step(FULL, math.inf).learning_rate_scale == pytest.approx(
        1.0 + expected / 10
    )


def test_a_state_resumes_exactly():
    first, second = Allowance(10, 50, 14), Allowance(10, 50, 14)
    random = np.random.default_rng(0)
    for step in range(900):
        if step % 10 == 0:
            stage = random.uniform(0.4, 1.0, 3)
            first.earn(*stage)
            second.earn(*stage)
        assert first.until_due == second.until_due
        for allowance in (first, second):
            allowance.see()
            if allowance.until_due == 0:
                allowance.begin()
                allowance.settled()
        if step % 7 == 0:
            second = Allowance(10, 50, 14)
            second.load(json.loads(json.dumps(first.state())))
        assert first.state() == second.state()


# -- the factor on a learning rate ------------------------------------------------------------


@given(st.floats(0.0, 2.0), st.floats(0.0, 10.0), st.floats(0.0, 10.0))
def test_a_factor_above_one_ends_at_the_highest_rate(scale, highest, rate):
    found = Directive(Action.FULL, learning_rate_scale=scale, highest_rate=highest).scale_at(rate)
    if scale <= 1.0:
        assert found == scale
    else:
        assert 1.0 <= found <= scale
        assert rate * found <= max(rate, highest) * (1.0 + 1e-12)


# -- in the engine ----------------------------------------------------------------------------


def fallen(steps, rate, **kwargs):
    """A noisy descent at the highest rate, and then `steps` more at `rate` of each."""
    descent = Watched(NOISY, noise=0.3, **kwargs)
    descent.run(500)
    assert descent.engine.controller.outer.active
    first, before = len(descent.directives), descent.engine.counters
    before = (before.predicted_steps, before.outer_steps)
    for step in range(steps):
        descent.rate = rate(step)
        descent.step()
    return descent, descent.directives[first:], before


def test_a_falling_rate_pays_and_the_path_stays_as_long(trusting):
    steps = 1500
    descent, directives, (predicted, outer) = fallen(steps, lambda k: 0.5 * (1.0 - 0.8 * k / steps))
    counters = descent.engine.counters
    paid = sum(d.learning_rate_scale - 1.0 for d in directives if d.action is Action.FULL)
    predicted = counters.predicted_steps - predicted
    # An outer step stands for two at full strength, and strength falls with the rate to a tenth.
    stood_for = STANDS_FOR * 0.5 * (counters.outer_steps - outer)
    assert paid > 60
    assert predicted == pytest.approx(paid + stood_for, rel=0.15)
    assert predicted > 0.17 * steps


def test_after_the_rate_is_annealed_flights_go_on_without_outer_steps(trusting):
    descent, directives, _ = fallen(600, lambda k: 0.05)
    outer, late = descent.engine.controller.outer, directives[60:]
    assert outer.annealed
    assert outer.active
    assert not any(d.action in (Action.MOVE, Action.PROBE) or d.snapshot for d in late)
    assert sum(d.action is Action.SKIP for d in late) > 0.17 * 540
    assert all(d.learning_rate_scale > 1.2 for d in late[20:] if d.action is Action.FULL)


def test_where_nothing_pays_outer_steps_end_with_the_rate(monkeypatch):
    monkeypatch.setattr("hybridcore.allowance.PAID", 0.0)
    descent, directives, _ = fallen(300, lambda k: 0.05)
    assert not descent.engine.controller.outer.active
    assert not any(d.action in (Action.MOVE, Action.SKIP) for d in directives[60:])


@pytest.mark.parametrize("low", [0.3, 0.05])
def test_a_warm_restart_is_no_bolder_than_the_loop(low, trusting):
    """Watched checks each step: none is beyond the highest rate, whenever the schedule rises."""
    descent, directives, _ = fallen(700, lambda k: low if k % 137 < 100 else 0.5)
    scaled = {d.learning_rate_scale for d in directives if d.action is Action.FULL}
    assert len(scaled) > 1
    assert np.isfinite(descent.x).all()


@pytest.mark.parametrize("batches", [24, 60, 70, 78, 360])
def test_no_batch_of_an_epoch_is_left_out_for_good_where_the_rate_pays(batches, trusting):
    descent = Watched(NOISY, noise=0.3)
    descent.run(500)
    descent.rate, used = 0.1, np.zeros(batches)
    for step in range(100 * batches):
        used[step % batches] += descent.step() is not Phase.PREDICT
    assert used.sum() < 0.85 * 100 * batches
    assert used.min() > 0.5 * 100


def test_flights_wait_for_a_calm_loss(trusting, monkeypatch):
    descent = Watched(NOISY, noise=0.3)
    descent.run(600)
    monitor = descent.engine.controller.monitor
    action = type(monitor.action())
    alarmed = next(kind for kind in action if not kind.bearable)
    monkeypatch.setattr(monitor, "action", lambda: alarmed)
    phases = descent.run(200)
    assert all(phase is Phase.FULL for phase in phases[15:])
    monkeypatch.undo()
    assert Phase.PREDICT in [phase for phase, _ in itertools.groupby(descent.run(200))]


@pytest.mark.parametrize("settings", [{"correction_interval": 1}, {"correction_interval": 2}])
def test_as_long_as_a_flight_may_be(settings, trusting):
    descent = Watched(HybridTrainerConfig(warmup_steps=20, **settings), noise=0.3)
    phases = descent.run(600)
    descent.rate = 0.05
    phases += descent.run(600)
    lengths = {len(list(g)) for phase, g in itertools.groupby(phases) if phase is Phase.PREDICT}
    assert lengths == ({1} if settings["correction_interval"] == 2 else set())


def test_what_is_abandoned_or_bad_earns_nothing(trusting):
    descent, _, _ = fallen(100, lambda k: 0.05)
    controller, allowance = descent.engine.controller, descent.engine.controller.outer.allowance
    while not controller.outer.is_due(controller.taken) or controller.phase is not Phase.FULL:
        descent.step()
    before = allowance.state()
    for _ in range(5):
        descent.engine.next()
        descent.engine.abandon()
        descent.step(bad=True)
    assert allowance.state() == before
    descent.step()
    assert allowance.state()[3] == pytest.approx(before[3] + allowance.paid)
