"""Quasi-Newton steps on real problems."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from problems import BRISK, digits, flat, leaping, regression, weights
from scipy.optimize import minimize
from torch import nn

from hybridcore import (
    Action,
    CheckpointError,
    Directive,
    HybridTrainerConfig,
    Phase,
)
from hybridcore.secant import Stage
from hybridcore_torch import HybridTrainer
from hybridcore_torch.decay import Decay


def by_scipy(penalty):
    """Weights and bias of the regression at its minimum, in float64."""
    x, y = (values.double().numpy() for values in digits())

    def loss(flattened):
        w = torch.tensor(flattened, requires_grad=True)
        logits = torch.tensor(x) @ w[:640].view(10, 64).T + w[640:]
        value = F.cross_entropy(logits, torch.tensor(y).long()) + 0.5 * penalty * (w @ w)
        value.backward()
        return float(value.detach()), w.grad.numpy()

    return minimize(loss, np.zeros(650), jac=True, method="L-BFGS-B", options={"maxiter": 2000})


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
def test_it_ends_at_the_minimum_that_scipy_finds(kind):
    x, y = digits()
    torch.manual_seed(0)
    model = nn.Linear(64, 10)
    optimizer = kind(model.parameters(), 1e-2, weight_decay=1e-2)
    trainer = HybridTrainer(model, optimizer)
    for _ in range(500):
        trainer.step(lambda: F.cross_entropy(model(x), y))
    assert trainer.statistics().secant_steps > 100
    best = by_scipy(1e-2)
    found = flat(model.parameters())
    assert np.linalg.norm(found - best.x) < 1e-2 * np.linalg.norm(best.x)


def test_a_likelihood_below_zero_is_reached_in_half_the_passes():
    g = torch.Generator().manual_seed(8)
    x = 4.0 * torch.rand(200, 1, generator=g) - 2.0
    y = torch.sin(2.0 * x) + (0.02 + 0.05 * x.abs()) * torch.randn(200, 1, generator=g)

    def built(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh())
        model.append(nn.Linear(24, 2))

        def loss():
            mean, log_variance = model(x).unbind(1)
            return F.gaussian_nll_loss(mean, y[:, 0], log_variance.exp())

        return torch.optim.Adam(model.parameters(), 3e-3), model, loss

    shares = []
    for seed in range(3):
        optimizer, _, loss = built(seed)
        for _ in range(500):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        target = loss().item()
        assert target < -2.0
        optimizer, model, loss = built(seed)
        trainer = HybridTrainer(model, optimizer)
        for _ in range(500):
            result = trainer.step(loss)
            # Told as it is, and not from where it is counted.
            assert -3.0 < result.loss < 2.0
            if loss().item() <= target:
                break
        statistics = trainer.statistics()
        shares.append((statistics.backward_passes + statistics.probes / 3) / 500)
    assert np.median(shares) <= 0.5


def test_decoupled_decay_is_where_the_optimizer_rests():
    """At rest AdamW's step vanishes: the gradient over its root is minus the decay."""
    x, y = digits()
    torch.manual_seed(0)
    model = nn.Linear(64, 10)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=1.0)
    trainer = HybridTrainer(model, optimizer, HybridTrainerConfig(min_full_steps=400))
    while trainer.engine.controller.secant.stage is not Stage.DESCEND:
        trainer.step(lambda: F.cross_entropy(model(x), y))
    # The root as it is when the descent begins.
    roots = [s.clone() for s in trainer._hands.secants._decay.strengths]
    for _ in range(150):
        trainer.step(lambda: F.cross_entropy(model(x), y))
        if trainer.engine.controller.secant.stage is not Stage.DESCEND:
            break
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    for p, root in zip(model.parameters(), roots, strict=True):
        step = p.grad + root * p.detach()
        assert step.norm() < 0.1 * p.grad.norm()
    assert trainer.statistics().secant_steps > 50


@pytest.mark.parametrize("amsgrad", [False, True])
def test_decoupled_decay_is_by_the_root_that_the_optimizer_divides_by(amsgrad):
    p = nn.Parameter(torch.ones(3))
    options = {"betas": (0.9, 0.9), "eps": 0.1, "amsgrad": amsgrad}
    optimizer = torch.optim.AdamW([p], 1e-2, weight_decay=0.3, **options)
    square, squares = 0.0, []
    for gradient in (3.0, 0.1, 0.1):
        p.grad = torch.full((3,), gradient)
        optimizer.step()
        square = 0.9 * square + 0.1 * gradient**2
        squares.append(square)
    root = math.sqrt((max(squares) if amsgrad else square) / (1.0 - 0.9**3))
    (strength,) = Decay(optimizer, [p]).strengths
    np.testing.assert_allclose(strength.numpy(), 0.3 * (root + 0.1), rtol=1e-5)


