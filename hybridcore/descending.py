"""Turns of a descent on secants: in FULL its steps, in PREDICT and CORRECT its leaps."""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import TYPE_CHECKING

from hybridcore.phases import Event, Phase
from hybridcore.search import beside_mark
from hybridcore.secant import Stage
from hybridcore.types import NAN, SKIP, Action, Directive, Observation, Turn

if TYPE_CHECKING:
    from hybridcore.controller import Controller


def descend(controller: Controller) -> Turn:
    """Take a step of the descent on secants, after a decision where a block is over."""
    secant = controller.secant
    if controller.phase is Phase.FULL and (
        secant.block_over or secant.suspects or secant.probe_due
    ):
        if not (yield from secant.is_fine()):
            yield from _end(controller)
            yield from controller.full()
            return
        if secant.block_over:
            yield from _decide(controller)
        if controller.leap:
            yield from leap(controller)
            return
    stage, landing, on_trial = secant.stage, secant.landing, secant.holds_recovery
    observation, ended = yield from secant.step()
    if secant.repeats and controller.outer.active:
        controller.outer.stop()
    # A bad batch leaves the judgement to the next one.
    landed = landing and (ended or not secant.holds_recovery)
    if stage is Stage.DESCEND:
        controller.taken += 1
        controller.forecast_loss = NAN if secant.accepted else secant.loss
    else:
        controller.absorb(observation)
    if controller.phase is Phase.CORRECT:
        controller.counters.rollbacks += not secant.accepted
        controller.note("leap kept" if secant.accepted else "leap rolled back")
        controller.enter(Event.VALIDATED if secant.accepted else Event.ROLLED_BACK)
    if secant.stage is Stage.PROVE is not stage and controller.phase is Phase.FULL:
        # A jump would take the place of the mark.
        proof = controller.taken + (secant.until_due(controller.taken) or 0)
        controller.pace.wait = max(controller.pace.wait, proof + 1)
    if ended and stage in (Stage.CHECK, Stage.PROVE):
        secant.rest(controller.taken)
    elif ended:
        yield from _end(controller)
    elif landed or (secant.stage is Stage.GATHER is not stage):
        if not landed:
            controller.note("quasi-Newton steps")
        controller.forget_path()
    in_vain = landed and on_trial and not secant.accepted
    if in_vain:
        controller.note("trial taken back")
    if landed:
        _close_landing(controller, in_vain=in_vain)
        if secant.accepted and secant.measured:
            outside = controller.meter.outside(controller.counters.full_steps)
            controller.meter.secants.measure(outside, secant.speed)


def _decide(controller: Controller) -> Generator[Directive, Observation, None]:
    """Leap by what the block was worth, or compare it with the optimizer, or go on."""
    secant, counters = controller.secant, controller.counters
    controller.meter.close_block(math.log(secant.loss), counters.full_steps, counters.probes)
    stuck = secant.stuck
    surplus = controller.pace.credit("secant", secant.finish_block())
    if secant.converging and secant.settled:
        # Nothing lowers the loss any more: the steps ahead stand still.
        secant.stand()
        surplus = math.inf
    elif secant.converging or stuck or surplus <= 0.0:
        controller.note("optimizer on trial")
        yield Directive(Action.SAVE)
        secant.compare(long=secant.converging)
        return
    # A leap would not see that the batch is another one.
    if secant.steady and surplus >= controller.config.snapshot_interval:
        controller.leap = round(min(surplus, controller.config.horizon))
        controller.note("leap", steps=controller.leap)
        controller.enter(Event.JUMP_CHOSEN)


def _end(controller: Controller) -> Generator[Directive, Observation, None]:
    """Leave it to the optimizer, which goes on from here on a path of its own.

    Where the batch is another, what has led far down on the one before may have led far up on it,
    so that it goes on from before them if the loss is lower there.
    """
    meter, counters, secant = controller.meter, controller.counters, controller.secant
    # What a trial has come to was not theirs.
    theirs = secant.stage is Stage.DESCEND and not secant.holds_recovery
    if theirs and math.isfinite(secant.loss):
        meter.close_block(math.log(secant.loss), counters.full_steps, counters.probes)
    meter.mark = (NAN, counters.full_steps, counters.probes)
    changed = secant.changed
    controller.note("quasi-Newton steps end")
    controller.note("optimizer goes on alone")
    # Before anything is evaluated, which the user's code may break off.
    secant.rest(controller.taken)
    controller.pace.wait = controller.taken + controller.config.min_full_steps
    controller.forget_path()
    if changed:
        here = yield Directive(Action.PROBE, own_batch=True)
        start = yield Directive(Action.PROBE, own_batch=True, at_start=True)
        lower = math.isfinite(start.loss) and not here.loss <= start.loss
        secant.steady = secant.steady and not (lower or math.isfinite(here.loss))
        if lower:
            yield Directive(Action.ROLLBACK, at_start=True)
            controller.note("back to before the quasi-Newton steps")
            secant.went_back(start.loss, controller.taken)


def finish_trial(controller: Controller) -> Turn:
    """Take a trial of the optimizer back unless it has lowered the loss so far: the run ends."""
    before, here = yield from beside_mark()
    if not (math.isfinite(here) and here < before):
        yield Directive(Action.ROLLBACK)
        controller.note("trial taken back")
        _close_landing(controller, in_vain=True)
    yield from _end(controller)


def _close_landing(controller: Controller, *, in_vain: bool) -> None:
    """End what the optimizer has taken; full steps of a trial `in_vain` stand for nothing."""
    progress = 0.0 if in_vain else NAN
    controller.close(math.log(controller.secant.loss), predicting=in_vain, progress=progress)


def leap(controller: Controller) -> Turn:
    """Stand on the next trial point for as many steps as the block before was worth."""
    event = Event.HORIZON_REACHED if controller.taken + 1 == controller.leap else None
    controller.forecast_loss = controller.secant.expected
    if controller.needs_batch:
        yield controller.secant.trial()
        probe = yield Directive(Action.PROBE, own_batch=True)
        if controller.secant.lowers(probe):
            controller.prediction_error = abs(controller.forecast_loss - probe.loss) / probe.loss
            controller.forecast_loss = controller.secant.expected
        else:
            yield from controller.secant.take_back(probe)
            controller.forecast_loss = controller.secant.loss
            controller.note("leap cut short", steps=controller.taken + 1)
            event = Event.DIVERGED
    yield SKIP
    controller.taken += 1
    if event is not None:
        controller.leap = 0
        controller.enter(event)
