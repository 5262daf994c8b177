"""Bad batches and failed probes."""

import math

import numpy as np
import pytest
from descent import BRISK, Descent, Watched

from hybridcore import Action, HybridTrainerConfig, Observation, Phase
from hybridcore.controller import Controller
from hybridcore.divergence import DivergenceMonitor, RecoveryAction

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
    stretches = len(deaf.engine.meter.stretches)
    phases = deaf.run(100)
    assert deaf.engine.counters.rollbacks == 0
    assert set(phases[: BRISK.snapshot_interval - 1]) == {Phase.CORRECT}
    landed = phases.index(Phase.FULL)
    wait = phases.index(Phase.PREDICT) - landed
    assert BRISK.min_full_steps <= wait <= 2 * BRISK.min_full_steps
    # What the jump gained is known to nobody: it must not pass for the work of full steps either.
    newer = deaf.engine.meter.stretches[stretches:]
    assert sum(stretch.predicting for stretch in newer) <= 1
    assert all(s.full_steps <= wait for s in newer if not s.predicting)


def test_a_bad_batch_is_critical_for_a_while():
    descent = Descent()
    descent.run(30)
    assert descent.engine.statistics().divergence_level == "NORMAL"
    descent.step(bad=True)
    assert descent.engine.statistics().divergence_level == "CRITICAL"
    descent.run(recovery_steps())
    assert descent.engine.statistics().divergence_level == "NORMAL"


def test_an_interrupt_while_steps_are_counted_loses_and_doubles_none(monkeypatch):
    """Steps with nothing to decide are counted later, several at once."""
    descent, absorbed = Descent(HybridTrainerConfig()), []
    for _ in range(58):
        descent.engine.count_time(descent.step(), 1e-3, 1e-4)
    absorb = Controller.absorb

    def interrupted(self, *arguments):
        absorb(self, *arguments)
        absorbed.append(arguments)
        if len(absorbed) in (2, 5):
            raise KeyboardInterrupt

    monkeypatch.setattr(Controller, "absorb", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            descent.engine.statistics()
    statistics = descent.engine.statistics()
    assert statistics.steps == sum(statistics.phase_counts.values()) == 58