def test_the_optimizer_follows_at_a_rate_of_zero():
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, BRISK)
    while trainer.statistics().secant_steps < 5:
        trainer.step(closure)
    before, rate = optimizer.state[model.weight]["exp_avg"].clone(), optimizer.param_groups[0]["lr"]
    trainer.step(closure)
    gradient = model.weight.grad
    followed = 0.9 * before + 0.1 * gradient
    torch.testing.assert_close(optimizer.state[model.weight]["exp_avg"], followed)
    assert optimizer.param_groups[0]["lr"] == rate


def test_the_penalty_of_decay_is_part_of_what_a_probe_compares():
    model, _, closure = regression()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2, weight_decay=0.3)
    trainer = HybridTrainer(model, optimizer, BRISK)
    while trainer.statistics().secant_steps < 5:
        trainer.step(closure)
    seen = trainer._hands.carry_out(Directive(Action.PROBE, own_batch=True), closure)
    penalty = 0.15 * (flat(model.parameters()) ** 2).sum()
    assert seen.objective == pytest.approx(closure().item() + penalty, rel=1e-6)


def test_fresh_pairs_begin_without_the_old_ones():
    model, optimizer, closure = regression()
    hands, found = HybridTrainer(model, optimizer, BRISK)._hands, []
    hands.carry_out(Directive(Action.FULL, snapshot=True), closure)
    assert hands.bank.nbytes > 0
    for fresh in (True, False, False, True, False):
        hands.carry_out(Directive(Action.FULL, pair=True, fresh_pairs=fresh), closure)
        found.append(len(hands.secants.state_dict()["order"]))
    assert found == [0, 1, 2, 0, 1]
    # Nor are there snapshots beside them.
    assert hands.bank.nbytes == 0


@pytest.mark.parametrize("cause", ["dropout", "batches", "noise"])
def test_where_no_two_batches_are_the_same_there_are_none(cause):
    x, y = digits()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 16), nn.Dropout(0.1 if cause == "dropout" else 0.0), nn.Linear(16, 10)
    )

    def closure(step):
        rows = slice(step % 2, None, 2) if cause == "batches" else slice(None)
        inputs = x[rows] + (1e-2 * torch.randn(x[rows].shape) if cause == "noise" else 0.0)
        return F.cross_entropy(model(inputs), y[rows])

    trainer = HybridTrainer(model, torch.optim.Adam(model.parameters(), 1e-3), BRISK)
    for step in range(400):
        trainer.step(lambda step=step: closure(step))
    assert trainer.statistics().secant_steps == 0


@pytest.mark.slow
def test_where_curvature_gains_little_it_ends_no_higher_after_as_many_steps():
    """The optimizer's loss rises before it falls there, and its trials need more than 20 steps."""
    x, _ = digits()
    x = x[:1350]
    ends = []
    for enabled in (False, True):
        config, of_seeds = HybridTrainerConfig(enabled=enabled), []
        for seed in range(3):
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8), nn.Linear(8, 64))
            model.extend((nn.Tanh(), nn.Linear(64, 64)))
            optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
            trainer = HybridTrainer(model, optimizer, config)
            for _ in range(600):
                trainer.step(lambda m=model: F.mse_loss(m(x), x))
            trainer.finish(lambda m=model: F.mse_loss(m(x), x))
            of_seeds.append(float(F.mse_loss(model(x), x).detach()))
        ends.append(np.mean(of_seeds))
    assert ends[1] <= ends[0]


def test_batches_that_stay_for_a_while_do_no_harm():
    """As in loops that take several steps on each batch."""
    x, y = digits()
    ends = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
        config = HybridTrainerConfig(enabled=enabled)
        trainer = HybridTrainer(model, torch.optim.Adam(model.parameters(), 1e-3), config)
        for step in range(1200):
            rows = slice(step // 40 % 6, None, 6)
            trainer.step(lambda m=model, rows=rows: F.cross_entropy(m(x[rows]), y[rows]))
            assert all(p.isfinite().all() for p in model.parameters())
        ends.append(float(F.cross_entropy(model(x), y).detach()))
    assert ends[1] < 1.1 * ends[0]


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_bad_batch_costs_itself_whatever_the_step_is_for(bad):
    stages = set()
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, BRISK)
    for step in range(240):
        stages.add((trainer.engine.phase, trainer.engine.controller.secant.stage))

        def sometimes(step=step):
            loss = closure()
            if step % 7 == 3:
                if bad == "loss":
                    return loss * math.nan
                # Finite, with a gradient that is not.
                return loss + (0.0 * model.bias.sum()).abs().sqrt()
            return loss

        trainer.step(sometimes)
        assert all(p.isfinite().all() for p in model.parameters())
    assert (Phase.FULL, Stage.GATHER) in stages
    assert closure().item() < 0.5


