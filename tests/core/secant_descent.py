"""A real descent in NumPy whose adapter keeps secant pairs too, in a list of vectors."""

import copy
import json
import math

import numpy as np
from descent import Descent, text

from hybridcore import Action, Engine, HybridTrainerConfig, Observation, Phase
from hybridcore.quasi_newton import Secants
from hybridcore.secant import Stage
from hybridcore.types import STEPS

_USUAL = HybridTrainerConfig()
EVALUATIONS = (Action.FULL, Action.GRADIENT, Action.PROBE)


class PairedDescent(Descent):
    """Gradient descent that can take quasi-Newton steps, and checks what it is told to do.

    Attributes
    ----------
    base : (weights, gradient) or None
    pairs : list of (displacement, change of the gradient), oldest first
    metric : ndarray or None
    start : ndarray or None
        Weights of the first pair, for as long as pairs may be asked for.
    directives : list of Directive
    decay : float
        Strength of a weight decay towards `origin`, which the gradient has and the loss has not.
    still : bool
        Break the promise: ``REACH`` leaves the weights where they are.
    plain_metric : bool
        Take the identity for the metric, not what the gradients were while pairs were gathered.
    """

    def __init__(self, config=_USUAL, pairs=10, noise=0.0, floor=1e-3, seed=0, seconds=1e-3):
        super().__init__(config, noise, floor, seed, seconds)
        self.engine = Engine(config, pairs)
        self.decay, self.origin = 0.0, np.zeros(60)
        self.still = self.plain_metric = self.on_trial = False
        self.directives, self.start = [], None
        self.forget()

    @property
    def stage(self):
        return self.engine.controller.secant.stage

    @property
    def secant(self):
        return self.engine.controller.secant

    def forget(self):
        self.base, self.pairs, self.metric, self.seen = None, [], None, []

    def loss(self, x):
        return super().loss(x) - self.added(x)

    def added(self, x):
        return 0.5 * self.decay * float((x - self.origin) @ (x - self.origin))

    def a_pass(self, random):
        """Loss of the next batch, and gradient of the objective, drawn as in a full step."""
        loss = self.loss(self.x) * math.exp(self.noise * random.normal())
        return loss, self.gradient_at(self.x) + self.noise * random.normal(size=60)

    # -- pairs --------------------------------------------------------------------------------

    def take(self, gradient):
        if self.base is not None:
            self.pairs.append((self.x - self.base[0], gradient - self.base[1]))
            self.pairs = self.pairs[-self.engine.pairs :]
        if self.metric is None:
            self.seen.append(gradient)
        if self.start is None:
            self.start = self.x
        self.base = self.x, gradient

    def vectors(self):
        moved = np.array([s for s, _ in self.pairs]).reshape(-1, 60)
        changed = np.array([y for _, y in self.pairs]).reshape(-1, 60)
        return moved, changed, self.base[1]

    def products(self):
        if self.metric is None and self.plain_metric:
            self.metric = np.ones(60)
        elif self.metric is None:
            root = np.sqrt(np.mean(np.square(self.seen), axis=0))
            self.metric = 1.0 / (root + 0.01 * root.mean())
            self.metric /= self.metric.mean()
        moved, changed, gradient = self.vectors()
        both = np.vstack((changed, gradient))
        return Secants(moved @ both.T, both * self.metric @ both.T)

    def reach(self, coefficients):
        moved, changed, gradient = self.vectors()
        assert coefficients.shape == (2 * len(moved) + 1,)
        assert np.isfinite(coefficients).all()
        if not self.still:
            combined = np.vstack((moved, self.metric * changed, self.metric * gradient))
            self.x = self.base[0] + coefficients @ combined

    # -- directives ---------------------------------------------------------------------------

    def carry_out(self, directive, bad=False):
        self.directives.append(directive)
        action = directive.action
        if action is Action.FULL and directive.pair and not bad:
            if directive.fresh_pairs:
                self.forget()
            # The pass that the step makes, without using up its random numbers.
            self.take(self.a_pass(copy.deepcopy(self.random))[1])
        elif action is Action.GRADIENT:
            loss, self.gradient = self.a_pass(self.random)
            if bad:
                return Observation(loss=math.nan, learning_rate=0.5, applied=False, backward=False)
            norm = float(np.linalg.norm(self.gradient))
            objective = loss + self.added(self.x)
            # Without the optimizer it takes less.
            return Observation(loss, norm, 0.5, 0.5 * self.seconds, objective=objective)
        elif action is Action.BASE:
            self.take(self.gradient)
            self.on_trial = False
            assert directive.average == (1.0 if self.engine.config.averaging else 0.0)
            return Observation(secants=self.products())
        elif action is Action.REACH:
            self.reach(directive.coefficients)
            self.on_trial = bool(directive.coefficients.any())
        elif action is Action.MARK:
            self.saved = self.marked = self.x
        elif action is Action.SAVE and self.stage is not Stage.DESCEND:
            # A jump starts from the newest snapshot.
            assert np.array_equal(self.bank[-1], self.x)
        elif action is Action.SAVE:
            # Where a trial of the optimizer begins may be probed later.
            self.marked = self.x
        elif action is Action.SKIP:
            self.on_trial = False
        elif directive.at_start and action is Action.ROLLBACK:
            self.x = self.start
            return Observation()
        elif directive.at_start and self.start is None:
            return Observation()
        elif action is Action.PROBE and (directive.own_batch or directive.at_mark):
            x = self.saved if directive.at_mark else self.start if directive.at_start else self.x
            # What SAVE keeps takes the place of the mark.
            looks = directive.at_mark and directive.own_batch
            assert not looks or np.array_equal(x, self.marked)
            loss = self.loss(x) * math.exp(self.noise * self.random.normal())
            objective = loss + self.added(x)
            if bad:
                loss = objective = math.nan
            return Observation(loss, seconds=self.seconds / 3, objective=objective)
        return super().carry_out(directive, bad)

    def step(self, bad=False, bad_one=None):
        """Take a step in which all evaluations are bad, or the one of that number, or none."""
        needs_batch, touches = self.engine.needs_batch, self.engine.touches_weights
        counted, first, self.evaluations = [], len(self.directives), 0
        while True:
            directive = self.engine.next()
            assert self.engine.next() is directive
            phase = self.engine.phase
            self.log.append((phase, directive.action))
            spoiled = bad or self.evaluations == bad_one
            self.engine.observe(self.carry_out(directive, spoiled))
            self.evaluations += directive.action in EVALUATIONS
            if directive.action in STEPS:
                counted.append(phase)
            if self.engine.step_done:
                break
        if not self.engine.holds_pairs:
            self.start = None
        (phase,) = counted
        done = self.directives[first:]
        if not needs_batch:
            assert {d.action for d in done} <= {Action.MOVE, Action.SKIP}
        if not touches:
            assert [d.action for d in done] in ([Action.FULL], [Action.SKIP])
            assert not done[0].snapshot
        return phase

    def abandon(self):
        """What an adapter does where the user's code raises: back from a trial point."""
        self.engine.abandon()
        if self.on_trial:
            self.x, self.on_trial = self.base[0], False

    # -- what tests ask -----------------------------------------------------------------------

    def until(self, moment, most=1000):
        """Take steps until the next one is at `moment`, a name in `MOMENTS`."""
        for _ in range(most):
            if MOMENTS[moment](self.engine.controller):
                return
            self.step()
        raise AssertionError(f"no step at {moment} among {most}")

    def resumed(self):
        """Return a copy whose engine is a new one that was given the state of this one's, as text.

        Its directives begin anew.
        """
        engine = Engine(self.engine.config, self.engine.pairs)
        engine.load_state_dict(json.loads(text(self.engine.state_dict())))
        fresh = {"engine": None, "log": [], "directives": []}
        other = copy.copy(self)
        other.__dict__.update(copy.deepcopy({**vars(self), **fresh}), engine=engine)
        return other


