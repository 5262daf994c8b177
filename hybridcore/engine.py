"""The state machine: directives out, observations in.

The engine never sees a tensor and calls no framework. An adapter asks :meth:`Engine.next` what to
do, does it, and tells :meth:`Engine.observe` what it saw, until the step is done::

    while True:
        directive = engine.next()
        engine.observe(carry_out(directive))
        if engine.step_done:
            break

Every phase is one generator below that reads as its row of the phase table. Decisions follow from
the observations alone, never from the clock, so the same observations give the same decisions on
every rank and every machine.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Generator
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from hybridcore.config import HybridTrainerConfig
from hybridcore.dynamics import DynamicsModel, LinearDynamics
from hybridcore.errors import ProtocolError
from hybridcore.meter import Meter
from hybridcore.metrics import Counters, TrainingStatistics
from hybridcore.phases import Event, Phase, transition
from hybridcore.planning import (
    ARMS,
    Flight,
    Pace,
    learning_rate_ahead,
    path_confidence,
)
from hybridcore.search import AVERAGED_SNAPSHOTS, everywhere, probe_average, search, usable
from hybridcore.types import NAN, Action, Directive, Observation

logger = logging.getLogger("hybridcore")

Turn: TypeAlias = Generator[Directive, Observation, None]

SETTLE_RATE = 0.5
ABORT_RISE = math.log(1.3)
TOLERANCE = math.log(1.2)
PATIENT_STEPS = 3
REGULAR_SNAPSHOTS = 3

_FULL = Directive(Action.FULL)
_SKIP = Directive(Action.SKIP)
_PROBE = Directive(Action.PROBE)


class Engine:
    """Decides, from a few floats a step, which steps are taken and which are predicted.

    Parameters
    ----------
    config : HybridTrainerConfig
        Settings.
    dynamics : DynamicsModel, optional
        Model of the loss; a :class:`LinearDynamics` of its own by default.
    """

    def __init__(self, config: HybridTrainerConfig, dynamics: DynamicsModel | None = None) -> None:
        self.config = config
        self.dynamics = LinearDynamics() if dynamics is None else dynamics
        self._meter = Meter()
        self._counters = Counters()
        self.phase = Phase.WARMUP
        self.confidence = 0.0
        self.forecast_loss = NAN
        self.prediction_error: float | None = None
        self.pace = Pace(config)
        self._flight: Flight | None = None
        self._taken = 0
        self._gram: NDArray[np.float64] | None = None
        self._bank = 0
        self._regular = 0
        self._lost = 0
        window = config.snapshot_interval * (config.snapshots - 1)
        self._rates: deque[float] = deque(maxlen=max(2, window))
        self._turns = {
            Phase.WARMUP: self._warm_up,
            Phase.FULL: self._full,
            Phase.PREDICT: self._predict,
            Phase.CORRECT: self._correct,
        }
        self._turn: Turn | None = None
        self._directive: Directive | None = None
        self._quiet = self._quiet_ahead()
        self._unread: list[Observation] = []
        self._times: list[tuple[Phase, float, float]] = []

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

    @property
    def step_done(self) -> bool:
        """True when the directives of the present step have all been observed."""
        return self._directive is None

    @property
    def uses_snapshots(self) -> bool:
        """True if the next step may take, read or write snapshots."""
        return not self._quiet and self.phase is not Phase.WARMUP

    @property
    def needs_batch(self) -> bool:
        """False if the next step will neither train nor probe, so that no data is needed."""
        if self.phase is not Phase.PREDICT:
            return True
        taken = self._taken + 1
        return taken % self.config.correction_interval == 0 or taken == self._in_flight.horizon

    def next(self) -> Directive:
        """Return the next directive; one that waits for its observation is returned again."""
        if self._directive is None:
            if self._quiet:
                self._directive = _FULL
            else:
                self._read()
                self.prediction_error = None
                self._turn = self._turns[self.phase]()
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
            if not self._quiet or not observation.applied:
                self._read()
            return
        self._account(self._directive, observation)
        try:
            self._directive = self._turn.send(observation)
        except StopIteration:
            self._turn = self._directive = None
            self._quiet = self._quiet_ahead()

    def abandon(self) -> None:
        """Drop the present step, because the user's code raised in it."""
        self._turn = self._directive = None

    def regroup(self) -> None:
        """Start over with an empty bank: the parameters are others than they were."""
        self._read()
        self._gram, self._flight, self._bank = None, None, 0
        self.pace.wait = self.config.min_full_steps
        if self.phase is not Phase.WARMUP:
            self.phase = Phase.FULL
            self.pace.wait += self._taken
        self._meter.mark = (NAN, self._counters.full_steps, self._counters.probes)
        self.dynamics.restart()
        self._quiet = self._quiet_ahead()
        logger.info("parameters changed: snapshots and trend start over")

    def count_plain(self, observation: Observation) -> None:
        """Count a step of a run with ``enabled=False``, about which there is nothing to decide."""
        self.phase = Phase.FULL
        self._account(_FULL, observation)

    def count_time(self, phase: Phase, seconds: float, overhead: float) -> None:
        """Take the wall-clock time of a whole step, and what of it was neither training nor probe.

        Times are reported; no decision depends on them.
        """
        self._times.append((phase, seconds, overhead))

    def statistics(self) -> TrainingStatistics:
        """Summary of the run so far."""
        return TrainingStatistics.of(
            self.counters, self.meter, self.pace.arm_values, self.confidence
        )

    # -- quiet steps ------------------------------------------------------------------------

    def _quiet_ahead(self) -> int:
        """Coming steps that are full steps and nothing else, whatever is seen in them."""
        config = self.config
        if self.phase is Phase.WARMUP:
            return max(0, config.warmup_steps - self._taken - 1)
        if self.phase is not Phase.FULL or self._gram is not None:
            return 0
        lead = self.pace.wait - self._taken - 1
        first = config.snapshot_interval * (config.snapshots - 1)
        return lead - first if lead > first else lead % config.snapshot_interval

    def _read(self) -> None:
        """Take in what was put off, because on a short step each line of Python counts."""
        unread, self._unread = self._unread, []
        for observation in unread:
            self._account(_FULL, observation)
            self._absorb(observation)
        if unread:
            self._quiet = self._quiet_ahead()
        for phase, seconds, overhead in self._times:
            self._counters.phase_steps[phase.name] += 1
            self._counters.phase_seconds[phase.name] += seconds
            self._meter.overhead_seconds += overhead
        self._times.clear()

    # -- the phases -------------------------------------------------------------------------

    def _warm_up(self) -> Turn:
        self._absorb((yield _FULL))
        if self._taken >= self.config.warmup_steps and self.dynamics.is_stable:
            self._enter(Event.BASELINE_STABLE)

    def _full(self) -> Turn:
        if self._gram is not None and self._bank == self.config.snapshots:
            self._flight = yield from self._choose(self._gram)
            if self._flight is not None:
                yield Directive(Action.SAVE)
                self._enter(Event.JUMP_CHOSEN)
                yield from self._predict()
                return
            self._gram = None
        lead = self.pace.wait - self._taken - 1
        interval, snapshots = self.config.snapshot_interval, self.config.snapshots
        if lead % interval != 0 or lead >= interval * snapshots:
            self._absorb((yield _FULL))
            return
        # Snapshots are cheap and go on through a spike; the Gram matrix waits until it is over.
        calm = self._loss_confidence >= self.config.confidence_threshold
        regular = self._regular + 1 if calm else 0
        wanted = lead <= 0 and regular >= REGULAR_SNAPSHOTS
        observation = yield Directive(
            Action.FULL, snapshot=True, fresh_bank=self._bank == 0, gram=wanted
        )
        self._absorb(observation)
        if observation.applied:
            self._regular = regular
            if lead <= 0 and not wanted:
                self.pace.wait += interval
            self._bank = min(self._bank + 1, snapshots)
            gram = observation.gram
            # Weights that are not finite can hide from the loss, but not from the bank.
            self._gram = gram if gram is not None and np.isfinite(gram).all() else None

    def _predict(self) -> Turn:
        flight, interval = self._in_flight, self.config.correction_interval
        if self._taken % interval == 0:
            yield self._move(min(self._taken + interval, flight.horizon) / flight.horizon)
        share = (self._taken + 1) / flight.horizon
        expected = flight.expected(share)
        self.forecast_loss = math.exp(expected)
        event = Event.HORIZON_REACHED if self._taken + 1 == flight.horizon else None
        if self.needs_batch:
            probe = yield _PROBE
            # A probe that is not finite is a bad batch, or settling and validation will tell.
            if usable(probe.loss):
                loss = math.log(probe.loss)
                self.prediction_error = abs(self.forecast_loss - probe.loss) / probe.loss
                self.forecast_loss = probe.loss
                if loss > flight.log_best + self._margin:
                    yield self._move(flight.best_share)
                    event = Event.DIVERGED
                elif loss > expected + TOLERANCE + self._margin:
                    event = Event.CONFIDENCE_LOST
                if loss < flight.log_best:
                    flight.log_best, flight.best_share = loss, share
        yield _SKIP
        self._taken += 1
        if event is not None:
            self._enter(event)

    def _correct(self) -> Turn:
        settling = max(AVERAGED_SNAPSHOTS, self.config.snapshot_interval)
        if self._taken == settling:
            if (yield from self._validate()):
                self._enter(Event.VALIDATED)
            else:
                yield from self._roll_back()
            yield from self._full()
            return
        due = self._taken + 1 in (settling // 2, settling)
        observation = yield Directive(Action.FULL, snapshot=due, learning_rate_scale=SETTLE_RATE)
        self._absorb(observation)
        self._lost = 0 if observation.applied else self._lost + 1
        if self._lost == PATIENT_STEPS:
            # One bad batch is the data's fault, several in a row are the jump's.
            yield from self._give_up()
            return
        # The fast directions that a jump excites fall back within a few steps, or never.
        if self._taken >= PATIENT_STEPS and usable(observation.loss):
            rise = math.log(observation.loss) - self._in_flight.log_start
            if rise > ABORT_RISE + self._margin:
                yield from self._give_up()

    # -- decisions --------------------------------------------------------------------------

    def _choose(
        self, gram: NDArray[np.float64]
    ) -> Generator[Directive, Observation, Flight | None]:
        """Jump to take from here, None for "do not predict"."""
        config = self.config
        path = path_confidence(gram.sum(axis=0))
        in_path, in_loss = max(path.values()), self._loss_confidence
        self.confidence = min(in_path, in_loss)
        retry = config.snapshot_interval
        if self.confidence < config.confidence_threshold:
            if in_path < config.confidence_threshold / 2 and self._regular >= config.snapshots:
                # Irregular though no spike explains it: looking again soon would be in vain.
                retry, self._bank = self.pace.back_off(config.min_full_steps), 0
            self.pace.wait = self._taken + retry
            return None
        here = (yield _PROBE).loss
        averaged = (yield probe_average(len(self._known_gram))).loss
        self.pace.wait = self._taken + retry
        if not (usable(here) and usable(averaged)):
            return None
        self._close_stretch(math.log(averaged), predicting=False)
        ahead = learning_rate_ahead(self._rates, config.horizon)
        unit = config.horizon / config.snapshot_interval * ahead
        candidates = [name for name in ARMS if path[name] >= config.confidence_threshold]
        best, least = yield from search(gram, candidates, unit, here)
        if best is not None:
            start = math.log(here)
            slope = self.dynamics.slope
            flight = Flight(best, 0, start, math.log(least), slope, log_best=start)
            flight.horizon = self.pace.horizon(flight)
            if flight.horizon > 0:
                return flight
        # Probing costs a step or two: where it finds nothing, not again soon.
        self.pace.wait = self._taken + self.pace.back_off(2 * retry)
        return None

    def _validate(self) -> Generator[Directive, Observation, bool]:
        """Compare the settled weights with those before the jump; True if the jump is kept.

        Both are means of as many snapshots: the bank holds those of either side.
        """
        groups = len(self._known_gram)
        before = (yield probe_average(groups, behind=AVERAGED_SNAPSHOTS)).loss
        after = (yield probe_average(groups)).loss
        if not usable(before):
            # A bad batch proves nothing, and the settling steps had no reason to abort: the jump
            # stays, and what it gained is known to nobody.
            self.pace.wait = self.config.min_full_steps
            self._close_stretch(NAN, predicting=True)
            return True
        if not usable(after):
            self._reward(0.0)
            return False
        progress = math.log(before) - math.log(after)
        self._reward(progress)
        if progress > 0.0:
            self._close_stretch(math.log(after), predicting=True, progress=progress)
        return progress > 0.0

    def _give_up(self) -> Turn:
        self._lost = 0
        self._reward(0.0)
        yield from self._roll_back()

    def _roll_back(self) -> Turn:
        yield Directive(Action.ROLLBACK)
        self._counters.rollbacks += 1
        logger.info("jump by %s rolled back", self._in_flight.jump.extrapolator)
        self._close_stretch(self._meter.mark[0], predicting=True, progress=0.0)
        self._enter(Event.ROLLED_BACK)

    def _reward(self, progress: float) -> None:
        """Learn what the jump was worth, and how soon another one is worth trying."""
        spent = self._meter.spent(self._counters.full_steps, self._counters.probes)
        self.pace.reward(self._in_flight, progress, *spent)

    # -- small change -----------------------------------------------------------------------

    @property
    def _margin(self) -> float:
        """Rise of the log loss that the loss's own noise explains."""
        return self.config.divergence_sigma * self.dynamics.noise

    @property
    def _loss_confidence(self) -> float:
        """Confidence in the trend of the loss, up to where a micro-correction would check it."""
        return self.dynamics.forecast(self.config.correction_interval).confidence(TOLERANCE)

    def _enter(self, event: Event) -> None:
        self.phase = transition(self.phase, event)
        self._taken = 0
        if event in (Event.VALIDATED, Event.ROLLED_BACK):
            self._gram, self._bank = None, 0
        if event is Event.VALIDATED:
            # After a rollback the trend from before the jump holds again, so only here.
            self.dynamics.restart()
        logger.debug("%s: now %s", event.value, self.phase.name)

    def _absorb(self, observation: Observation) -> None:
        """Take the figures of a full step into the statistics of its phase."""
        self.forecast_loss = NAN
        if not observation.applied:
            return
        self._taken += 1
        if self.phase is not Phase.CORRECT:
            self.dynamics.observe(observation.loss)
            self._rates.append(observation.learning_rate)

    @property
    def _known_gram(self) -> NDArray[np.float64]:
        assert self._gram is not None
        return self._gram

    @property
    def _in_flight(self) -> Flight:
        assert self._flight is not None
        return self._flight

    def _move(self, share: float) -> Directive:
        return Directive(Action.MOVE, everywhere(self._in_flight.jump, self._known_gram, share))

    def _close_stretch(
        self, log_loss: float, predicting: bool, progress: float | None = None
    ) -> None:
        full, probes = self._counters.full_steps, self._counters.probes
        self._meter.close_stretch(log_loss, full, probes, predicting=predicting, progress=progress)

    def _account(self, directive: Directive, observation: Observation) -> None:
        counters, meter = self._counters, self._meter
        if directive.action is Action.FULL:
            counters.steps += 1
            counters.full_steps += 1
            counters.backward_passes += math.isfinite(observation.loss)
            counters.divergences += not observation.applied
            meter.full_seconds.append(observation.seconds)
        elif directive.action is Action.SKIP:
            counters.steps += 1
            counters.predicted_steps += 1
        elif directive.action is Action.PROBE:
            counters.probes += 1
            meter.probe_seconds.append(observation.seconds)
