"""The engine against a real descent in NumPy."""

import itertools
import json
import math

import numpy as np
import pytest
from descent import BRISK, Descent, Watched, text
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcore import (
    Action,
    Directive,
    Engine,
    HybridTrainerConfig,
    Observation,
    Phase,
    ProtocolError,
)
from hybridcore.divergence import DivergenceMonitor, RecoveryAction
from hybridcore.planning import Jump


def test_smooth_descent_is_predicted_and_gains():
    hybrid = Descent()
    phases = hybrid.run(600)
    counters = hybrid.engine.counters
    plain = Descent(HybridTrainerConfig(warmup_steps=10**6))
    plain.run(counters.full_steps + counters.probes // 3)
    assert counters.predicted_steps > 150
    assert hybrid.loss(hybrid.x) - 1e-3 < 0.5 * (plain.loss(plain.x) - 1e-3)
    assert phases[:20] == [Phase.WARMUP] * 20
    # Runs of equal phases keep to the settings.
    runs = [[phases[0], 0]]
    for phase in phases:
        if phase is not runs[-1][0]:
            runs.append([phase, 0])
        runs[-1][1] += 1
    follows = {Phase.WARMUP: Phase.FULL, Phase.FULL: Phase.PREDICT, Phase.PREDICT: Phase.CORRECT}
    for (phase, count), (after, _) in itertools.pairwise(runs):
        assert after is follows.get(phase, Phase.FULL)
        if phase is Phase.FULL:
            assert count >= BRISK.min_full_steps
        if phase is Phase.PREDICT:
            assert count <= BRISK.horizon
        if phase is Phase.CORRECT:
            assert count <= BRISK.snapshot_interval
    statistics = hybrid.engine.statistics()
    assert statistics.measured_speedup > 1.0
    assert sum(statistics.arm_values.values()) > 0.0


def test_micro_corrections_come_every_interval():
    descent = Descent()
    descent.run(300)
    in_predict = [action for phase, action in descent.log if phase is Phase.PREDICT]
    since = 0
    for action in in_predict:
        since += action is Action.SKIP
        if action is Action.PROBE:
            since = 0
        assert since <= BRISK.correction_interval


def test_noise_is_left_alone():
    descent = Descent(HybridTrainerConfig(), noise=0.3)
    descent.run(1500)
    counters = descent.engine.counters
    assert counters.predicted_steps <= 0.03 * 1500
    assert counters.probes <= 30
    assert descent.engine.statistics().measured_speedup == pytest.approx(1.0, abs=0.05)


def test_decisions_do_not_look_at_the_clock():
    fast, slow = Descent(seconds=1e-6), Descent(seconds=7.0)
    fast.run(400)
    slow.run(400)
    assert fast.log == slow.log
    assert np.array_equal(fast.x, slow.x)


@pytest.mark.parametrize("cut", range(15, 200, 7))
def test_state_resumes_exactly(cut):
    whole = Descent()
    whole.run(200)
    first, second = Descent(), Descent()
    first.run(cut)
    second.engine.load_state_dict(json.loads(text(first.engine.state_dict())))
    second.x, second.bank, second.saved = first.x, first.bank, first.saved
    second.run(200 - cut)
    assert np.array_equal(second.x, whole.x)
    assert second.engine.counters.predicted_steps == whole.engine.counters.predicted_steps
    assert first.log + second.log == whole.log


@pytest.mark.parametrize("victim", range(5, 150, 4))
def test_a_bad_batch_costs_itself_only(victim):
    clean, hurt = Descent(), Descent()
    for step in range(200):
        clean.step()
        hurt.step(bad=step == victim)
        assert np.isfinite(hurt.x).all()
    assert hurt.engine.counters.predicted_steps > 0.5 * clean.engine.counters.predicted_steps
    assert hurt.loss(hurt.x) < 2.0 * clean.loss(clean.x)
    assert hurt.engine.counters.rollbacks <= 1


def test_a_jump_that_hurts_is_rolled_back_and_not_tried_again_soon():
    descent = Descent()
    descent.penalty = 10.0
    descent.run(400)
    counters = descent.engine.counters
    assert counters.rollbacks >= 1
    assert descent.engine.controller.pace.patience > 1
    assert (Phase.CORRECT, Action.ROLLBACK) in descent.log
    # Each failure doubles the wait: far fewer attempts than there is room for.
    assert counters.rollbacks <= 5
    assert counters.predicted_steps < 150


@pytest.mark.parametrize("floor", [-5.0, -1e-3])
def test_losses_that_are_not_positive_are_never_predicted(floor):
    descent = Descent(floor=floor)
    below = 0
    for _ in range(2500):
        was_below = descent.loss(descent.x) <= 0.0
        phase = descent.step()
        below += was_below
        assert not (was_below and phase is Phase.PREDICT)
        assert np.isfinite(descent.x).all()
    assert below > 100


def test_protocol():
    engine = Engine(BRISK)
    with pytest.raises(ProtocolError, match="next"):
        engine.observe(Observation())
    engine.next()
    with pytest.raises(ProtocolError, match="middle of a step"):
        engine.state_dict()
    engine.abandon()
    assert engine.state_dict()["counters"]["steps"] == 0


@pytest.mark.parametrize("at", [10, 40, 50, 60, 70, 80, 90])
def test_regroup_starts_over_in_any_phase(at):
    descent = Descent()
    descent.run(at)
    descent.engine.regroup()
    descent.bank, descent.saved = [], None
    phases = descent.run(300)
    assert Phase.PREDICT not in phases[: BRISK.min_full_steps]
    assert Phase.PREDICT in phases


# -- what every adapter may rely on ---------------------------------------------------------------


SETTINGS = {
    "brisk": BRISK,
    "default": HybridTrainerConfig(),
    "saver": HybridTrainerConfig.memory_saver(),
    "tight": HybridTrainerConfig(
        warmup_steps=1, min_full_steps=4, horizon=1, correction_interval=1, snapshots=10
    ),
    "odd": HybridTrainerConfig(
        warmup_steps=11, min_full_steps=31, horizon=23, correction_interval=7, snapshots=5
    ),
    "reckless": HybridTrainerConfig(
        warmup_steps=1, min_full_steps=8, confidence_threshold=0.0, horizon=20
    ),
    "timid": HybridTrainerConfig(warmup_steps=5, min_full_steps=12, confidence_threshold=1.0),
}


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.3])
@pytest.mark.parametrize("name", SETTINGS)
def test_directives_keep_to_the_protocol_and_to_the_settings(name, noise):
    config = SETTINGS[name]
    descent = Watched(config, noise=noise)
    phases = descent.run(700)
    counters = descent.engine.counters
    assert counters.steps == counters.full_steps + counters.predicted_steps == 700
    assert counters.predicted_steps == phases.count(Phase.PREDICT)
    assert counters.backward_passes == counters.full_steps
    assert phases[: config.warmup_steps] == [Phase.WARMUP] * config.warmup_steps
    spans = [(phase, len(list(steps))) for phase, steps in itertools.groupby(phases)]
    for (phase, count), (after, _) in itertools.pairwise(spans):
        allowed = {
            Phase.WARMUP: [Phase.FULL],
            Phase.FULL: [Phase.PREDICT],
            Phase.PREDICT: [Phase.CORRECT],
            Phase.CORRECT: [Phase.FULL],
        }
        assert after in allowed[phase]
        if phase is Phase.FULL:
            assert count >= config.min_full_steps
        elif phase is Phase.PREDICT:
            assert count <= config.horizon
        elif phase is Phase.CORRECT:
            assert count <= max(2, config.snapshot_interval)
    if noise == 0.0 and name not in ("timid", "tight"):
        assert counters.predicted_steps > 0


