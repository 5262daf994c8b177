"""Where a batch that had stayed for long is followed by another one, in a descent on the first."""

import math

import numpy as np
import pytest
from secant_descent import at, same

from hybridcore import Action, Observation
from hybridcore.secant import CARRIED_OVER, MOST_PATIENCE, WAIT, SecantDescent, Stage
from hybridcore.trial import MOST_VAIN, SPIKE, OptimizerTrial

BACK = "back to before the quasi-Newton steps"


def turned(moment, share):
    """One at `moment` of a descent whose next batch has its minimum `share` of the way back.

    And no loss as low, or it would be taken for progress.
    """
    descent = at(moment)
    descent.floor += 0.1
    assert descent.start is not None
    descent.centre = (1.0 - share) * descent.x + share * descent.start
    return descent


def until_they_end(descent):
    """Take steps until the quasi-Newton steps end; return the directives from then on."""
    for _ in range(150):
        first = len(descent.directives)
        descent.step()
        if descent.stage is Stage.REST:
            return descent.directives[first:]
    raise AssertionError("they went on")


def rolled_back(directives):
    return [d.at_start for d in directives if d.action is Action.ROLLBACK]


@pytest.mark.parametrize("moment", ["decision", "descent", "comparison", "standing"])
@pytest.mark.parametrize("share", [1.0, 0.8])
def test_a_batch_that_is_lower_where_they_began_is_trained_from_there(moment, share):
    descent = turned(moment, share)
    start = descent.start
    lower = descent.loss(start)
    assert lower < descent.loss(descent.x)
    done = until_they_end(descent)
    assert rolled_back(done)[-1:] == [True]
    assert descent.start is None
    events = descent.engine.take_events()
    assert BACK in [event["event"] for event in events]
    # One step of the optimizer from there at most.
    assert descent.loss(descent.x) <= lower
    assert np.linalg.norm(descent.x - start) <= 0.5 * np.linalg.norm(descent.curvature * start)


@pytest.mark.parametrize("moment", ["decision", "descent", "comparison", "standing"])
def test_one_that_is_lower_where_they_have_led_is_trained_from_here(moment):
    descent = turned(moment, 0.2)
    before = descent.loss(descent.x)
    assert before < descent.loss(descent.start)
    done = until_they_end(descent)
    assert True not in rolled_back(done)
    # A trial of the optimizer may have been taken back.
    assert descent.loss(descent.x) <= before + 1e-4


@pytest.mark.parametrize(
    ("here", "start", "back"),
    [
        (2.0, 1.0, True),
        (1.0, 1.0, False),
        (math.nan, 1.0, True),
        (math.inf, 1.0, True),
        (2.0, math.nan, False),
        (2.0, -math.inf, False),
        (math.nan, math.nan, False),
    ],
)
def test_a_loss_that_is_no_number_is_the_highest(here, start, back):
    descent = turned("decision", 1.0)
    losses = iter([here, start])
    while (directive := descent.engine.next()).action is not Action.FULL:
        seen = descent.carry_out(directive)
        if descent.stage is Stage.REST and directive.action is Action.PROBE:
            seen = Observation(next(losses))
        descent.engine.observe(seen)
    assert rolled_back(descent.directives) == [True] * back


def test_where_nothing_is_kept_of_the_beginning_it_goes_on_from_here():
    """As in a state of an earlier version."""
    descent = turned("decision", 1.0)
    descent.start = None
    before = descent.loss(descent.x)
    assert True not in rolled_back(until_they_end(descent))
    assert descent.loss(descent.x) <= before


def test_a_run_that_stood_still_does_not_take_another_batch_for_the_same():
    """It evaluates the base anew, at which the loss was known."""
    descent = at("standing")
    while descent.engine.controller.leap or not descent.secant.landing:
        descent.step()
    assert descent.stage is Stage.DESCEND
    descent.centre = descent.start
    assert rolled_back(until_they_end(descent)) == [True]


@pytest.mark.parametrize(
    ("first", "loss", "wait"),
    [
        (2.0, 1.6, WAIT),
        # What was learned before them is of use for that batch too.
        (2.0, 0.99 * CARRIED_OVER * 2.0, WAIT * MOST_PATIENCE),
        (2.0, 1.01 * CARRIED_OVER * 2.0, WAIT),
        (math.nan, 0.1, WAIT),
    ],
)
def test_where_batches_are_parts_of_the_same_data_looks_are_rare(first, loss, wait):
    secant = SecantDescent(pairs=10, block=50)
    for seen in (first, 0.001) if first > 0.0 else ():
        secant.see(Observation(seen))
    secant.rest(1000)
    secant.went_back(loss, 1000)
    assert secant.until_due(1000) == wait


