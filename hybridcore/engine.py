"""The state machine: directives out, observations in.

The engine never sees a tensor and calls no framework. An adapter asks :meth:`Engine.next` what to
do, does it, and tells :meth:`Engine.observe` what it saw, until the step is done:

    while True:
        directive = engine.next()
        engine.observe(carry_out(directive))
        if engine.step_done:
            break

What is decided is the business of a :class:`hybridcore.phases.PhaseController`. Decisions
follow from the observations alone, never from the clock, so the same observations give the same
decisions on every rank and every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from hybridcore.config import HybridTrainerConfig
from hybridcore.controller import Controller
from hybridcore.errors import ProtocolError
from hybridcore.floor import Floor
from hybridcore.meter import Meter
from hybridcore.metrics import Counters, TrainingStatistics
from hybridcore.phases import Phase, PhaseController
from hybridcore.types import FULL_STEP, STEPS, Action, Directive, Observation, Turn


class Engine:
    """Decides, from a few floats a step, which steps are taken and which are predicted.

    Parameters
    ----------
    config : HybridTrainerConfig
        Settings.
    pairs : int
        Secant pairs that the adapter can hold; 0 where it takes no quasi-Newton steps.
    controller : callable, optional
        ``controller(config, counters, meter, pairs)`` builds the one who runs the phases.
    """

    def __init__(
        self,
        config: HybridTrainerConfig,
        pairs: int = 0,
        controller: Callable[
            [HybridTrainerConfig, Counters, Meter, int], PhaseController
        ] = Controller,
    ) -> None:
        self.config = config
        self.pairs = pairs
        self._counters = Counters()
        self._meter = Meter()
        self._floor = Floor()
        self._controller = controller(config, self._counters, self._meter, pairs)
        self._turn: Turn | None = None
        self._directive: Directive | None = None
        # State from before the first decision of the present step, while it may be abandoned.
        self._before: dict[str, Any] | None = None
        # Whether what was learned and counted in it stays if it is.
        self._stays = False
        # What quiet steps are, while there are any.
        self._quiet_step = FULL_STEP
        self._look_ahead()
        self._unread: list[Observation] = []
        self._times: list[tuple[Phase, float, float]] = []

    # -- one step ---------------------------------------------------------------------------

    def next(self) -> Directive:
        """Return the next directive; one that waits for its observation is returned again."""
        if self._directive is None:
            if self._quiet:
                self._directive = self._quiet_step
            else:
                self._take_in()
                self._turn = self._controller.turn()
                self._directive = next(self._turn)
        return self._directive

    def observe(self, observation: Observation) -> None:
        """Take what the adapter saw while it carried out the last directive.

        Raises
        ------
        ProtocolError
            If no directive waits for an observation.
        """
        if self._directive is None:
            raise ProtocolError("observe() without a directive: call next() and carry it out first")
        if self._turn is None:
            self._directive = None
            self._unread.append(observation)
            self._quiet -= 1
            if not observation.applied:
                self._read()
            return
        action = self._directive.action
        # Moves of a jump are done again, from the same snapshots.
        moved = action is Action.MOVE and self._controller.phase is not Phase.PREDICT
        moved |= action is Action.ROLLBACK and self._directive.at_start
        if moved or action in STEPS:
            self._before, self._stays = None, True
        elif action is Action.PROBE and not self._stays and self._before is None:
            self._before = self._state()
        self._account(self._directive, observation)
        phase = self._controller.phase
        try:
            self._directive = self._turn.send(self._above_floor(observation))
        except StopIteration:
            self._turn = self._directive = self._before = None
            self._stays = False
            self._lower_floor()
            self._look_ahead()
        if self._controller.phase is not phase:
            self._before = None

    @property
    def step_done(self) -> bool:
        """True when the directives of the present step have all been observed."""
        return self._directive is None

    def finish(self) -> None:
        """End a jump, or a trial of the optimizer, where it is: it is kept if the loss is lower.

        An outer step that has led to no number is taken back, for which one is looked at that no
        full step has followed.
        Directives for it follow, none of which is a step, unless there is nothing to end.

        Raises
        ------
        ProtocolError
            In the middle of a step.
        """
        if not self.step_done:
            raise ProtocolError("finish() in the middle of a step: finish the step first")
        self._read()
        self._turn = self._controller.finish()
        self._directive = None if self._turn is None else next(self._turn)

    def abandon(self) -> None:
        """Drop the present step, because the user's code raised in it; it can be taken again.

        Before its full, quasi-Newton or predicted step has been observed, what was learned and
        counted in it is forgotten, so that it leaves no trace; a phase that was entered and an
        outer step that was taken stay, and it goes on from there. After that the step counts, and
        what would have followed is left out: a trial point is no new base, or a jump is not yet
        taken back. Only an outer step is made up for. The adapter takes back points that were only
        tried.
        """
        self._turn = self._directive = None
        self._stays = False
        if self._before is not None:
            self._load(self._before)
            self._before = None

    def regroup(self, pairs: int = 0, snapshots: int | None = None) -> None:
        """Start over with an empty bank: the parameters, or the room for copies of them, changed.

        Parameters
        ----------
        pairs : int
            Secant pairs that the adapter can hold now.
        snapshots : int, optional
            Snapshots that it can hold now, 0 or at least 4; by default as many as before.
        """
        self._read()
        self.pairs = pairs
        self._controller.restart(pairs, snapshots)
        self._look_ahead()

    def count_plain(self, observation: Observation) -> None:
        """Count a step of a run with ``enabled=False``, about which there is nothing to decide."""
        self._account(FULL_STEP, observation)
        self._read()

    def count_time(self, phase: Phase, seconds: float, overhead: float) -> None:
        """Take the wall-clock time of a whole step, and what of it was neither training nor probe.

        Times are reported; no decision depends on them.
        """
        self._times.append((phase, seconds, overhead))

    def take_events(self) -> tuple[dict[str, Any], ...]:
        """Return what happened since the last call, for :class:`hybridcore.StepResult`.

        Of full steps whose figures are read later it is told with the step that reads them.
        """
        events = self._controller.events
        if not events:
            return ()
        taken = tuple(events)
        events.clear()
        return taken

    # -- what an adapter may ask ------------------------------------------------------------

    @property
    def phase(self) -> Phase:
        """Phase of the next step."""
        return self._controller.phase

    @property
    def confidence(self) -> float:
        """Confidence in [0, 1] at the last decision."""
        return self._controller.confidence

    @property
    def forecast_loss(self) -> float:
        """Loss at the weights that the newest step left, where no pass of it was there, else NaN.

        That is a forecast if it was predicted.
        """
        return self._controller.forecast_loss + self._floor.value

    @property
    def prediction_error(self) -> float | None:
        """``|forecast - loss| / loss`` of the newest step, None where nothing was compared."""
        return self._controller.prediction_error

    @property
    def touches_weights(self) -> bool:
        """True if the next step may copy, average or move the weights, beside training them."""
        return not (self._quiet or self._controller.stands_still)

    @property
    def may_roll_back(self) -> bool:
        """Whether what the last ``SAVE`` kept may still be asked for."""
        return self._controller.may_roll_back

    @property
    def may_jump(self) -> bool:
        """Whether the next step decides about a jump, and may begin it."""
        return self._controller.may_jump

    @property
    def moved(self) -> bool:
        """Whether an outer step has led to these weights, and no good batch has followed yet."""
        return self._controller.moved

    @property
    def holds_mark(self) -> bool:
        """Whether the weights that the last ``MARK`` kept may still be asked for."""
        return self._controller.holds_mark

    @property
    def holds_pairs(self) -> bool:
        """Whether the secant pairs may still be asked for."""
        return self._controller.holds_pairs

    @property
    def snapshots(self) -> int:
        """Snapshots that there is room for, as far as the engine knows."""
        return self._controller.snapshots

    @property
    def needs_batch(self) -> bool:
        """False if the next step needs none, as it will neither train nor probe."""
        return self._controller.needs_batch

    @property
    def controller(self) -> PhaseController:
        """The one who runs the phases."""
        self._read()
        return self._controller

    @property
    def counters(self) -> Counters:
        """Totals of the run."""
        self._read()
        return self._counters

    @property
    def meter(self) -> Meter:
        """What predicting gained, and what steps and probes cost."""
        self._read()
        return self._meter

    def statistics(self) -> TrainingStatistics:
        """Summary of the run so far."""
        return TrainingStatistics.of(self.counters, self.meter, self._controller)

    # -- state ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state between two steps, as numbers, lists and arrays.

        Raises
        ------
        ProtocolError
            In the middle of a step.
        """
        if not self.step_done:
            raise ProtocolError("state_dict() in the middle of a step: finish the step first")
        self._read()
        return self._state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned under the same settings."""
        self.abandon()
        self._unread.clear()
        self._times.clear()
        self._load(state)
        self._look_ahead()

    # -- bookkeeping ------------------------------------------------------------------------

    def _look_ahead(self) -> None:
        self._quiet = self._controller.quiet_steps()
        if self._quiet:
            self._quiet_step = self._controller.quiet_step

    def _state(self) -> dict[str, Any]:
        # Nothing in it is copied by dataclasses.asdict: a first probe copies all of it, and on a
        # short step that took a third of the time.
        return {
            "controller": self._controller.state_dict(),
            "counters": self._counters.state_dict(),
            "meter": self._meter.state_dict(),
            "floor": self._floor.state_dict(),
        }

    def _load(self, state: dict[str, Any]) -> None:
        self._controller.load_state_dict(state["controller"])
        self._counters.load_state_dict(state["counters"])
        self._meter.load_state_dict(state["meter"])
        # States from before there was one hold losses above zero.
        self._floor.load_state_dict(state.get("floor", Floor().state_dict()))

    def _read(self) -> None:
        """Take in what was put off, and what follows from it for the coming steps."""
        unread = bool(self._unread)
        self._take_in()
        if unread:
            self._look_ahead()

    def _take_in(self) -> None:
        """Take in what was put off, because on a short step each line of Python counts."""
        # One by one, so that an interrupt costs no more than the one at hand.
        while self._unread:
            observation = self._unread.pop(0)
            self._account(self._quiet_step, observation)
            self._controller.absorb(self._above_floor(observation), self._quiet_step)
            # After each, or it would matter when they are read.
            self._lower_floor()
        while self._times:
            phase, seconds, overhead = self._times.pop(0)
            self._counters.phase_steps[phase.name] += 1
            self._counters.phase_seconds[phase.name] += seconds
            self._meter.overhead_seconds += overhead

    def _above_floor(self, observation: Observation) -> Observation:
        floor = self._floor.value
        return observation._replace(loss=observation.loss - floor) if floor else observation

    def _lower_floor(self) -> None:
        # What may be rolled back is compared with losses from before it.
        if self._floor.is_near and not self._controller.may_roll_back:
            self._controller.raise_losses(self._floor.lower())

    def _account(self, directive: Directive, observation: Observation) -> None:
        counters, meter = self._counters, self._meter
        if directive.action in (Action.FULL, Action.GRADIENT):
            counters.steps += 1
            counters.full_steps += 1
            counters.backward_passes += observation.backward
            # A trial point may be far off: that is no fault of the batch.
            bad = not (observation.applied or observation.overflow)
            counters.divergences += bad and directive.action is Action.FULL
            counters.secant_steps += directive.action is Action.GRADIENT
            if directive.action is Action.FULL:
                # A quasi-Newton step leaves the optimizer out, and is no unit.
                meter.full_time.add(observation.seconds)
            if math.isfinite(observation.loss):
                self._floor.see(observation.loss)
        elif directive.action is Action.SKIP:
            counters.steps += 1
            counters.predicted_steps += 1
        elif directive.action is Action.MOVE:
            counters.outer_steps += directive.snapshot
        elif directive.action is Action.PROBE:
            counters.probes += 1
            meter.probe_time.add(observation.seconds)
