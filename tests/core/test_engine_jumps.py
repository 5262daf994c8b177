"""Jumps: how they are chosen and followed, and what happens when they go wrong."""

import dataclasses
import math

import numpy as np
import pytest
from descent import BRISK, Descent, Watched
from secant_descent import PairedDescent

from hybridcore import (
    Action,
    HybridTrainerConfig,
    Observation,
    Phase,
)
from hybridcore.jumping import ABORT_RISE, PATIENT_STEPS
from hybridcore.planning import Jump, path_confidence

# -- jumps that go wrong --------------------------------------------------------------------------


def why_rolled_back(descent):
    events = descent.engine.take_events()
    return {event["why"] for event in events if event["event"] == "jump rolled back"}


def test_a_rollback_puts_the_weights_back_and_doubles_the_wait():
    descent = Watched()
    descent.penalty = 10.0
    waits = []
    while len(waits) < 5:
        rollbacks = descent.engine.counters.rollbacks
        descent.step()
        if descent.engine.counters.rollbacks > rollbacks:
            assert np.array_equal(descent.x, descent.saved)
            assert descent.engine.phase is Phase.FULL
            waits.append(descent.engine.controller.pace.wait)
    least = BRISK.min_full_steps
    assert waits == [least, 2 * least, 4 * least, 8 * least, 16 * least]
    assert sum(descent.engine.statistics().arm_values.values()) < 0.0
    assert descent.engine.statistics().measured_speedup < 1.0


def test_a_jump_is_given_up_after_a_few_settling_steps():
    descent = Descent()
    descent.penalty = 10.0
    phases = []
    while descent.engine.counters.rollbacks == 0:
        phases.append(descent.step())
    assert phases.count(Phase.CORRECT) == 3
    assert why_rolled_back(descent) == {"the loss of full steps rose"}


def test_bad_batches_in_a_row_behind_a_jump_take_it_back():
    descent = Descent()
    while descent.engine.phase is not Phase.CORRECT:
        descent.step()
    for _ in range(3):
        assert descent.engine.counters.rollbacks == 0
        descent.step(bad=True)
    assert descent.engine.counters.rollbacks == 1
    assert why_rolled_back(descent) == {"bad batches"}
    assert np.array_equal(descent.x, descent.saved)


def test_bad_batches_behind_a_jump_that_was_taken_back_are_not_held_against_the_next():
    descent = Descent()
    while descent.engine.phase is not Phase.CORRECT:
        descent.step()
    for _ in range(PATIENT_STEPS):
        descent.step(bad=True)
    assert descent.engine.counters.rollbacks == 1
    while descent.engine.phase is not Phase.CORRECT:
        descent.step()
    descent.step(bad=True)
    assert descent.engine.phase is Phase.CORRECT
    assert descent.engine.counters.rollbacks == 1


def test_what_a_jump_was_worth_is_learned_where_the_end_of_a_run_keeps_it():
    descent = PairedDescent(BRISK, pairs=0)
    while descent.engine.phase is not Phase.CORRECT:
        descent.step()
    descent.run(3)
    assert not descent.engine.statistics().arm_values
    spent = descent.engine.counters.full_steps - descent.engine.meter.mark[1]
    descent.engine.finish()
    while not descent.engine.step_done:
        descent.engine.observe(descent.carry_out(descent.engine.next()))
    assert descent.engine.take_events()[-1]["event"] == "jump kept"
    (worth,) = descent.engine.statistics().arm_values.values()
    assert worth > 0.0
    assert worth == descent.engine.controller.pace.worth
    assert descent.engine.meter.stretches[-1].full_steps == spent


def test_a_rise_that_the_noise_of_the_loss_explains_does_not_take_a_jump_back():
    class Restless(Descent):
        """Losses go up and down, and where a jump settles they are higher than before by `rise`."""

        rise, spread, steps, level = 0.0, 0.05, 0, 0.0

        def carry_out(self, directive, bad=False):
            seen = super().carry_out(directive, bad)
            if directive.action is not Action.FULL:
                return seen
            self.steps += 1
            noise = self.spread * (1.0, -1.0, -1.0, 1.0)[self.steps % 4]
            if self.engine.phase is Phase.CORRECT:
                return seen._replace(loss=self.level * math.exp(self.rise))
            self.level = seen.loss
            return seen._replace(loss=seen.loss * math.exp(noise))

    for excess, kept in ((0.05, True), (1.0, False)):
        descent = Restless()
        descent.rise = ABORT_RISE + excess
        while descent.engine.phase is not Phase.CORRECT:
            descent.step()
        assert 0.06 < descent.engine.controller.margin < 0.9
        while descent.engine.phase is Phase.CORRECT:
            descent.step()
        assert (descent.engine.counters.rollbacks == 0) is kept


