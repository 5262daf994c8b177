"""Losses that raise: at points that were only tried that is one that is no number."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from problems import BRISK, digits, left_by, regression, weights
from torch import nn

from hybridcore import ModelError
from hybridcore_torch import HybridTrainer

JUMPS = dataclasses.replace(BRISK, secant_pairs=0)


def test_a_pass_that_raises_at_a_trial_point_leaves_none_of_it():
    x, y = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 10))
    trainer = HybridTrainer(model, torch.optim.Adam(model.parameters(), 1e-2), BRISK)
    while trainer.statistics().secant_steps < 3:
        trainer.step(lambda: F.cross_entropy(model(x), y))
    elsewhere = 0
    for _ in range(20):
        before, seen = copy.deepcopy(model.state_dict()), []

        def raises(seen=seen):
            seen.append(weights(model))
            return F.cross_entropy(model(x), y) / (1 // 0)

        with pytest.raises(ZeroDivisionError):
            trainer.step(raises)
        elsewhere += not torch.equal(seen[0][0], before["0.weight"])
        assert all(map(torch.equal, before.values(), model.state_dict().values()))
        trainer.step(lambda: F.cross_entropy(model(x), y))
    assert elsewhere > 10


def test_a_loss_that_raises_only_where_steps_are_tried_is_one_that_is_no_number(caplog):
    x, y = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    fall = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 400)
    trainer = HybridTrainer(model, optimizer, BRISK, scheduler=fall)
    raised, base, tried = 0, None, {}

    def closure():
        nonlocal raised
        here = model[0].weight.detach().numpy().tobytes()
        if (
            trainer._hands._on_trial
            and here != base
            and tried.setdefault(here, len(tried)) % 3 == 2
        ):
            raised += 1
            raise torch.linalg.LinAlgError("not positive definite")
        return F.cross_entropy(model(x), y)

    while raised < 20:
        before, seen = copy.deepcopy(model.state_dict()), raised
        base = model[0].weight.detach().numpy().tobytes()
        result = trainer.step(closure)
        if raised > seen:
            assert all(map(torch.equal, before.values(), model.state_dict().values()))
            assert math.isfinite(result.loss)
    statistics = trainer.statistics()
    assert fall.last_epoch == statistics.steps
    assert statistics.secant_steps > 20
    assert statistics.divergences == 0
    told = [r for r in caplog.records if "LinAlgError" in r.message]
    assert [r.levelname for r in told] == ["WARNING"]


@pytest.mark.parametrize("only_there", [False, True])
def test_what_only_a_backward_pass_raises_is_held_against_another(only_there):
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, BRISK)
    raised, base, armed = 0, None, False

    def hook(gradient):
        nonlocal raised
        away = model.weight.detach().numpy().tobytes() != base
        if armed and trainer._hands._on_trial and (away or not only_there):
            raised += 1
            raise RuntimeError("in the backward pass")
        return gradient

    model.bias.register_hook(hook)
    while trainer.statistics().secant_steps < 3:
        trainer.step(closure)
    armed = True

    def go_on():
        nonlocal base
        for _ in range(5):
            base = model.weight.detach().numpy().tobytes()
            trainer.step(closure)

    if only_there:
        go_on()
        assert raised > 3
    else:
        with pytest.raises(RuntimeError, match="in the backward pass"):
            go_on()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_what_raises_now_and_then_is_the_users_to_see():
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, BRISK)
    raised = seen = 0

    def flaky():
        nonlocal raised
        if trainer._hands._on_trial and torch.is_grad_enabled() and raised == seen:
            raised += 1
            raise RuntimeError("could not read the sample")
        return closure()

    for _ in range(200):
        try:
            trainer.step(flaky)
        except RuntimeError:
            seen += 1
            trainer.step(closure)
    assert seen == raised > 5


def test_an_error_of_our_own_is_not_of_numbers():
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, BRISK)
    base = None

    def refused():
        if trainer._hands._on_trial and model.weight.detach().numpy().tobytes() != base:
            raise ModelError("a gradient is sparse")
        return closure()

    while trainer.statistics().secant_steps < 3:
        trainer.step(closure)
    base = model.weight.detach().numpy().tobytes()
    with pytest.raises(ModelError, match="sparse"):
        trainer.step(refused)


def test_a_probe_that_breaks_is_told_though_a_point_was_given_up(caplog):
    model, optimizer, closure = regression()
    armed, broken, base = False, False, None

    def probe():
        if broken:
            raise ValueError("no probe any more")
        return 0.5 * closure()

    def fragile():
        away = model.weight.detach().numpy().tobytes() != base
        if armed and trainer._hands._on_trial and away:
            raise ValueError("scale must be positive")
        return closure()

    trainer = HybridTrainer(model, optimizer, BRISK, probe=probe)
    while trainer.statistics().secant_steps < 3:
        trainer.step(closure)
    armed = True
    for step in range(120):
        broken = step >= 60
        base = model.weight.detach().numpy().tobytes()
        trainer.step(fragile)
    told = [r.message for r in caplog.records if r.levelname == "WARNING" and "raised" in r.message]
    assert [message.split()[0] for message in told] == ["closure", "probe"]


def test_a_probe_that_raises_only_where_a_jump_would_lead_is_no_number():
    model, optimizer, closure = regression()
    config = dataclasses.replace(BRISK, secant_pairs=0)
    trainer, raised, away = None, 0, 0

    def probe():
        nonlocal raised, away
        bank = trainer and trainer._hands.bank
        if bank and bank._waiting is not None:
            away += 1
            if away % 2:
                raised += 1
                raise ValueError("scale must be positive")
        return closure()

    trainer = HybridTrainer(model, optimizer, config, probe=probe)
    for _ in range(300):
        trainer.step(closure)
    assert raised > 3
    assert trainer.statistics().predicted_steps > 20


@pytest.mark.parametrize("config", [BRISK, JUMPS], ids=["trial", "jump"])
def test_what_led_to_where_the_loss_raises_is_taken_back(config):
    model, optimizer, closure = regression()
    trainer, left = HybridTrainer(model, optimizer, config), left_by(optimizer, model)
    saved, returned, raised = None, 0, 0

    def fragile():
        nonlocal saved, returned, raised
        here = weights(model)
        if trainer._hands.recovery is None:
            if saved is not None:
                assert all(map(torch.equal, here, saved))
                saved, returned = None, returned + 1
            return closure()
        if saved is None:
            # The optimizer is tried from there, a jump has led away before anything is evaluated.
            saved = left[-1] if config is JUMPS else here
        if not all(map(torch.equal, here, saved)):
            raised += 1
            raise ValueError("scale must be positive")
        return closure()

    for _ in range(300):
        trainer.step(fragile)
    assert raised >= returned > 2
    assert trainer.statistics().divergences >= returned


def test_training_goes_on_without_a_probe_that_raises_later(caplog):
    model, optimizer, closure = regression()
    limit = 2.0 * float(sum(p.detach().square().sum() for p in model.parameters()))
    raised = 0

    def probe():
        nonlocal raised
        if sum(p.square().sum() for p in model.parameters()) > limit:
            raised += 1
            raise torch.linalg.LinAlgError("not positive definite")
        # Another loss than that of the batch, or it would not be taken for the user's.
        return 0.5 * closure()

    trainer = HybridTrainer(model, optimizer, BRISK, probe=probe)
    first = trainer.step(closure).loss
    for _ in range(300):
        last = trainer.step(closure).loss
    trainer.finish()
    assert raised > 3
    assert last < 0.2 * first
    told = [r for r in caplog.records if "LinAlgError" in r.message]
    assert [r.levelname for r in told] == ["WARNING"]


@pytest.mark.parametrize("call", ["step", "finish"])
def test_a_probe_that_cannot_be_evaluated_at_all_is_the_users_to_see(call):
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, BRISK, probe=lambda: model(torch.ones(3)).sum())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        getattr(trainer, call)(closure)


def test_a_resumed_run_goes_on_without_a_probe_that_raises_by_now():
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, BRISK, probe=closure)
    for _ in range(5):
        trainer.step(closure)
    state = copy.deepcopy(trainer.state_dict())
    model, optimizer, closure = regression()
    other = HybridTrainer(model, optimizer, BRISK, probe=lambda: closure() / (1 // 0))
    other.load_state_dict(state)
    for _ in range(100):
        other.step(closure)
    assert other.statistics().full_steps == 105
