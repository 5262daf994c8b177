"""The engine against a real descent in NumPy: an adapter of forty lines, and no framework."""

import itertools
import json
import math
from itertools import pairwise

import numpy as np
import pytest

from hybridcore import (
    Action,
    Engine,
    HybridTrainerConfig,
    Observation,
    Phase,
    ProtocolError,
    engine_state,
    restore_engine,
)

BRISK = HybridTrainerConfig(warmup_steps=20, min_full_steps=24, horizon=30, correction_interval=10)


class Descent:
    """Gradient descent on ``x A x / 2 + floor``, driven by an engine."""

    def __init__(self, config=BRISK, noise=0.0, floor=1e-3, seed=0, seconds=1e-3):
        self.random = np.random.default_rng(seed)
        self.curvature = np.geomspace(1e-3, 1.0, 60)
        self.x = np.random.default_rng(1).normal(size=60)
        self.noise, self.floor, self.seconds = noise, floor, seconds
        self.engine = Engine(config)
        self.bank, self.saved, self.log = [], None, []
        self.penalty = 0.0

    def loss(self, x):
        return 0.5 * float(x @ (self.curvature * x)) + self.floor

    def point(self, coefficients):
        newest = np.array(self.bank[-coefficients.shape[1] :])
        assert np.allclose(coefficients.sum(axis=1), 1.0, atol=1e-6)
        return coefficients[0] @ newest

    def carry_out(self, directive, bad=False):
        action, gram = directive.action, None
        if action is Action.FULL:
            if bad:
                return Observation(loss=math.nan, learning_rate=0.5, applied=False)
            loss = self.loss(self.x) * math.exp(self.noise * self.random.normal())
            gradient = self.curvature * self.x + self.noise * self.random.normal(size=60)
            self.x = self.x - 0.5 * directive.learning_rate_scale * gradient
            if directive.snapshot:
                older = [] if directive.fresh_bank else self.bank
                self.bank = [*older[1 - self.engine.config.snapshots :], self.x]
            if directive.gram:
                moved = np.array(self.bank) - self.bank[-1]
                gram = (moved @ moved.T)[None]
            loss += self.penalty if self.engine.phase is Phase.CORRECT else 0.0
            norm = float(np.linalg.norm(gradient))
            return Observation(loss, norm, 0.5, self.seconds, gram)
        if action is Action.PROBE:
            x = self.x
            if directive.at_recovery_point:
                x = self.saved
            elif directive.coefficients is not None:
                x = self.point(directive.coefficients)
            return Observation(math.nan if bad else self.loss(x), seconds=self.seconds / 3)
        if action is Action.MOVE:
            self.x = self.point(directive.coefficients)
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


