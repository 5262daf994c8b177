"""Quasi-Newton steps as the engine takes them, on a loss that is known exactly."""

import copy
import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from descent import text
from hypothesis import given, settings
from hypothesis import strategies as st
from secant_descent import EVALUATIONS, MOMENTS, PairedDescent, at, count, go_on, made, same

from hybridcore import Action, HybridTrainerConfig, Observation, Phase
from hybridcore.meter import MOST_A_STEP, Meter, SecantCredit
from hybridcore.phases import TRANSITIONS
from hybridcore.secant import LEAST_PAIRS, MOST_PATIENCE, WAIT, SecantDescent, Stage

WITHOUT_CLOCK = settings(deadline=None, derandomize=True, database=None)
OWN_ACTIONS = (Action.GRADIENT, Action.BASE, Action.REACH, Action.MARK)

# -- where they are taken, and what for -----------------------------------------------------------


@pytest.mark.parametrize("least", [1e-5, 1e-3])
@pytest.mark.parametrize("floor", [1e-3, -0.1, -1.0, -5.0])
@pytest.mark.parametrize("seed", range(3))
def test_half_of_the_passes_lead_as_far(least, floor, seed):
    x, curvature = np.random.default_rng(seed).normal(size=60), np.geomspace(least, 1.0, 60)
    task = {"plain_metric": True, "curvature": curvature, "x": x, "floor": floor}
    jumps, secants = made(0, **task), made(10, **task)
    jumps.run(600)
    target, passes = jumps.loss(jumps.x), jumps.engine.counters.full_steps
    while secants.engine.counters.full_steps < passes // 2:
        secants.step()
    assert secants.loss(secants.x) <= target


def test_from_the_first_of_them_the_speedup_is_open_above():
    descent = PairedDescent()
    while not descent.engine.counters.secant_steps:
        assert math.isfinite(descent.engine.statistics().measured_speedup_interval.high)
        descent.step()
    for _ in range(150):
        statistics = descent.engine.statistics()
        assert statistics.measured_speedup_interval.high == math.inf
        assert "not known for quasi-Newton steps, at least" in str(statistics)
        descent.step()
    # The unit of costs is a step with the optimizer.
    assert descent.engine.meter.full_time.mean == pytest.approx(descent.seconds)


@pytest.mark.parametrize("plain_metric", [True, False])
def test_weight_decay_is_part_of_what_is_minimized(plain_metric):
    origin = np.random.default_rng(4).normal(size=60)
    descent = made(floor=1.1, plain_metric=plain_metric, decay=1e-3, origin=origin)

    def above():
        return descent.loss(descent.x) + descent.added(descent.x) - descent.floor

    before = above()
    descent.run(1000)
    # The loss alone has its minimum elsewhere.
    assert above() < 1e-6 * before
    assert descent.engine.counters.secant_steps > 100


@pytest.mark.parametrize("noise", [1e-3, 0.3])
@pytest.mark.parametrize("seed", range(3))
def test_where_batches_differ_there_are_none_and_looks_become_rare(noise, seed):
    descent, looks = PairedDescent(noise=noise, seed=seed), []
    for step in range(2000):
        before = len(descent.directives)
        descent.step()
        done = descent.directives[before:]
        # Those of a step with a move weigh an outer step.
        if any(d.own_batch for d in done) and not any(d.action is Action.MOVE for d in done):
            looks.append(step)
    assert count(descent, Action.GRADIENT) == descent.engine.counters.secant_steps == 0
    gaps = np.diff(looks)
    assert 3 <= len(looks) <= 8
    assert gaps[-1] > 4 * gaps[0]


@pytest.mark.parametrize("pairs", range(LEAST_PAIRS + 1))
def test_too_few_pairs_are_as_good_as_none(pairs):
    descent = PairedDescent(pairs=pairs)
    descent.run(400)
    own = [d for d in descent.directives if d.action in OWN_ACTIONS or d.own_batch or d.pair]
    assert bool(own) == (pairs == LEAST_PAIRS)
    assert (descent.engine.counters.secant_steps > 0) == (pairs == LEAST_PAIRS)


