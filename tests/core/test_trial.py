"""The optimizer on trial, in the midst of quasi-Newton steps on a loss that is known exactly."""

import contextlib
import copy
import json
import math

import numpy as np
import pytest
from descent import text
from secant_descent import PairedDescent, at, go_on, made

from hybridcore import Action, Observation
from hybridcore.quasi_newton import Descent
from hybridcore.secant import MOST_REJECTED, VAIN, SecantDescent, Stage
from hybridcore.trial import LONG, MOST_VAIN, OptimizerTrial

# -- what it comes to ------------------------------------------------------------------------------


def test_where_the_optimizer_has_led_uphill_it_is_put_back():
    descent = at("landing again")
    descent.x = descent.x + 1.0
    descent.step()
    assert np.array_equal(descent.x, descent.saved)
    assert descent.stage is Stage.DESCEND
    go_on(descent, 300)


def test_a_state_that_knows_of_a_trial_no_more_than_its_loss_is_resumed():
    descent = at("landing again")
    state = descent.engine.state_dict()
    secant = state["controller"]["secant"]
    secant["numbers"]["_saved"] = secant.pop("trial")["loss"]
    descent.engine.load_state_dict(json.loads(text(state)))
    assert descent.engine.controller.secant.holds_recovery
    descent.x = descent.x + 1.0
    descent.step()
    assert np.array_equal(descent.x, descent.saved)


def trial(secant, fall, losses=(1.2,) * 9, there=2.0, here=1.0, falling=10**9):
    """Lead a trial of the optimizer from a loss of 1 through `losses`; how many it took.

    The learning rate falls by `fall` in each of the first `falling` steps. In the end the loss is
    `there`, and `here` where the trial began.
    """
    secant.loss, steps = 1.0, []
    secant.compare()
    for loss in (1.0, *losses):
        turn = secant.step()
        steps.append(next(turn))
        assert steps[-1].action is Action.FULL
        rate = 0.5 - min(len(steps), falling) * fall
        with pytest.raises(StopIteration):
            turn.send(Observation(loss, 1.0, rate, applied=math.isfinite(loss)))
        if secant.stage is Stage.DESCEND:
            break
    else:
        return len(steps), None
    # However long it was, it is judged first.
    secant._has_probe = True
    assert not secant.block_over
    assert not secant.probe_due
    turn = secant.step()
    directive = next(turn)
    with contextlib.suppress(StopIteration):
        while True:
            loss = here if directive.action is Action.PROBE else there
            directive = turn.send(Observation(loss, 1.0, 0.1, objective=loss))
    return len(steps), [step.fresh_pairs for step in steps if step.pair]


def test_after_two_trials_in_vain_at_a_falling_rate_the_optimizer_has_all_the_time():
    def vain(times, fall=1e-4):
        secant = SecantDescent(10, 20)
        pairs = [True, *[False] * 9]
        for _ in range(times):
            assert trial(secant, fall) == (10, pairs)
        return secant

    # At the same rate another trial would come to the same.
    vain(8, fall=0.0)
    assert trial(vain(2), 1e-4, [1.2] * 500) == (501, None)
    # It ends where the loss is much lower, and where it spikes; with the pairs that there are.
    assert trial(vain(2), 1e-4, [*[0.9] * 90, 0.4], there=0.4) == (92, [])
    secant = vain(2)
    assert trial(secant, 1e-4, [*[1.2] * 90, 20.0]) == (92, [])
    assert secant.loss == 1.0
    again = SecantDescent(10, 20)
    again.load_state_dict(json.loads(text(secant.state_dict())))
    assert trial(again, 1e-4, [1.2] * 500) == (501, None)
    # Nor does it go on where the rate has come to its end, or rises.
    assert trial(vain(2), 1e-4, [1.2] * 500, falling=100) == (120, [])
    # Two bad batches in a row are not the fault of the batch.
    assert trial(vain(2), 1e-4, [*[math.nan, 1.2] * 45, 0.4], there=0.4) == (92, [])
    assert trial(vain(2), 1e-4, [*[1.2] * 90, math.nan, math.nan]) == (93, [])
    # With another batch in the end there is nothing to compare, and nothing is taken back.
    secant = vain(2)
    assert trial(secant, 1e-4, [20.0], here=3.0) == (2, [])
    assert math.isnan(secant.loss)
    # Who gets lower begins anew, and so does a block that does.
    secant = vain(1)
    assert trial(secant, 1e-4, there=0.5)[0] == 10
    assert trial(secant, 1e-4)[0] == 10
    assert trial(secant, 1e-4)[0] == 10
    secant._began, secant.loss = 0.0, 0.9
    secant.finish_block()
    assert trial(secant, 1e-4)[0] == 10