def test_full_steps_after_a_rollback_are_measured_from_where_it_has_led_back_to():
    class Noting(Descent):
        """Knows the loss at the mean of two snapshots, where a decision begins."""

        averaged = math.nan

        def carry_out(self, directive, bad=False):
            seen = super().carry_out(directive, bad)
            two = directive.action is Action.PROBE and np.shape(directive.coefficients) == (1, 2)
            if two and self.engine.phase is Phase.FULL:
                self.averaged = seen.loss
            return seen

    descent = Noting()
    descent.penalty = 10.0
    losses, full = [], []
    while len(losses) < 2:
        rollbacks = descent.engine.counters.rollbacks
        descent.step()
        if descent.engine.counters.rollbacks > rollbacks:
            losses.append(descent.averaged)
            full.append(descent.engine.counters.full_steps)
    (jump, between, _) = descent.engine.meter.stretches[-3:]
    assert jump.predicting
    assert not between.predicting
    assert between.progress == pytest.approx(math.log(losses[0] / losses[1]))
    assert between.full_steps == full[1] - full[0] - jump.full_steps


def test_validation_that_fails_rolls_back():
    class Treacherous(Watched):
        """Reports lower losses everywhere but where the weights have settled."""

        def carry_out(self, directive, bad=False):
            seen = super().carry_out(directive, bad)
            settled = self.engine.phase is Phase.CORRECT and directive.coefficients is not None
            return Observation(1e3) if settled else seen

    descent = Treacherous()
    descent.run(100)
    assert descent.engine.counters.rollbacks >= 1
    assert descent.engine.controller.pace.patience > 1
    assert (Phase.CORRECT, Action.ROLLBACK) in descent.log
    assert why_rolled_back(descent) == {"the loss is not lower"}


def test_a_loss_that_rises_on_the_way_sends_the_weights_back_to_the_best_point():
    class Cliff(Watched):
        """The probes on the way see a loss that is far too high."""

        def carry_out(self, directive, bad=False):
            seen = super().carry_out(directive, bad)
            flying = self.engine.phase is Phase.PREDICT and directive.action is Action.PROBE
            return Observation(1e3) if flying else seen

    descent = Cliff()
    phases = descent.run(BRISK.warmup_steps + BRISK.min_full_steps + BRISK.correction_interval + 10)
    assert phases.count(Phase.PREDICT) == BRISK.correction_interval
    moves = [d for d in descent.directives if d.action is Action.MOVE]
    assert len(moves) == 2
    # No probe has been better than the start: back to the newest snapshot, exactly.
    stay = np.zeros(BRISK.snapshots)
    stay[-1] = 1.0
    assert moves[1].coefficients.tolist() == [stay.tolist()]


def test_a_forecast_that_is_missed_ends_the_flight_where_it_is():
    class Disappointing(Watched):
        """The loss promised while choosing is not there on the way, but nothing is lost either."""

        def carry_out(self, directive, bad=False):
            seen = super().carry_out(directive, bad)
            trial = directive.coefficients is not None and directive.coefficients.shape[1] > 2
            if directive.action is not Action.PROBE:
                return seen
            if self.engine.phase is Phase.FULL and trial:
                return Observation(0.01 * seen.loss)
            return Observation(self.loss(self.saved)) if self.saved is not None else seen

    descent = Disappointing()
    phases = []
    while phases[-1:] != [Phase.CORRECT]:
        phases.append(descent.step())
    assert phases.count(Phase.PREDICT) == BRISK.correction_interval < BRISK.horizon
    assert [d.action for d in descent.directives].count(Action.MOVE) == 1


# -- choosing and following a jump ----------------------------------------------------------------


def test_the_best_of_the_jumps_tried_is_taken_and_followed_in_even_segments():
    descent, tried, jumps = Watched(), {}, 0
    for _ in range(400):
        first = len(descent.directives)
        newest = descent.bank
        counted = descent.step()
        done = descent.directives[first:]
        state = descent.engine.controller.state_dict()
        if any(directive.action is Action.SAVE for directive in done):
            trials = [d.coefficients for d in done if d.coefficients is not None]
            points = [c[0] @ np.array(newest) for c in trials if c.shape[1] > 2]
            tried = [descent.loss(point) for point in points[:-1]]  # the last is the move
            flight = state["flight"]
            # The target is one of the trials, and below the loss here; the lowest of them but for
            # what the bandit has learned, and before the first reward that is nothing.
            target = math.exp(flight["log_target"])
            assert min(abs(loss / target - 1.0) for loss in tried) < 1e-9
            assert target < math.exp(flight["log_start"])
            if jumps == 0:
                assert target == pytest.approx(min(tried), rel=1e-9)
            taken, jumps = 0, jumps + 1
        if counted is not Phase.PREDICT:
            continue
        flight, gram = state["flight"], state["gram"]
        for directive in done:
            if directive.action is Action.MOVE:
                end = min(taken + BRISK.correction_interval, flight["horizon"])
                way = Jump(**flight["jump"]).coefficients(gram, end / flight["horizon"])
                np.testing.assert_allclose(directive.coefficients, way, rtol=1e-9, atol=1e-9)
        taken += 1
    assert jumps >= 3