def test_between_steps_the_loss_is_that_of_the_best_point_yet():
    descent, seen = PairedDescent(), 0
    descent.until("landing")
    lowest = math.inf
    for _ in range(800):
        phase = descent.step()
        secant, here = descent.engine.controller.secant, descent.loss(descent.x)
        if secant.stage is not Stage.DESCEND or phase is not Phase.FULL:
            lowest = math.inf
        elif descent.directives[-1].action is not Action.FULL:
            assert here == secant.loss == descent.loss(descent.base[0])
            # A trial that was taken back is not what is said of its step.
            taken_back = descent.directives[-1].action is Action.REACH
            assert not taken_back or descent.engine.forecast_loss == here
            assert here <= lowest
            lowest, seen = here, seen + 1
    assert seen > 200


# -- leaps ----------------------------------------------------------------------------------------


def test_leaps_go_through_the_phase_table():
    descent, config = PairedDescent(), HybridTrainerConfig()
    descent.run(800)
    phases = [phase for phase, _ in descent.log]
    allowed = {(before, after) for (before, _), after in TRANSITIONS.items()}
    taken = {pair for pair in itertools.pairwise(phases) if pair[0] is not pair[1]}
    assert taken == allowed
    leaps = [len(list(g)) for p, g in itertools.groupby(phases) if p is Phase.PREDICT]
    # The move to the trial point and a probe there come on top.
    assert all(leap - 2 <= config.horizon for leap in leaps)
    counters = descent.engine.counters
    assert counters.predicted_steps == count(descent, Action.SKIP) > 100
    assert counters.steps == counters.full_steps + counters.predicted_steps == 800


def test_a_leap_stands_on_a_lower_point_for_all_of_its_steps():
    descent, leaps = PairedDescent(), 0
    for _ in range(4):
        descent.until("decision")
        before, expected = descent.loss(descent.x), descent.engine.controller.secant.expected
        if descent.step() is not Phase.PREDICT or descent.engine.phase is not Phase.PREDICT:
            # There is none, or its point is no lower.
            continue
        leaps += 1
        stood, error = descent.x, descent.engine.prediction_error
        found = descent.loss(stood)
        assert error == pytest.approx(abs(expected - found) / found)
        assert found < before
        while descent.engine.phase is Phase.PREDICT:
            assert not descent.engine.needs_batch
            # A loss that is known is told in the place of the forecast.
            assert descent.engine.forecast_loss == found
            descent.step()
            assert np.array_equal(descent.x, stood)
    assert leaps >= 1


def test_a_trial_point_that_is_no_lower_ends_the_leap():
    descent = at("decision")
    before = descent.x
    # After the probe that asks whether to go on.
    descent.step(bad_one=1)
    assert np.array_equal(descent.x, before)
    assert descent.engine.forecast_loss == descent.loss(before)
    assert descent.engine.phase is Phase.CORRECT
    go_on(descent, 200)


def test_at_the_minimum_a_run_stands_still():
    descent = made(plain_metric=True)
    descent.run(800)
    reached = descent.loss(descent.x)
    assert reached == pytest.approx(descent.floor, rel=1e-12)
    counters = descent.engine.counters
    full, predicted = counters.full_steps, counters.predicted_steps
    for _ in range(800):
        before = descent.x
        if descent.step() is Phase.PREDICT:
            assert np.array_equal(descent.x, before)
        assert descent.loss(descent.x) <= reached * (1.0 + 1e-12)
    assert counters.predicted_steps - predicted > 0.3 * (counters.full_steps - full)


# -- where something goes wrong -------------------------------------------------------------------


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_bad_batch_costs_itself_whatever_the_step_is_for(moment):
    descent = at(moment)
    before = descent.x
    descent.step(bad=True)
    # What a leap stood on has no gradient, so that it cannot become the base.
    kept = descent.base[0] if moment == "correction" else before
    assert np.array_equal(descent.x, kept)
    go_on(descent, 300)


@pytest.mark.parametrize("moment", MOMENTS)
def test_one_bad_evaluation_does_no_harm_whichever_it_is(moment):
    start = at(moment)
    for number in range(20):
        descent = start.resumed()
        descent.step(bad_one=number)
        if descent.evaluations <= number:
            break
        best = start.base[0] if moment == "correction" else start.x
        assert descent.loss(descent.x) <= start.loss(best)
        go_on(descent, 200)
    assert number == descent.evaluations < 20


@pytest.mark.parametrize("moment", ["proof", "first pair", "decision"])
def test_one_bad_batch_does_not_end_them_for_good(moment):
    descent = at(moment)
    descent.step(bad=True)
    before = descent.engine.counters.secant_steps
    descent.run(2000)
    assert descent.engine.counters.secant_steps > before


