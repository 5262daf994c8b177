"""A jump: its choice, in PREDICT its segments, in CORRECT its settling steps and its validation."""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hybridcore.divergence import RecoveryAction
from hybridcore.phases import Event, Phase
from hybridcore.planning import Flight, learning_rate_ahead, path_confidence
from hybridcore.search import AVERAGED_SNAPSHOTS, beside_mark, probe_average, usable
from hybridcore.types import NAN, SKIP, Action, Directive, Observation, Turn

if TYPE_CHECKING:
    from hybridcore.controller import Controller

SETTLE_RATE = 0.5
SHORTENED = 0.5
ABORT_RISE = math.log(1.3)
PATIENT_STEPS = 3

_PROBE = Directive(Action.PROBE)


def choose(
    controller: Controller, gram: NDArray[np.float64]
) -> Generator[Directive, Observation, Flight | None]:
    """Jump to take from here, None for "do not predict"."""
    config, pace, rule = controller.config, controller.pace, controller.rule
    path = path_confidence(gram.sum(axis=0))
    in_path, in_loss = max(path.values()), controller.loss_confidence
    controller.confidence = min(in_path, in_loss)
    slope = controller.dynamics.slope
    ahead = learning_rate_ahead(controller.rates, config.horizon)
    context = rule.context(in_path, in_loss, slope, ahead)
    action = controller.monitor.action()
    sure = controller.confidence >= config.confidence_threshold
    # Nothing is learned before the first probe, in which the step may be abandoned.
    here = (yield _PROBE).loss if action.bearable and sure else NAN
    rule.learn(gram, path, context)
    pace.wait = controller.taken + config.snapshot_interval
    if not action.bearable:
        return None
    if not sure:
        if in_path < config.confidence_threshold / 2 and controller.regular >= pace.snapshots:
            # Irregular though no spike explains it: looking again soon would be in vain.
            pace.look_later(controller.taken)
        return None
    averaged = (yield probe_average()).loss
    if not (usable(here) and usable(averaged)):
        return None
    controller.close(math.log(averaged), predicting=False)
    reach = config.horizon / config.snapshot_interval * ahead
    if action is RecoveryAction.SHORTEN_HORIZON:
        reach *= SHORTENED
    flight = yield from rule.choose(gram, path, context, here, slope, reach)
    if flight is None:
        # Probing costs a step or two: where it finds nothing, not again soon.
        pace.wait = controller.taken + pace.back_off(2 * config.snapshot_interval)
    return flight


def predict(controller: Controller) -> Turn:
    """Take a predicted step: move at the start of a segment, probe at its end."""
    flight, interval = controller.in_flight, controller.config.correction_interval
    if controller.taken % interval == 0 or controller.astray:
        end = controller.taken + interval - controller.taken % interval
        yield controller.move(min(end, flight.last) / flight.horizon)
    controller.forecast_loss = math.exp(flight.expected((controller.taken + 1) / flight.horizon))
    event = Event.HORIZON_REACHED if controller.taken + 1 == flight.last else None
    if controller.needs_batch:
        probe = yield _PROBE
        # A probe that is not finite is a bad batch, or settling and validation will tell.
        if usable(probe.loss):
            monitor = controller.monitor
            before = monitor.level
            now = monitor.observe_prediction(controller.forecast_loss, probe.loss)
            controller.note_level(before, now)
            controller.prediction_error = abs(controller.forecast_loss - probe.loss) / probe.loss
            controller.forecast_loss = probe.loss
            event = (
                flight.correct(controller.taken + 1, math.log(probe.loss), controller.margin)
                or event
            )
            if event in (Event.DIVERGED, Event.CONFIDENCE_LOST):
                controller.note("jump cut short", steps=controller.taken + 1)
            if event is Event.DIVERGED:
                controller.astray = True
                yield controller.move(flight.best_share)
    yield SKIP
    controller.astray = False
    controller.taken += 1
    if event is not None:
        controller.enter(event)


def correct(controller: Controller) -> Turn:
    """Take a settling step, or validate the jump after the last of them and go on."""
    settling = max(AVERAGED_SNAPSHOTS, controller.config.snapshot_interval)
    if controller.taken == settling:
        if (yield from validate(controller)):
            controller.note("jump kept", arm=controller.in_flight.jump.extrapolator)
            controller.enter(Event.VALIDATED)
        else:
            yield from roll_back(controller, "the loss is not lower")
        yield from controller.full()
        return
    due = controller.taken + 1 in (settling // 2, settling)
    observation = yield Directive(Action.FULL, snapshot=due, learning_rate_scale=SETTLE_RATE)
    controller.absorb(observation)
    bad = not (observation.applied or observation.overflow)
    controller.lost = controller.lost + 1 if bad else 0
    # One bad batch is the data's fault, several in a row are the jump's.
    why = "bad batches" if controller.lost >= PATIENT_STEPS else None
    # The fast directions that a jump excites fall back within a few steps, or never.
    if controller.taken >= PATIENT_STEPS and usable(observation.loss):
        # The trend from before the jump: a probe's loss may be of other data.
        rise = math.log(observation.loss) - controller.dynamics.forecast(0.0).mean
        if rise > ABORT_RISE + controller.margin:
            why = "the loss of full steps rose"
    if why is not None:
        yield from roll_back(controller, why)


def validate(controller: Controller) -> Generator[Directive, Observation, bool]:
    """Compare the settled weights with those before the jump; True if the jump is kept.

    Both are means of as many snapshots: the bank holds those of either side.
    """
    before = (yield probe_average(behind=AVERAGED_SNAPSHOTS)).loss
    after = (yield probe_average()).loss
    if not usable(before):
        # A bad batch proves nothing, and the settling steps had no reason to abort: the jump
        # stays, and what it gained is known to nobody.
        controller.pace.wait = controller.config.min_full_steps
        controller.close(NAN, predicting=True)
        return True
    progress = math.log(before) - math.log(after) if usable(after) else 0.0
    if progress > 0.0:
        reward(controller, progress)
        controller.close(math.log(after), predicting=True, progress=progress)
    return progress > 0.0


def finish(controller: Controller) -> Turn:
    """Keep a jump or take it back at once, because the run ends."""
    before, here = yield from beside_mark()
    progress = math.log(before) - math.log(here) if usable(before) and usable(here) else 0.0
    if progress > 0.0:
        reward(controller, progress)
        controller.close(math.log(here), predicting=True, progress=progress)
        controller.note("jump kept", arm=controller.in_flight.jump.extrapolator)
        _come_down(controller)
        controller.enter(Event.VALIDATED)
    else:
        yield from roll_back(controller, "the loss is not lower")


def roll_back(controller: Controller, why: str) -> Turn:
    """Undo the jump, and say `why`."""
    yield Directive(Action.ROLLBACK)
    reward(controller, 0.0)
    controller.counters.rollbacks += 1
    controller.note("jump rolled back", arm=controller.in_flight.jump.extrapolator, why=why)
    controller.close(controller.meter.mark[0], predicting=True, progress=0.0)
    _come_down(controller)
    controller.enter(Event.ROLLED_BACK)


def _come_down(controller: Controller) -> None:
    """End the predicted steps of a jump that the end of the run has caught in them."""
    controller.forecast_loss = NAN
    if controller.phase is Phase.PREDICT:
        controller.enter(Event.HORIZON_REACHED)


def reward(controller: Controller, progress: float) -> None:
    """Learn what the jump was worth, and how soon another one is worth trying."""
    spent = controller.meter.spent(controller.counters.full_steps, controller.counters.probes)
    controller.rule.reward(controller.in_flight, progress, *spent)
