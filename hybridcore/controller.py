"""What each phase does: generators of directives, and what they share.

Those of jumps, of quasi-Newton steps and of outer steps are in files of their own. A generator
yields directives and is sent what was seen while they were carried out. It knows no framework and
no clock, so the same observations give the same decisions on every rank.
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
from hybridcore.descending import descend, finish_trial, leap
from hybridcore.divergence import DivergenceLevel, DivergenceMonitor
from hybridcore.dynamics import build
from hybridcore.jumping import choose, correct, finish, predict
from hybridcore.meter import Meter
from hybridcore.metrics import Counters
from hybridcore.outer import LEAST, OuterMomentum
from hybridcore.phases import Event, Phase, transition
from hybridcore.planning import Flight
from hybridcore.pushing import go_ahead, prove, push, rest, settle
from hybridcore.secant import SecantDescent, Stage
from hybridcore.types import FULL_STEP, NAN, SKIP, Action, Directive, Observation, Turn

logger = logging.getLogger("hybridcore")

TOLERANCE = math.log(1.2)
REGULAR_SNAPSHOTS = 3
# How many times as long as elsewhere snapshots have to be irregular where the path was straight.
STRAIGHT_PATIENCE = 4


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
    pairs : int
        Secant pairs that the adapter can hold.
    accumulation_steps : int
        Full steps that an update of the weights takes, at least 1: settings count updates.
    """

    def __init__(
        self,
        config: HybridTrainerConfig,
        counters: Counters,
        meter: Meter,
        pairs: int = 0,
        accumulation_steps: int = 1,
    ) -> None:
        self.config = config = config.accumulating(accumulation_steps)
        self.phase = Phase.WARMUP
        self.confidence = 0.0
        self.forecast_loss = NAN
        self.prediction_error: float | None = None
        # Whether a probe has sent the weights back from the end of a segment, in the present step.
        self.astray = False
        # Bounded, because an adapter need not take them.
        self.events: deque[dict[str, Any]] = deque(maxlen=64)
        self.dynamics = build(config.dynamics, config.device)
        self.rule = DecisionRule(config, self.dynamics)
        self.pace = self.rule.pace
        self.monitor = DivergenceMonitor(config.divergence_sigma)
        # A flight is as far as a jump goes without a probe.
        flight = min(config.horizon, config.correction_interval - 1)
        self.outer = OuterMomentum(config.min_full_steps, flight, accumulation_steps)
        meter.outer_interval = self.outer.interval
        self.secant = SecantDescent(pairs, config.min_full_steps, config.averaging)
        self.average = Averaging()
        self.counters, self.meter = counters, meter
        self.flight: Flight | None = None
        self.taken = 0
        self.gram: NDArray[np.float64] | None = None
        self.bank = 0
        self.regular = 0
        self.lost = 0
        self.leap = 0
        window = config.snapshot_interval * (config.snapshots - 1)
        self.rates: deque[float] = deque(maxlen=max(2, window))

    @property
    def arm_values(self) -> dict[str, float]:
        """By extrapolator, how many full steps its last jumps gained, net."""
        return self.pace.arm_values

    @property
    def divergence_level(self) -> str:
        """Name of the monitor's level."""
        return self.monitor.level.name

    @property
    def divergence_signals(self) -> dict[str, float]:
        """Severity of each of the monitor's signals when last measured, above 1 if triggered."""
        return {signal.value: severity for signal, severity in self.monitor.signals.items()}

    def turn(self) -> Turn:
        """Directives of the next step, in the present phase."""
        self.prediction_error = None
        if self.stands_still:
            return go_ahead(self)
        free = self.gram is None and not self.outer.unfinished
        due = free and self.secant.until_due(self.taken) == 0
        if self.phase is Phase.WARMUP:
            return self._warm_up(due and self.secant.stage is not Stage.PROVE)
        if self.phase is Phase.FULL:
            return descend(self) if due else self.full()
        if self.outer.active:
            return settle(self)
        if self.secant.active:
            return leap(self) if self.phase is Phase.PREDICT else descend(self)
        return predict(self) if self.phase is Phase.PREDICT else correct(self)

    def finish(self) -> Turn | None:
        """Directives that end what may be taken back, without a step; None if there is nothing."""
        self.prediction_error = None
        if not self.stands_still:
            self.forecast_loss = NAN
        if self.outer.unproven:
            return prove(self)
        if not self.may_roll_back:
            return None
        return finish_trial(self) if self.secant.holds_recovery else finish(self)

    def quiet_steps(self) -> int:
        """Coming steps that are :attr:`quiet_step` and nothing else, whatever is seen in them."""
        if self.stands_still:
            # The last one ends the phase.
            return self.outer.allowance.ahead - 1
        if self.phase in (Phase.PREDICT, Phase.CORRECT):
            return 0
        until = self.secant.until_due(self.taken)
        if self.phase is Phase.WARMUP:
            quiet = max(0, self.config.warmup_steps - self.taken - 1)
            until = None if self.secant.stage is Stage.PROVE else until
        elif self.gram is not None or self.outer.unfinished:
            return 0
        else:
            quiet = self.pace.until_snapshot(self.taken)
            if self.outer.active or self.has_rest:
                quiet = min(quiet, self.outer.until_due(self.taken))
        quiet = quiet if until is None else min(quiet, until)
        return min(quiet, self.average.until_due(self.taken)) if self.config.averaging else quiet

    @property
    def quiet_step(self) -> Directive:
        """Step that each of :meth:`quiet_steps` is."""
        return SKIP if self.stands_still else self._between_outer_steps(FULL_STEP)

    def _between_outer_steps(self, directive: Directive) -> Directive:
        """Return a full step at the rate, and as fast to forget, as outer steps want it."""
        forgetting = self.outer.forgetting
        if forgetting != 1.0:
            directive = directive._replace(forgetting=forgetting)
        return self.outer.allowance.full_step(directive)

    def absorb(self, observation: Observation, directive: Directive = FULL_STEP) -> None:
        """Take in the figures of a step that `directive` asked for."""
        if directive.action is Action.SKIP:
            self.outer.allowance.ahead -= 1
            return
        self.forecast_loss = NAN
        level = self.monitor.level
        if not observation.applied:
            if not observation.overflow:
                self.outer.count_bad()
                if not self.secant.holds_recovery:
                    self.note_level(level, self.monitor.observe_delta(finite=False))
                count = self.counters.divergences
                if count == 10 ** (len(str(count)) - 1):
                    logger.warning(
                        "batches left out so far, as loss or gradients were not finite: %d", count
                    )
            self.note("loss scale overflowed" if observation.overflow else "batch left out")
            return
        if not self.secant.holds_recovery:
            # While the optimizer is on trial, a rising loss says that it will be taken back, and
            # bad batches alone would raise the level with nothing to lower it.
            self.note_level(
                level, self.monitor.observe(observation.loss, observation.gradient_norm)
            )
        self.taken += 1
        if self.phase is not Phase.CORRECT or self.outer.active:
            self.secant.see(observation)
            self.dynamics.observe(observation)
            self.outer.see(observation, directive)
            self.rates.append(observation.learning_rate)

    @property
    def may_roll_back(self) -> bool:
        """Whether what the last ``SAVE`` kept may still be asked for."""
        jumping = self.phase in (Phase.PREDICT, Phase.CORRECT)
        checked = not (self.secant.active or self.outer.active)
        return (jumping and checked) or self.secant.holds_recovery

    @property
    def may_jump(self) -> bool:
        """Whether the next step decides about a jump."""
        decides = self.phase is Phase.FULL and self.gram is not None
        return decides and self.bank == self.pace.snapshots

    @property
    def moved(self) -> bool:
        """Whether an outer step has led to these weights, and no good batch has followed yet."""
        return self.outer.unproven

    @property
    def holds_mark(self) -> bool:
        """Whether the weights that the last ``MARK`` kept may still be asked for."""
        return self.secant.holds_mark

    @property
    def holds_pairs(self) -> bool:
        """Whether the secant pairs may still be asked for."""
        return self.secant.active

    @property
    def stands_still(self) -> bool:
        """Whether the next step leaves the weights where they are, and needs no copy of them."""
        return self.phase is Phase.PREDICT and self.outer.active

    @property
    def needs_batch(self) -> bool:
        """False if the next step needs none, as it will neither train nor probe.

        Steps that outer steps or the rate make up for take one and leave it out, as batches differ
        there: if it were not drawn from the loader, the end of each epoch would be missed instead.
        """
        if self.phase is not Phase.PREDICT or self.outer.active:
            return True
        if self.secant.active:
            return self.taken == 0 and not self.secant.landing
        taken = self.taken + 1
        return taken % self.config.correction_interval == 0 or taken == self.in_flight.last

    def forget_path(self) -> None:
        """Start over with snapshots, trend and average: the weights moved by other means."""
        self.gram, self.bank = None, 0
        self.dynamics.restart()
        self.average.restart()
        self.outer.stop()

    @property
    def snapshots(self) -> int:
        """Snapshots that there is room for."""
        return self.pace.snapshots

    def restart(self, pairs: int, snapshots: int | None = None) -> None:
        """Forget the trajectory, and a jump under way: the parameters are others now."""
        self.forget_path()
        self.pace.snapshots = self.pace.snapshots if snapshots is None else snapshots
        self.secant.pairs = pairs
        self.flight, self.leap, self.lost, self.forecast_loss = None, 0, 0, NAN
        self.secant.rest(self.taken)
        self.pace.wait = self.config.min_full_steps
        if self.phase is not Phase.WARMUP:
            self.phase = Phase.FULL
            self.pace.wait += self.taken
        self.meter.mark = (NAN, self.counters.full_steps, self.counters.probes)
        self.rule.restart()
        if self.taken:
            self.note("snapshots and trend start over")

    def raise_losses(self, by: float) -> None:
        """Count losses from further down: what is remembered of them is higher `by`."""
        self.forecast_loss += by
        self.dynamics.restart()
        self.monitor.forget_losses()
        self.outer.raise_losses(by)
        self.secant.raise_losses(by)
        self.meter.break_off(self.counters.full_steps, self.counters.probes)

    # -- the phases -------------------------------------------------------------------------

    def _warm_up(self, look: bool) -> Turn:
        yield from descend(self) if look else self.step()
        if self.taken >= self.config.warmup_steps and self.dynamics.is_stable:
            self.enter(Event.BASELINE_STABLE)

    def full(self) -> Turn:
        """Take a full step, with what is due beside it: a decision, a snapshot, an outer step."""
        if self.may_jump:
            assert self.gram is not None
            self.flight = yield from choose(self, self.gram)
            if self.flight is not None:
                self.secant.unmark()
                yield Directive(Action.SAVE)
                self.outer.stop()
                self.note(
                    "jump",
                    arm=self.flight.jump.extrapolator,
                    steps=self.flight.last,
                    promise=self.flight.promise,
                    scales=list(self.flight.jump.scales),
                )
                self.enter(Event.JUMP_CHOSEN)
                yield from predict(self)
                return
            self.gram = None
        if self.outer.unfinished:
            yield from push(self)
        looks = self.pace.until_snapshot(self.taken) == 0
        if looks and self.outer.active and not self.outer.annealed:
            self.pace.put_off()
        if self.pace.until_snapshot(self.taken) > 0:
            yield from rest(self)
            return
        calm = self.loss_confidence >= self.config.confidence_threshold
        last = self.taken + 1 >= self.pace.wait
        # Snapshots are cheap and go on through a spike; the Gram matrix waits until it is over.
        regular = max(0, self.regular) + 1 if calm else min(0, self.regular) - 1
        wanted = last and regular >= REGULAR_SNAPSHOTS
        observation = yield from self.step(
            Directive(
                Action.FULL, snapshot=True, fresh_bank=self.bank == 0, gram=wanted, exact=wanted
            )
        )
        if observation.applied:
            self.regular = regular
            if last and not wanted:
                self.pace.wait += self.config.snapshot_interval
            self.bank = min(self.bank + 1, self.pace.snapshots)
            gram = observation.gram
            # Weights that are not finite can hide from the loss, but not from the bank.
            self.gram = gram if gram is not None and np.isfinite(gram).all() else None
            # Jumps should have a path that was straight, but not where they find none for long.
            patience = STRAIGHT_PATIENCE if self.outer.straight else 1
            long = self.bank == self.pace.snapshots and regular <= -patience * self.pace.snapshots
            if last and long:
                self.pace.rest(self.taken)

    def step(
        self, directive: Directive = FULL_STEP
    ) -> Generator[Directive, Observation, Observation]:
        """Take a full step, and average the weights where it is time to."""
        weight = self.average.weight(self.taken + 1) if self.config.averaging else 0.0
        directive = self._between_outer_steps(directive)
        observation = yield directive._replace(average=weight) if weight else directive
        self.absorb(observation, directive)
        if weight and observation.applied:
            self.average.add()
        return observation

    # -- state ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything that decides what comes next, as numbers, lists and arrays."""
        return {
            "phase": self.phase.name,
            "confidence": self.confidence,
            "dynamics": self.dynamics.state_dict(),
            "rule": self.rule.state_dict(),
            "monitor": self.monitor.state_dict(),
            "average": self.average.state_dict(),
            "outer": self.outer.state_dict(),
            "flight": None if self.flight is None else dataclasses.asdict(self.flight),
            "gram": None if self.gram is None else self.gram.copy(),
            "rates": list(self.rates),
            "secant": self.secant.state_dict(),
            "counts": [self.taken, self.bank, self.regular, self.lost, self.leap],
            "events": [dict(event) for event in self.events],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned under the same settings."""
        self.phase = Phase[state["phase"]]
        self.confidence = float(state["confidence"])
        self.dynamics.load_state_dict(state["dynamics"])
        self.rule.load_state_dict(state["rule"])
        self.monitor.load_state_dict(state["monitor"])
        self.average.load_state_dict(state["average"])
        self.outer.load_state_dict(state["outer"])
        flight, gram = state["flight"], state["gram"]
        self.flight = None if flight is None else Flight.from_dict(flight)
        self.gram = None if gram is None else np.array(gram, dtype=np.float64)
        self.rates = deque(state["rates"], maxlen=self.rates.maxlen)
        self.secant.load_state_dict(state["secant"])
        self.forecast_loss = self.outer.loss if self.stands_still else NAN
        self.prediction_error = None
        counts = map(int, state["counts"])
        self.taken, self.bank, self.regular, self.lost, self.leap = counts
        if self.outer.active and not self.config.outer_momentum:
            # From before it was known that this optimizer averages by itself.
            self.outer.stop()
            self.phase, self.bank, self.forecast_loss = Phase.FULL, 0, NAN
        self.events.clear()
        # States from before they were kept have none.
        self.events.extend(dict(event) for event in state.get("events", []))

    # -- small change -----------------------------------------------------------------------

    @property
    def margin(self) -> float:
        """Rise of the log loss that the loss's own noise explains."""
        return self.config.divergence_sigma * self.dynamics.noise

    @property
    def loss_confidence(self) -> float:
        """Confidence in the trend of the loss, up to where a micro-correction would check it."""
        return self.dynamics.forecast(self.config.correction_interval).confidence(TOLERANCE)

    def enter(self, event: Event) -> None:
        """Go to the phase that follows on `event`."""
        self.phase = transition(self.phase, event)
        self.secant.pass_by(self.taken)
        self.taken = 0
        if event in (Event.VALIDATED, Event.ROLLED_BACK):
            self.gram, self.bank, self.lost = None, 0, 0
        if event is Event.VALIDATED:
            # After a rollback the trend from before the jump holds again, so only here.
            self.dynamics.restart()
            self.average.restart()
        logger.debug("%s: now %s", event.value, self.phase.name)

    def note(self, name: str, **figures: Any) -> None:
        """Report an event of the present step, to who takes :attr:`events` and to the log."""
        self._tell(logging.INFO, name, figures)

    def note_level(self, before: DivergenceLevel, now: DivergenceLevel) -> None:
        """Report a change of the monitor's level."""
        if now is not before:
            # On mini-batches caution comes and goes, and would hide all else in the log.
            grave = max(before, now) > DivergenceLevel.CAUTION
            level = logging.INFO if grave else logging.DEBUG
            self._tell(level, "divergence level", {"level": now.name})

    def _tell(self, level: int, name: str, figures: dict[str, Any]) -> None:
        self.events.append({"event": name, **figures})
        log = "".join(f", {key} {value}" for key, value in figures.items())
        logger.log(level, "%s%s", name, log)

    @property
    def has_rest(self) -> bool:
        """Whether outer steps, if they are wanted, have the time to pay.

        Not where a batch stays for several steps: what ten of them have in common is of that batch,
        whose loss they are weighed by.
        """
        wanted = self.config.outer_momentum and self.pace.snapshots > 0 and not self.secant.repeats
        return wanted and self.pace.until_snapshot(self.taken) >= LEAST * self.outer.interval

    @property
    def in_flight(self) -> Flight:
        """The jump under way."""
        assert self.flight is not None
        return self.flight

    def move(self, share: float) -> Directive:
        """Return the move to a `share` in [0, 1] of the jump under way."""
        assert self.gram is not None
        return Directive(Action.MOVE, self.in_flight.jump.coefficients(self.gram, share))

    def close(self, log_loss: float, predicting: bool, progress: float | None = None) -> None:
        """Tell the meter that a stretch is over."""
        full, probes = self.counters.full_steps, self.counters.probes
        self.meter.close_stretch(log_loss, full, probes, predicting=predicting, progress=progress)