@settings(WITHOUT_CLOCK, max_examples=15)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.01, 0.1, 0.3]))
def test_bad_batches_here_and_there_do_not_stop_a_run(seed, share):
    random, descent = np.random.default_rng(seed), PairedDescent()
    for _ in range(500):
        descent.step(bad=random.random() < share)
        assert np.isfinite(descent.x).all()
    assert descent.loss(descent.x) < 0.02


@pytest.mark.parametrize("moment", ["check", "proof", "landing", "decision"])
def test_another_batch_is_seen_by_its_loss(moment):
    descent = at(moment)
    descent.floor *= 2.0
    descent.step()
    assert descent.stage is Stage.REST
    go_on(descent, 40)
    assert descent.stage is Stage.REST


def until_the_next_look(descent):
    controller = descent.engine.controller
    assert descent.stage is Stage.REST
    return controller.secant.until_due(controller.taken)


class Probed(PairedDescent):
    """A descent with a probe of the user's own, whose loss is higher by `gap`."""

    gap = 0.1

    def carry_out(self, directive, bad=False):
        own = directive.own_batch or directive.at_mark or directive.coefficients is not None
        if directive.action is Action.PROBE and not own:
            return Observation(self.loss(self.x) + self.gap)
        return super().carry_out(directive, bad)


@pytest.mark.parametrize(
    ("kind", "name", "stayed", "patience"),
    [
        (PairedDescent, "floor", -1, MOST_PATIENCE),
        # It stayed for a block of quasi-Newton steps: the next one may stay for as long.
        (PairedDescent, "floor", 0, 1),
        (Probed, "gap", 0, MOST_PATIENCE),
    ],
)
def test_after_another_batch_or_a_probe_that_rose_looks_are_rare(kind, name, stayed, patience):
    descent = kind()
    descent.until("decision")
    secant = descent.engine.controller.secant
    assert secant._stayed >= secant.block
    secant._stayed = secant.block + stayed
    setattr(descent, name, 2.0 * getattr(descent, name))
    descent.step()
    # But for the full step that was taken at once.
    assert until_the_next_look(descent) == WAIT * patience - 1


def test_where_there_is_a_probe_every_step_is_resumed_exactly():
    descent, probes = Probed(), 0
    descent.until("first pair")
    for _ in range(60):
        other = descent.resumed()
        at = len(descent.log)
        descent.step()
        probes += descent.log[at:].count((Phase.FULL, Action.PROBE))
        # When it is looked at next depends on the loss where it was looked at last.
        ahead = copy.deepcopy(descent)
        ahead.run(11)
        other.run(12)
        assert ahead.log[at:] == other.log
    assert probes > 2


def test_after_a_block_that_paid_there_is_a_look_soon():
    descent = at("decision")
    secant = descent.engine.controller.secant
    secant._patience = MOST_PATIENCE
    assert secant.finish_block() > 0.0
    secant.rest(descent.engine.controller.taken)
    assert until_the_next_look(descent) == WAIT


def test_what_follows_on_another_batch_is_not_compared_with_what_was_before():
    descent = PairedDescent(HybridTrainerConfig(outer_momentum=False))
    descent.until("descent")
    for _ in range(10):
        descent.step()
    full = descent.engine.counters.full_steps
    assert count(descent, Action.GRADIENT) == 11
    descent.floor += 1.0
    while descent.stage is not Stage.REST:
        descent.step()
    meter = descent.engine.meter
    # All but the first, which evaluated where the optimizer had led, are theirs.
    assert meter.secants.taken == count(descent, Action.GRADIENT) - 1
    assert full + 5 > descent.engine.counters.full_steps
    before = len(meter.stretches)
    while len(descent.engine.meter.stretches) == before:
        descent.step()
    assert all(s.progress > -0.5 for s in descent.engine.meter.stretches)


@pytest.mark.parametrize("begins", range(101, 500, 19))
def test_batches_that_begin_to_differ_leave_the_run_to_the_optimizer(begins):
    descent = PairedDescent()
    descent.run(begins)
    descent.noise = 0.01
    # A leap under way is finished first, and the block after it.
    descent.run(200)
    assert descent.stage is Stage.REST
    before = count(descent, Action.GRADIENT)
    descent.run(300)
    assert count(descent, Action.GRADIENT) == before
    assert descent.loss(descent.x) < 0.1