def test_a_quarter_of_a_smooth_descent_is_predicted():
    descent = Watched()
    descent.run(800)
    assert descent.engine.counters.predicted_steps >= 200
    assert descent.engine.counters.rollbacks == 0


def test_a_micro_correction_at_the_end_of_every_segment():
    descent = Watched()
    steps, first = [], 0
    for _ in range(300):
        phase = descent.step()
        if phase is Phase.PREDICT:
            steps.append([d.action for d in descent.directives[first:]])
        else:
            steps.append(None)
        first = len(descent.directives)
    flights = [list(g) for none, g in itertools.groupby(steps, lambda s: s is None) if not none]
    if steps[-1] is not None:
        # Cut off by the end of the run.
        flights.pop()
    assert len(flights) >= 2
    for flight in flights:
        for number, actions in enumerate(flight, start=1):
            last = number == len(flight)
            assert (Action.MOVE in actions) == (number % BRISK.correction_interval == 1)
            probed = actions[-2:] == [Action.PROBE, Action.SKIP]
            assert probed == (last or number % BRISK.correction_interval == 0)


# Losses that no real run should have, among some that it does.
ODD = [math.nan, math.inf, -math.inf, 0.0, -1.0, 5e-324, 1e-300, 1e300, 1.7e308, 0.5, 0.5, 0.5]


