"""A step in which the user's code raises, at any directive of any step, is taken again."""

import copy

import numpy as np
import pytest
from descent import BRISK, Descent, Overstepping, text
from secant_descent import PairedDescent

from hybridcore import Action, HybridTrainerConfig, Observation, Phase
from hybridcore.types import STEPS


class Treacherous(Descent):
    """Its jumps lower the loss nowhere where they have settled."""

    def carry_out(self, directive, bad=False):
        seen = super().carry_out(directive, bad)
        settled = self.engine.phase is Phase.CORRECT and directive.coefficients is not None
        return Observation(1e3) if settled else seen


class Cliff(Descent):
    """The loss rises on the way of a jump, which is sent back to its best point.

    It does so at the end of the way that the engine asked for, and nowhere else.
    """

    def carry_out(self, directive, bad=False):
        if directive.action is Action.MOVE and self.engine.phase is Phase.PREDICT:
            self.way = directive.coefficients.tolist()
        seen = super().carry_out(directive, bad)
        flying = self.engine.phase is Phase.PREDICT and directive.action is Action.PROBE
        edge = flying and np.array_equal(self.x, self.point(np.array(self.way)))
        there = edge and self.way[0][-1] != 1.0 and self.engine.controller.taken > BRISK.horizon / 2
        return Observation(1e3 * seen.loss) if there else seen


def made(kind):
    if kind == "a jump that is taken back":
        return Treacherous()
    if kind == "a jump that is given up":
        descent = Descent()
        descent.penalty = 10.0
        return descent
    if kind == "a jump that is cut short":
        return Cliff()
    if kind == "outer steps":
        return Descent(HybridTrainerConfig(warmup_steps=20), noise=0.3)
    if kind == "outer steps that are taken back":
        descent = Overstepping(HybridTrainerConfig(warmup_steps=20), noise=0.3)
        descent.began = 120
        return descent
    if kind == "quasi-Newton steps":
        return PairedDescent()
    return Descent()


# The steps that are abandoned, and what has to be among them.
RUNS = {
    "jumps": (range(160), {"jump kept"}),
    "a jump that is taken back": (range(100), {"jump rolled back"}),
    "a jump that is given up": (range(100), {"jump rolled back"}),
    "a jump that is cut short": (range(100), {"jump cut short"}),
    "outer steps": (range(40, 140), {"outer momentum"}),
    "outer steps that are taken back": (range(130, 300), {"outer step taken back"}),
    "quasi-Newton steps": (range(2, 300), {"leap", "leap kept", "optimizer on trial"}),
}


def everything(descent):
    """All that decides how a run goes on, and what it has told so far."""
    names = ("x", "bank", "saved", "base", "pairs", "metric", "on_trial", "told")
    held = {name: getattr(descent, name) for name in names if hasattr(descent, name)}
    engine = descent.engine
    outcome = [engine.forecast_loss, engine.prediction_error, engine.confidence]
    return text([engine.state_dict(), outcome, held])


def step(descent):
    descent.step()
    descent.told.extend(descent.engine.take_events())


def abandon(descent):
    """As adapters do: back from a trial point."""
    descent.engine.abandon()
    if getattr(descent, "on_trial", False):
        descent.x, descent.on_trial = descent.base[0], False


@pytest.mark.parametrize("observed", [False, True], ids=["before it", "before it is observed"])
@pytest.mark.parametrize("kind", RUNS)
def test_a_step_that_is_abandoned_and_taken_again_leaves_no_trace(kind, observed):
    steps, events = RUNS[kind]
    descent, actions = made(kind), set()
    descent.told = []
    descent.run(steps.start)
    for number in steps:
        start = copy.deepcopy(descent)
        first = len(descent.log)
        step(descent)
        expected, done = everything(descent), [action for _, action in descent.log[first:]]
        # Of steps that are one full step and nothing else a few will do.
        for at, action in enumerate(done if len(done) > 1 or number % 10 == 0 else []):
            hurt = copy.deepcopy(start)
            for _ in range(at):
                hurt.engine.observe(hurt.carry_out(hurt.engine.next()))
            directive = hurt.engine.next()
            assert directive.action is action
            late = any(earlier in STEPS for earlier in done[:at])
            if observed:
                # What an adapter starts over after, or cannot undo.
                if action in (*STEPS, Action.BASE) or directive.snapshot:
                    continue
                hurt.carry_out(directive)
            abandon(hurt)
            assert hurt.engine.step_done
            steps_taken = hurt.engine.counters.steps - start.engine.counters.steps
            assert steps_taken == late
            if late:
                # The step counts, and what would have followed was left out: the run goes on.
                points = [hurt.x, start.x] + [start.saved] * (start.saved is not None)
                hurt.run(30)
                assert hurt.loss(hurt.x) <= 1.1 * max(map(hurt.loss, points))
                continue
            step(hurt)
            assert everything(hurt) == expected, (done, at)
            actions.add(action)
    assert events <= {told["event"] for told in descent.told}
    if kind == "quasi-Newton steps":
        assert {Action.MARK, Action.PROBE, Action.SAVE, Action.REACH} <= actions
    elif not kind.startswith("outer steps"):
        assert {Action.PROBE, Action.SAVE, Action.MOVE} <= actions
    else:
        moves = not observed or kind.endswith("taken back")
        assert {Action.PROBE} | ({Action.MOVE} if moves else set()) <= actions


def test_so_does_one_that_follows_on_a_step_that_was_cut_off_behind_its_evaluation():
    descent, cases = PairedDescent(), 0
    # No trial point is lower, so that each is taken back, and the batch comes under suspicion.
    descent.still = True
    for _ in range(300):
        start, first = copy.deepcopy(descent), len(descent.log)
        descent.step()
        done = [action for _, action in descent.log[first:]]
        if done[-2:] != [Action.GRADIENT, Action.REACH]:
            continue
        # The way back from the trial point is cut off, and then the evaluation of the next step.
        for _ in done[:-1]:
            start.engine.observe(start.carry_out(start.engine.next()))
        assert start.engine.next().action is Action.REACH
        start.abandon()
        before, phase, seen = text(start.engine.state_dict()), start.engine.phase, []
        while start.engine.next().action not in STEPS:
            seen.append(start.engine.next().action)
            start.engine.observe(start.carry_out(start.engine.next()))
        start.abandon()
        if Action.PROBE in seen and start.engine.phase is phase:
            assert text(start.engine.state_dict()) == before, seen
            cases += 1
    assert cases > 0
