"""Numbers that go wrong, and loops that change under way."""

import copy
import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from problems import BRISK, digits, noisy, regression, weights
from torch import nn

from hybridcore import DivergenceError, HybridTrainerConfig, ModelError, Phase
from hybridcore.rotation import checkpoints_in
from hybridcore.secant import MOST_REJECTED
from hybridcore_torch import HybridTrainer

JUMPING = dataclasses.replace(BRISK, secant_pairs=0)
finite = lambda model: all(torch.isfinite(p).all() for p in model.parameters())  # noqa: E731


def run(trainer, closure, steps):
    for _ in range(steps):
        trainer.step(closure)


def until(trainer, closure, phase):
    while trainer.engine.phase is not phase:
        trainer.step(closure)


# -- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_in_a_snapshot_makes_no_jump(bad):
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, JUMPING)
    for step in range(200):
        bank = trainer._hands.bank
        if (
            bank is not None
            and bank.count
            and step % 50 == 5
            and trainer.engine.phase is Phase.FULL
        ):
            bank._buckets[0].rows[bank._order[0]][3] = bad
        trainer.step(closure)
        assert finite(model)
    assert closure().item() < 0.3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e38])
def test_a_probe_that_goes_wrong_costs_jumps_at_most(bad):
    model, optimizer, closure = regression()
    calls = 0

    def probe():
        nonlocal calls
        calls += 1
        return closure() * (bad if calls % 3 == 0 else 1.0)

    trainer = HybridTrainer(model, optimizer, JUMPING, probe=probe)
    for _ in range(300):
        trainer.step(closure)
        assert finite(model)
    assert calls > 10
    assert closure().item() < 0.3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_parameter_that_is_not_finite_is_said_and_the_last_good_state_is_kept(
    bad, tmp_path, caplog
):
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, BRISK)
    trainer.save_every(10, tmp_path, keep=2)
    for _ in range(45):
        trainer.step(closure)
    with torch.no_grad():
        model.weight[3, 3] = bad
    for _ in range(45):
        trainer.step(closure)
    assert trainer.statistics().divergences == 45
    assert "weights are not finite, so there is no checkpoint of step 50" in caplog.text
    assert [int(p.stem[5:]) for p in checkpoints_in(tmp_path)] == [40, 30]
    strict = dataclasses.replace(BRISK, on_divergence="raise")
    with pytest.raises(DivergenceError, match="weights themselves are not finite: go back"):
        HybridTrainer(model, optimizer, strict).step(closure)
    good, optimizer, again = regression(seed=5)
    resumed = HybridTrainer.load(tmp_path, good, optimizer)
    for _ in range(45):
        resumed.step(again)
    assert again().item() < 0.5


def test_an_overflow_of_the_loss_scale_is_no_divergence():
    x, y = digits()
    strict = dataclasses.replace(BRISK, on_divergence="raise")
    torch.manual_seed(0)
    model = nn.Linear(64, 10)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    # The first hundred steps overflow: each halves the scale.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=30)
    trainer = HybridTrainer(model, optimizer, strict, scaler=scaler)
    before = weights(model)
    scales = []
    for _ in range(200):
        scales.append(scaler.get_scale())
        trainer.step(lambda: 100.0 * F.cross_entropy(model(x), y))
        if len(scales) == 1:
            assert all(map(torch.equal, before, weights(model)))
    assert any(after < before for before, after in itertools.pairwise(scales))
    statistics = trainer.statistics()
    assert statistics.divergences == 0
    assert statistics.divergence_level == "NORMAL"
    assert finite(model)


def test_at_a_loss_scale_below_one_nothing_overflows_but_the_gradient_itself():
    model, optimizer, closure = regression()
    strict = dataclasses.replace(BRISK, on_divergence="raise")
    scaler = torch.amp.GradScaler("cpu", init_scale=0.5)
    trainer = HybridTrainer(model, optimizer, strict, scaler=scaler)
    # Finite, with a gradient that is not.
    with pytest.raises(DivergenceError, match="gradient norm nan"):
        trainer.step(lambda: closure() + (0.0 * model.bias.sum()).abs().sqrt())
    assert trainer.statistics().divergences == 1


@pytest.mark.slow
@pytest.mark.parametrize("config", [JUMPING, BRISK], ids=["jumps", "pairs"])
def test_a_spike_of_a_hundred_times_the_loss_is_survived(config, record_property):
    victims = range(3, 160, 26)
    for victim in victims:
        _, plain_optimizer, plain = regression()
        model, optimizer, closure = regression()
        trainer = HybridTrainer(model, optimizer, config)
        for step in range(160):
            factor = 100.0 if step == victim else 1.0
            plain_optimizer.zero_grad()
            (factor * plain()).backward()
            plain_optimizer.step()
            trainer.step(lambda f=factor, c=closure: f * c())
        # What a plain loop makes of it, or better.
        assert closure().item() < 1.05 * plain().item(), victim
    record_property("times", len(victims))