@pytest.mark.parametrize("begins", range(150, 700, 29))
@pytest.mark.parametrize("change", ["raised", "stretched", "turned"])
def test_another_loss_in_the_middle_of_a_run_is_minimized_then(begins, change):
    descent = PairedDescent()
    descent.run(begins)
    # A trial of the optimizer takes it for the optimizer's doing, and goes on all the same.
    rested = descent.engine.controller.secant.holds_recovery
    if change == "raised":
        descent.floor *= 2.0
    else:
        old = descent.curvature
        descent.curvature = 2.0 * old if change == "stretched" else old[::-1].copy()
    before = descent.loss(descent.x)
    for _ in range(500):
        descent.step()
        rested |= descent.stage is Stage.REST
    assert descent.loss(descent.x) <= min(before, descent.floor + 0.03)
    # One that is lower after all may as well be the same one.
    assert rested or change != "raised"


def test_a_trial_point_without_a_number_is_no_bad_batch():
    descent = at("descent")
    descent.step(bad=True)
    assert [d.action for d in descent.directives[-2:]] == [Action.GRADIENT, Action.REACH]
    assert descent.engine.statistics().divergences == 0


def test_pairs_that_lead_nowhere_are_given_up_before_they_cost_much():
    jumps, descent = made(0), made(still=True)
    for run in (jumps, descent):
        run.run(1500)
    assert 0 < descent.engine.counters.secant_steps < 0.05 * 1500
    assert not descent.engine.controller.secant.active
    assert descent.loss(descent.x) < 1.01 * jumps.loss(jumps.x)


def test_a_look_does_not_part_a_jump_from_its_newest_snapshot():
    descent = PairedDescent(noise=1e-4)
    controller = descent.engine.controller
    while controller.gram is None:
        descent.step()
    # However long it should have waited; the helper holds SAVE against the newest snapshot.
    controller.secant.pass_by(10**9)
    while descent.engine.phase is not Phase.PREDICT:
        descent.step()


# -- interruptions --------------------------------------------------------------------------------


def test_every_stage_is_resumed_exactly():
    whole, walker = PairedDescent(), PairedDescent()
    whole.run(700)
    seen = set()
    for cut in range(640):
        seen |= {walker.stage, walker.engine.phase}
        if cut % 7 == 0 or cut in (1, 2):
            other = walker.resumed()
            assert text(other.engine.state_dict()) == text(walker.engine.state_dict())
            other.run(60)
            done = len(walker.directives)
            expected = whole.directives[done : done + len(other.directives)]
            assert all(map(same, other.directives, expected)), cut
            assert other.log == whole.log[done : done + len(other.log)]
        walker.step()
    assert seen == {*Stage, *Phase}


@pytest.mark.parametrize("moment", MOMENTS)
def test_other_parameters_leave_the_run_to_the_optimizer(moment):
    descent = at(moment)
    warming_up = descent.engine.phase is Phase.WARMUP
    descent.engine.regroup()
    descent.forget()
    descent.bank, descent.saved = [], None
    assert descent.stage is Stage.REST
    assert descent.engine.phase is (Phase.WARMUP if warming_up else Phase.FULL)
    go_on(descent, 400)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_step_whose_batch_raises_can_be_taken_again(moment):
    start = at(moment)
    evaluations = start.resumed()
    evaluations.step()
    for number in range(evaluations.evaluations):
        descent, seen = start.resumed(), 0
        while True:
            directive = descent.engine.next()
            if directive.action in EVALUATIONS:
                if seen == number:
                    break
                seen += 1
            descent.engine.observe(descent.carry_out(directive))
        descent.abandon()
        assert descent.loss(descent.x) <= start.loss(start.x)
        go_on(descent, 200)


# -- what they are worth --------------------------------------------------------------------------


