"""Interruptions and resumption: nothing is lost, and no clock decides."""

import json

import numpy as np
import pytest
from descent import BRISK, Descent, Watched, text

from hybridcore import (
    Engine,
    HybridTrainerConfig,
    Observation,
    Phase,
    ProtocolError,
)
from hybridcore.jumping import PATIENT_STEPS

# -- interruptions --------------------------------------------------------------------------------


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


def test_what_is_still_to_be_told_of_quiet_steps_is_told_by_a_resumed_run():
    descent = Descent(HybridTrainerConfig())
    descent.run(52)
    descent.engine.take_events()
    assert not descent.engine.touches_weights
    descent.engine.next()
    descent.engine.observe(Observation(1e6, 1.0, 0.5))
    state = text(descent.engine.state_dict())
    other = Descent(HybridTrainerConfig())
    other.engine.load_state_dict(json.loads(state))
    told = other.engine.take_events()
    assert told == ({"event": "divergence level", "level": "CAUTION"},)
    assert told == descent.engine.take_events()
    # Nor is anything told twice.
    other.engine.load_state_dict(json.loads(text(other.engine.state_dict())))
    assert other.engine.take_events() == ()


def test_a_state_does_not_move_with_the_engine():
    descent = Descent()
    descent.run(60)
    state = descent.engine.state_dict()
    before = text(state)
    for _ in range(60):
        phase = descent.step()
        descent.engine.count_time(phase, 1e-3, 1e-4)
    assert text(descent.engine.state_dict()) != before == text(state)


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


def test_what_waits_to_be_counted_is_no_part_of_a_state_that_is_loaded():
    descent = Descent()
    descent.run(5)
    state = descent.engine.state_dict()
    before = text(state)
    for _ in range(3):
        # One full step and nothing else: its figures and its time are taken in later.
        assert not descent.engine.touches_weights
        descent.engine.count_time(descent.step(), 1.0, 0.1)
    descent.engine.load_state_dict(state)
    assert text(descent.engine.state_dict()) == before


def test_bad_batches_behind_a_jump_are_counted_on_by_a_resumed_run():
    descent = Descent()
    while descent.engine.phase is not Phase.CORRECT:
        descent.step()
    for _ in range(PATIENT_STEPS - 1):
        assert descent.step(bad=True) is Phase.CORRECT
    other = Descent()
    other.engine.load_state_dict(json.loads(text(descent.engine.state_dict())))
    other.x, other.bank, other.saved = descent.x, list(descent.bank), descent.saved
    for each in (descent, other):
        each.step(bad=True)
        assert each.engine.phase is Phase.FULL
        assert each.engine.counters.rollbacks == 1


def test_how_many_snapshots_there_is_room_for_is_part_of_a_state():
    descent, other = Descent(), Descent()
    descent.engine.regroup(snapshots=4)
    other.engine.load_state_dict(json.loads(text(descent.engine.state_dict())))
    assert other.engine.snapshots == 4
    assert other.engine.statistics().snapshots == 4
