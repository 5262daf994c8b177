"""A real descent in NumPy whose adapter keeps secant pairs too, in a list of vectors."""

import copy
import math

import numpy as np
from descent import Descent

from hybridcore import Action, Engine, HybridTrainerConfig, Observation, Phase
from hybridcore.quasi_newton import Secants
from hybridcore.secant import Stage
from hybridcore.types import STEPS

QUICK = HybridTrainerConfig()


class PairedDescent(Descent):
    """Gradient descent that can take quasi-Newton steps, and checks what it is told to do.

    Attributes
    ----------
    base : (weights, gradient) or None
    pairs : list of (displacement, change of the gradient), oldest first
    metric : ndarray or None
    directives : list of Directive
    decay : float
        Strength of a weight decay towards `origin`, which the gradient has and the loss has not.
    still : bool
        Break the promise: ``REACH`` leaves the weights where they are.
    plain_metric : bool
        Take the identity for the metric, not what the gradients were while pairs were gathered.
    """

    def __init__(self, config=QUICK, pairs=10, noise=0.0, floor=1e-3, seed=0, seconds=1e-3):
        super().__init__(config, noise, floor, seed, seconds)
        self.engine = Engine(config, pairs)
        self.decay, self.origin = 0.0, np.zeros(60)
        self.still = self.plain_metric = False
        self.directives = []
        self.forget()

    @property
    def stage(self):
        return self.engine.controller.secant.stage

    def forget(self):
        self.base, self.pairs, self.metric, self.seen = None, [], None, []

    def loss(self, x):
        return super().loss(x) - self.added(x)

    def added(self, x):
        return 0.5 * self.decay * float((x - self.origin) @ (x - self.origin))

    def a_pass(self, random):
        """Loss of the next batch, and gradient of the objective, drawn as in a full step."""
        loss = self.loss(self.x) * math.exp(self.noise * random.normal())
        return loss, self.curvature * self.x + self.noise * random.normal(size=60)

    # -- pairs --------------------------------------------------------------------------------

    def take(self, gradient):
        if self.base is not None:
            self.pairs.append((self.x - self.base[0], gradient - self.base[1]))
            self.pairs = self.pairs[-self.engine.pairs :]
        if self.metric is None:
            self.seen.append(gradient)
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
                return Observation(loss=math.nan, learning_rate=0.5, applied=False)
            norm = float(np.linalg.norm(self.gradient))
            objective = loss + self.added(self.x)
            return Observation(loss, norm, 0.5, self.seconds, objective=objective)
        elif action is Action.BASE:
            self.take(self.gradient)
            assert directive.average == (1.0 if self.engine.config.averaging else 0.0)
            return Observation(secants=self.products())
        elif action is Action.REACH:
            self.reach(directive.coefficients)
        elif action is Action.MARK:
            self.saved = self.x
        elif action is Action.SAVE and self.stage is not Stage.GATHER:
            # A jump starts from the newest snapshot.
            assert np.array_equal(self.bank[-1], self.x)
        elif action is Action.PROBE and directive.own_batch:
            x = self.saved if directive.at_mark else self.x
            loss = self.loss(x) * math.exp(self.noise * self.random.normal())
            objective = loss + self.added(x)
            if bad:
                loss = objective = math.nan
            return Observation(loss, seconds=self.seconds / 3, objective=objective)
        return super().carry_out(directive, bad)

    def step(self, bad=False):
        needs_batch, touches = self.engine.needs_batch, self.engine.touches_weights
        counted, first = [], len(self.directives)
        while True:
            directive = self.engine.next()
            assert self.engine.next() is directive
            phase = self.engine.phase
            self.log.append((phase, directive.action))
            self.engine.observe(self.carry_out(directive, bad))
            if directive.action in STEPS:
                counted.append(phase)
            if self.engine.step_done:
                break
        (phase,) = counted
        done = self.directives[first:]
        if not needs_batch:
            assert {d.action for d in done} <= {Action.MOVE, Action.SKIP}
        if not touches:
            assert [d.action for d in done] == [Action.FULL]
            assert not done[0].snapshot
        return phase

    # -- what tests ask -----------------------------------------------------------------------

    def until(self, stage, phase=Phase.FULL, most=1000):
        """Take steps until the next one is at `stage` in `phase`."""
        for _ in range(most):
            if self.stage is stage and self.engine.phase is phase:
                return
            self.step()
        raise AssertionError(f"no step at {stage} in {phase} among {most}")

    def copied_from(self, other):
        """Take over all of `other` but its engine."""
        kept = self.engine
        self.__dict__.update(copy.deepcopy({**vars(other), "engine": None}), engine=kept)
        return self

    def count(self, action):
        return sum(d.action is action for d in self.directives)


STAGES = tuple(Stage)