class Hostile(Watched):
    """A descent whose reports go wrong at random; the engine must carry on regardless."""

    def __init__(self, config, seed, share):
        super().__init__(config)
        self.dice, self.share = np.random.default_rng(seed), share

    def carry_out(self, directive, bad=False):
        seen = super().carry_out(directive, bad)
        if directive.action not in (Action.FULL, Action.PROBE) or self.dice.random() > self.share:
            return seen
        loss = ODD[self.dice.integers(len(ODD))]
        rate = [0.5, 0.0, math.nan, -1.0][self.dice.integers(4)]
        return Observation(loss, math.nan, rate, 0.0, seen.gram, seen.applied)


@settings(deadline=None, derandomize=True, database=None, max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1),
    share=st.sampled_from([0.01, 0.05, 0.3, 1.0]),
    name=st.sampled_from(sorted(SETTINGS)),
)
def test_no_report_whatever_raises_into_the_loop(seed, share, name):
    descent = Hostile(SETTINGS[name], seed, share)
    descent.run(250)
    counters = descent.engine.counters
    assert counters.steps == counters.full_steps + counters.predicted_steps == 250
    assert 0.0 <= descent.engine.confidence <= 1.0
    json.dumps(descent.engine.statistics().to_dict())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gram_matrix_that_is_not_finite_costs_a_jump_not_the_run(value):
    class Overflowing(Descent):
        def carry_out(self, directive, bad=False):
            seen = super().carry_out(directive, bad)
            if seen.gram is not None and len(self.log) < 120:
                seen.gram[0, 0, 0] = value
            return seen

    descent = Overflowing()
    phases = descent.run(300)
    assert Phase.PREDICT not in phases[:100]
    assert Phase.PREDICT in phases


# -- bad batches ----------------------------------------------------------------------------------


def steps_of(count):
    """Phase and actions of each step of a clean run."""
    descent = Descent()
    for _ in range(count):
        first = len(descent.log)
        phase = descent.step()
        yield phase, [action for _, action in descent.log[first:]]


def lone_full_steps(count):
    """Steps of a clean run that are one full step and nothing else, with the phase of each."""
    steps = enumerate(steps_of(count))
    return [(number, phase) for number, (phase, actions) in steps if actions == [Action.FULL]]


def recovery_steps():
    """Quiet steps after a bad batch until the monitor asks for nothing any more."""
    monitor = DivergenceMonitor()
    monitor.observe_delta(finite=False)
    steps = 0
    while monitor.action() is not RecoveryAction.CONTINUE:
        monitor.observe(1.0)
        steps += 1
    return steps


