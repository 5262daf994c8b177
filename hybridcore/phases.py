"""The four phases, the events between them, the one table that joins them, and who runs them."""

from __future__ import annotations

import enum
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

from hybridcore.errors import TransitionError

if TYPE_CHECKING:
    from hybridcore.types import Directive, Observation, Turn


class Phase(enum.Enum):
    """Where a run stands; each value is one turn of a loop.

    The loop in pseudocode:

        while baseline is not stable:               # WARMUP
            full step

        repeat:
            while no jump is worth it:              # FULL
                full step
                now and then: snapshot
                while a jump is out of reach: every tenth step, move on by outer momentum, as far
                    as probes say that the loss of a batch bears it; now and then predict the steps
                    that this stands for, or a higher rate pays for, without a probe
                while every batch is the same: quasi-Newton steps
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


class PhaseController(Protocol):
    """What the engine asks of whoever runs the phases.

    Attributes
    ----------
    phase : Phase
        Present phase; only :func:`transition` changes it.
    confidence : float
        Confidence in [0, 1] at the last decision.
    forecast_loss : float
        Loss at the weights that the newest step left, where no pass of it was there: a forecast if
        it was predicted. NaN elsewhere.
    prediction_error : float or None
        ``|forecast - loss| / loss`` of the newest step, None where it could not compare them.
    events : deque of dict
        What happened since they were last taken: ``event`` is its name, the rest its figures.
    """

    phase: Phase
    confidence: float
    forecast_loss: float
    prediction_error: float | None
    events: deque[dict[str, Any]]

    @property
    def arm_values(self) -> dict[str, float]:
        """What each way to predict has been worth, in full steps."""
        ...

    @property
    def divergence_level(self) -> str:
        """Name of how serious the signs of divergence are."""
        ...

    @property
    def divergence_signals(self) -> dict[str, float]:
        """Severity of each of these signs, above 1 if triggered."""
        ...

    def turn(self) -> Turn:
        """Directives of the next step, in the present phase.

        It may be abandoned at any of them; the engine then puts back the state from before its
        first probe, if it had one and no outer step has been taken since, and the step is taken
        again. So what must not be done twice, or be lost, changes only after the directive that it
        belongs to has been observed.
        """
        ...

    def finish(self) -> Turn | None:
        """Directives that end what may be taken back, without a step; None if there is nothing."""
        ...

    def quiet_steps(self) -> int:
        """Coming steps that are :attr:`quiet_step` and nothing else, whatever is seen in them."""
        ...

    @property
    def quiet_step(self) -> Directive:
        """Step that each of :meth:`quiet_steps` is."""
        ...

    def absorb(self, observation: Observation, directive: Directive) -> None:
        """Take in what was seen in such a step, which `directive` asked for."""
        ...

    @property
    def may_roll_back(self) -> bool:
        """Whether what the last ``SAVE`` kept may still be asked for."""
        ...

    @property
    def may_jump(self) -> bool:
        """Whether the next step decides about a jump."""
        ...

    @property
    def moved(self) -> bool:
        """Whether an outer step has led to these weights, and no good batch has followed yet."""
        ...

    @property
    def holds_mark(self) -> bool:
        """Whether the weights that the last ``MARK`` kept may still be asked for."""
        ...

    @property
    def holds_pairs(self) -> bool:
        """Whether the secant pairs may still be asked for."""
        ...

    @property
    def stands_still(self) -> bool:
        """Whether the next step leaves the weights where they are, and needs no copy of them."""
        ...

    @property
    def needs_batch(self) -> bool:
        """False if the next step needs none, as it will neither train nor probe."""
        ...

    @property
    def snapshots(self) -> int:
        """Snapshots that there is room for."""
        ...

    def restart(self, pairs: int, snapshots: int | None = None) -> None:
        """Forget the trajectory: the parameters, or the room for copies of them, are others.

        There is room for `pairs` secant pairs, and for `snapshots` snapshots, as before if None.
        """
        ...

    def raise_losses(self, by: float) -> None:
        """Count losses from further down, where nothing may be rolled back: all are higher `by`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return everything that decides what comes next, as numbers, lists and arrays.

        With the events, which have still to be told.
        """
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        ...