def test_the_first_loss_is_counted_from_the_floor_too():
    secant = SecantDescent(pairs=10, block=50)
    secant.see(Observation(2.0))
    secant.raise_losses(4.0)
    secant.rest(1000)
    # That is 1.0 for 2.0 as it was, and 5.0 for 6.0 now.
    secant.went_back(5.0, 1000)
    assert secant.until_due(1000) == WAIT


@pytest.mark.parametrize(
    ("long", "vain", "losses", "asked"),
    [
        (True, 0, (0.5, 2.0 * SPIKE), [False, True]),
        # Once for each spike.
        (True, 0, (2.0 * SPIKE, 3.0 * SPIKE, 0.5, 2.0 * SPIKE), [True, False, False, True]),
        (True, 0, (0.9 * SPIKE,), [False]),
        # The others end there.
        (False, 0, (2.0 * SPIKE,), [False]),
        (True, 2, (2.0 * SPIKE,), [False]),
    ],
)
def test_a_long_trial_asks_at_each_spike_whether_it_is_another_batch(long, vain, losses, asked):
    trial = OptimizerTrial(vain=vain)
    trial.begin(1.0, 0.1, long=long)
    found = []
    for steps, loss in enumerate(losses, 1):
        seen = Observation(loss, learning_rate=0.1)
        found.append(trial.begins_a_spike(seen))
        trial.see(seen, steps, 20, 50)
    assert found == asked


@pytest.mark.parametrize("long", [True, False])
def test_a_trial_that_has_all_the_time_sees_that_its_batch_is_another(long):
    """One that goes on through spikes at once, and one that ends at a spike where it is judged."""
    descent = at("comparison")
    trial = descent.secant._trial
    trial.long, trial.vain = long, 0 if long else MOST_VAIN
    for _ in range(3):
        descent.step()
    assert descent.secant.holds_recovery
    before = len(descent.directives)
    descent.floor += 1.0
    descent.centre = descent.start
    descent.step()
    if not long:
        assert descent.stage is Stage.DESCEND
        descent.step()
    assert descent.stage is Stage.REST
    done = descent.directives[before:]
    assert any(d.at_mark for d in done)
    assert rolled_back(done) == [True]


@pytest.mark.parametrize("moment", ["comparison", "landing", "decision"])
@pytest.mark.parametrize("number", [0, 1])
def test_where_the_batch_raises_in_between_they_have_ended_all_the_same(moment, number):
    descent = turned(moment, 1.0)
    probes = 0
    for _ in range(150):
        while True:
            directive = descent.engine.next()
            looks = directive.action is Action.PROBE and not directive.at_mark
            ends = looks and descent.secant.stage is Stage.REST
            if ends and probes == number:
                break
            probes += ends
            descent.engine.observe(descent.carry_out(directive))
            if descent.engine.step_done:
                break
        if ends:
            break
    assert ends
    descent.abandon()
    assert not descent.secant.changed
    # What was decided in a step that is taken again is decided again.
    until_they_end(descent)
    for _ in range(40):
        descent.step()
        assert descent.stage is Stage.REST


def test_in_the_middle_of_a_descent_all_of_it_is_resumed():
    descent = turned("decision", 1.0)
    other = descent.resumed()
    mine, others = until_they_end(descent), until_they_end(other)
    assert len(mine) == len(others)
    assert all(map(same, mine, others))
    assert np.array_equal(descent.x, other.x)


def test_a_step_that_raises_after_the_way_back_goes_on_from_there():
    descent = turned("decision", 1.0)
    start = descent.start
    while True:
        directive = descent.engine.next()
        descent.engine.observe(descent.carry_out(directive))
        if directive.action is Action.ROLLBACK and directive.at_start:
            break
    assert descent.engine.next().action is Action.FULL
    descent.abandon()
    assert descent.stage is Stage.REST
    assert np.array_equal(descent.x, start)
    before = len(descent.directives)
    descent.step()
    assert [d.action for d in descent.directives[before:]] == [Action.FULL]


def test_where_the_batch_has_been_another_there_are_no_leaps_any_more():
    descent = turned("standing", 1.0)
    # So that nothing was learned for it.
    descent.floor += 100.0
    until_they_end(descent)
    before = [event["event"] for event in descent.engine.take_events()]
    assert "leap" in before
    for _ in range(400):
        descent.step()
    since = [event["event"] for event in descent.engine.take_events()]
    assert "quasi-Newton steps" in since
    assert "optimizer on trial" in since
    assert "leap" not in since


def test_at_the_same_batch_nobody_asks_for_the_beginning():
    descent = at("decision")
    descent.run(300)
    assert not any(d.at_start for d in descent.directives)
