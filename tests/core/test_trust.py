"""Trust in outer momentum: what the loss of batches before and after outer steps leaves of it."""

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
from descent import Descent, Overstepping, Watched, text
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcore import Action, HybridTrainerConfig, Observation, Phase
from hybridcore.outer import INTERVAL, SELDOM, WEIGHED, OuterMomentum

NOISY = HybridTrainerConfig(warmup_steps=20)


def weighing(rises, difference):
    """Trust after each of the `rises`, at losses that differ by `difference` from step to step."""
    outer, trusts = OuterMomentum(50, 14), []
    outer.load_state_dict(outer.state_dict() | {"trust": [0.0, 0.0, 1.0, difference]})
    for rise in rises:
        outer.stepped(2.0)
        outer.weigh(2.0 + rise)
        assert outer.dead_end == (rise == math.inf)
        if outer.dead_end:
            outer.taken_back()
        trusts.append(outer.trust)
    return trusts


@settings(deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.sampled_from([-9.0, -0.5, 0.0, 0.01, 0.3, 9.0, math.inf]), max_size=30),
    st.floats(0.01, 10.0),
)
def test_trust_is_by_the_mean_rise(rises, difference):
    mean, square, expected = 0.0, 0.0, []
    for count, rise in enumerate(rises, 1):
        risen, weight = np.clip(rise / difference, -1.0, 1.0), max(1.0 / count, 0.1)
        mean, square = mean + weight * (risen - mean), square + weight * (risen**2 - square)
        prior, noise = 0.05**2, square / min(count, 10)
        posterior = 0.5 * noise + (1.0 - mean / 0.05) * prior
        expected.append(min(1.0, max(0.1, posterior / (noise + prior))))
    np.testing.assert_allclose(weighing(rises, difference), expected, atol=1e-9 / difference)


def test_trust_falls_where_the_loss_rises_and_comes_back():
    trusts = weighing([0.2] * 30 + [0.0] * 80, 1.0)
    assert trusts[0] < 0.5
    assert trusts[29] == 0.1
    assert trusts[-1] == pytest.approx(1.0, abs=0.01)


def test_no_trust_is_left_by_rises_of_any_size():
    for rise in (0.05, 0.2, 1.0, 5.0, 1e3, math.inf):
        assert weighing([rise] * 10, 1.0)[-1] == 0.1
        assert rise == math.inf or weighing([-rise] * 10, 1.0)[-1] == 1.0


def test_rises_that_differ_say_little():
    """As of a closure that draws anew in each call, by a generator of its own."""
    after = weighing([0.0] * 10 + [5.0] + [0.0] * 20, 1.0)
    assert after[9] == 1.0
    assert 0.15 < after[10] < after[20] < after[30]
    assert after[30] > 0.6
    trusts = weighing(np.random.default_rng(0).normal(size=1000), 1.0)
    assert np.std(trusts) < 0.2
    assert min(trusts) > 0.1
    assert max(trusts) < 1.0


def test_rises_are_in_mean_differences_that_no_spike_spoils():
    outer, last, expected = OuterMomentum(50, 14), None, 0.0
    random = np.random.default_rng(0)
    for step in range(300):
        loss = 2.0 + random.normal() + 1e4 * (step == 290)
        if last is not None:
            away = abs(loss - last)
            expected += 0.02 * (min(away, 3.0 * expected) - expected) if expected else away
        last = loss
        outer.see(Observation(loss, learning_rate=0.1))
        (*_, found) = outer.state_dict()["trust"]
        assert found == pytest.approx(expected, rel=1e-9)
    # The mean distance of two normal numbers.
    assert found == pytest.approx(2.0 / math.sqrt(math.pi), rel=0.3)


def test_the_first_are_weighed_and_then_one_in_so_many_whatever_ends_between():
    outer, asked = OuterMomentum(50, 14), []
    for number in range(100):
        if number % 7 == 0:
            outer.begin()
        # While the loss never changes there is nothing to hold a rise against.
        outer.see(Observation(1.0 + number % 2 * (number > 5), learning_rate=0.1))
        weighs = outer.to_be_weighed
        outer.stepped(1.0 if weighs else math.nan)
        assert outer.in_balance == weighs
        if weighs:
            asked.append(number)
            outer.weigh(1.0)
    assert asked[:WEIGHED] == [*range(7, 7 + WEIGHED)]
    assert set(np.diff(asked[WEIGHED:])) == {SELDOM}
    assert asked[WEIGHED] - asked[WEIGHED - 1] == SELDOM