def test_a_jump_is_doubled_for_as_long_as_that_pays():
    class Valley(Watched):
        """The farther a trial lands, the lower its loss, up to a point and no farther."""

        trials = ()

        def carry_out(self, directive, bad=False):
            seen = super().carry_out(directive, bad)
            if directive.action is Action.SAVE or directive.coefficients is None:
                return seen
            if directive.action is Action.PROBE and directive.coefficients.shape[1] > 2:
                distance = np.linalg.norm(self.point(directive.coefficients) - self.x)
                nearest = self.trials[0][0] if self.trials else distance
                loss = 0.5 + 0.1 * abs(math.log(distance / nearest) - math.log(3.0))
                self.trials = (*self.trials, (distance, loss * self.loss(self.x)))
                return Observation(self.trials[-1][1])
            return seen

    descent = Valley()
    # Slow directions alone: the path is as good as straight, and the arms differ little.
    descent.curvature = np.geomspace(1e-5, 1e-4, 60)
    while descent.saved is None:
        descent.step()
    flight = descent.engine.controller.state_dict()["flight"]
    unit = BRISK.horizon / BRISK.snapshot_interval
    losses = [loss for _, loss in descent.trials]
    assert flight["jump"]["reach"] in (2.0 * unit, 4.0 * unit)
    assert math.exp(flight["log_target"]) == pytest.approx(min(losses))
    # The last doubling was one too many.
    assert losses[-1] > min(losses)


@pytest.mark.parametrize("horizon", [25, 31])
def test_a_way_that_is_no_multiple_of_its_segments_ends_where_a_probe_has_been(horizon):
    config = HybridTrainerConfig(
        warmup_steps=20, min_full_steps=24, horizon=horizon, correction_interval=10
    )
    descent = Watched(config)
    while descent.engine.phase is not Phase.PREDICT:
        first = len(descent.directives)
        descent.step()
    probed = [d.coefficients for d in descent.directives[first:] if d.action is Action.PROBE]
    assert descent.engine.controller.flight.last == horizon
    while descent.engine.phase is Phase.PREDICT:
        descent.step()
    (*_, last) = [d.coefficients for d in descent.directives if d.action is Action.MOVE]
    tried = [c for c in probed if np.shape(c) == last.shape]
    assert any(np.allclose(c, last, rtol=1e-12, atol=1e-12) for c in tried)


def test_a_path_that_is_half_regular_is_looked_at_again_soon():
    """Only one that is irregular altogether is left alone for longer."""
    line = np.linspace(0.0, 1.0, BRISK.snapshots)[:, None]
    for noise, soon in ((0.65, True), (3.0, False)):
        points = line + noise * np.random.default_rng(4).normal(size=(BRISK.snapshots, 200)) / 14.0
        points -= points[-1]
        sure = max(path_confidence(points @ points.T).values())
        assert (0.3 < sure < 0.6) if soon else sure < 0.3
        descent, looks = PathOf(points), []
        while len(looks) < 2:
            descent.step()
            if descent.looked:
                looks.append(descent.engine.counters.full_steps)
                descent.looked = False
        between = BRISK.snapshot_interval if soon else BRISK.min_full_steps
        assert looks[1] - looks[0] == between


class PathOf(Descent):
    """A descent whose snapshots are said to lie at `points`."""

    def __init__(self, points):
        super().__init__(
            HybridTrainerConfig(
                warmup_steps=BRISK.warmup_steps,
                min_full_steps=BRISK.min_full_steps,
                outer_momentum=False,
            )
        )
        self.points, self.looked = points, False

    def carry_out(self, directive, bad=False):
        seen = super().carry_out(directive, bad)
        if not directive.gram:
            return seen
        self.looked = True
        return seen._replace(gram=(self.points @ self.points.T)[None])


def test_figures_of_a_step_do_not_outlive_the_end_of_a_run():
    for settings in ({}, {"averaging": False}):
        descent = PairedDescent(dataclasses.replace(BRISK, **settings), pairs=0)
        while descent.engine.prediction_error is None:
            descent.step()
        descent.engine.finish()
        while not descent.engine.step_done:
            descent.engine.observe(descent.carry_out(descent.engine.next()))
        for _ in range(5):
            descent.step()
            assert descent.engine.prediction_error is None
            assert math.isnan(descent.engine.forecast_loss)


@pytest.mark.parametrize("restart", [False, True])
def test_bad_batches_behind_a_jump_that_is_over_are_not_held_against_the_next(restart):
    descent = PairedDescent(BRISK, pairs=0)

    def settle():
        while descent.engine.phase is not Phase.CORRECT:
            descent.step()

    settle()
    for _ in range(PATIENT_STEPS - 1):
        descent.step(bad=True)
    if restart:
        descent.engine.regroup()
    else:
        descent.engine.finish()
        while not descent.engine.step_done:
            descent.engine.observe(descent.carry_out(descent.engine.next()))
    assert descent.engine.phase is Phase.FULL
    settle()
    descent.step(bad=True)
    assert descent.engine.phase is Phase.CORRECT