def test_a_bad_batch_leaves_no_trace():
    clean = Descent()
    clean.run(160)
    # The monitor puts off a jump that follows closely on a bad batch, as it should.
    decisions = [n for n, (_, actions) in enumerate(steps_of(160)) if Action.SAVE in actions]
    lone = [
        (number, phase)
        for number, phase in lone_full_steps(160)
        if not any(0 <= decision - number <= recovery_steps() for decision in decisions)
    ]
    assert {phase for _, phase in lone} == {Phase.WARMUP, Phase.FULL, Phase.CORRECT}
    for number, phase in lone:
        hurt = Descent()
        hurt.run(number)
        at = len(hurt.log)
        assert hurt.step(bad=True) is phase
        hurt.run(160 - number)
        # One entry more in the log, and otherwise the same run to the last bit.
        assert hurt.log[:at] + hurt.log[at + 1 :] == clean.log, (number, phase)
        assert np.array_equal(hurt.x, clean.x)
        assert hurt.engine.counters.divergences == 1
        assert hurt.engine.counters.backward_passes == clean.engine.counters.backward_passes


class Deaf(Watched):
    """A descent whose probes fail in one phase, and only the first `failures` steps with any."""

    def __init__(self, phase, failures):
        super().__init__()
        self.deaf_in, self.failures = phase, failures

    def step(self, bad=False):
        first = len(self.log)
        counted = super().step(bad)
        here = [(phase, action) for phase, action in self.log[first:]]
        self.failures -= (self.deaf_in, Action.PROBE) in here
        return counted

    def carry_out(self, directive, bad=False):
        seen = super().carry_out(directive, bad)
        deaf = self.failures > 0 and self.engine.phase is self.deaf_in
        if directive.action is Action.PROBE and deaf:
            return Observation(math.nan)
        return seen


def test_failed_probes_while_choosing_put_the_jump_off_by_one_snapshot():
    clean, deaf = Watched(), Deaf(Phase.FULL, 1)
    on_time, late = (each.run(120).index(Phase.PREDICT) for each in (clean, deaf))
    assert late == on_time + BRISK.snapshot_interval


def test_failed_probes_while_predicting_do_not_end_the_flight():
    clean, deaf = Watched(), Deaf(Phase.PREDICT, 3)
    ways = clean.run(100), deaf.run(100)
    assert ways[0] == ways[1]
    assert deaf.engine.counters.rollbacks == 0


@pytest.mark.parametrize("late", [0, 15])
def test_failed_probes_while_validating_keep_the_jump_and_claim_nothing(late):
    # Choosing late shows whether the wait from before the jump is taken along.
    deaf = Deaf(Phase.FULL, late)
    deaf.run(40)
    while deaf.step() is not Phase.CORRECT:
        pass
    deaf.deaf_in, deaf.failures = Phase.CORRECT, 1
    stretches = len(deaf.engine.meter.full)
    phases = deaf.run(100)
    assert deaf.engine.counters.rollbacks == 0
    assert set(phases[: BRISK.snapshot_interval - 1]) == {Phase.CORRECT}
    landed = phases.index(Phase.FULL)
    wait = phases.index(Phase.PREDICT) - landed
    assert BRISK.min_full_steps <= wait <= 2 * BRISK.min_full_steps
    # What the jump gained is known to nobody: it must not pass for the work of full steps either.
    assert len(deaf.engine.meter.predicting) <= 1
    assert all(steps <= wait for _, steps, _ in deaf.engine.meter.full[stretches:])


# -- jumps that go wrong --------------------------------------------------------------------------


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


# -- interruptions --------------------------------------------------------------------------------


