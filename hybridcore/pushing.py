"""Turns of outer momentum: in FULL its steps, in PREDICT and CORRECT what they stand for."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import TYPE_CHECKING

from hybridcore.phases import Event, Phase, Turn, transition
from hybridcore.types import Action, Directive, Observation

if TYPE_CHECKING:
    from hybridcore.controller import Controller

_OWN_PROBE = Directive(Action.PROBE, own_batch=True)


def rest(controller: Controller) -> Turn:
    """Take a full step while there is nothing to look at, and outer steps if that lasts."""
    outer = controller.outer
    due = outer.until_due(controller.taken) == 0
    if due and outer.annealed:
        outer.stop()
    elif due and not outer.active and controller.has_rest:
        controller.bank = 0
        outer.begin()
        controller.note("outer momentum")
    elif due and outer.active and outer.strength == 0.0:
        # The learning rate rises, or the loss does.
        outer.begin()
    pushes = outer.active and outer.strength > 0.0
    if not (due and pushes and controller.monitor.action().bearable):
        yield from controller.step()
        return
    observation = yield from controller.step(outer.full_step)
    if observation.applied and outer.take(observation.gram):
        controller.pace.wait = controller.taken + controller.config.min_full_steps


def push(controller: Controller) -> Generator[Directive, Observation, bool]:
    """Take the outer step that is pending; True if predicted steps follow, the first one here."""
    outer, config = controller.outer, controller.config
    move = outer.step()
    if outer.to_be_weighed:
        here = (yield _OWN_PROBE).loss
        there = yield replace(_OWN_PROBE, coefficients=move.coefficients)
        outer.weigh(here, there.loss)
        if not outer.pending:
            return False
    yield move
    outer.stepped()
    # A segment is as far as a jump goes without a probe.
    if not outer.go_ahead(
        config.min_full_steps, min(config.horizon, config.correction_interval - 1)
    ):
        return False
    controller.phase = transition(controller.phase, Event.JUMP_CHOSEN)
    yield from go_ahead(controller)
    return True


def go_ahead(controller: Controller) -> Turn:
    """Take a predicted step that the outer steps before it stand for."""
    outer = controller.outer
    controller.forecast_loss = outer.loss
    yield Directive(Action.SKIP)
    outer.ahead -= 1
    if not outer.ahead:
        controller.phase = transition(Phase.PREDICT, Event.HORIZON_REACHED)


def settle(controller: Controller) -> Turn:
    """Take the full step that follows them, which is all that corrects them."""
    yield from controller.step()
    controller.outer.settled()
    controller.phase = transition(Phase.CORRECT, Event.VALIDATED)