# -- in the engine ----------------------------------------------------------------------------


@pytest.mark.parametrize("weighed", [0, WEIGHED])
def test_one_that_leads_to_no_number_is_taken_back(weighed):
    """One that is weighed at once, another after two batches; and they are tried again."""
    descent = Overstepping(NOISY, noise=0.3)
    outer, counters, seen = descent.engine.controller.outer, descent.engine.counters, set()
    descent.run(descent.began)
    before = counters.outer_steps
    # One that is not weighed is followed by others that may be.
    outer.load_state_dict(outer.state_dict() | {"weighed": [weighed, 1]})
    trust = outer.trust
    while descent.returns < 4:
        descent.step()
        seen.add(outer.active)
    assert seen == {True, False}
    assert counters.outer_steps - before == 4
    assert counters.divergences == (0 if weighed < WEIGHED else 2 * 4)
    assert outer.trust < trust
    told = [event["event"] for event in descent.engine.take_events()]
    assert told.count("outer step taken back") == 4


def ended(descent):
    """Weights after the run has been ended, twice, and probes that it took."""
    engine, count = descent.engine, descent.engine.counters.probes
    for _ in range(2):
        engine.finish()
        while not engine.step_done:
            engine.observe(descent.carry_out(engine.next()))
    return descent.x, engine.counters.probes - count


def test_the_end_of_a_run_takes_one_back_that_leads_to_no_number():
    descent = Overstepping(NOISY, noise=0.3)
    outer = descent.engine.controller.outer
    descent.run(descent.began)
    outer.load_state_dict(outer.state_dict() | {"weighed": [WEIGHED, 1]})
    while not outer.dead_end:
        descent.step()
    edge = descent.edge
    x, probes = ended(descent)
    assert np.array_equal(x, edge)
    assert (descent.returns, probes) == (1, 0)
    assert not outer.active


@pytest.mark.parametrize("phase", [Phase.FULL, Phase.PREDICT, Phase.CORRECT])
@pytest.mark.parametrize("bad", [True, False])
def test_the_end_of_a_run_looks_at_one_that_no_good_batch_has_followed(phase, bad):
    descent = Overstepping(NOISY, noise=0.3)
    descent.began = math.inf
    outer, engine = descent.engine.controller.outer, descent.engine
    descent.run(300)
    while not (outer.unproven and engine.phase is phase):
        descent.step()
    there = descent.x
    descent.edge = descent.bank[-2] if bad else None
    x, probes = ended(descent)
    # Where it is fine it may be looked at again.
    assert probes == (1 if bad else 2)
    assert descent.returns == bad
    assert np.array_equal(x, descent.bank[-2] if bad else there)
    assert outer.active != bad
    assert engine.phase is (Phase.FULL if bad else phase)
    descent.run(100)


def test_one_is_not_taken_back_for_batches_that_are_bad_themselves():
    descent = Watched(NOISY, noise=0.3)
    pushed, count = False, 0
    for step in range(600):
        # One with an outer step, none after it, and then any number.
        descent.step(bad=step > 300 and not pushed and step % 3 > 0)
        pushed = any(d.action is Action.MOVE for d in descent.directives[count:])
        count = len(descent.directives)
    assert descent.engine.counters.divergences > 100
    assert all(d.snapshot for d in descent.directives if d.action is Action.MOVE)
    assert descent.engine.controller.outer.active


def test_trust_is_what_they_do_to_the_loss():
    """Far from the minimum they lead down; from where only noise is left they lead up."""
    trusts = []
    for scale in (30.0, 0.0):
        descent = Watched(NOISY, noise=0.3)
        descent.x *= scale
        descent.run(600)
        assert descent.engine.counters.outer_steps > 30
        trusts.append(descent.engine.controller.outer.trust)
    assert trusts[0] > 0.9
    assert trusts[1] < 0.3


# -- a loss that rises ----------------------------------------------------------------------------