def test_a_trial_that_catches_up_goes_on_until_it_is_ahead_or_slows_down():
    def tried(losses, pace=0.01, there=2.0):
        secant = SecantDescent(10, 20)
        secant._own_speed = pace
        return trial(secant, 0.0, losses, there)[0], secant

    falling = [1.5 * math.exp(-0.05 * step) for step in range(60)]
    # In step n the median of the newest seven is that of three steps before, falling[n - 5], and at
    # n = 17 it is below exp(-0.01 n) for the first time.
    took, secant = tried(falling, there=falling[16])
    assert took == 17
    assert secant.loss == falling[16]
    # No faster than the block was, or too far up to be back soon, it has ten steps as ever.
    assert tried(falling, pace=0.05001)[0] == 10
    assert tried([2.0 * loss for loss in falling])[0] == 10
    # It ends where it is no faster any more, in vain where that is above where it began.
    took, secant = tried([*falling[:8], *[falling[8]] * 60])
    assert 10 < took < 25
    assert secant.loss == 1.0
    # What it took to get back to where it began is no measure of the steps ahead.
    slow = [falling[8] * 0.991**step for step in range(60)]
    took, secant = tried([*falling[:8], *slow], there=0.9)
    assert 10 < took < 25
    assert -math.log(0.9) / took < 0.008
    assert secant.speed == pytest.approx(-math.log(0.991))


@pytest.mark.parametrize("count", [2, 3, 5, 11, 14])
def test_the_speed_of_a_trial_is_the_fall_of_the_log_loss_by_a_step(count):
    trial = OptimizerTrial()
    trial.begin(1.0, 0.01)
    for step in range(count):
        trial.see(Observation(math.exp(-0.05 * step), 1.0, 0.1), step + 1, 20, 50)
    assert trial.speed == pytest.approx(0.05)


def test_after_one_that_caught_up_in_vain_the_next_has_its_usual_time():
    falling = [1.5 * math.exp(-0.05 * step) for step in range(60)]
    secant = SecantDescent(10, 20)
    for there, expected in ((2.0, 17), (2.0, 10), (0.95, 10), (2.0, 17)):
        secant._own_speed = 0.01
        assert trial(secant, 0.0, falling, there)[0] == expected
        again = SecantDescent(10, 20)
        again.load_state_dict(json.loads(text(secant.state_dict())))
        secant = again


# -- where batches are bad ------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [1, 2])
@pytest.mark.parametrize("number", [0, 4, 8, 9])
def test_a_bad_batch_on_trial_does_not_keep_what_the_optimizer_did(number, bad):
    """Of the nine steps that follow on the first one, the last leads uphill here."""
    descent = at("comparison")
    kept, secant, steps, uphill = descent.saved, descent.engine.controller.secant, 0, False
    secant.speed = 1.0
    while secant.holds_recovery:
        descent.step(bad=number <= steps < number + bad)
        steps += 1
        if secant.landing and not uphill:
            descent.x, uphill = descent.x + 1.0, True
    # One is the batch's fault. Two in a row are not, and where the trial has led is judged.
    assert steps == (number + 3 if bad == 2 and number < 9 else 11)
    assert np.array_equal(descent.x, kept)
    assert descent.stage is Stage.DESCEND
    # What has led uphill is no measure of how fast the optimizer is.
    assert secant.speed == VAIN * secant._own_speed
    go_on(descent, 200)


def test_a_bad_batch_where_a_trial_is_judged_leaves_that_to_the_next():
    descent = at("landing again")
    descent.engine.take_events()
    before = copy.deepcopy(descent.engine.meter.state_dict())
    descent.step(bad=True)
    names = [event["event"] for event in descent.engine.take_events()]
    assert not {"trial taken back", "quasi-Newton steps end"} & set(names)
    assert descent.engine.meter.state_dict()["mark"] == before["mark"]
    descent.step()
    assert not descent.engine.controller.secant.holds_recovery
    assert descent.engine.meter.state_dict()["mark"] != before["mark"]
    # Interrupted on its way back it is judged anew.
    descent = at("landing again")
    descent.x, kept = descent.x + 1.0, descent.saved
    descent.step(bad=True)
    while descent.engine.next().action is not Action.ROLLBACK:
        descent.engine.observe(descent.carry_out(descent.engine.next(), bad=True))
    descent.abandon()
    descent.step()
    assert np.array_equal(descent.x, kept)


@pytest.mark.parametrize("vain", [0, 2])
def test_a_trial_that_leads_to_no_number_is_taken_back_and_seldom_begun_again(vain):
    descent = at("comparison")
    descent.engine.controller.secant._trial.vain = vain
    kept, trials = descent.loss(descent.saved), 0
    for _ in range(1000):
        on_trial = descent.engine.controller.secant.holds_recovery
        descent.step(bad=on_trial)
        trials += not on_trial and descent.engine.controller.secant.holds_recovery
    assert descent.loss(descent.x) <= kept
    assert descent.engine.counters.predicted_steps > 300
    assert trials < 25


