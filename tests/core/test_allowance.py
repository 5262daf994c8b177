"""Steps that may be left out: what earns them, at which rate, and when they are taken."""

import itertools
import json

import numpy as np
import pytest
from descent import Watched, text
from hypothesis import given
from hypothesis import strategies as st

from hybridcore import Action, HybridTrainerConfig, Phase
from hybridcore.allowance import PAID, STANDS_FOR, Allowance
from hybridcore.outer import INTERVAL
from hybridcore.types import Directive

FULL = Directive(Action.FULL)
NOISY = HybridTrainerConfig(warmup_steps=20)
UNIT = st.floats(0.0, 1.0)
STAGES = st.lists(st.tuples(UNIT, UNIT, UNIT), min_size=1, max_size=60)


@pytest.fixture
def trusting(monkeypatch):
    """Outer steps that go on being trusted, whatever they do to the loss."""
    monkeypatch.setattr("hybridcore.outer.UNBEARABLE", 1e9)


def at(*rates, full_steps=50, most=14):
    """Allowance of a run that was at a rate of 1 in each group, and is at `rates` now."""
    allowance = Allowance(10, full_steps, most)
    for seen in (tuple(1.0 for _ in rates), rates):
        allowance.see(seen, scale=1.0, counts=True)
    allowance.restart()
    return allowance


def lived(stages, full_steps=50, most=14):
    """Full steps and flights in turn: scale and rate of the former, and where the latter are."""
    allowance = at(stages[0][2], full_steps=full_steps, most=most)
    steps, flights, since = [], [], 0
    for strength, trust, rate in stages:
        allowance.earn(strength, trust)
        for _ in range(10):
            flies = allowance.until_flight == 0
            if flies:
                allowance.begin()
                flights.append((since, allowance.ahead))
                allowance.ahead = since = 0
            steps.append((allowance.full_step(FULL).scale_at((rate,)), rate))
            allowance.see((rate,), scale=steps[-1][0], counts=True)
            if flies:
                allowance.settled()
            else:
                since += 1
    return steps, flights


@given(STAGES, st.integers(4, 80), st.integers(0, 80))
def test_no_rate_is_beyond_the_highest_whenever_it_rises(stages, full_steps, most):
    steps, _ = lived(stages, full_steps=full_steps, most=most)
    for scale, rate in steps:
        assert 1.0 <= scale <= 1.0 + PAID / 10 + 1e-12
        assert scale * rate <= 1.0 + 1e-12


@given(st.lists(st.tuples(UNIT, UNIT), min_size=1, max_size=60), UNIT, st.integers(4, 80))
def test_what_is_left_out_was_stood_for_or_paid(stages, rate, full_steps):
    steps, flights = lived([(*stage, rate) for stage in stages], full_steps=full_steps)
    paid = sum(scale - 1.0 for scale, _ in steps)
    stood_for = sum(STANDS_FOR * strength for strength, _ in stages)
    assert sum(count for _, count in flights) <= paid + stood_for + 1e-9


@given(STAGES, st.integers(4, 80), st.integers(0, 80))
def test_flights_are_as_long_and_as_far_apart_as_is_allowed(stages, full_steps, most):
    _, flights = lived(stages, full_steps=full_steps, most=most)
    for since, count in flights:
        assert since >= full_steps
        assert 1 <= count <= most


@given(UNIT, UNIT, UNIT)
def test_nothing_is_paid_at_the_highest_rate_or_without_trust(strength, trust, rate):
    for rates, trusted in (((1.0,), trust), ((rate,), min(trust, 0.5)), ((rate, 1.0), trust)):
        allowance = at(*rates)
        allowance.earn(strength, trusted)
        assert allowance.paid == 0.0
        assert allowance.full_step(FULL) is FULL


def test_at_a_low_rate_and_full_trust_flights_are_paid_for_and_full():
    steps, flights = lived([(0.0, 1.0, 0.1)] * 400)
    paid = sum(scale - 1.0 for scale, _ in steps)
    lengths = [count for _, count in flights]
    assert np.mean(lengths) > 13.5
    assert sum(lengths) > 0.97 * paid
    gaps = [since for since, _ in flights[1:]]
    assert min(gaps) >= 50
    assert max(gaps) <= 63
    assert len(set(gaps)) > 8


