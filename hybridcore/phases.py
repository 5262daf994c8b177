"""The four phases, the events between them, and the one table that joins them."""

from __future__ import annotations

import enum

from hybridcore.errors import TransitionError


class Phase(enum.Enum):
    """Where a run stands; each value is one turn of this loop.

    ::

        while baseline is not stable:               # WARMUP
            full step

        repeat:
            while no jump is worth it:              # FULL
                full step
                now and then: snapshot
            until the horizon is reached:           # PREDICT
                at the start of a segment: move the weights
                at the end of a segment: probe; back to the best point if the loss rose
            for a few settling steps:               # CORRECT
                full step at a lower learning rate
            keep the jump, or roll it back
    """

    WARMUP = "warmup"
    FULL = "full"
    PREDICT = "predict"
    CORRECT = "correct"


class Event(enum.Enum):
    """What can end a phase."""

    BASELINE_STABLE = "baseline stable"
    JUMP_CHOSEN = "jump chosen"
    HORIZON_REACHED = "horizon reached"
    DIVERGED = "diverged"
    CONFIDENCE_LOST = "confidence lost"
    VALIDATED = "validated"
    ROLLED_BACK = "rolled back"


TRANSITIONS: dict[tuple[Phase, Event], Phase] = {
    (Phase.WARMUP, Event.BASELINE_STABLE): Phase.FULL,
    (Phase.FULL, Event.JUMP_CHOSEN): Phase.PREDICT,
    (Phase.PREDICT, Event.HORIZON_REACHED): Phase.CORRECT,
    (Phase.PREDICT, Event.DIVERGED): Phase.CORRECT,
    (Phase.PREDICT, Event.CONFIDENCE_LOST): Phase.CORRECT,
    (Phase.CORRECT, Event.VALIDATED): Phase.FULL,
    (Phase.CORRECT, Event.ROLLED_BACK): Phase.FULL,
}


def transition(phase: Phase, event: Event) -> Phase:
    """Phase that follows `phase` on `event`.

    Raises
    ------
    TransitionError
        If the table has no such pair.
    """
    try:
        return TRANSITIONS[phase, event]
    except KeyError:
        allowed = ", ".join(e.name for p, e in TRANSITIONS if p is phase)
        raise TransitionError(
            f"event {event.name} is not allowed in phase {phase.name}; allowed there: {allowed}"
        ) from None
