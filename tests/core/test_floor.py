"""Losses below zero: counted from a floor, they are predicted as others are."""

import math

import numpy as np
import pytest
from descent import Descent, Watched, text
from hypothesis import given, settings
from hypothesis import strategies as st
from secant_descent import MOMENTS, PairedDescent, at

from hybridcore import Action, HybridTrainerConfig, Phase
from hybridcore.floor import Floor
from hybridcore.secant import Stage

WITHOUT_CLOCK = settings(deadline=None, derandomize=True, database=None)
HOW_FAR = 1.5


def floor_of(descent):
    return descent.engine.state_dict()["floor"]["value"]


def seen(floor, losses):
    """Floors and rises while `losses` are seen."""
    values, rises = [], []
    for loss in losses:
        if math.isfinite(loss):
            floor.see(loss)
        if floor.is_near:
            rises.append(floor.lower())
        values.append(floor.value)
    return np.array(values), rises


# -- the floor ------------------------------------------------------------------------------------


@WITHOUT_CLOCK
@given(st.lists(st.floats(0.0, 1e30) | st.just(math.nan) | st.just(math.inf), max_size=60))
def test_it_is_zero_while_no_loss_is_negative(losses):
    values, rises = seen(Floor(), losses)
    assert not values.any()
    assert not rises


@WITHOUT_CLOCK
@given(
    start=st.floats(-10.0, 10.0),
    fall=st.floats(1e-3, 100.0),
    noise=st.floats(0.0, 0.3),
    scale=st.floats(1e-6, 1e6),
    seed=st.integers(0, 9),
)
def test_losses_that_fall_stay_above_it_and_it_is_seldom_lowered(start, fall, noise, scale, seed):
    steps = np.arange(1000)
    losses = start - fall * steps / 1000 + noise * np.random.default_rng(seed).normal(size=1000)
    losses *= scale
    values, rises = seen(Floor(), losses)
    assert (np.diff(values) <= 0.0).all()
    assert all(rise > 0.0 for rise in rises)
    assert -values[-1] == pytest.approx(sum(rises), rel=1e-9, abs=0.0)
    assert len(rises) < 20
    if rises:
        since = int(np.argmax(values < 0.0))
        # But for some before it was seen that they are no single ones.
        assert np.sum(losses[since:] <= values[since:]) <= 5
        # Not so deep that a fall would not show in the logarithm.
        assert -values[-1] < 10.0 * np.abs(losses).max()


@WITHOUT_CLOCK
@given(
    huge=st.sampled_from([-1e300, -1e6, 1e3, 1e25, 1e300]),
    start=st.integers(0, 500),
    times=st.lists(st.integers(0, 40), max_size=15, unique=True),
)
def test_points_far_off_do_not_lower_it(huge, start, times):
    losses = 1.0 - 0.01 * np.arange(700)
    # Of low ones two at most, of high ones fewer than half of a window.
    losses[start + np.array(times if huge > 0.0 else times[:2], dtype=int)] = huge
    values, _ = seen(Floor(), losses)
    assert values[-1] < 0.0
    assert -values[-1] < 10.0 * 6.0


def test_what_is_near_when_it_is_saved_is_near_when_it_comes_back():
    floor, other = Floor(), Floor()
    for loss in (3.0, 1.0, -1.0, -2.0, -3.0, 0.5):
        floor.see(loss)
    assert floor.is_near
    other.load_state_dict(floor.state_dict())
    assert other.is_near
    assert other.lower() == floor.lower() > 0.0
    other.load_state_dict(Floor().state_dict())
    assert not other.is_near


def test_its_state_comes_back():
    floor, other = Floor(), Floor()
    losses = np.random.default_rng(3).normal(size=200) * 0.1 - 0.01 * np.arange(200)
    seen(floor, losses[:100])
    other.load_state_dict(floor.state_dict())
    assert np.array_equal(seen(floor, losses[100:])[0], seen(other, losses[100:])[0])


# -- decisions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("floor", [-5.0, -1.0, -0.1])
@pytest.mark.parametrize("warm", [3, 20])
def test_a_loss_that_is_or_becomes_negative_is_predicted_as_others_are(floor, warm):
    config = HybridTrainerConfig(warmup_steps=warm, min_full_steps=24, horizon=30)
    above, below = Descent(config, floor=-floor), Watched(config, floor=floor)
    above.run(600)
    losses = [below.loss(below.x)]
    for _ in range(600):
        phase = below.step()
        if phase is Phase.PREDICT:
            # Counted from zero, and on the way down.
            assert floor - 1.0 < below.engine.forecast_loss < losses[-60:][0]
        elif phase is not Phase.WARMUP:
            assert math.isnan(below.engine.forecast_loss)
        assert below.engine.controller.divergence_level == "NORMAL"
        losses.append(below.loss(below.x))
    assert floor_of(below) < 0.0
    assert below.loss(below.x) < 0.0
    predicted = [descent.engine.counters.predicted_steps for descent in (above, below)]
    assert predicted[1] > 0.7 * predicted[0] > 50
    # Nothing is compared across a lowering, where a fall would seem a rise.
    assert all(stretch.progress >= 0.0 for stretch in below.engine.meter.stretches)