def test_what_flights_have_no_place_for_is_not_kept_for_later():
    _, flights = lived([(1.0, 1.0, 1.0)] * 40 + [(0.0, 0.0, 1.0)] * 40, most=5)
    assert [count for _, count in flights[-3:-1]] == [5, 5]
    assert sum(since for since, _ in flights) < 540


PLACES = 140 / 57.25


@pytest.mark.parametrize(
    ("trust", "rates", "strength", "expected"),
    [
        (1.0, (0.1,), 0.0, PLACES),
        (1.0, (0.1,), 0.5, PLACES - 1.0),
        (0.6, (0.1,), 0.0, 0.8),
        (1.0, (1.0 / 1.05,), 0.0, 0.5),
        (1.0, (0.1, 1.0 / 1.05), 0.0, 0.5),
        (1.0, (0.0, 1.0 / 1.05), 0.0, 0.5),
        (1.0, (0.0,), 0.0, PLACES),
        (0.5, (0.1,), 0.0, 0.0),
        (1.0, (0.1,), 1.0, PLACES - 2.0),
    ],
)
def test_the_rate_pays_for_what_trust_the_highest_rates_and_flights_leave(
    trust, rates, strength, expected
):
    allowance = at(*rates)
    allowance.earn(strength, trust)
    assert allowance.paid == pytest.approx(expected, abs=1e-12)
    assert allowance.full_step(FULL).learning_rate_scale == pytest.approx(1.0 + expected / 10)


def test_what_was_settled_holds_until_more_is_earned():
    """Or a look at the run, which reads what was put off, would change it."""
    allowance = at(0.5)
    allowance.earn(0.0, 1.0)
    directive = allowance.full_step(FULL)
    for rate in (0.9, 3.0, 0.1):
        allowance.see((rate,), scale=1.1, counts=True)
        assert allowance.full_step(FULL) == directive
        assert allowance.until_flight is None
    allowance.earn(0.0, 1.0)
    assert allowance.full_step(FULL).highest_rates == (3.0,)
    for _ in range(7):
        allowance.see((0.1,), scale=1.1, counts=True)
    allowance.earn(0.0, 0.5)
    assert allowance.until_flight == 40
    assert allowance.state_dict()["earned"] == pytest.approx([1.0, 0.0, 0.0])


def test_a_group_more_has_been_no_higher_than_it_is():
    allowance = at(0.5)
    allowance.see((0.5, 0.2), scale=1.0, counts=True)
    allowance.earn(0.0, 1.0)
    assert allowance.paid == 0.0
    allowance.see((0.25, 0.1), scale=1.0, counts=True)
    allowance.earn(0.0, 1.0)
    assert allowance.paid > 1.0


def test_only_rates_that_count_are_the_highest():
    allowance = Allowance(10, 50, 14)
    for rate, counts in ((9.0, False), (1.0, True), (9.0, False), (1.0, True)):
        allowance.see((rate, 0.0), scale=1.0, counts=counts)
        if counts:
            allowance.earn(0.0, 1.0)
            assert allowance.paid == 0.0
    allowance.see((0.5, 0.0), scale=1.0, counts=False)
    allowance.earn(0.0, 1.0)
    assert allowance.full_step(FULL).highest_rates == (1.0, 0.0)


def test_where_no_rate_was_above_zero_nothing_limits_what_is_paid():
    allowance = Allowance(10, 50, 14)
    allowance.see((0.0,), scale=1.0, counts=True)
    allowance.earn(0.0, 0.6)
    assert allowance.paid == pytest.approx(0.0)


def test_what_full_steps_have_paid_outlasts_a_pause_but_not_a_restart():
    for end, left in ((Allowance.pause, 2.0), (Allowance.restart, 0.0)):
        allowance = at(0.5)
        allowance.earn(0.0, 1.0)
        for _ in range(10):
            allowance.see((0.5,), scale=1.2, counts=True)
        end(allowance)
        assert allowance.full_step(FULL) is FULL
        allowance.earn(0.0, 0.5)
        assert allowance.state_dict()["earned"] == pytest.approx([left, 0.0, 0.0])