def test_a_dead_network_stays_where_it_is():
    x, y = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    with torch.no_grad():
        model[0].bias.fill_(-1e3)
    model[2].requires_grad_(False)
    trainer = HybridTrainer(model, torch.optim.SGD(model.parameters(), 0.1), BRISK)
    before = weights(model)
    for _ in range(200):
        result = trainer.step(lambda: F.cross_entropy(model(x), y))
    assert math.isfinite(result.loss)
    assert all(map(torch.equal, before, weights(model)))


@pytest.mark.parametrize("config", [JUMPING, BRISK], ids=["jumps", "pairs"])
def test_a_rate_that_diverges_in_plain_training_is_said(config):
    x, _ = digits()

    def problem():
        torch.manual_seed(0)
        model = nn.Linear(64, 1)
        return model, torch.optim.SGD(model.parameters(), 2.0), lambda: model(x).square().mean()

    plain, optimizer, closure = problem()
    for _ in range(200):
        optimizer.zero_grad()
        closure().backward()
        optimizer.step()
    assert not finite(plain)
    model, optimizer, closure = problem()
    strict = dataclasses.replace(config, on_divergence="raise", secant_pairs=0)
    trainer = HybridTrainer(model, optimizer, strict)
    with pytest.raises(DivergenceError, match="lower the learning rate"):
        run(trainer, closure, 200)
    # The weights are the last for which there was a loss or a gradient.
    assert finite(model)


# -- the loop -------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["between steps", "after a state", "after an error"])
@pytest.mark.parametrize("phase", [Phase.FULL, Phase.PREDICT, Phase.CORRECT])
@pytest.mark.parametrize("config", [JUMPING, BRISK], ids=["jumps", "pairs"])
def test_weights_that_the_user_loads_are_kept_in_any_phase(phase, config, moment):
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, config)
    until(trainer, closure, Phase.PREDICT)
    until(trainer, closure, phase)
    if phase is Phase.FULL:
        # The last step before a jump: the bank is full.
        while trainer.engine.controller.gram is None and not trainer.engine.holds_pairs:
            trainer.step(closure)
    if moment == "after a state":
        trainer.load_state_dict(copy.deepcopy(trainer.state_dict()))
    elif moment == "after an error" and trainer.engine.needs_batch:
        with pytest.raises(ZeroDivisionError):
            trainer.step(lambda: 1 / 0)
    load(model, 3.0)
    for _ in range(4):
        trainer.step(closure)
        # Adam moves by about its rate, whatever the gradient.
        assert all((p - 3.0).abs().max() < 0.2 for p in model.parameters())


def load(model, value):
    model.load_state_dict({n: torch.full_like(p, value) for n, p in model.state_dict().items()})


@pytest.mark.parametrize("kind", ["snapshots", "outer steps"])
def test_weights_that_the_user_loads_are_kept_between_any_two_steps(kind, record_property):
    """Most of these steps are full steps with nothing beside them."""
    moments, told = range(11), 0
    for at in moments:
        if kind == "snapshots":
            model, optimizer, closure = regression()
            trainer = HybridTrainer(model, optimizer, JUMPING)
            while trainer.engine.controller.bank < 2:
                trainer.step(closure)
        else:
            trainer, closure, _ = noisy(config=HybridTrainerConfig(warmup_steps=20, secant_pairs=0))
            model = trainer.model
            while trainer.statistics().outer_steps < 3:
                trainer.step(closure)
        for _ in range(at):
            trainer.step(closure)
        load(model, 3.0)
        for step in range(1, 15):
            result = trainer.step(closure)
            told += any(e["event"] == "snapshots and trend start over" for e in result.events)
            assert all((p - 3.0).abs().max() < 0.03 * step for p in model.parameters())
    assert told == len(moments)
    record_property("times", len(moments))


def test_a_rate_that_is_changed_by_hand_holds(record_property):
    moments = range(20, 140, 18)
    for at in moments:
        model, optimizer, closure = regression()
        trainer = HybridTrainer(model, optimizer, JUMPING)
        for step in range(160):
            if step == at:
                optimizer.param_groups[0]["lr"] = 3e-3
            trainer.step(closure)
        assert optimizer.param_groups[0]["lr"] == 3e-3, at
    record_property("times", len(moments))


@pytest.mark.parametrize("config", [JUMPING, BRISK], ids=["jumps", "pairs"])
def test_a_head_that_is_replaced_in_its_group_leaves_its_state_behind(config, tmp_path):
    x, y = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    trainer = HybridTrainer(model, optimizer, config)
    closure = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    trainer.save_every(10, tmp_path, keep=2)
    run(trainer, closure, 30)
    old = model[2].weight
    model[2] = nn.Linear(16, 10)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    run(trainer, closure, 170)
    assert trainer.statistics().predicted_steps > 0
    assert closure().item() < 0.5
    assert checkpoints_in(tmp_path)[0].name == "step-000000200.safetensors"
    if config is JUMPING:
        until(trainer, closure, Phase.CORRECT)
        run(trainer, lambda: closure() * math.nan, 3)
        assert trainer.statistics().rollbacks > 0
    # It is the user's, who may put the old head back: a rollback leaves it there too.
    assert old in optimizer.state
    trainer.load_state_dict(trainer.state_dict())