def test_what_they_stand_for_by_hand():
    assert SecantCredit().stands_for() == (0.0, 0.0, 0.0)
    credit = SecantCredit(taken=50, steps=100.0, speed=0.01, progress=1.0)
    # At a speed that stays, 100 steps; with one that falls like the root, 100 (1.5^2 - 1).
    assert credit.stands_for() == pytest.approx((100.0, 125.0, math.inf))
    # No less than themselves, and no more than each of them can be worth.
    assert SecantCredit(50, [0.0, 0.0], 100.0, 0.01, 0.1).stands_for()[:2] == (50.0, 50.0)
    most = MOST_A_STEP * 50
    assert SecantCredit(50, [0.0, 0.0], 100.0, 0.01, 99.0).stands_for()[:2] == (0.5 * most, most)
    # Of a speed that is not known nothing follows.
    assert SecantCredit(50, [0.0, 0.0], 100.0, 0.0, 1.0).stands_for()[:2] == (50.0, 50.0)


def test_a_speed_that_is_measured_anew_is_that_of_all_that_the_run_stood_for():
    credit = SecantCredit(taken=50, steps=100.0, speed=0.01, progress=1.0)
    credit.measure(150, 0.004)
    # 150 full steps of the optimizer, and the 125 that were stood for.
    assert (credit.steps, credit.progress) == (275.0, 0.0)
    credit.taken, credit.progress = 100, 1.1
    expected = 100.0 + 1.1 / 0.004, 125.0 + 275.0 * (1.5**2 - 1.0)
    assert credit.stands_for()[:2] == pytest.approx((min(expected[0], 250.0), expected[1]))


STRETCHES = st.tuples(
    st.integers(1, 100), st.floats(0.0, 5.0), st.floats(-0.1, 0.0) | st.floats(1e-18, 0.5)
)


@WITHOUT_CLOCK
@given(st.lists(STRETCHES, max_size=8), st.floats(0.0, 10.0))
def test_they_stand_for_themselves_at_least_and_for_more_the_more_they_gain(stretches, more):
    credit, outside = SecantCredit(), 0
    for taken, progress, speed in stretches:
        before = credit.stands_for()[:2]
        outside += 60
        credit.measure(outside, speed)
        # What was gained before stays gained, whatever the speed is now.
        assert credit.stands_for()[:2] == pytest.approx(before)
        credit.taken += taken
        credit.progress += progress
        low, middle, high = credit.stands_for()
        assert credit.taken <= low <= middle <= MOST_A_STEP * credit.taken
        assert high == math.inf
        further = dataclasses.replace(credit, progress=credit.progress + more)
        assert all(b >= a for a, b in zip(credit.stands_for(), further.stands_for(), strict=True))


def test_the_meter_counts_them_apart():
    meter = Meter()
    meter.full_time.add(3.0)
    meter.close_stretch(2.0, 100, 0, predicting=False, progress=math.nan)
    meter.secants.measure(meter.outside(100), 0.01)
    meter.close_block(1.5, 140, 0)
    # A block that loses counts for its steps.
    meter.close_block(1.6, 150, 0)
    assert (meter.secants.taken, meter.secants.progress) == (50, 0.5)
    assert meter.outside(170) == 120
    # A share of 0.5 more than the hundred before them: 100 (1.25^2 - 1).
    speedup, interval = meter.speedup(170, 0)
    assert speedup == pytest.approx((120.0 + 56.25) / 170.0)
    assert interval.high == math.inf
    other = Meter()
    other.load_state_dict(json.loads(json.dumps(meter.state_dict())))
    assert other == meter != Meter()


def test_the_speedup_of_a_run_is_what_plain_steps_would_have_needed():
    """Against the plain descent itself, step by step to the same loss."""
    descent = made(plain_metric=True)
    descent.run(170)
    plain, needed = PairedDescent(pairs=0), 0
    while plain.loss(plain.x) > descent.loss(descent.x):
        plain.x = plain.x - 0.5 * plain.curvature * plain.x
        needed += 1
    low, high = descent.engine.statistics().measured_speedup_interval
    assert 1.0 < low < needed / descent.engine.counters.full_steps < high


def test_all_numbers_are_part_of_the_state():
    secant, other = SecantDescent(20, 50), SecantDescent(20, 50)
    names = [name for name, value in vars(secant).items() if type(value) in (int, float, bool)]
    for number, name in enumerate(sorted(set(names) - {"pairs", "block"}), start=2):
        setattr(secant, name, type(getattr(secant, name))(number))
    other.load_state_dict(json.loads(json.dumps(secant.state_dict())))
    kept = [(getattr(secant, name), getattr(other, name)) for name in names]
    assert [mine for mine, _ in kept] == [loaded for _, loaded in kept]