def strengths(losses, rates=0.1, negative=True):
    """Strength after each of the `losses`, of which one before was `negative`."""
    outer, found = OuterMomentum(50, 14), []
    outer.begin()
    for loss, rate in zip(losses, np.broadcast_to(rates, len(losses)), strict=True):
        outer.see(Observation(float(loss), learning_rate=float(rate)))
        if negative and not found:
            outer.raise_losses(0.0)
        found.append(outer.strength)
    return np.array(found)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("seed", range(3))
def test_there_are_none_while_a_negative_loss_rises(seed, scale):
    """As the surrogate of a policy gradient does, while the policy gets better."""
    noise = np.random.default_rng(seed).normal(size=2000)
    falling = strengths(scale * (5.0 - np.linspace(0.0, 4.0, 2000) + noise))
    rising = scale * (1.0 + np.linspace(0.0, 4.0, 2000) + noise)
    assert (falling[20:] > 0.0).all()
    # From where it has risen by about one difference and a half, the slow mean being behind.
    assert not strengths(rising)[1000:].any()
    # What cannot fall below zero is what training lowers.
    assert (strengths(rising, negative=False)[20:] > 0.0).all()


@pytest.mark.parametrize("spike", [1e9, -1e9])
@pytest.mark.parametrize("at", [100, 5000])
@pytest.mark.parametrize("seed", range(3))
def test_noise_and_spikes_are_no_rise(seed, at, spike):
    losses = 2.0 + np.random.default_rng(seed).standard_t(3, size=10_000)
    losses[at] = spike
    assert (strengths(losses)[20:] > 0.0).all()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("seed", range(3))
def test_other_data_have_them_begin_anew(seed, scale):
    noise = np.random.default_rng(seed).normal(size=1000)
    losses = scale * (9.0 - np.linspace(0.0, 2.0, 1000) + noise)
    losses[500:] += 8.0 * scale
    found = strengths(losses, negative=False) > 0.0
    assert found[20:500].all()
    # Five losses tell, and ten full steps later they begin.
    assert found[500:].tolist() == [True] * 4 + [False] * INTERVAL + [True] * (496 - INTERVAL)


def test_a_rise_of_the_loss_with_the_rate_is_not_told_twice():
    losses, rates = np.ones(400), np.full(400, 0.1)
    losses += 0.1 * np.random.default_rng(0).normal(size=400)
    losses[200:] += 5.0
    rates[200:] = 0.2
    found = strengths(losses, rates, negative=False) > 0.0
    assert np.flatnonzero(~found[20:]).tolist() == list(range(180, 180 + INTERVAL))


def test_high_losses_in_a_row_are_part_of_the_state():
    outer, other = OuterMomentum(50, 14), OuterMomentum(50, 14)
    outer.begin()
    noise = np.random.default_rng(0).normal(size=300)
    for loss in (*(9.0 + noise), *[30.0] * 3):
        outer.see(Observation(float(loss), learning_rate=0.1))
    other.load_state_dict(json.loads(json.dumps(outer.state_dict())))
    for one in (outer, other):
        one.see(Observation(30.0, learning_rate=0.1))
        assert one.strength > 0.0
        one.see(Observation(30.0, learning_rate=0.1))
        assert one.strength == 0.0


def test_what_a_loss_has_risen_by_is_part_of_the_state():
    outer, other = OuterMomentum(50, 14), OuterMomentum(50, 14)
    outer.begin()
    noise = np.random.default_rng(0).normal(size=3000)
    for step, loss in enumerate(np.linspace(0.0, 4.0, 3000) + noise):
        if step == 10:
            outer.raise_losses(5.0)
        if step % 700 == 699:
            other.load_state_dict(outer.state_dict())
        for one in (outer, other)[: 1 + (step >= 699)]:
            one.see(Observation(float(loss) + 5.0 * (step >= 10), learning_rate=0.1))
        assert step < 699 or other.strength == outer.strength
    assert outer.strength == 0.0


def test_a_rise_after_a_steep_fall_is_seen():
    noise = 0.1 * np.random.default_rng(5).normal(size=1200)
    fall = np.maximum(20.0 * (1.0 - np.arange(1200) / 40), 0.0)
    rise = np.maximum(0.004 * (np.arange(1200) - 600), 0.0)
    assert (strengths(fall + noise)[20:] > 0.0).all()
    assert not strengths(fall + rise + noise)[1000:].any()