def test_smooth_descent_is_predicted_and_gains():
    hybrid = Descent()
    phases = hybrid.run(600)
    counters = hybrid.engine.counters
    plain = Descent(HybridTrainerConfig(warmup_steps=10**6))
    plain.run(counters.full_steps + counters.probes // 3)
    assert counters.predicted_steps > 150
    assert hybrid.loss(hybrid.x) - 1e-3 < 0.5 * (plain.loss(plain.x) - 1e-3)
    assert phases[:20] == [Phase.WARMUP] * 20
    # Runs of equal phases keep to the settings.
    runs = [[phases[0], 0]]
    for phase in phases:
        if phase is not runs[-1][0]:
            runs.append([phase, 0])
        runs[-1][1] += 1
    follows = {Phase.WARMUP: Phase.FULL, Phase.FULL: Phase.PREDICT, Phase.PREDICT: Phase.CORRECT}
    for (phase, count), (after, _) in itertools.pairwise(runs):
        assert after is follows.get(phase, Phase.FULL)
        if phase is Phase.FULL:
            assert count >= BRISK.min_full_steps
        if phase is Phase.PREDICT:
            assert count <= BRISK.horizon
        if phase is Phase.CORRECT:
            assert count <= 2 * BRISK.snapshot_interval
    statistics = hybrid.engine.statistics()
    assert statistics.measured_speedup > 1.0
    assert sum(statistics.arm_values.values()) > 0.0


def test_micro_corrections_come_every_interval():
    descent = Descent()
    descent.run(300)
    in_predict = [action for phase, action in descent.log if phase is Phase.PREDICT]
    since = 0
    for action in in_predict:
        since += action is Action.SKIP
        if action is Action.PROBE:
            since = 0
        assert since <= BRISK.correction_interval


def test_noise_is_left_alone():
    descent = Descent(HybridTrainerConfig(), noise=0.3)
    descent.run(1500)
    counters = descent.engine.counters
    assert counters.predicted_steps <= 0.03 * 1500
    assert counters.probes <= 30
    assert descent.engine.statistics().measured_speedup == pytest.approx(1.0, abs=0.05)


def test_decisions_do_not_look_at_the_clock():
    fast, slow = Descent(seconds=1e-6), Descent(seconds=7.0)
    fast.run(400)
    slow.run(400)
    assert fast.log == slow.log
    assert np.array_equal(fast.x, slow.x)


@pytest.mark.parametrize("cut", range(15, 200, 7))
def test_state_resumes_exactly(cut):
    whole = Descent()
    whole.run(200)
    first, second = Descent(), Descent()
    first.run(cut)
    state = engine_state(first.engine)
    gram = state.pop("gram")
    state = json.loads(json.dumps(state)) | {"gram": gram}
    restore_engine(second.engine, state)
    second.x, second.bank, second.saved = first.x, first.bank, first.saved
    second.run(200 - cut)
    assert np.array_equal(second.x, whole.x)
    assert second.engine.counters.predicted_steps == whole.engine.counters.predicted_steps
    assert first.log + second.log == whole.log


@pytest.mark.parametrize("victim", range(5, 150, 4))
def test_a_bad_batch_costs_itself_only(victim):
    clean, hurt = Descent(), Descent()
    for step in range(200):
        clean.step()
        hurt.step(bad=step == victim)
        assert np.isfinite(hurt.x).all()
    assert hurt.engine.counters.predicted_steps > 0.5 * clean.engine.counters.predicted_steps
    assert hurt.loss(hurt.x) < 2.0 * clean.loss(clean.x)
    assert hurt.engine.counters.rollbacks <= 1


def test_a_jump_that_hurts_is_rolled_back_and_not_tried_again_soon():
    descent = Descent()
    descent.penalty = 10.0
    descent.run(400)
    counters = descent.engine.counters
    assert counters.rollbacks >= 1
    assert descent.engine.pace.patience > 1
    assert (Phase.CORRECT, Action.ROLLBACK) in descent.log
    # Each failure doubles the wait: far fewer attempts than there is room for.
    assert counters.rollbacks <= 5
    assert counters.predicted_steps < 150


@pytest.mark.parametrize("floor", [-5.0, -1e-3])
def test_losses_that_are_not_positive_are_never_predicted(floor):
    descent = Descent(floor=floor)
    below = 0
    for _ in range(2500):
        was_below = descent.loss(descent.x) <= 0.0
        phase = descent.step()
        below += was_below
        assert not (was_below and phase is Phase.PREDICT)
        assert np.isfinite(descent.x).all()
    assert below > 100


def test_protocol():
    engine = Engine(BRISK)
    with pytest.raises(ProtocolError, match="next"):
        engine.observe(Observation())
    engine.next()
    with pytest.raises(ProtocolError, match="middle of a step"):
        engine_state(engine)
    engine.abandon()
    assert engine_state(engine)["counters"]["steps"] == 0


@pytest.mark.parametrize("at", [10, 40, 50, 60, 70, 80, 90])
def test_regroup_starts_over_in_any_phase(at):
    descent = Descent()
    descent.run(at)
    descent.engine.regroup()
    descent.bank, descent.saved = [], None
    phases = descent.run(300)
    assert Phase.PREDICT not in phases[: BRISK.min_full_steps]
    assert Phase.PREDICT in phases
