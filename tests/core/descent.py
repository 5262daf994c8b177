"""A real descent in NumPy that an engine drives: an adapter of forty lines, and no framework."""

import json
import math

import numpy as np
import pytest

from hybridcore import Action, Engine, HybridTrainerConfig, Observation, Phase
from hybridcore.jumping import SETTLE_RATE

BRISK = HybridTrainerConfig(warmup_steps=20, min_full_steps=24, horizon=30, correction_interval=10)


class Descent:
    """Gradient descent on ``(x - centre) A (x - centre) / 2 + floor``, driven by an engine."""

    def __init__(self, config=BRISK, noise=0.0, floor=1e-3, seed=0, seconds=1e-3):
        self.random = np.random.default_rng(seed)
        self.curvature = np.geomspace(1e-3, 1.0, 60)
        self.x = np.random.default_rng(1).normal(size=60)
        self.noise, self.floor, self.seconds = noise, floor, seconds
        self.engine = Engine(config)
        self.bank, self.saved, self.log = [], None, []
        self.penalty, self.rate, self.centre = 0.0, 0.5, np.zeros(60)

    def loss(self, x):
        away = x - self.centre
        return 0.5 * float(away @ (self.curvature * away)) + self.floor

    def gradient_at(self, x):
        return self.curvature * (x - self.centre)

    def point(self, coefficients):
        newest = np.array(self.bank[-coefficients.shape[1] :])
        assert np.allclose(coefficients.sum(axis=1), 1.0, atol=1e-6)
        return coefficients[0] @ newest

    def carry_out(self, directive, bad=False):
        action, gram = directive.action, None
        if action is Action.FULL:
            if bad:
                return Observation(
                    loss=math.nan, learning_rate=self.rate, applied=False, backward=False
                )
            loss = self.loss(self.x) * math.exp(self.noise * self.random.normal())
            gradient = self.gradient_at(self.x) + self.noise * self.random.normal(size=60)
            self.x = self.x - self.rate * directive.scale_at((self.rate,)) * gradient
            if directive.snapshot:
                older = [] if directive.fresh_bank else self.bank
                self.bank = [*older[1 - self.engine.config.snapshots :], self.x]
            if directive.gram:
                moved = np.array(self.bank) - self.bank[-1]
                gram = (moved @ moved.T)[None]
            loss += self.penalty if self.engine.phase is Phase.CORRECT else 0.0
            norm = float(np.linalg.norm(gradient))
            return Observation(loss, norm, self.rate, self.seconds, gram)
        if action is Action.PROBE:
            x = self.x
            if directive.coefficients is not None:
                x = self.point(directive.coefficients)
            return Observation(math.nan if bad else self.loss(x), seconds=self.seconds / 3)
        if action is Action.MOVE:
            self.x = self.point(directive.coefficients)
            if directive.snapshot:
                self.bank = [*self.bank[1 - self.engine.config.snapshots :], self.x]
        elif action is Action.SAVE:
            self.saved = self.x
        elif action is Action.ROLLBACK:
            self.x = self.saved
        return Observation()

    def step(self, bad=False):
        while True:
            directive = self.engine.next()
            assert self.engine.next() is directive
            phase = self.engine.phase
            self.log.append((phase, directive.action))
            self.engine.observe(self.carry_out(directive, bad))
            if directive.action in (Action.FULL, Action.SKIP):
                counted = phase
            if self.engine.step_done:
                return counted

    def run(self, steps):
        return [self.step() for _ in range(steps)]


class Watched(Descent):
    """Checks every directive against what the protocol promises."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.directives = []
        self.held = 0
        self.last_phase, self.begun = None, False
        self.highest_rate = self.rate

    def carry_out(self, directive, bad=False):
        self.directives.append(directive)
        capacity, action = self.engine.config.snapshots, directive.action
        if directive.coefficients is not None:
            assert action in (Action.PROBE, Action.MOVE)
            assert directive.coefficients.ndim == 2
            assert 1 <= directive.coefficients.shape[1] <= self.held
            size = max(1.0, np.abs(directive.coefficients).max())
            assert directive.coefficients.sum(axis=1) == pytest.approx(1.0, abs=1e-13 * size)
        if action is Action.MOVE:
            assert directive.coefficients is not None
            # In a jump, or an outer step between full steps, which may be taken back.
            back = np.array_equal(directive.coefficients, [[1.0, 0.0]])
            phase = Phase.FULL if directive.snapshot else Phase.PREDICT
            assert back or self.engine.phase is phase
        if action is Action.SAVE:
            # The newest snapshot holds the weights, so that standing still is exact.
            assert np.array_equal(self.bank[-1], self.x)
        settling = action is Action.FULL and self.engine.phase is Phase.CORRECT
        outer = self.engine.controller.outer.active
        settling = settling and not outer
        self.highest_rate = max(self.highest_rate, self.rate)
        scale = directive.scale_at((self.rate,))
        if outer and action is Action.FULL:
            # It pays for predicted steps, and is no bolder than the loop has been.
            assert 1.0 <= scale < 1.5
            assert scale * self.rate <= self.highest_rate * (1.0 + 1e-12)
        else:
            assert scale == directive.learning_rate_scale == (SETTLE_RATE if settling else 1.0)
        if self.engine.phase is not self.last_phase:
            # Outer steps go on where they were after the predicted steps that they stand for.
            self.last_phase, self.begun = self.engine.phase, self.begun and outer
        if directive.snapshot:
            # Weights on both sides of a jump are no trajectory: each stretch of full steps has a
            # bank of its own, and what settling adds to it is for validation only.
            assert directive.fresh_bank or self.begun or settling
            assert not (directive.gram and settling)
            assert action in (Action.FULL, Action.MOVE)
        assert not directive.gram or directive.snapshot
        assert not directive.fresh_bank or directive.snapshot
        observation = super().carry_out(directive, bad)
        if directive.snapshot and observation.applied:
            self.begun = True
            self.held = min(capacity, 1 if directive.fresh_bank else self.held + 1)
        return observation

    def step(self, bad=False):
        engine, first = self.engine, len(self.directives)
        needs_batch, touches_weights = engine.needs_batch, engine.touches_weights
        before = engine.counters.steps
        counted = super().step(bad)
        done = self.directives[first:]
        actions = [directive.action for directive in done]
        assert actions.count(Action.FULL) + actions.count(Action.SKIP) == 1
        assert engine.counters.steps == before + 1
        if not needs_batch:
            assert set(actions) <= {Action.MOVE, Action.SKIP}
        if not touches_weights:
            assert actions in ([Action.FULL], [Action.SKIP])
            assert not done[0].snapshot
        return counted


class Overstepping(Watched):
    """There is no loss where outer steps lead from step `began` on."""

    began, edge, returns = 300, None, 0

    def carry_out(self, directive, bad=False):
        if directive.action is Action.PROBE and self.edge is not None:
            return Observation(math.inf)
        seen = super().carry_out(directive, bad or self.edge is not None)
        if directive.action is Action.MOVE and directive.snapshot:
            self.edge = self.bank[-2] if self.engine.counters.steps >= self.began else None
        elif directive.action is Action.MOVE:
            assert self.edge is None or np.array_equal(self.x, self.edge)
            self.edge, self.returns = None, self.returns + 1
        return seen


def text(state):
    """State of an engine as JSON, arrays as nested lists."""
    return json.dumps(state, default=lambda array: array.tolist())
