"""Loops in which an update of the weights takes several steps: what counts updates, and why."""

from functools import partial

import numpy as np
import pytest
from descent import Watched

from hybridcore import Action, Engine, HybridTrainerConfig
from hybridcore.allowance import PAID, STANDS_FOR, Allowance
from hybridcore.controller import Controller
from hybridcore.outer import INTERVAL, MOST_WORTH

NOISY = HybridTrainerConfig(warmup_steps=20)


class Accumulating(Watched):
    """Weights move in the last of `steps` full steps, as where gradients are summed over them."""

    def __init__(self, steps):
        super().__init__(NOISY, noise=0.3)
        self.engine = Engine(NOISY, controller=partial(Controller, accumulation_steps=steps))
        self.steps, self.full, self.outer = steps, 0, []

    def carry_out(self, directive, bad=False):
        before = self.x
        seen = super().carry_out(directive, bad)
        if directive.action is Action.FULL:
            self.full += 1
            if self.full % self.steps:
                self.x = before
                if directive.snapshot:
                    self.bank[-1] = before
        elif directive.action is Action.MOVE and directive.snapshot:
            self.outer.append(self.full)
        return seen


@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_a_displacement_is_of_ten_updates_however_many_steps_these_take(steps, monkeypatch):
    # Or what they stand for hangs on what they did to the loss.
    monkeypatch.setattr("hybridcore.outer.UNBEARABLE", 1e9)
    descent = Accumulating(steps)
    descent.run(1000 * steps)
    assert set(np.diff(descent.outer) % (INTERVAL * steps)) == {0}
    counters = descent.engine.counters
    assert 0.6 * 1000 / INTERVAL < counters.outer_steps < 1000 / INTERVAL
    # Each stands for as many updates.
    at_most = STANDS_FOR * steps * counters.outer_steps
    assert 0.7 * at_most < counters.predicted_steps <= at_most
    statistics = descent.engine.statistics()
    most = 1.0 + MOST_WORTH * INTERVAL * steps * statistics.outer_steps / statistics.steps
    assert 0.9 * most < statistics.measured_speedup_interval.high < 1.5 * most


@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.parametrize(("strength", "trust", "rate"), [(1.0, 1.0, 0.2), (0.5, 0.8, 1.0)])
def test_an_allowance_pays_by_updates(steps, strength, trust, rate):
    single, several = Allowance(10, 50, 14), Allowance(10 * steps, 50 * steps, 14 * steps, steps)
    for allowance in (single, several):
        allowance.see((1.0,), scale=1.0, counts=True)
        allowance.see((rate,), scale=1.0, counts=True)
        allowance.earn(strength, trust)
    # But for the one step that follows a flight, whatever an update takes.
    assert several.paid == pytest.approx(steps * single.paid, abs=0.05 * steps)
    assert single.paid <= PAID
    assert several.state_dict()["earned"][0] == steps * single.state_dict()["earned"][0] > 0.0


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("config", [HybridTrainerConfig(), HybridTrainerConfig(min_full_steps=4)])
def test_settings_that_are_steps_count_updates(config, steps):
    scaled = config.accumulating(steps)
    for name in ("warmup_steps", "horizon", "correction_interval", "snapshot_interval"):
        assert getattr(scaled, name) == steps * getattr(config, name)
    assert abs(scaled.min_full_steps - steps * config.min_full_steps) < steps * config.snapshots
    changed = {name for name, value in scaled.to_dict().items() if value != getattr(config, name)}
    assert (len(changed) == 4) == (steps > 1)
    assert steps > 1 or scaled is config
