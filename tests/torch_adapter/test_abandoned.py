"""Steps in which the user's code raises, and which are taken again."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from problems import BRISK, digits, noisy
from resuming import figures
from torch import nn

from hybridcore import HybridTrainerConfig
from hybridcore_torch import HybridTrainer

STEPS = 260


def smooth(pairs, probed=False):
    x, y = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.BatchNorm1d(16), nn.Linear(16, 10))
    closure, schedule = lambda: F.cross_entropy(model(x[:1200]), y[:1200]), None
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    if not pairs:
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * STEPS)
    held_out = Flaky(lambda: F.cross_entropy(model(x[1200:]), y[1200:])) if probed else None
    config = dataclasses.replace(BRISK, secant_pairs=pairs)
    return HybridTrainer(model, optimizer, config, scheduler=schedule, probe=held_out), closure


def outer_steps():
    trainer, closure, _ = noisy(config=HybridTrainerConfig(warmup_steps=20, secant_pairs=0))
    return trainer, closure


KINDS = {
    "jumps": lambda: smooth(0),
    "jumps on a probe": lambda: smooth(0, probed=True),
    "quasi-Newton steps": lambda: smooth(20),
    "quasi-Newton steps and a probe": lambda: smooth(20, probed=True),
    "outer steps": outer_steps,
}


class Flaky:
    """Calls `closure`, but where it is flaky each call of a step raises before it succeeds once."""

    def __init__(self, closure):
        self.closure, self.flaky, self.failed, self.called = closure, False, 0, 0

    def begin(self):
        """Take note that an attempt at the step begins."""
        self.called = 0

    def end(self):
        """Take note that the step is over."""
        self.failed = 0

    def __call__(self):
        self.called += 1
        if self.flaky and self.called > self.failed:
            self.failed = self.called
            raise StopIteration
        return self.closure()


def run(kind, flaky):
    trainer, closure = KINDS[kind]()
    calls = [Flaky(closure)]
    if trainer.probe is not None:
        calls.append(trainer.probe)
    for call in calls:
        call.flaky = flaky
    results, abandoned, phases = [], 0, set()
    while len(results) < STEPS:
        for call in calls:
            call.begin()
        try:
            results.append(trainer.step(calls[0]))
        except StopIteration:
            abandoned += 1
            phases.add(trainer.engine.phase)
            # Between two attempts everything can be asked for.
            trainer.state_dict(snapshots=False)
        else:
            for call in calls:
                call.end()
    return *figures(trainer, results), abandoned, phases


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_fails_at_each_of_its_passes_comes_to_the_same(kind, record_property):
    steps, (digest, summary, events), none, _ = run(kind, flaky=False)
    again, last, abandoned, phases = run(kind, flaky=True)
    assert again == steps
    assert last == [digest, summary, events]
    assert none == 0
    assert abandoned > STEPS / 2
    if kind == "outer steps":
        assert summary["outer_steps"] > 10
    else:
        assert len(phases) > 2
        assert summary["predicted_steps"] > 0
    record_property("times", abandoned)