def test_a_state_resumes_exactly():
    first, second = at(1.0, 1.0), at(1.0, 1.0)
    random = np.random.default_rng(0)
    for step in range(900):
        rates = tuple(random.uniform(0.2, 1.2, 2).tolist())
        stage = random.uniform(0.4, 1.0, 2)
        assert first.until_flight == second.until_flight
        for allowance in (first, second):
            if step % 10 == 0:
                allowance.earn(*stage)
            scale = allowance.full_step(FULL).scale_at(rates)
            allowance.see(rates, scale=scale, counts=step % 3 > 0)
            if allowance.until_flight == 0:
                allowance.begin()
                allowance.settled()
        if step % 7 == 0:
            second = Allowance(10, 50, 14)
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert first.state_dict() == second.state_dict()
        assert first.full_step(FULL) == second.full_step(FULL)


# -- the factor on a learning rate ------------------------------------------------------------

RATES = st.lists(st.floats(0.0, 10.0), min_size=1, max_size=3)


@given(st.floats(0.0, 2.0), RATES, RATES)
def test_a_factor_above_one_ends_at_the_highest_rates(scale, highest, rates):
    directive = Directive(Action.FULL, learning_rate_scale=scale, highest_rates=tuple(highest))
    found = directive.scale_at(tuple(rates))
    if scale <= 1.0:
        assert found == scale
    else:
        assert 1.0 <= found <= scale
        for most, rate in itertools.zip_longest(highest, rates, fillvalue=0.0):
            assert rate * found <= max(rate, most) * (1.0 + 1e-12)


def test_a_factor_without_highest_rates_has_no_limit():
    assert Directive(Action.FULL, learning_rate_scale=2.0).scale_at((1.0, 3.0)) == 2.0


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


def last_scale(descent):
    """Factor on the rate of the newest full step."""
    full = [d for d in descent.directives if d.action is Action.FULL]
    return full[-1].learning_rate_scale


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
    assert not any(d.action is Action.MOVE for d in late)
    assert sum(d.action is Action.SKIP for d in late) > 0.16 * 540
    assert all(d.learning_rate_scale > 1.2 for d in late[20:] if d.action is Action.FULL)


@pytest.mark.parametrize(
    ("settings", "rate"),
    [
        ({}, lambda k: 0.5 * (1.0 - 0.9 * (k % 40) / 40)),
        ({}, lambda k: 0.5 * (1.0 - 0.9 * (k % 50) / 50)),
        ({}, lambda k: 0.5 * (1.0 - 0.9 * (k % 137) / 137)),
        ({}, lambda k: 0.5 if k % 300 < 30 else 0.1),
        ({"min_full_steps": 60}, lambda k: 0.5 if k < 500 else 0.05),
        ({"min_full_steps": 30}, lambda k: 0.5 if k < 500 else 0.05),
    ],
)
def test_what_the_rate_has_paid_is_predicted(settings, rate, trusting, monkeypatch):
    """Whatever the schedule does, and also in steps that end in a snapshot for a jump."""
    stood_for, earn = [], Allowance.earn

    def watched(allowance, strength, trust):
        stood_for.append(STANDS_FOR * strength)
        earn(allowance, strength, trust)

    monkeypatch.setattr(Allowance, "earn", watched)
    descent = Watched(HybridTrainerConfig(warmup_steps=20, **settings), noise=0.3)
    paid = 0.0
    for step in range(3000):
        first, descent.rate = len(descent.directives), rate(step)
        descent.step()
        full = [d for d in descent.directives[first:] if d.action is Action.FULL]
        paid += sum(max(0.0, d.scale_at((descent.rate,)) - 1.0) for d in full)
    assert descent.engine.controller.outer.active
    assert paid > 100
    predicted, earned = descent.engine.counters.predicted_steps, paid + sum(stood_for)
    assert 0.95 * earned - 20 < predicted <= earned


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
    for rate in (0.25, 0.05):
        descent.rate = rate
        descent.run(100)
        assert last_scale(descent) > 1.0
        with monkeypatch.context() as patch:
            patch.setattr(monitor, "action", lambda: alarmed)
            phases = descent.run(40)
            assert all(phase is Phase.FULL for phase in phases[25:])
            assert last_scale(descent) == 1.0
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
    before = allowance.state_dict()
    for _ in range(5):
        descent.engine.next()
        descent.engine.abandon()
        descent.step(bad=True)
    assert allowance.state_dict() == before
    descent.step()
    earned, paid, unsettled = before["earned"]
    assert paid > 2.0
    assert allowance.state_dict()["earned"][0] == pytest.approx(earned + unsettled + paid / 10)