def test_a_step_that_is_abandoned_at_any_directive_can_be_taken_again():
    clean = Watched()
    clean.run(130)
    for at in range(0, len(clean.directives), 3):
        descent = Descent()
        seen = 0
        while descent.engine.counters.steps < 130:
            if seen <= at < seen + 40 and descent.engine.step_done:
                # Carry out the next directives one by one, to stop at the one that is wanted.
                while seen < at:
                    directive = descent.engine.next()
                    descent.engine.observe(descent.carry_out(directive))
                    seen += 1
                descent.engine.next()
                descent.engine.abandon()
                assert descent.engine.step_done
                seen = at + 1
            before = len(descent.log)
            descent.step()
            seen += len(descent.log) - before
        counters = descent.engine.counters
        assert counters.steps == counters.full_steps + counters.predicted_steps
        assert counters.predicted_steps >= clean.engine.counters.predicted_steps // 2, at
        assert counters.rollbacks == 0
        assert descent.loss(descent.x) < 1.5 * clean.loss(clean.x)


def test_a_directive_waits_until_it_is_observed():
    engine = Engine(BRISK)
    assert engine.step_done
    assert engine.next() is engine.next()
    assert not engine.step_done
    engine.observe(Observation(loss=1.0, learning_rate=0.1))
    assert engine.step_done
    with pytest.raises(ProtocolError, match="next"):
        engine.observe(Observation(loss=1.0))
    engine.next()
    engine.abandon()
    with pytest.raises(ProtocolError, match="next"):
        engine.observe(Observation(loss=1.0))
    assert engine.counters.steps == 1


def test_every_phase_is_resumed_at_every_step_boundary():
    whole = Descent()
    whole.run(150)
    walker, phases = Descent(), set()
    for cut in range(150):
        phases.add(walker.engine.phase)
        if cut % 3 == 0:
            state = text(walker.engine.state_dict())
            other = Descent()
            other.engine.load_state_dict(json.loads(state))
            assert text(other.engine.state_dict()) == state
            other.x, other.bank, other.saved = walker.x, list(walker.bank), walker.saved
            at = len(walker.log)
            other.run(150 - cut)
            assert other.log == whole.log[at:], cut
            assert np.array_equal(other.x, whole.x)
            assert other.engine.statistics() == whole.engine.statistics()
        walker.step()
    assert phases == set(Phase)


def test_a_state_does_not_move_with_the_engine():
    descent = Descent()
    descent.run(60)
    state = descent.engine.state_dict()
    before = text(state)
    descent.run(60)
    assert text(state) == before


def test_no_second_of_any_clock_enters_a_decision():
    steady, erratic = Watched(), Watched()
    clock = np.random.default_rng(5)
    for _ in range(300):
        steady.step()
        erratic.seconds = float(clock.exponential())
        erratic.step()
        erratic.engine.count_time(Phase.FULL, erratic.seconds, 100.0 * erratic.seconds)
    assert steady.log == erratic.log
    for one, other in zip(steady.directives, erratic.directives, strict=True):
        assert one.action is other.action
        assert np.array_equal(one.coefficients, other.coefficients)


# -- other losses, other parameters ---------------------------------------------------------------


@pytest.mark.parametrize("floor", [-1e6, -5.0, -1.0, -0.01])
@pytest.mark.parametrize("warm", [1, 20])
def test_a_loss_that_is_or_becomes_negative_is_not_predicted_there(floor, warm):
    descent = Watched(HybridTrainerConfig(warmup_steps=warm, min_full_steps=12), floor=floor)
    positive = [True]
    for _ in range(400):
        phase = descent.step()
        if phase is Phase.PREDICT and descent.engine.phase is Phase.PREDICT:
            assert positive[-1]
        elif phase is not Phase.PREDICT:
            positive.append(descent.loss(descent.x) > 0.0)
    assert descent.loss(descent.x) < 0.0


def test_a_loss_of_zero_is_left_alone():
    class Solved(Watched):
        def carry_out(self, directive, bad=False):
            seen = super().carry_out(directive, bad)
            return Observation(0.0, 0.0, 0.5, 0.0, seen.gram)

    descent = Solved()
    assert set(descent.run(300)) == {Phase.WARMUP}
    assert descent.engine.counters.probes == 0


