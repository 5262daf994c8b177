"""How often a step waits for the device: as often as the plain loop, which reads its loss."""

import sys

import pytest
import torch
import torch.nn.functional as F
from problems import BRISK, digits
from torch import nn

from hybridcore import HybridTrainerConfig
from hybridcore_torch import HybridTrainer

WAITING = ("item", "tolist", "cpu", "numpy", "__float__", "__bool__", "__int__")


@pytest.fixture
def waits(monkeypatch):
    """What hybridcore's own code has called that waits for the device, in a list that grows."""
    found = []
    for name in WAITING:
        original = getattr(torch.Tensor, name)

        def watched(tensor, *arguments, name=name, original=original, **named):
            caller = sys._getframe(1).f_code.co_filename
            if "hybridcore" in caller and "test" not in caller:
                found.append(name)
            return original(tensor, *arguments, **named)

        monkeypatch.setattr(torch.Tensor, name, watched)
    return found


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_full_step_waits_once(waits, clip):
    """As on a GPU, where loss and norm are fetched together; here that path is asked for."""
    x, y = digits()
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    closure = lambda: F.cross_entropy(model(x[:64]), y[:64])  # noqa: E731
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    plain = HybridTrainer(model, optimizer, HybridTrainerConfig(enabled=False))
    plain.step(closure)
    assert waits == ["item"]
    trainer = HybridTrainer(model, optimizer, HybridTrainerConfig(), max_grad_norm=clip)
    trainer._hands.stepper.late = True
    # Steps that look for the same batch, average or take snapshots are not full steps alone.
    quiet = 0
    for _ in range(60):
        touches = trainer.engine.touches_weights
        waits.clear()
        trainer.step(closure)
        if not touches:
            quiet += 1
            assert waits == ["tolist"]
    assert quiet > 30


def test_what_is_fetched_late_is_the_same():
    x, y = digits()
    losses = []
    for late in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(64, 10).double()
        trainer = HybridTrainer(
            model, torch.optim.Adam(model.parameters(), 1e-2), BRISK, max_grad_norm=0.5
        )
        trainer._hands.stepper.late = late
        bad = torch.ones(150, dtype=torch.float64)
        bad[15] = torch.nan

        def run(trainer=trainer, model=model, bad=bad):
            for factor in bad:
                yield trainer.step(lambda f=factor: F.cross_entropy(model(x.double()), y) * f).loss

        losses.append(list(run()))
        assert trainer.statistics().divergences == 1
        assert trainer.statistics().predicted_steps > 20
    torch.testing.assert_close(*map(torch.tensor, losses), equal_nan=True, rtol=1e-6, atol=0.0)


def test_most_loops_and_the_others_come_to_the_same():
    """To the last bit, with bad losses, bad gradients and running statistics among it."""
    runs = []
    for usual in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 10))
        trainer = HybridTrainer(model, torch.optim.Adam(model.parameters(), 1e-2), BRISK)
        assert trainer._hands.stepper._is_usual
        trainer._hands.stepper._is_usual = usual
        x, y = digits()
        seen = []
        for step in range(150):
            offset = model[3].bias.sum() * 0.0
            hurt = {15: offset * torch.nan, 40: (offset - 0.0).sqrt(), 41: offset + torch.inf}
            rows, more = torch.arange(32) + step % 40, hurt.get(step, offset)
            result = trainer.step(
                lambda r=rows, m=more, model=model, x=x, y=y: F.cross_entropy(model(x[r]), y[r]) + m
            )
            held = [float(value.double().sum()) for value in model.state_dict().values()]
            seen.append([result.loss, result.gradient_norm or 0.0, *held])
        assert trainer.statistics().divergences == 3
        runs.append(torch.tensor(seen, dtype=torch.float64))
    assert torch.equal(*(torch.nan_to_num(run) for run in runs))
