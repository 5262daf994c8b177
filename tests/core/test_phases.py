"""The phase table of the specification, section 5, and a controller of one's own."""

import math
from collections import deque

import pytest
from descent import BRISK

from hybridcore import (
    Action,
    Directive,
    Engine,
    Event,
    HybridCoreError,
    Observation,
    Phase,
    TransitionError,
)
from hybridcore.phases import TRANSITIONS, transition

# Written out here on purpose: the test must not read the table that it checks.
LEGAL = {
    (Phase.WARMUP, Event.BASELINE_STABLE): Phase.FULL,
    (Phase.FULL, Event.JUMP_CHOSEN): Phase.PREDICT,
    (Phase.PREDICT, Event.HORIZON_REACHED): Phase.CORRECT,
    (Phase.PREDICT, Event.DIVERGED): Phase.CORRECT,
    (Phase.PREDICT, Event.CONFIDENCE_LOST): Phase.CORRECT,
    (Phase.CORRECT, Event.VALIDATED): Phase.FULL,
    (Phase.CORRECT, Event.ROLLED_BACK): Phase.FULL,
}


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("event", Event)
def test_every_pair(phase, event):
    if (phase, event) in LEGAL:
        assert transition(phase, event) is LEGAL[phase, event]
    else:
        with pytest.raises(TransitionError, match=f"{event.name} .* {phase.name}; allowed there"):
            transition(phase, event)


def test_every_phase_can_be_left():
    assert {phase for phase, _ in TRANSITIONS} == set(Phase)


def test_the_table_has_no_other_rows():
    assert TRANSITIONS == LEGAL
    assert [phase.name for phase in Phase] == ["WARMUP", "FULL", "PREDICT", "CORRECT"]
    assert sorted(event.name for _, event in TRANSITIONS) == sorted(event.name for event in Event)


@pytest.mark.parametrize("phase", Phase)
def test_an_error_lists_exactly_what_is_allowed(phase):
    allowed = {event.name for p, event in LEGAL if p is phase}
    for event in Event:
        if event.name in allowed:
            continue
        with pytest.raises(TransitionError) as caught:
            transition(phase, event)
        listed = str(caught.value).split("allowed there: ")[1]
        assert set(listed.split(", ")) == allowed
        assert isinstance(caught.value, HybridCoreError)


def test_warm_up_is_never_entered_again():
    assert Phase.WARMUP not in TRANSITIONS.values()


class OnlyFull:
    """A controller of one's own, that never predicts."""

    def __init__(self, config, counters, meter, pairs):
        self.phase, self.confidence, self.seen = Phase.WARMUP, 0.0, 0
        self.forecast_loss, self.prediction_error = math.nan, None
        self.events, self.divergence_signals = deque(), {}
        self.arm_values, self.needs_batch, self.may_roll_back = {}, True, False
        self.holds_mark = self.holds_pairs = self.stands_still = False
        self.divergence_level = "NORMAL"

    def turn(self):
        self.absorb((yield self.quiet_step), self.quiet_step)

    quiet_step = Directive(Action.FULL)

    def quiet_steps(self):
        return 3 - self.seen % 4

    def absorb(self, observation, directive):
        self.seen += 1

    def restart(self, pairs, snapshots=None):
        self.seen = 0

    def raise_losses(self, by):
        self.raised = by

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


def test_an_engine_runs_any_controller():
    engine = Engine(BRISK, controller=OnlyFull)
    for step in range(10):
        assert engine.next().action is Action.FULL
        engine.observe(Observation(loss=1.0))
        assert engine.step_done
        assert engine.counters.steps == engine.controller.seen == step + 1
    other = Engine(BRISK, controller=OnlyFull)
    other.load_state_dict(engine.state_dict())
    assert other.controller.seen == 10
    for _ in range(5):
        engine.next()
        engine.observe(Observation(loss=-2.0))
    # Four times their size below them.
    assert engine.controller.raised == 10.0
    engine.regroup()
    assert engine.controller.seen == 0
