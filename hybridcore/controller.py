"""What each phase does: one generator a phase, that reads as its row of the phase table.

A generator yields directives and is sent what was seen while they were carried out. It knows no
framework and no clock, so the same observations give the same decisions on every rank.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import deque
from collections.abc import Generator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybridcore.averaging import Averaging
from hybridcore.config import HybridTrainerConfig
from hybridcore.decision import DecisionRule
from hybridcore.divergence import DivergenceMonitor, RecoveryAction
from hybridcore.dynamics import build
from hybridcore.meter import Meter
from hybridcore.metrics import Counters
from hybridcore.outer import LEAST, OuterMomentum
from hybridcore.phases import Event, Phase, Turn, transition
from hybridcore.planning import Flight, learning_rate_ahead, path_confidence
from hybridcore.search import AVERAGED_SNAPSHOTS, probe_average, usable
from hybridcore.types import NAN, Action, Directive, Observation

logger = logging.getLogger("hybridcore")

SETTLE_RATE = 0.5
ABORT_RISE = math.log(1.3)
TOLERANCE = math.log(1.2)
PATIENT_STEPS = 3
REGULAR_SNAPSHOTS = 3
SHORTENED = 0.5
BEARABLE = (RecoveryAction.CONTINUE, RecoveryAction.SHORTEN_HORIZON)

FULL_STEP = Directive(Action.FULL)
_SKIP = Directive(Action.SKIP)
_PROBE = Directive(Action.PROBE)


class Controller:
    """Jumps along the extrapolation that probes best, where trajectory and loss are regular.

    Parameters
    ----------
    config : HybridTrainerConfig
        Settings.
    counters : Counters
        Totals of the run, kept by the engine; rollbacks are counted here.
    meter : Meter
        Told where stretches of full steps and jumps begin and end.
    """

    def __init__(self, config: HybridTrainerConfig, counters: Counters, meter: Meter) -> None:
        self.config = config
        self.phase = Phase.WARMUP
        self.confidence = 0.0
        self.forecast_loss = NAN
        self.prediction_error: float | None = None
        self.dynamics = build(config.dynamics, config.device)
        self.rule = DecisionRule(config, self.dynamics)
        self.pace = self.rule.pace
        self.monitor = DivergenceMonitor(config.divergence_sigma)
        self.outer = OuterMomentum()
        self._average = Averaging()
        self._counters, self._meter = counters, meter
        self._flight: Flight | None = None
        self._taken = 0
        self._gram: NDArray[np.float64] | None = None
        self._bank = 0
        self._regular = 0
        self._lost = 0
        window = config.snapshot_interval * (config.snapshots - 1)
        self._rates: deque[float] = deque(maxlen=max(2, window))

    @property
    def arm_values(self) -> dict[str, float]:
        """By extrapolator, how many full steps its last jumps gained, net."""
        return self.pace.arm_values

    @property
    def divergence_level(self) -> str:
        """Name of the monitor's level."""
        return self.monitor.level.name

    def turn(self) -> Turn:
        """Directives of the next step, in the present phase."""
        self.prediction_error = None
        if self.phase is Phase.WARMUP:
            return self._warm_up()
        if self.phase is Phase.FULL:
            return self._full()
        return self._predict() if self.phase is Phase.PREDICT else self._correct()

    def quiet_steps(self) -> int:
        """Coming steps that are one full step and nothing else, whatever is seen in them."""
        if self.phase is Phase.WARMUP:
            quiet = max(0, self.config.warmup_steps - self._taken - 1)
        elif self.phase is not Phase.FULL or self._gram is not None:
            return 0
        else:
            quiet = self.pace.until_snapshot(self._taken)
            if self.outer.active or self._has_rest:
                quiet = min(quiet, self.outer.until_due(self._taken))
        return min(quiet, self._average.until_due(self._taken)) if self.config.averaging else quiet

    def absorb(self, observation: Observation) -> None:
        """Take the figures of a full step into the statistics of its phase."""
        self.forecast_loss = NAN
        if not observation.applied:
            self.monitor.observe_delta(finite=False)
            return
        self.monitor.observe(observation.loss, observation.gradient_norm)
        self._taken += 1
        if self.phase is not Phase.CORRECT:
            self.dynamics.observe(observation)
            self._rates.append(observation.learning_rate)

    @property
    def needs_batch(self) -> bool:
        """False if the next step will neither train nor probe."""
        if self.phase is not Phase.PREDICT:
            return True
        taken = self._taken + 1
        return taken % self.config.correction_interval == 0 or taken == self._in_flight.last

    def restart(self) -> None:
        """Forget the trajectory, and a jump under way: the parameters are others now."""
        self._gram, self._flight, self._bank = None, None, 0
        self.pace.wait = self.config.min_full_steps
        if self.phase is not Phase.WARMUP:
            self.phase = Phase.FULL
            self.pace.wait += self._taken
        self._meter.mark = (NAN, self._counters.full_steps, self._counters.probes)
        self.dynamics.restart()
        self.rule.restart()
        self._average.restart()
        self.outer.stop()
        logger.info("parameters changed: snapshots and trend start over")

    # -- the phases -------------------------------------------------------------------------

    def _warm_up(self) -> Turn:
        yield from self._step()
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
        if self.outer.pending:
            yield self.outer.step(self._rates[-1])
        calm = self._loss_confidence >= self.config.confidence_threshold
        if self.outer.active and not calm and self.pace.until_snapshot(self._taken) == 0:
            self.pace.put_off()
        if self.pace.until_snapshot(self._taken) > 0:
            yield from self._rest()
            return
        self.outer.stop()
        last = self._taken + 1 >= self.pace.wait
        # Snapshots are cheap and go on through a spike; the Gram matrix waits until it is over.
        regular = max(0, self._regular) + 1 if calm else min(0, self._regular) - 1
        wanted = last and regular >= REGULAR_SNAPSHOTS
        observation = yield from self._step(
            Directive(Action.FULL, snapshot=True, fresh_bank=self._bank == 0, gram=wanted)
        )
        if observation.applied:
            self._regular = regular
            if last and not wanted:
                self.pace.wait += self.config.snapshot_interval
            self._bank = min(self._bank + 1, self.config.snapshots)
            gram = observation.gram
            # Weights that are not finite can hide from the loss, but not from the bank.
            self._gram = gram if gram is not None and np.isfinite(gram).all() else None
            long = self._bank == self.config.snapshots and regular <= -self.config.snapshots
            if last and long and not self.outer.straight:
                self.pace.rest(self._taken)

    def _rest(self) -> Turn:
        """Take a full step while there is nothing to look at, and outer steps if that lasts."""
        if not self.outer.active and self._has_rest:
            self._bank = 0
            self.outer.begin()
        due = self.outer.active and self.outer.until_due(self._taken) == 0
        wanted = due and self.monitor.action() in BEARABLE
        observation = yield from self._step(self.outer.full_step if wanted else FULL_STEP)
        if wanted and observation.applied and self.outer.take(observation.gram):
            self.pace.wait = self._taken + self.config.min_full_steps

    def _step(
        self, directive: Directive = FULL_STEP
    ) -> Generator[Directive, Observation, Observation]:
        """Take a full step, and average the weights where it is time to."""
        weight = self._average.weight(self._taken + 1) if self.config.averaging else 0.0
        observation = yield dataclasses.replace(directive, average=weight) if weight else directive
        self.absorb(observation)
        if weight and observation.applied:
            self._average.add()
        return observation

    def _predict(self) -> Turn:
        flight, interval = self._in_flight, self.config.correction_interval
        if self._taken % interval == 0:
            yield self._move(min(self._taken + interval, flight.last) / flight.horizon)
        self.forecast_loss = math.exp(flight.expected((self._taken + 1) / flight.horizon))
        event = Event.HORIZON_REACHED if self._taken + 1 == flight.last else None
        if self.needs_batch:
            probe = yield _PROBE
            # A probe that is not finite is a bad batch, or settling and validation will tell.
            if usable(probe.loss):
                self.monitor.observe_prediction(self.forecast_loss, probe.loss)
                self.prediction_error = abs(self.forecast_loss - probe.loss) / probe.loss
                self.forecast_loss = probe.loss
                event = flight.correct(self._taken + 1, math.log(probe.loss), self._margin) or event
                if event is Event.DIVERGED:
                    yield self._move(flight.best_share)
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
        self.absorb(observation)
        self._lost = 0 if observation.applied else self._lost + 1
        # One bad batch is the data's fault, several in a row are the jump's.
        hopeless = self._lost == PATIENT_STEPS
        # The fast directions that a jump excites fall back within a few steps, or never.
        if self._taken >= PATIENT_STEPS and usable(observation.loss):
            # The trend from before the jump: a probe's loss may be of other data.
            rise = math.log(observation.loss) - self.dynamics.forecast(0.0).mean
            hopeless = hopeless or rise > ABORT_RISE + self._margin
        if hopeless:
            self._reward(0.0)
            yield from self._roll_back()

    # -- decisions --------------------------------------------------------------------------

    def _choose(
        self, gram: NDArray[np.float64]
    ) -> Generator[Directive, Observation, Flight | None]:
        """Jump to take from here, None for "do not predict"."""
        config = self.config
        path = path_confidence(gram.sum(axis=0))
        in_path, in_loss = max(path.values()), self._loss_confidence
        self.confidence = min(in_path, in_loss)
        slope = self.dynamics.slope
        ahead = learning_rate_ahead(self._rates, config.horizon)
        context = self.rule.context(in_path, in_loss, slope, ahead)
        self.rule.learn(gram, path, context)
        self.pace.wait = self._taken + config.snapshot_interval
        action = self.monitor.action()
        if action not in BEARABLE:
            return None
        if self.confidence < config.confidence_threshold:
            if in_path < config.confidence_threshold / 2 and self._regular >= config.snapshots:
                # Irregular though no spike explains it: looking again soon would be in vain.
                self.pace.look_later(self._taken)
            return None
        here = (yield _PROBE).loss
        averaged = (yield probe_average()).loss
        if not (usable(here) and usable(averaged)):
            return None
        self._close(math.log(averaged), predicting=False)
        reach = config.horizon / config.snapshot_interval * ahead
        if action is RecoveryAction.SHORTEN_HORIZON:
            reach *= SHORTENED
        flight = yield from self.rule.choose(gram, path, context, here, slope, reach)
        if flight is not None:
            return flight
        # Probing costs a step or two: where it finds nothing, not again soon.
        self.pace.wait = self._taken + self.pace.back_off(2 * config.snapshot_interval)
        return None

    def _validate(self) -> Generator[Directive, Observation, bool]:
        """Compare the settled weights with those before the jump; True if the jump is kept.

        Both are means of as many snapshots: the bank holds those of either side.
        """
        before = (yield probe_average(behind=AVERAGED_SNAPSHOTS)).loss
        after = (yield probe_average()).loss
        if not usable(before):
            # A bad batch proves nothing, and the settling steps had no reason to abort: the jump
            # stays, and what it gained is known to nobody.
            self.pace.wait = self.config.min_full_steps
            self._close(NAN, predicting=True)
            return True
        progress = math.log(before) - math.log(after) if usable(after) else 0.0
        self._reward(progress)
        if progress > 0.0:
            self._close(math.log(after), predicting=True, progress=progress)
        return progress > 0.0

    def _roll_back(self) -> Turn:
        self._lost = 0
        yield Directive(Action.ROLLBACK)
        self._counters.rollbacks += 1
        logger.info("jump by %s rolled back", self._in_flight.jump.extrapolator)
        self._close(self._meter.mark[0], predicting=True, progress=0.0)
        self._enter(Event.ROLLED_BACK)

    def _reward(self, progress: float) -> None:
        """Learn what the jump was worth, and how soon another one is worth trying."""
        spent = self._meter.spent(self._counters.full_steps, self._counters.probes)
        self.rule.reward(self._in_flight, progress, *spent)

    # -- state ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything that decides what comes next, as numbers, lists and arrays."""
        return {
            "phase": self.phase.name,
            "confidence": self.confidence,
            "dynamics": self.dynamics.state_dict(),
            "rule": self.rule.state_dict(),
            "monitor": self.monitor.state_dict(),
            "average": self._average.state_dict(),
            "outer": self.outer.state_dict(),
            "flight": None if self._flight is None else dataclasses.asdict(self._flight),
            "gram": None if self._gram is None else self._gram.copy(),
            "rates": list(self._rates),
            "counts": [self._taken, self._bank, self._regular, self._lost],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned under the same settings."""
        self.phase = Phase[state["phase"]]
        self.confidence = float(state["confidence"])
        self.dynamics.load_state_dict(state["dynamics"])
        self.rule.load_state_dict(state["rule"])
        self.monitor.load_state_dict(state["monitor"])
        self._average.load_state_dict(state["average"])
        self.outer.load_state_dict(state["outer"])
        flight, gram = state["flight"], state["gram"]
        self._flight = None if flight is None else Flight.from_dict(flight)
        self._gram = None if gram is None else np.array(gram, dtype=np.float64)
        self._rates = deque(state["rates"], maxlen=self._rates.maxlen)
        self._taken, self._bank, self._regular, self._lost = map(int, state["counts"])

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
            self._average.restart()
        logger.debug("%s: now %s", event.value, self.phase.name)

    @property
    def _has_rest(self) -> bool:
        """Whether outer steps, if they are wanted, have the time to pay."""
        return self.config.outer_momentum and self.pace.until_snapshot(self._taken) >= LEAST

    @property
    def _in_flight(self) -> Flight:
        assert self._flight is not None
        return self._flight

    def _move(self, share: float) -> Directive:
        assert self._gram is not None
        return Directive(Action.MOVE, self._in_flight.jump.coefficients(self._gram, share))

    def _close(self, log_loss: float, predicting: bool, progress: float | None = None) -> None:
        full, probes = self._counters.full_steps, self._counters.probes
        self._meter.close_stretch(log_loss, full, probes, predicting=predicting, progress=progress)