def test_a_look_at_the_run_changes_nothing(trusting):
    """Neither where the rate has peaks, each higher than those before."""
    ends = []
    for looks in (True, False):
        descent = Watched(NOISY, noise=0.3)
        for step in range(900):
            descent.rate = (0.3 + step / 6000) * (1.0 if step % 89 == 7 else 0.5)
            descent.step()
            if looks:
                assert descent.engine.counters.steps == step + 1
        ends.append(descent.x)
    assert np.array_equal(*ends)


def test_a_displacement_is_one_of_ten_full_steps(trusting):
    descent = Watched(NOISY, noise=0.3)
    spans, since = [], None
    descent.run(400)
    for step in range(1500):
        descent.rate = 0.5 * (1.0 - 0.8 * step / 1500)
        first = len(descent.directives)
        descent.step()
        for directive in descent.directives[first:]:
            if directive.action is Action.MOVE:
                since = 0
            elif directive.action is Action.FULL and since is not None:
                since += 1
                if directive.snapshot:
                    spans.append(since)
    assert len(spans) > 80
    assert set(spans) == {INTERVAL}


def test_a_path_that_has_become_smooth_is_not_overlooked(trusting):
    """Where the rate is annealed and pays for flights, jumps are looked for all the same."""
    descent, _, _ = fallen(300, lambda k: 0.05)
    assert descent.engine.controller.outer.active
    descent.noise = 0.0
    for _ in range(2500):
        descent.step()
        if descent.saved is not None:
            break
    assert descent.saved is not None
    assert not descent.engine.controller.outer.active
    descent.run(400)
    assert descent.engine.counters.predicted_steps > 300


def test_nothing_pays_while_a_low_rate_rises(trusting):
    descent, directives, _ = fallen(400, lambda k: 0.02 + 0.05 * k / 400)
    late = [d for d in directives[40:] if d.action in (Action.FULL, Action.SKIP)]
    assert all(d.learning_rate_scale == 1.0 for d in late)
    # One flight with what was earned before.
    assert sum(d.action is Action.SKIP for d in late) <= 14
    descent.rate = 0.05
    descent.run(200)
    assert last_scale(descent) > 1.2


def test_after_the_parameters_have_changed_nothing_pays(trusting):
    descent, _, _ = fallen(200, lambda k: 0.1)
    assert last_scale(descent) > 1.2
    while descent.engine.phase is not Phase.FULL:
        descent.step()
    descent.engine.regroup()
    descent.held, descent.begun = 0, False
    descent.run(30)
    full = [d for d in descent.directives[-30:] if d.action is Action.FULL]
    assert all(d.learning_rate_scale == 1.0 for d in full)


def test_a_flight_ends_where_the_parameters_change():
    descent = Watched(NOISY, noise=0.3)
    while descent.engine.controller.outer.allowance.ahead < 3:
        descent.step()
    descent.engine.regroup()
    descent.held, descent.begun = 0, False
    first = len(descent.directives)
    descent.run(20)
    assert {d.action for d in descent.directives[first:]} == {Action.FULL}


def test_a_state_from_before_the_rate_paid_is_read():
    old, new = Watched(NOISY, noise=0.3), Watched(NOISY, noise=0.3)
    old.run(500)
    state = json.loads(text(old.engine.state_dict()))
    outer = state["controller"]["outer"]
    allowance, loss = outer.pop("allowance"), outer.pop("loss")
    outer["ahead"] = [*allowance["counts"], allowance["earned"][0], loss]
    new.engine.load_state_dict(state)
    found = new.engine.controller.outer
    assert found.loss == loss
    assert found.allowance.state_dict()["counts"] == allowance["counts"]
    assert found.allowance.state_dict()["earned"][0] == allowance["earned"][0]
    assert found.allowance.state_dict()["highest"] == allowance["highest"]