@pytest.mark.parametrize("at", range(2, 130, 4))
def test_regroup_needs_a_full_bank_again_and_no_longer(at):
    descent = Watched()
    descent.run(at)
    warming = descent.engine.phase is Phase.WARMUP
    descent.engine.regroup()
    assert not warming or descent.engine.controller.pace.wait == BRISK.min_full_steps
    descent.bank, descent.saved, descent.held, descent.begun = [], None, 0, False
    stretches = list(descent.engine.meter.full)
    phases = []
    while Phase.PREDICT not in phases:
        phases.append(descent.step())
    # A stretch across the change would compare the losses of two different models.
    assert descent.engine.meter.full == stretches
    # Taken in the warm-up, what is left of that comes first.
    wait = phases.index(Phase.PREDICT) - phases.index(Phase.FULL)
    # The trend starts over as well, and a stretch of snapshots must find it regular first.
    assert BRISK.min_full_steps <= wait <= 2 * BRISK.min_full_steps


def test_a_plain_run_is_counted_and_nothing_else():
    engine = Engine(HybridTrainerConfig(enabled=False))
    for loss in (1.0, math.nan, 0.5):
        engine.count_plain(Observation(loss, 1.0, 0.1, 0.01))
    statistics = engine.statistics()
    assert (statistics.steps, statistics.full_steps, statistics.predicted_steps) == (3, 3, 0)
    assert statistics.measured_speedup == 1.0
    assert statistics.probes == 0


def test_reading_the_totals_at_any_time_changes_nothing():
    asked, left_alone = Descent(), Descent()
    for step in range(300):
        asked.step()
        left_alone.step()
        statistics = asked.engine.statistics()
        assert statistics.steps == step + 1
        assert statistics.full_steps == sum(action is Action.FULL for _, action in asked.log), (
            "a quiet step is counted when it is asked for"
        )
    assert asked.log == left_alone.log
    assert np.array_equal(asked.x, left_alone.x)
    assert asked.engine.statistics() == left_alone.engine.statistics()


def test_a_summary_is_json_at_any_time():
    descent = Descent()
    for _ in range(120):
        descent.step()
        statistics = descent.engine.statistics()
        json.dumps(statistics.to_dict(), allow_nan=False)
        known = math.isfinite(statistics.measured_speedup_interval.high)
        assert ("not known yet" in str(statistics)) != known


def test_a_bad_batch_is_critical_for_a_while():
    descent = Descent()
    descent.run(30)
    assert descent.engine.statistics().divergence_level == "NORMAL"
    descent.step(bad=True)
    assert descent.engine.statistics().divergence_level == "CRITICAL"
    descent.run(recovery_steps())
    assert descent.engine.statistics().divergence_level == "NORMAL"


class OnlyFull:
    """A controller of one's own, that never predicts."""

    def __init__(self, config, counters, meter):
        self.phase, self.confidence, self.seen = Phase.WARMUP, 0.0, 0
        self.forecast_loss, self.prediction_error = math.nan, None
        self.arm_values, self.needs_batch = {}, True
        self.divergence_level = "NORMAL"

    def turn(self):
        self.absorb((yield Directive(Action.FULL)))

    def quiet_steps(self):
        return 3 - self.seen % 4

    def absorb(self, observation):
        self.seen += 1

    def restart(self):
        self.seen = 0

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


def test_an_engine_runs_any_controller():
    engine = Engine(BRISK, OnlyFull)
    for step in range(10):
        assert engine.next().action is Action.FULL
        engine.observe(Observation(loss=1.0))
        assert engine.step_done
        assert engine.counters.steps == engine.controller.seen == step + 1
    other = Engine(BRISK, OnlyFull)
    other.load_state_dict(engine.state_dict())
    assert other.controller.seen == 10
    engine.regroup()
    assert engine.controller.seen == 0