def _due(controller):
    return controller.phase is Phase.FULL and controller.secant.until_due(controller.taken) == 0


def _leaps(controller):
    return controller.phase is Phase.PREDICT and controller.secant.active


# What the next step may be for, while there are quasi-Newton steps or may be.
MOMENTS = {
    "look": lambda c: c.secant.stage is Stage.REST and c.secant.until_due(c.taken) == 0,
    "check": lambda c: c.secant.stage is Stage.CHECK,
    "proof": lambda c: c.secant.stage is Stage.PROVE and _due(c),
    "first pair": lambda c: c.secant.stage is Stage.GATHER,
    "landing": lambda c: c.secant.landing and c.phase is Phase.FULL,
    "descent": lambda c: c.secant.stage is Stage.DESCEND and not c.secant.landing and _due(c),
    "decision": lambda c: c.secant.block_over and _due(c),
    "comparison": lambda c: c.secant.stage is Stage.GATHER and c.secant.holds_recovery,
    "landing again": lambda c: c.secant.landing and c.secant.holds_recovery,
    "standing": lambda c: _leaps(c) and not c.needs_batch,
    "correction": lambda c: c.phase is Phase.CORRECT and c.secant.active,
}


def count(descent, action):
    return sum(d.action is action for d in descent.directives)


def made(pairs=10, **attributes):
    descent = PairedDescent(pairs=pairs)
    vars(descent).update(attributes)
    return descent


def at(moment):
    descent = PairedDescent()
    descent.until(moment)
    return descent


def go_on(descent, steps):
    """Take steps, of which only a move along the path or back can ever raise the loss."""
    start = descent.loss(descent.x)
    for _ in range(steps):
        before, first = descent.loss(descent.x), len(descent.log)
        descent.step()
        assert np.isfinite(descent.x).all()
        moved = {Action.MOVE, Action.ROLLBACK} & {action for _, action in descent.log[first:]}
        assert moved or descent.loss(descent.x) <= before * (1.0 + 1e-12)
    assert descent.loss(descent.x) <= start


def same(first, second):
    plain = [d._replace(coefficients=None) for d in (first, second)]
    return plain[0] == plain[1] and np.array_equal(first.coefficients, second.coefficients)
