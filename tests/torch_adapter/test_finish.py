"""A run that ends in a jump or in a trial of the optimizer is left at the better weights."""

import math

import pytest
import torch
from problems import BRISK, leaping, regression, weights

from hybridcore import ClosureError, HybridTrainerConfig, Phase, ProtocolError
from hybridcore_torch import HybridTrainer

JUMPS = HybridTrainerConfig(
    warmup_steps=20, min_full_steps=24, horizon=30, correction_interval=10, secant_pairs=0
)


@pytest.mark.parametrize("spoil", [False, True])
@pytest.mark.parametrize("phase", [Phase.PREDICT, Phase.CORRECT])
def test_a_jump_is_kept_where_it_lowered_the_loss_and_taken_back_elsewhere(phase, spoil):
    model, optimizer, closure = regression()
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.999)
    trainer = HybridTrainer(model, optimizer, JUMPS, scheduler=schedule)
    before = None
    while trainer.engine.phase is not phase or before is None:
        if trainer.engine.may_jump:
            before = weights(model)
        trainer.step(closure)
    trainer.step(closure)
    steps, rate = trainer.statistics().steps, optimizer.param_groups[0]["lr"]
    if spoil:
        # As if the jump had gone somewhere bad, and nobody had written the weights.
        for p in model.parameters():
            p.data.neg_()
        trainer._hands.watch()
    jumped = weights(model)
    trainer.finish(closure)
    assert trainer.engine.phase is Phase.FULL
    assert not trainer.engine.may_roll_back
    assert all(map(torch.equal, weights(model), before if spoil else jumped))
    summary = trainer.statistics()
    assert summary.steps == steps
    assert summary.rollbacks == spoil
    assert optimizer.param_groups[0]["lr"] == rate
    assert trainer.state_dict()["recovery"] is None
    # It goes on, jumps and all.
    for _ in range(4):
        loss = closure().item()
        result = trainer.step(closure)
        assert result.loss == loss
        assert not any("start over" in event["event"] for event in result.events)
    for _ in range(120):
        trainer.step(closure)
    assert trainer.statistics().predicted_steps > summary.predicted_steps
    assert closure().item() < 0.3


def test_autocast_around_it_sees_the_weights_that_are_left():
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, JUMPS)
    while trainer.engine.phase is not Phase.CORRECT:
        trainer.step(closure)
    for p in model.parameters():
        p.data.neg_()
    trainer._hands.watch()
    with torch.autocast("cpu", torch.bfloat16):
        spoilt = closure().item()
        trainer.finish(closure)
        found = closure().item()
    assert trainer.statistics().rollbacks == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert closure().item() == found != spoilt


@pytest.mark.parametrize("config", [BRISK, JUMPS], ids=["trial", "jump"])
def test_the_copies_that_could_take_it_back_are_gone_afterwards(config):
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, config)
    while not trainer.engine.may_roll_back:
        trainer.step(closure)
    assert trainer._hands.recovery is not None
    trainer.finish(closure)
    hands = trainer._hands
    assert hands.recovery is hands.secants is None
    assert hands.bank._recovery is None


def test_weights_that_the_user_writes_into_a_jump_are_kept():
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, JUMPS)
    while trainer.engine.phase is not Phase.PREDICT:
        trainer.step(closure)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(3.0)
    trainer.finish(closure)
    assert all((p == 3.0).all() for p in model.parameters())


def test_a_trial_of_the_optimizer_is_taken_back_unless_it_has_helped():
    ends = []
    for trainer, closure in map(leaping, range(4)):
        for _ in range(600):
            saved = trainer.engine.controller.secant.loss
            result = trainer.step(closure)
            if any(event["event"] == "optimizer on trial" for event in result.events):
                trainer.step(closure)
                now = closure().item()
                trainer.finish(closure)
                ends.append((saved, now, closure().item()))
                # What fails in the next step does not bring it back.
                with pytest.raises(ZeroDivisionError):
                    trainer.step(lambda: 1 / 0)
                assert not trainer.engine.may_roll_back
    assert ends
    for saved, now, end in ends:
        assert end == pytest.approx(min(saved, now), rel=1e-5)
    assert any(now > saved for saved, now, _ in ends)


@pytest.mark.parametrize("config", [BRISK, HybridTrainerConfig(enabled=False)])
def test_where_nothing_is_under_way_nothing_is_done(config):
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, config)
    for _ in range(30):
        trainer.step(closure)
    assert not trainer.engine.may_roll_back
    before, probes, calls = weights(model), trainer.statistics().probes, []
    trainer.finish(lambda: calls.append(1) or closure())
    assert not calls
    assert all(map(torch.equal, before, weights(model)))
    assert trainer.statistics().probes == probes


def test_a_probe_stands_in_for_the_closure():
    model, optimizer, closure = regression()
    calls = []
    trainer = HybridTrainer(model, optimizer, JUMPS, probe=lambda: calls.append(1) or closure())
    while trainer.engine.phase is not Phase.PREDICT:
        trainer.step(closure)
    calls.clear()
    trainer.finish()
    assert len(calls) == 2
    assert trainer.engine.phase is Phase.FULL


def test_what_does_not_fit_is_said_and_changes_nothing():
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, JUMPS)
    while trainer.engine.phase is not Phase.PREDICT:
        trainer.step(closure)
    before = weights(model)
    with pytest.raises(ClosureError, match="pass one as to step"):
        trainer.finish()
    with pytest.raises(ClosureError):
        trainer.finish(lambda: None)
    with trainer.averaged(), pytest.raises(ProtocolError, match="averaged"):
        trainer.finish(closure)
    assert all(map(torch.equal, before, weights(model)))
    assert trainer.engine.phase is Phase.PREDICT
    trainer.finish(lambda: closure() * math.nan)
    assert not trainer.engine.may_roll_back