def test_between_steps_the_weights_are_no_worse_than_before():
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, BRISK)
    lowest, seen = math.inf, 0
    secant = trainer.engine.controller.secant
    for _ in range(300):
        stage = secant.stage
        result = trainer.step(closure)
        if secant.stage is not Stage.DESCEND or stage is not secant.stage:
            lowest = math.inf
            continue
        with torch.no_grad():
            here = closure().item()
        if result.phase is Phase.FULL:
            # What a step says of its loss is that of the weights that it leaves.
            assert result.loss == pytest.approx(here, rel=1e-5)
        assert here <= lowest * (1 + 1e-5)
        lowest, seen = min(lowest, here), seen + 1
    assert seen > 50


def test_a_held_out_loss_that_rises_leaves_the_run_to_the_optimizer():
    x, y = digits()
    train, test = slice(0, 200), slice(200, None)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    held_out = lambda: F.cross_entropy(model(x[test]), y[test])  # noqa: E731
    trainer = HybridTrainer(
        model, torch.optim.Adam(model.parameters(), 1e-3), BRISK, probe=held_out
    )
    for _ in range(600):
        trainer.step(lambda: F.cross_entropy(model(x[train]), y[train]))
    statistics = trainer.statistics()
    assert 0 < statistics.secant_steps < 300
    # Nor is there a copy of the pairs any more.
    assert not trainer.engine.holds_pairs
    assert trainer.state_dict()["secants"] is None


@pytest.mark.parametrize("number", [1.0, math.nan])
def test_a_probe_ends_them_before_they_overfit(number):
    """Without it the held-out loss is several times plain's by the end of the first block."""
    x, y = digits()
    train, test = slice(0, 200), slice(200, None)
    ends = {}
    for kind in ("plain", "alone", "probed"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
        held_out = lambda: F.cross_entropy(model(x[test]), y[test])  # noqa: B023, E731
        probe = (lambda: number * held_out()) if kind == "probed" else None  # noqa: B023
        config = HybridTrainerConfig(enabled=kind != "plain")
        trainer = HybridTrainer(
            model, torch.optim.Adam(model.parameters(), 3e-3), config, probe=probe
        )
        for _ in range(300):
            trainer.step(lambda: F.cross_entropy(model(x[train]), y[train]))  # noqa: B023
        ends[kind] = held_out().item()
    assert ends["alone"] > 1.5 * ends["plain"]
    assert ends["probed"] < 1.2 * ends["plain"]
    if math.isnan(number):
        assert trainer.statistics().secant_steps < 5


@pytest.mark.parametrize(
    ("kind", "decay"),
    [(torch.optim.Adam, 0.0), (torch.optim.SGD, 0.03), (torch.optim.AdamW, 0.3)],
)
def test_saved_in_the_middle_of_a_descent_it_goes_on_bit_for_bit(kind, decay, tmp_path):
    def made(seed):
        model, _, closure = regression(seed)
        return model, kind(model.parameters(), 1e-2, weight_decay=decay), closure

    model, optimizer, closure = made(0)
    trainer = HybridTrainer(model, optimizer, BRISK)
    while trainer.statistics().secant_steps < 7:
        trainer.step(closure)
    trainer.save(tmp_path / "run.pt")
    expected = [trainer.step(closure).loss for _ in range(60)]
    other, fresh, again = made(1)
    resumed = HybridTrainer.load(tmp_path / "run.pt", other, fresh)
    assert [resumed.step(again).loss for _ in range(60)] == expected
    assert all(map(torch.equal, weights(model), weights(other)))


def test_weights_that_the_user_writes_are_kept():
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, BRISK)
    while trainer.statistics().secant_steps < 5:
        trainer.step(closure)
    # An average that is shown and put back is no edit.
    with trainer.averaged():
        pass
    trainer.step(closure)
    assert trainer.engine.controller.secant.active
    with torch.no_grad():
        model.weight.zero_()
    trainer.step(closure)
    assert not trainer.engine.controller.secant.active
    # One step of Adam away from what was written.
    assert 0.0 < model.weight.abs().max() < 0.1