def test_it_does_not_matter_what_losses_are_counted_from():
    losses = -5.0 + np.random.default_rng(7).normal(size=80)
    low, high = OuterMomentum(50, 14), OuterMomentum(50, 14)
    for number, loss in enumerate(losses):
        if number == 40:
            high.raise_losses(9.0)
        low.see(Observation(loss + 9.0, 1.0, 0.1))
        high.see(Observation(loss + (9.0 if number >= 40 else 0.0), 1.0, 0.1))
    (*_, newest, difference), loss = low.state_dict()["trust"], low.state_dict()["loss"]
    assert high.state_dict()["trust"][2:] == pytest.approx([newest, difference])
    assert high.state_dict()["loss"] == pytest.approx(loss)
    assert high.state_dict()["means"][0] == pytest.approx(low.state_dict()["means"][0])


@pytest.fixture
def in_the_balance():
    """A run whose last step was abandoned between an outer step and the look at what it did."""
    descent = Watched(NOISY, noise=0.3)
    while True:
        start, first = copy.deepcopy(descent), len(descent.log)
        descent.step()
        actions = [action for _, action in descent.log[first:]]
        if actions[:3] == [Action.PROBE, Action.MOVE, Action.PROBE]:
            break
    for _ in range(2):
        start.engine.observe(start.carry_out(start.engine.next()))
    assert start.engine.next().action is Action.PROBE
    start.engine.abandon()
    return start


def test_an_outer_step_that_is_in_the_balance_is_weighed_by_a_resumed_run(in_the_balance):
    other = Watched(NOISY)
    other.engine.load_state_dict(json.loads(text(in_the_balance.engine.state_dict())))
    assert in_the_balance.engine.next().action is other.engine.next().action is Action.PROBE
    for descent in (in_the_balance, other):
        descent.engine.observe(Observation(1.0))
        descent.engine.observe(Observation(1.0, 1.0, 0.5))
    trusts = [d.engine.controller.outer.trust for d in (in_the_balance, other)]
    assert trusts[0] == trusts[1]


def test_an_outer_step_that_is_in_the_balance_is_forgotten_with_the_parameters(in_the_balance):
    in_the_balance.engine.regroup()
    assert in_the_balance.engine.next().action is Action.FULL


def test_what_rises_with_the_rate_is_no_rise():
    fall = np.linspace(2.0, 1.0, 500)
    losses = np.tile(fall, 4) + 0.05 * np.random.default_rng(0).normal(size=2000)
    restarts = np.tile(np.linspace(0.1, 0.07, 500), 4)
    since = np.arange(2000) % 500
    assert (strengths(losses, restarts)[since > 10] > 0.0).all()
    # At one rate it is one.
    assert not strengths(losses)[600:700].any()


def test_a_policy_gradient_is_left_alone_while_its_surrogate_rises():
    class Surrogate(Watched):
        """Its gradient leads down, its value up: from -1 to 0, and in the next batch elsewhere."""

        def carry_out(self, directive, bad=False):
            seen = super().carry_out(directive, bad)
            level = -1.0 / (1.0 + self.engine.counters.steps / 200)
            return seen._replace(loss=level + 0.05 * float(self.random.normal()))

    descent = Surrogate(NOISY, noise=0.3)
    descent.run(300)
    first = descent.engine.counters.outer_steps
    descent.run(700)
    assert descent.engine.counters.outer_steps == first
    assert math.isnan(descent.engine.forecast_loss)


def test_after_one_was_taken_back_in_a_flight_no_forecast_is_told_of_full_steps():
    descent = Descent(dataclasses.replace(NOISY, averaging=False), noise=0.3)
    controller = descent.engine._controller
    while not (controller.stands_still and controller.outer.unproven):
        descent.step()
    descent.engine.finish()
    while not descent.engine.step_done:
        directive = descent.engine.next()
        seen = descent.carry_out(directive)
        lost = directive.action is Action.PROBE
        descent.engine.observe(Observation(math.inf) if lost else seen)
    assert descent.engine.phase is Phase.FULL
    for _ in range(3):
        descent.step()
        assert math.isnan(descent.engine.forecast_loss)