def test_that_a_trial_was_in_vain_is_known_until_one_gets_lower():
    descent = at("landing again")
    trial = descent.engine.controller.secant._trial
    # The rate has fallen.
    trial.first_rate = 2.0 * trial.last_rate
    descent.x = descent.x + 1.0
    descent.step()
    assert trial.vain == 1
    # Where it began becomes the base again.
    descent.step()
    assert descent.engine.controller.secant._trial.vain == 1
    descent.until("landing again")
    descent.step()
    assert descent.engine.controller.secant._trial.vain == 0


def test_a_block_that_gets_stuck_after_one_in_vain_counts_as_another():
    descent = at("comparison")
    secant = descent.engine.controller.secant
    for vain, fall, stuck, expected in (
        (1, 0.0, True, 2),
        (1, 0.0, False, 1),
        (1, 1.0, True, 0),
        (0, 0.0, True, 0),
    ):
        secant._trial.vain, secant.loss = vain, 1e-3
        secant._began, secant._rejected = math.log(1e-3) + fall, MOST_REJECTED * stuck
        secant.finish_block()
        assert secant._trial.vain == expected
        assert secant._trial.endless == (expected >= MOST_VAIN)


def test_bad_batches_of_a_trial_are_no_divergence_of_the_run():
    descent = at("comparison")
    secant, level = descent.engine.controller.secant, descent.engine.controller.monitor.level
    secant._trial.vain = MOST_VAIN
    for step in range(200):
        descent.step(bad=step % 10 == 0)
        if not secant.holds_recovery:
            break
        assert descent.engine.controller.monitor.level is level
    assert descent.engine.counters.divergences >= 3


def test_losses_that_rise_on_trial_are_no_divergence_of_the_run():
    descent = made(floor=1.0)
    descent.until("comparison")
    descent.step()
    secant, lowest = descent.engine.controller.secant, descent.loss(descent.x)
    while descent.stage is Stage.GATHER:
        # Uphill, to well above all that the run had before, but not so far that it is over at once.
        descent.x = descent.x * 1.5
        descent.step()
        assert secant.holds_recovery
        assert descent.engine.statistics().divergence_level == "NORMAL"
    assert descent.loss(descent.x) > 2.0 * lowest


def test_a_leap_that_a_bad_batch_takes_back_is_counted():
    descent = at("correction")
    descent.step(bad=True)
    assert descent.engine.take_events()[-1]["event"] == "leap rolled back"
    assert descent.engine.statistics().rollbacks == 1


def test_a_trial_in_vain_at_a_level_rate_ends_the_row_of_those_at_a_falling_one():
    secant, vain = SecantDescent(5, 50), []
    for fall in (0.01, 0.0, 0.01):
        trial(secant, fall)
        vain.append(secant._trial.vain)
    assert vain == [1, 0, 1]


def test_at_the_end_a_trial_that_has_not_moved_the_loss_is_taken_back():
    descent = at("comparison")
    descent.step()
    descent.engine.finish()
    seen = []
    while not descent.engine.step_done:
        seen.append(descent.engine.next().action)
        descent.carry_out(descent.engine.next())
        descent.engine.observe(Observation(0.5))
    assert seen == [Action.PROBE, Action.PROBE, Action.ROLLBACK]
    assert np.array_equal(descent.x, descent.saved)


def test_a_short_trial_that_is_abandoned_on_the_way_to_a_new_base_is_judged_anew():
    descent = at("comparison")
    secant = descent.engine.controller.secant
    descent.step(bad=True)
    descent.step(bad=True)
    assert secant.landing
    secant._own_speed = math.inf
    while descent.engine.next().action is not Action.BASE:
        descent.engine.observe(descent.carry_out(descent.engine.next()))
    descent.abandon()
    assert secant.holds_recovery
    descent.step()
    assert not secant.holds_recovery
    go_on(descent, 200)


def test_a_trial_that_leads_below_zero_is_kept():
    descent = made(floor=-0.0005)
    descent.until("comparison", most=3000)
    descent.x = 0.01 * descent.x
    reached, kept = descent.loss(descent.x), descent.x
    assert reached < 0.0
    ended = descent.resumed()
    ended.engine.finish()
    while not ended.engine.step_done:
        ended.engine.observe(ended.carry_out(ended.engine.next()))
    assert np.array_equal(ended.x, kept)
    for _ in range(200):
        descent.step()
        assert descent.loss(descent.x) <= reached + 1e-9


def test_a_trial_whose_first_batch_is_bad_begins_with_the_next():
    descent = PairedDescent()
    while not descent.engine.controller.secant.holds_recovery:
        descent.until("decision")
        before = descent.resumed()
        descent.step()
    kept = before.x
    # After the probe that asks whether to go on.
    before.step(bad_one=1)
    assert before.engine.controller.secant.holds_recovery
    assert np.array_equal(before.x, kept)
    before.step()
    assert before.directives[-1].fresh_pairs
    assert np.array_equal(before.saved, kept)
    go_on(before, 200)