def test_a_trial_that_is_taken_back_leaves_no_mark_in_running_statistics():
    x, y = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 10))
    trainer = HybridTrainer(model, torch.optim.Adam(model.parameters(), 1e-2), BRISK)
    secant, taken_back = trainer.engine.controller.secant, 0
    for _ in range(200):
        before, stage = model[1].running_mean.clone(), secant.stage
        # A trial of the optimizer goes back to where it began.
        landing = secant.landing
        trainer.step(lambda: F.cross_entropy(model(x), y))
        descends = stage is secant.stage is Stage.DESCEND and not landing
        if descends and not secant.accepted:
            taken_back += 1
            assert torch.equal(before, model[1].running_mean)
    assert taken_back > 3


def test_the_optimizer_follows_by_clipped_gradients():
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, BRISK, max_grad_norm=1e-3)
    while trainer.statistics().secant_steps < 5:
        trainer.step(lambda: 1e3 * closure())
    roots = optimizer.state[model.weight]["exp_avg_sq"].sqrt()
    assert roots.max() < 1e-3


def test_pairs_are_of_gradients_that_are_not_clipped():
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, BRISK, max_grad_norm=1e-3)
    secant = trainer.engine.controller.secant
    while trainer.statistics().secant_steps < 5 or not secant.accepted:
        trainer.step(closure)
    bank = trainer._hands.secants
    gradient = torch.autograd.grad(closure(), list(model.parameters()))
    torch.testing.assert_close(bank._gradient_views[bank._turn], list(gradient))


def test_a_layer_that_is_not_used_does_not_decay():
    x, y = digits()
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(64, 10), nn.Linear(3, 3)])
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=1e-2)
    trainer = HybridTrainer(model, optimizer, BRISK)
    before = model[1].weight.detach().clone()
    for _ in range(150):
        trainer.step(lambda: F.cross_entropy(model[0](x), y))
    assert trainer.statistics().secant_steps > 20
    assert torch.equal(before, model[1].weight)


def test_a_state_that_does_not_fit_leaves_a_descent_as_it_is():
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, BRISK)
    while trainer.statistics().secant_steps < 5:
        trainer.step(closure)
    state = trainer.state_dict()
    state["secants"]["rows"] = state["secants"]["rows"][1:]
    with pytest.raises(CheckpointError, match="secant pairs"):
        trainer.load_state_dict(state)
    trainer.step(closure)
    assert trainer.engine.controller.secant.active


def test_a_trial_that_makes_the_loss_leap_up_is_over_at_once():
    trials: list[list[float]] = []
    for seed in range(4):
        trainer, closure = leaping(seed)
        on_trial = False
        for _ in range(600):
            before = trainer.engine.controller.secant.loss
            result = trainer.step(closure)
            if any(event["event"] == "optimizer on trial" for event in result.events):
                trials.append([])
                saved, on_trial = before, True
            if on_trial and trainer.engine.may_roll_back and trainer.engine.phase is Phase.FULL:
                trials[-1].append(result.loss / saved)
    assert len(trials) > 1
    for trial in trials:
        assert sum(ratio > 10.0 for ratio in trial) <= 1
    assert max(map(max, trials)) > 10.0
    assert min(map(len, trials)) < 12


def test_in_the_rounding_a_falling_rate_has_all_the_time_and_nothing_is_lost():
    steps, before, length, longest = 2000, math.inf, 0, 0
    torch.manual_seed(0)
    x = torch.randn(200, 30) * torch.logspace(0.0, -1.5, 30)
    y = x @ torch.randn(30, 1)

    def task():
        torch.manual_seed(1)
        model = nn.Linear(30, 1)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        fall = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: max(0.0, 1.0 - t / steps))
        return model, HybridTrainer(model, optimizer, scheduler=fall)

    (model, trainer), (other, resumed) = task(), task()
    loss = lambda of: (of(x) - y).square().mean()  # noqa: E731
    secant = trainer.engine.controller.secant
    for step in range(steps):
        trainer.step(lambda: loss(model))
        length = length + 1 if secant.holds_recovery else 0
        longest = max(longest, length)
        if not length:
            before = loss(model).item()
        if step == steps - 100:
            assert length > 60
            resumed.load_state_dict(copy.deepcopy(trainer.state_dict()))
        if step > steps - 100:
            resumed.step(lambda: loss(other))
    assert longest > 10 * trainer.config.min_full_steps
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    trainer.finish(lambda: loss(model))
    assert loss(model).item() <= before
