"""The phase table of the specification, section 5: every pair of phase and event."""

import pytest

from hybridcore import Event, Phase, TransitionError
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