# -- what it is worth ------------------------------------------------------------------------------


def test_steps_of_a_trial_in_vain_stand_for_nothing():
    descent = at("comparison")
    counters, meter = descent.engine.counters, descent.engine.meter
    before = counters.full_steps, meter.outside(counters.full_steps)
    taken = meter.secants.taken
    while descent.stage is Stage.GATHER:
        descent.step()
    descent.x = descent.x + 1.0
    descent.step()
    assert descent.engine.take_events()[-1]["event"] == "trial taken back"
    meter, full = descent.engine.meter, descent.engine.counters.full_steps
    assert full > before[0] + 5
    # The first of them was taken with the decision.
    assert meter.outside(full) == before[1] - 1
    assert meter.secants.taken == taken


def test_so_do_those_of_one_that_the_end_of_a_run_takes_back():
    descent = at("comparison")
    counters, meter = descent.engine.counters, descent.engine.meter
    outside = meter.outside(counters.full_steps)
    descent.step()
    descent.x = descent.x + 1.0
    descent.engine.finish()
    while not descent.engine.step_done:
        descent.engine.observe(descent.carry_out(descent.engine.next()))
    assert "trial taken back" in [event["event"] for event in descent.engine.take_events()]
    assert descent.engine.meter.outside(descent.engine.counters.full_steps) == outside - 1


def test_steps_of_a_trial_that_the_optimizer_wins_are_its_own():
    descent = at("comparison")
    taken, outside = descent.engine.meter.secants.taken, descent.engine.meter.outside(0)
    full = descent.engine.counters.full_steps
    while descent.stage is Stage.GATHER:
        descent.step()
    descent.x = 0.01 * descent.x
    descent.step()
    assert descent.stage is Stage.REST
    meter = descent.engine.meter
    assert meter.secants.taken == taken
    steps = descent.engine.counters.full_steps
    assert meter.outside(0) == outside
    assert meter.outside(steps) == outside + steps
    assert steps > full


# -- long ones -------------------------------------------------------------------------------------


def steps_of(trial, losses, most=20, block=50):
    """Number of the step that ends the trial, None if none of `losses` does."""
    for step, loss in enumerate(losses, 1):
        if trial.see(Observation(loss, 1.0, 0.1), step, most, block):
            return step
    return None


def test_a_long_trial_has_time_to_come_back_from_anywhere():
    losses = [1.2] * 10 + [40.0] * 200 + [0.9] * 20
    usual, long = OptimizerTrial(), OptimizerTrial()
    usual.begin(1.0, 0.1)
    long.begin(1.0, 0.1, long=True)
    assert steps_of(usual, losses) == 11
    # By the median of the newest seven; and as well from a state that was saved on the way.
    assert steps_of(long, losses) == 214
    assert steps_of(OptimizerTrial(**long.state_dict()), losses) == 214
    long.begin(1.0, 0.1)
    assert steps_of(long, losses) == 11


def test_a_long_trial_that_is_ahead_at_once_has_as_many_steps_as_any_and_one_in_vain_an_end():
    long = OptimizerTrial()
    long.begin(1.0, 0.1, long=True)
    assert steps_of(long, [0.9] * 30) == 20
    long.begin(1.0, 0.1, long=True)
    assert steps_of(long, [1.1] * 1000) == LONG * 50


def test_at_a_falling_rate_a_long_trial_is_one_without_an_end():
    long = OptimizerTrial(vain=MOST_VAIN)
    long.begin(1.0, 0.1, long=True)
    assert steps_of(long, [1.2, 40.0]) == 2


@pytest.mark.parametrize(
    ("slope", "steepness", "loss", "tried", "settled"),
    [
        (-0.1, 0.0, 0.02, False, False),
        (-0.1, 0.0, 0.02, True, True),
        (-1e-5, 1.0, 0.02, False, True),
        (-0.1, 0.0, 1e-12, False, True),
        # Without a model, at a tenth and a thousandth of the gradient of a loss of 10.
        (None, 0.1, 0.02, False, False),
        (None, 0.1, 0.02, True, True),
        (None, 0.1, 1e-12, False, True),
        (None, 0.001, 0.02, False, True),
    ],
)
def test_a_run_that_nothing_lowers_stands_still_only_where_it_has_settled(
    slope, steepness, loss, tried, settled
):
    secant = SecantDescent(20, 50)
    secant.loss, secant._scale, secant._steepness = loss, 10.0, steepness
    secant._descent = None if slope is None else Descent(np.ones(3), slope * loss)
    secant._trial.long = tried
    assert secant.settled is settled