@pytest.mark.parametrize("floor", np.linspace(-0.02, -0.002, 8).tolist())
def test_what_is_told_is_true_where_it_is_lowered(floor):
    descent, lowered = PairedDescent(floor=floor), 0
    for _ in range(600):
        before = floor_of(descent)
        phase = descent.step()
        lowered += floor_of(descent) < before and descent.stage is Stage.DESCEND
        told = descent.engine.forecast_loss
        if phase is Phase.FULL and descent.stage is Stage.DESCEND and not math.isnan(told):
            assert told == pytest.approx(descent.loss(descent.x), abs=1e-9)
    assert lowered > 0


def test_a_loss_that_falls_has_no_rising_trend_where_it_is_lowered():
    descent, lowered = Descent(HybridTrainerConfig(warmup_steps=400), floor=-1.0), 0
    for _ in range(400):
        before, floor = descent.loss(descent.x), floor_of(descent)
        descent.step()
        assert descent.loss(descent.x) < before
        lowered += floor_of(descent) < floor
        assert descent.engine.controller.dynamics.slope <= 0.0
    assert lowered > 0


def test_how_fast_the_optimizer_is_has_to_be_found_out_anew():
    descent = at("descent")
    for _ in range(3):
        descent.step()
    secant = descent.engine.controller.secant
    assert math.isfinite(secant.speed)
    secant.raise_losses(5.0)
    # Worth nothing by what is known, so that the optimizer is tried.
    assert secant.finish_block() < 0.0


def test_a_trial_point_far_off_spoils_no_loss_that_is_told():
    descent = PairedDescent(floor=-2.0)
    carry_out, told = descent.carry_out, []

    def watched(directive, bad=False):
        seen = carry_out(directive, bad)
        far = directive.action is Action.GRADIENT and len(told) % 9 < 4
        return seen._replace(loss=4.9e25, objective=4.9e25) if far else seen

    descent.carry_out = watched
    for _ in range(800):
        phase = descent.step()
        told.append(descent.engine.forecast_loss)
        if phase is Phase.FULL and descent.stage is Stage.DESCEND and not math.isnan(told[-1]):
            assert told[-1] == pytest.approx(descent.loss(descent.x), abs=1e-9)
    assert floor_of(descent) < 0.0
    assert sum(not math.isnan(loss) for loss in told) > 50


@pytest.mark.parametrize("moment", sorted(MOMENTS))
def test_a_floor_can_be_lowered_at_any_moment(moment):
    descent = at(moment)
    assert floor_of(descent) == 0.0
    before = descent.loss(descent.x)
    # As if the loss were another one from here on, by a number that no gradient shows.
    descent.floor -= HOW_FAR * before
    for _ in range(1500):
        held, floor = descent.engine.may_roll_back, floor_of(descent)
        descent.step()
        # What may be rolled back is compared with what was before it.
        assert floor_of(descent) == floor or not (held and descent.engine.may_roll_back)
        assert np.isfinite(descent.x).all()
    assert floor_of(descent) < 0.0
    assert descent.loss(descent.x) - descent.floor <= before


@pytest.mark.parametrize("steps", [150, 400])
def test_a_run_goes_on_from_its_state_below_zero(steps):
    descent = PairedDescent(floor=-1.0)
    descent.run(steps)
    assert floor_of(descent) < 0.0
    other = descent.resumed()
    for _ in range(100):
        descent.step()
        other.step()
        assert np.array_equal(descent.x, other.x)


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("kind", [Descent, PairedDescent])
def test_it_does_not_matter_who_looks(kind, noise):
    quiet, looked_at = (kind(noise=noise, floor=-1.0) for _ in range(2))
    for _ in range(600):
        quiet.step()
        looked_at.step()
        looked_at.engine.statistics()
        assert np.array_equal(quiet.x, looked_at.x)
    assert text(quiet.engine.state_dict()) == text(looked_at.engine.state_dict())
    assert floor_of(quiet) < 0.0


@pytest.mark.parametrize("floor", [-3e4, -30.0, 30.0, 3e4])
@pytest.mark.parametrize("spike", [0.0, -1e6, 1e6])
def test_batches_that_differ_are_told_apart_wherever_losses_lie(floor, spike):
    """By more than rounding, as a share of the loss as it is; one loss may be far off."""
    descent = PairedDescent(floor=floor)
    carry_out = descent.carry_out

    def watched(directive, bad=False):
        seen, step = carry_out(directive, bad), descent.engine.counters.steps
        off = spike if step == 30 else 0.0
        return seen._replace(loss=seen.loss + off + 2.5e-5 * abs(floor) * (step % 3))

    descent.carry_out = watched
    descent.run(1500)
    assert descent.engine.counters.secant_steps == 0


@pytest.mark.parametrize("floor", np.linspace(-1.5, -0.001, 12).tolist())
def test_it_is_not_lowered_while_a_jump_may_be_taken_back(floor):
    descent, jumps = Descent(floor=floor), 0
    for _ in range(600):
        held, before = descent.engine.may_roll_back, floor_of(descent)
        descent.step()
        if held and descent.engine.may_roll_back:
            jumps += 1
            assert floor_of(descent) == before
    assert jumps > 20
    assert floor_of(descent) < 0.0


def test_a_state_from_before_there_were_floors_is_taken():
    descent = Descent()
    descent.run(60)
    state = descent.engine.state_dict()
    del state["floor"]
    descent.engine.load_state_dict(state)
    descent.run(100)
    assert floor_of(descent) == 0.0
