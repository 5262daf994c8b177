"""Turns of a descent on secants: in FULL its steps, in PREDICT and CORRECT its leaps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from hybridcore.phases import Event, Phase, Turn
from hybridcore.secant import Outcome, Stage
from hybridcore.types import NAN, Action, Directive

if TYPE_CHECKING:
    from hybridcore.controller import Controller


def descend(controller: Controller) -> Turn:
    """Take a step of the descent on secants, and decide what follows it."""
    secant, stage, landing = controller.secant, controller.secant.stage, controller.secant.landing
    observation, outcome = yield from secant.step()
    if stage is Stage.DESCEND:
        controller.taken += 1
        controller.forecast_loss = NAN if secant.accepted else secant.loss
    else:
        controller.absorb(observation)
    if controller.phase is Phase.CORRECT:
        controller.counters.rollbacks += not secant.accepted
        controller.enter(Event.VALIDATED if secant.accepted else Event.ROLLED_BACK)
    if outcome is Outcome.ENDED:
        secant.rest(controller.taken)
        if stage is Stage.CHECK:
            return
        controller.pace.wait = controller.taken + controller.config.min_full_steps
    if landing or secant.stage is Stage.GATHER is not stage or outcome is Outcome.ENDED:
        # What was seen of the path before is over.
        controller.forget_path()
    if landing:
        controller.close(math.log(secant.loss), predicting=False, progress=NAN)
        if secant.accepted and secant.measured:
            outside = controller.meter.outside(controller.counters.full_steps)
            controller.meter.secants.measure(outside, secant.speed)
    if outcome in (Outcome.BLOCK_DONE, Outcome.STUCK):
        counters = controller.counters
        controller.meter.close_block(math.log(secant.loss), counters.full_steps, counters.probes)
        surplus = controller.pace.credit("secant", secant.finish_block())
        if secant.converging:
            # Nothing lowers the loss any more: the steps ahead stand still.
            secant.stand()
            surplus = math.inf
        elif outcome is Outcome.STUCK or surplus <= 0.0:
            yield secant.compare()
        if surplus >= controller.config.snapshot_interval and not secant.holds_recovery:
            controller.leap = round(min(surplus, controller.config.horizon))
            controller.enter(Event.JUMP_CHOSEN)


def leap(controller: Controller) -> Turn:
    """Stand on the next trial point for as many steps as the block before was worth."""
    event = Event.HORIZON_REACHED if controller.taken + 1 == controller.leap else None
    controller.forecast_loss = controller.secant.expected
    if controller.needs_batch:
        yield controller.secant.trial()
        probe = yield Directive(Action.PROBE, own_batch=True)
        if controller.secant.lowers(probe):
            controller.prediction_error = abs(controller.forecast_loss - probe.loss) / probe.loss
        else:
            yield from controller.secant.take_back(probe)
            controller.forecast_loss = controller.secant.loss
            event = Event.DIVERGED
    yield Directive(Action.SKIP)
    controller.taken += 1
    if event is not None:
        controller.leap = 0
        controller.enter(event)
