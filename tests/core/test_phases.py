"""The phase table of the specification, section 5: every pair of phase and event."""

import pytest

from hybridcore import Event, HybridCoreError, Phase, TransitionError
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