def test_batches_that_are_left_out_are_said_and_save_nothing(caplog):
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, BRISK)
    run(trainer, lambda: closure() * math.nan, 12)
    said = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert [message.split()[-1] for message in said] == ["1", "10"]
    assert "(0% fewer backward passes)" in str(trainer.statistics())


def test_among_quasi_newton_steps_several_bad_batches_are_an_error():
    model, optimizer, closure = regression()
    config = dataclasses.replace(BRISK, secant_pairs=8, on_divergence="raise")
    trainer = HybridTrainer(model, optimizer, config)
    while trainer.statistics().secant_steps < 10 or trainer.engine.phase is not Phase.FULL:
        trainer.step(closure)
    for _ in range(MOST_REJECTED):
        trainer.step(lambda: closure() * math.nan)
        assert finite(model)
    with pytest.raises(DivergenceError):
        trainer.step(lambda: closure() * math.nan)
    assert trainer.statistics().divergences == 1
    assert finite(model)


def test_a_loss_of_another_model_is_told_once(caplog):
    model, optimizer, _ = regression()
    _, _, of_another = regression()
    before = [p.clone() for p in model.parameters()]
    trainer = HybridTrainer(model, optimizer, BRISK)
    run(trainer, of_another, 10)
    assert all(map(torch.equal, before, model.parameters()))
    said = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert len(said) == 1
    assert "a loss of the trainer's own model" in said[0]


def test_gradients_that_are_zero_are_some(caplog):
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, BRISK)
    for _ in range(10):
        assert trainer.step(lambda: 0.0 * closure()).gradient_norm == 0.0
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_a_loop_that_steps_by_itself_too_is_told(caplog):
    model, optimizer, closure = regression()
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.999)
    trainer = HybridTrainer(model, optimizer, JUMPING, scheduler=schedule)
    run(trainer, closure, 50)
    earlier = copy.deepcopy(trainer.state_dict())
    run(trainer, closure, 10)
    trainer.load_state_dict(earlier)
    run(trainer, closure, 10)
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    for _ in range(200):
        trainer.step(closure)
        optimizer.step()
        schedule.step()
    said = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert len(said) == 2
    assert any("leave optimizer.step()" in message for message in said)
    assert any("leave scheduler.step() out of the loop" in message for message in said)


def test_an_interrupt_inside_a_block_without_gradients_leaves_them_on():
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, BRISK)

    def interrupted():
        torch.set_grad_enabled(False)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.step(interrupted)
    assert torch.is_grad_enabled()
    trainer.step(closure)


@pytest.mark.parametrize("name", ["model", "optimizer", "scheduler", "scaler", "probe"])
def test_what_a_trainer_was_built_from_cannot_be_swapped_unseen(name):
    model, optimizer, _ = regression()
    trainer = HybridTrainer(model, optimizer, BRISK)
    with pytest.raises(ModelError, match=f"{name} cannot be replaced"):
        setattr(trainer, name, torch.optim.SGD(model.parameters(), 0.1))


def test_a_new_trainer_goes_on_with_another_optimizer():
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, JUMPING)
    until(trainer, closure, Phase.PREDICT)
    loss = closure().item()
    swapped = HybridTrainer(model, torch.optim.SGD(model.parameters(), 0.1), JUMPING)
    for _ in range(100):
        swapped.step(closure)
    assert closure().item() < loss


def test_evaluation_and_a_new_loader_inside_the_loop_do_no_harm():
    x, y = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 10))
    trainer = HybridTrainer(model, torch.optim.Adam(model.parameters(), 1e-2), BRISK)
    steps = 0
    while steps < 300:
        for inputs, targets in trainer.batches([(x, y)] * 20):
            trainer.step(lambda i=inputs, t=targets: F.cross_entropy(model(i), t))
        steps = trainer.statistics().steps
        before = copy.deepcopy(model.state_dict())
        model.eval()
        with torch.no_grad():
            held_out = F.cross_entropy(model(x), y).item()
        model.train()
        assert all(map(torch.equal, before.values(), model.state_dict().values()))
    assert held_out < 0.3


def test_freezing_and_thawing_again_and_again(caplog, record_property):
    caplog.set_level("INFO", logger="hybridcore")
    x, y = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    trainer = HybridTrainer(model, torch.optim.Adam(model.parameters(), 3e-3), BRISK)
    for step in range(400):
        if step % 37 == 0:
            frozen = model[0].weight.requires_grad_(step % 2 == 0)
            kept = frozen.detach().clone()
        trainer.step(lambda: F.cross_entropy(model(x), y))
        if not frozen.requires_grad:
            assert torch.equal(frozen, kept)
    assert F.cross_entropy(model(x), y).item() < 0.2
    # But for the first time, when there was nothing yet.
    times = len(range(0, 400, 37))
    assert caplog.text.count("snapshots and trend start over") >= times - 1
    record_property("times", times)
