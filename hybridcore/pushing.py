"""Turns of outer momentum: in FULL its steps, in PREDICT and CORRECT what is left out for them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from hybridcore.phases import Event, Phase, transition
from hybridcore.types import NAN, SKIP, Action, Directive, Turn

if TYPE_CHECKING:
    from hybridcore.controller import Controller

_OWN_PROBE = Directive(Action.PROBE, own_batch=True)
_BACK = Directive(Action.MOVE, np.array([[1.0, 0.0]]))


def rest(controller: Controller) -> Turn:
    """Take a full step while there is nothing to look at, and outer steps if that lasts."""
    outer = controller.outer
    due = outer.is_due(controller.taken)
    bearable = controller.monitor.action().bearable
    if bearable and not due and outer.active and outer.allowance.until_flight == 0:
        outer.allowance.begin()
        controller.phase = transition(controller.phase, Event.JUMP_CHOSEN)
        yield from go_ahead(controller)
        return
    if due and outer.annealed:
        observation = yield from controller.step()
        if observation.applied:
            outer.coast()
            if not bearable:
                outer.allowance.pause()
        return
    if due and not outer.active and controller.has_rest:
        controller.bank = 0
        outer.begin()
        controller.note("outer momentum")
    elif due and outer.active and outer.strength == 0.0:
        # The learning rate rises, or the loss does.
        outer.begin()
    if due and not bearable:
        outer.allowance.pause()
    pushes = outer.active and outer.strength > 0.0
    if not (due and pushes and bearable):
        yield from controller.step()
        return
    observation = yield from controller.step(outer.full_step)
    if not observation.applied:
        return
    if outer.take(observation.gram):
        controller.note("outer momentum ends")
        controller.pace.wait = controller.taken + controller.config.min_full_steps
    elif outer.pending and not outer.to_be_weighed:
        # One that is weighed waits for the next batch: this one's loss has just been lowered.
        yield from push(controller)


def push(controller: Controller) -> Turn:
    """Take the outer step that is pending, and take it back if it leads to no number."""
    outer = controller.outer
    if outer.pending:
        here = (yield _OWN_PROBE).loss if outer.to_be_weighed else NAN
        yield outer.step()
        outer.stepped(here)
    if outer.in_balance:
        outer.weigh((yield _OWN_PROBE).loss)
    if outer.dead_end:
        yield from _go_back(controller)


def prove(controller: Controller) -> Turn:
    """Look at the newest outer step as the run ends, and take it back if it leads to no number."""
    if controller.outer.dead_end or not math.isfinite((yield Directive(Action.PROBE)).loss):
        yield from _go_back(controller)


def _go_back(controller: Controller) -> Turn:
    yield _BACK
    controller.outer.taken_back()
    controller.note("outer step taken back")
    # The end of the run may be among the predicted steps beside it, which end with it.
    if controller.phase is Phase.PREDICT:
        controller.forecast_loss = NAN
        controller.phase = transition(Phase.PREDICT, Event.HORIZON_REACHED)
    if controller.phase is Phase.CORRECT:
        controller.phase = transition(Phase.CORRECT, Event.VALIDATED)


def go_ahead(controller: Controller) -> Turn:
    """Take a predicted step that outer steps, or the rate, have made up for."""
    outer = controller.outer
    controller.forecast_loss = outer.loss
    controller.absorb((yield SKIP), SKIP)
    if not outer.allowance.ahead:
        controller.phase = transition(Phase.PREDICT, Event.HORIZON_REACHED)


def settle(controller: Controller) -> Turn:
    """Take the full step that follows them, which is all that corrects them."""
    yield from controller.step()
    controller.outer.allowance.settled()
    controller.phase = transition(Phase.CORRECT, Event.VALIDATED)
