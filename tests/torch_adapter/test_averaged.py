"""The running average of the weights, and the block that evaluates it."""

import contextlib

import pytest
import torch
from problems import BRISK, left_by, noisy, regression, weights
from torch import nn

from hybridcore import ConfigError, HybridTrainerConfig, Phase, ProtocolError
from hybridcore.averaging import DECAY, INTERVAL
from hybridcore_torch import HybridTrainer


def test_it_is_the_polynomial_mean_of_what_the_loop_went_through():
    """Of the weights that its own steps have left, outer steps that follow in the same step not."""
    trainer, closure, _ = noisy()
    left = left_by(trainer.optimizer, trainer.model)
    mean, count = None, 0
    for _ in range(301):
        if trainer.step(closure).was_predicted:
            continue
        step = trainer.statistics().full_steps
        if step == 1 or step % INTERVAL == 0:
            count += 1
            share = (DECAY + 1) / (DECAY + count)
            now = [w.double() for w in left[-1]]
            mean = (
                now
                if mean is None
                else [m + share * (w - m) for m, w in zip(mean, now, strict=True)]
            )
    assert trainer.statistics().outer_steps > 0
    raw = weights(trainer.model)
    with trainer.averaged():
        for found, expected in zip(weights(trainer.model), mean, strict=True):
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    assert all(map(torch.equal, raw, weights(trainer.model)))


def test_an_error_in_the_block_does_not_cost_the_average():
    trainer, closure, _ = noisy()
    for _ in range(250):
        trainer.step(closure)
    assert trainer.engine.controller.outer.active
    with trainer.averaged():
        average = weights(trainer.model)
    with pytest.raises(ZeroDivisionError), trainer.averaged():
        raise ZeroDivisionError
    with trainer.averaged():
        assert all(map(torch.equal, average, weights(trainer.model)))
        with pytest.raises(ProtocolError, match="averaged"):
            trainer.step(closure)
    assert not any("start over" in e["event"] for e in trainer.step(closure).events)


def test_noise_is_less_at_the_average():
    ahead = []
    for seed in range(5):
        trainer, closure, held_out = noisy(seed, HybridTrainerConfig(outer_momentum=False))
        for _ in range(600):
            trainer.step(closure)
        raw = held_out()
        with trainer.averaged():
            ahead.append(held_out() < 0.95 * raw)
    assert sum(ahead) >= 4


def test_the_run_is_the_same_with_and_without():
    runs = []
    for averaging in (True, False):
        trainer, closure, _ = noisy(config=HybridTrainerConfig(averaging=averaging))
        for step in range(300):
            trainer.step(closure)
            if averaging and step % 50 == 0:
                with trainer.averaged():
                    pass
        runs.append(weights(trainer.model))
    assert all(map(torch.equal, *runs))


def test_an_error_inside_puts_the_weights_back():
    trainer, closure, _ = noisy()
    for _ in range(20):
        trainer.step(closure)
    raw = weights(trainer.model)
    with pytest.raises(KeyboardInterrupt), trainer.averaged():
        raise KeyboardInterrupt
    assert all(map(torch.equal, raw, weights(trainer.model)))
    trainer.step(closure)


def test_autocast_around_it_sees_the_average_inside_and_the_weights_after():
    trainer, closure, held_out = noisy()
    for _ in range(40):
        trainer.step(closure)
    expected = []
    for shown in (contextlib.nullcontext, trainer.averaged):
        with shown(), torch.autocast("cpu", torch.bfloat16):
            expected.append(held_out())
    assert expected[0] != expected[1]
    with torch.autocast("cpu", torch.bfloat16):
        found = [held_out()]
        with trainer.averaged():
            found.append(held_out())
        found.append(held_out())
    assert found == [*expected, expected[0]]


@pytest.mark.parametrize("call", ["step", "state_dict", "load_state_dict", "averaged"])
def test_the_run_waits_until_its_own_weights_are_back(call):
    trainer, closure, _ = noisy()
    for _ in range(20):
        trainer.step(closure)
    arguments = {"step": (closure,), "load_state_dict": (trainer.state_dict(),)}.get(call, ())
    with trainer.averaged(), pytest.raises(ProtocolError, match="leave the with block"):
        getattr(trainer, call)(*arguments)
    assert trainer.statistics().steps == 20


def test_with_hybridcore_off_the_weights_are_the_run_s_own():
    trainer, closure, _ = noisy(config=HybridTrainerConfig(enabled=False))
    for _ in range(20):
        trainer.step(closure)
    raw = weights(trainer.model)
    with trainer.averaged():
        assert all(map(torch.equal, raw, weights(trainer.model)))


def test_it_is_saved_and_resumed(tmp_path):
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, BRISK)
    for _ in range(203):
        trainer.step(closure)
    trainer.save(tmp_path / "run.pt")
    other, fresh, again = regression(seed=1)
    resumed = HybridTrainer.load(tmp_path / "run.pt", other, fresh)
    with trainer.averaged(), resumed.averaged():
        assert all(map(torch.equal, weights(model), weights(other)))
    for _ in range(100):
        trainer.step(closure)
        resumed.step(again)
    with trainer.averaged(), resumed.averaged():
        assert all(map(torch.equal, weights(model), weights(other)))


def test_frozen_parameters_leave_it_and_it_starts_over():
    trainer, closure, _ = noisy(config=HybridTrainerConfig(secant_pairs=0))
    for _ in range(50):
        trainer.step(closure)
    for parameter in trainer.model[0].parameters():
        parameter.requires_grad_(False)
    for _ in range(INTERVAL):
        trainer.step(closure)
    raw = weights(trainer.model)
    with trainer.averaged():
        assert all(map(torch.equal, raw, weights(trainer.model)))


def test_what_the_user_has_written_is_shown():
    trainer, closure, _ = noisy()
    for _ in range(50):
        trainer.step(closure)
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.fill_(3.0)
    with trainer.averaged():
        assert all((p == 3.0).all() for p in trainer.model.parameters())


def test_half_precision_is_averaged_in_single():
    model = nn.Linear(2, 1, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(model.weight)
    # Below a 256th of the weight bfloat16 stands still; its mean must not.
    optimizer = torch.optim.SGD(model.parameters(), 2**-7)
    trainer = HybridTrainer(model, optimizer)
    for _ in range(90):
        trainer.step(lambda: model.weight.sum())
    values = torch.cat([value.flatten() for value in trainer._hands.average.values])
    assert values.dtype is torch.float32
    lag = float(values[0] - model.weight.detach()[0, 0])
    assert 0.0 < lag < 20 * 2**-7


def test_without_the_setting_there_is_none():
    trainer, _, _ = noisy(config=HybridTrainerConfig(averaging=False))
    with pytest.raises(ConfigError, match="averaging=True, got False"):
        trainer.averaged()


def test_after_a_jump_it_begins_with_the_next_step():
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, BRISK)
    before, jumps = Phase.WARMUP, 0
    for _ in range(300):
        phase = trainer.step(closure).phase
        if (before, phase) == (Phase.CORRECT, Phase.FULL):
            jumps += 1
            raw = weights(model)
            with trainer.averaged():
                assert all(map(torch.equal, raw, weights(model)))
        before = phase
    assert jumps > 2


def test_batches_wait_for_the_run_s_own_weights_too():
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, BRISK)
    while trainer.engine.phase is not Phase.PREDICT:
        trainer.step(closure)
    with trainer.averaged(), pytest.raises(ProtocolError, match="leave the with block"):
        next(iter(trainer.batches([0])))
