"""The promises of the first issue, on real problems."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from problems import BRISK, digits, regression, weights
from torch import nn

from hybridcore import (
    ClosureError,
    ConfigError,
    DivergenceError,
    HybridTrainerConfig,
    ModelError,
    Phase,
)
from hybridcore_torch import HybridTrainer


def train(trainer, closure, steps):
    return [trainer.step(closure) for _ in range(steps)]


def make_optimizer(kind, model):
    if kind == "adam":
        return torch.optim.Adam(model.parameters(), 1e-2)
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), 1e-2)


@pytest.mark.parametrize("kind", ["adam", "sgd", "adamw"])
def test_disabled_is_the_plain_loop_bit_for_bit(kind):
    x, y = digits()

    def build():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Dropout(0.1), nn.Linear(32, 10))
        optimizer = make_optimizer(kind, model)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + 0.01 * t))
        return model, optimizer, scheduler

    def batch(step):
        chosen = torch.arange(32) + 7 * step
        return x[chosen % len(x)], y[chosen % len(y)]

    plain, optimizer, scheduler = build()
    plain_losses = []
    for step in range(600):
        inputs, labels = batch(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(plain(inputs), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        plain_losses.append(loss.item())
    model, optimizer, scheduler = build()
    off = HybridTrainerConfig(enabled=False)
    trainer = HybridTrainer(model, optimizer, off, scheduler=scheduler, max_grad_norm=1.0)
    losses = []
    for step in range(600):
        inputs, labels = batch(step)
        losses.append(trainer.step(lambda i=inputs, t=labels: F.cross_entropy(model(i), t)).loss)
    assert losses == plain_losses
    assert all(torch.equal(a, b) for a, b in zip(weights(plain), weights(model), strict=True))
    assert trainer.statistics().backward_passes == 600


def test_two_enabled_runs_are_the_same_bit_for_bit():
    runs = []
    for _ in range(2):
        model, optimizer, closure = regression()
        trainer = HybridTrainer(model, optimizer, BRISK)
        results = train(trainer, closure, 400)
        runs.append(([r.loss for r in results], [r.phase for r in results], weights(model)))
    assert runs[0][0] == runs[1][0]
    assert runs[0][1] == runs[1][1]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][2], runs[1][2], strict=True))
    assert runs[0][1].count(Phase.PREDICT) > 100


@pytest.mark.parametrize("pairs", [0, 20])
def test_a_jump_moves_every_tensor_by_a_delta_that_is_not_constant(pairs):
    x, y = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    trainer = HybridTrainer(model, optimizer, dataclasses.replace(BRISK, secant_pairs=pairs))
    jumps = 0
    before = weights(model)
    for _ in range(400):
        result = trainer.step(lambda: F.cross_entropy(model(x), y))
        after = weights(model)
        deltas = [b - a for a, b in zip(before, after, strict=True)]
        if result.was_predicted and any(d.abs().max() > 0 for d in deltas):
            jumps += 1
            assert all(d.std() > 0 for d in deltas)
        before = after
    assert jumps >= 3


def test_predicted_steps_run_no_backward_pass_and_advance_the_schedule():
    model, optimizer, closure = regression()
    backwards = []

    def counted():
        loss = closure()
        if loss.requires_grad:
            loss.register_hook(lambda grad: backwards.append(1))
        return loss

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / 1000)
    trainer = HybridTrainer(model, optimizer, BRISK, scheduler=scheduler)
    results = train(trainer, counted, 400)
    statistics = trainer.statistics()
    predicted = sum(r.was_predicted for r in results)
    assert predicted >= 100
    assert len(backwards) == 400 - predicted == statistics.backward_passes
    assert statistics.predicted_steps == predicted
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * (1 - 400 / 1000))


@pytest.mark.parametrize(("pairs", "most"), [(0, 0.75), (20, 0.25)])
def test_full_batch_regression_is_reached_for_less(pairs, most):
    model, optimizer, closure = regression()
    for _ in range(800):
        optimizer.zero_grad()
        loss = closure()
        loss.backward()
        optimizer.step()
    target = loss.item()
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, HybridTrainerConfig(secant_pairs=pairs))
    reached = None
    for _ in range(800):
        result = trainer.step(closure)
        if reached is None and not result.was_predicted and result.loss <= target:
            reached = trainer.statistics()
    assert reached.backward_passes + reached.probes / 3 < most * 800
    statistics = trainer.statistics()
    assert statistics.predicted_steps > 0.25 * statistics.steps
    assert result.loss <= target


def test_noisy_training_gets_no_jumps():
    x, y = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    trainer = HybridTrainer(model, torch.optim.AdamW(model.parameters(), 2e-3))
    for _ in range(800):
        chosen = torch.randint(len(x), (32,))
        trainer.step(lambda c=chosen: F.cross_entropy(model(x[c]), y[c]))
    statistics = trainer.statistics()
    # What outer steps stand for is all.
    assert 0.05 * 800 < statistics.predicted_steps <= 2 * statistics.outer_steps
    assert statistics.rollbacks == 0
    # Probes of outer steps and looks for smooth work, a third of a step each.
    assert statistics.probes / 3 <= 0.02 * 800


def test_where_labels_are_noise_there_is_no_harm():
    """On five seeds: held-out loss within their spread of plain's, for at most 1.02 of its cost."""
    x, _ = digits()
    ends = {True: [], False: []}
    for seed in range(5):
        for enabled in ends:
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
            optimizer = torch.optim.Adam(model.parameters(), 1e-3)
            trainer = HybridTrainer(model, optimizer, HybridTrainerConfig(enabled=enabled))
            for _ in range(800):
                chosen, labels = torch.randint(len(x), (32,)), torch.randint(10, (32,))
                trainer.step(lambda m=model, c=chosen, y=labels: F.cross_entropy(m(x[c]), y))
            with torch.no_grad():
                # What a label costs on average, whichever it is.
                ends[enabled].append(-F.log_softmax(model(x), dim=1).mean().item())
            statistics = trainer.statistics()
            cost = statistics.backward_passes + statistics.probes / 3
            assert cost < 1.02 * 800 if enabled else cost == 800
    plain, hybrid = torch.tensor(ends[False]), torch.tensor(ends[True])
    assert hybrid.mean() <= plain.mean() + 2.0 * plain.std()


BAD_CLOSURES = {
    "None": lambda loss: None,
    "vector": lambda loss: loss.expand(3),
    "detached": lambda loss: loss.detach(),
    "float": lambda loss: loss.item(),
    "complex": lambda loss: loss * 1j,
}


@pytest.mark.parametrize("kind", BAD_CLOSURES)
def test_a_bad_closure_is_an_error_that_changes_nothing(kind):
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer)
    before = weights(model)
    with pytest.raises(ClosureError, match="closure returned"):
        trainer.step(lambda: BAD_CLOSURES[kind](closure()))
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    assert not optimizer.state
    assert trainer.statistics().steps == 0
    assert trainer.step(closure).phase is Phase.WARMUP


@pytest.mark.parametrize(
    ("probe", "error"),
    [
        (lambda: None, "probe returned NoneType"),
        (lambda: torch.ones(3), "probe returned a tensor of shape"),
        (lambda: 1 / 0, "division by zero"),
    ],
)
def test_a_bad_probe_is_an_error_in_the_first_step(probe, error):
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, probe=probe)
    before = weights(model)
    with pytest.raises((ClosureError, ZeroDivisionError), match=error):
        trainer.step(closure)
    assert all(map(torch.equal, before, weights(model)))
    assert trainer.statistics().steps == 0


@pytest.mark.slow
def test_a_closure_that_raises_at_any_call_changes_nothing():
    for fatal in range(20, 130, 4):
        model, optimizer, closure = regression()
        calls = 0

        def sometimes(fatal=fatal, closure=closure):
            nonlocal calls
            calls += 1
            if calls == fatal:
                raise KeyError("no such batch")
            return closure()

        trainer = HybridTrainer(model, optimizer, BRISK)
        raised = 0
        for _ in range(160):
            before, steps = weights(model), trainer.statistics().steps
            try:
                trainer.step(sometimes)
            except KeyError:
                raised += 1
                assert trainer.statistics().steps == steps
                if trainer.engine.phase is not Phase.PREDICT:
                    after = weights(model)
                    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        # Predicted steps call nothing, so the latest calls may never come.
        assert raised == (calls >= fatal)
        assert trainer.statistics().steps == 160 - raised


def test_arguments_that_do_not_fit_are_named():
    model, optimizer, _ = regression()
    other = nn.Linear(3, 2)
    with pytest.raises(ModelError, match="optimizer holds none"):
        HybridTrainer(other, optimizer)
    frozen = nn.Linear(3, 2).requires_grad_(False)
    with pytest.raises(ModelError, match="no trainable parameter"):
        HybridTrainer(frozen, optimizer)
    with pytest.raises(ModelError, match="no trainable parameter"):
        HybridTrainer(nn.ReLU(), optimizer)
    lazy = nn.LazyLinear(2)
    with pytest.raises(ModelError, match=r"weight of a lazy layer .* call the model on one batch"):
        HybridTrainer(lazy, torch.optim.SGD(lazy.parameters(), 0.1))
    with pytest.raises(ModelError, match="LBFGS"):
        HybridTrainer(model, torch.optim.LBFGS(model.parameters()))
    for norm in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"max_grad_norm must be .* got {norm}: with None"):
            HybridTrainer(model, optimizer, max_grad_norm=norm)
    with pytest.raises(ConfigError, match=r"callbacks .* got <built-in .*: pass a list"):
        HybridTrainer(model, optimizer, callbacks=print)
    with pytest.raises(ConfigError, match=r"folder must be a path, got 3: "):
        HybridTrainer(model, optimizer).save_every(5, 3)
    with pytest.raises(ConfigError, match=r"path must be a path, got 3: "):
        HybridTrainer.load(3, model, optimizer)
    with pytest.raises(ClosureError, match="callable"):
        HybridTrainer(model, optimizer).step(torch.zeros(1))
    with pytest.raises(ModelError, match="layer_groups"):
        HybridTrainer(model, optimizer, layer_groups=[[model.weight]])
    for groups in (list(model.parameters()), 3, ["weight"], [["weight", "bias"]], [3]):
        with pytest.raises(ModelError, match="a list for each group"):
            HybridTrainer(model, optimizer, layer_groups=groups)
    with pytest.raises(ModelError, match="got dict: pass a list for each group"):
        HybridTrainer(model, optimizer, layer_groups={"all": list(model.parameters())})
    HybridTrainer(model, optimizer, layer_groups=[model.parameters()])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_batch_costs_itself_and_nothing_else(bad, record_property):
    victims = range(5, 160, 7)
    for victim in victims:
        model, optimizer, closure = regression()
        trainer = HybridTrainer(model, optimizer, BRISK)
        for step in range(160):
            factor = bad if step == victim else 1.0
            trainer.step(lambda f=factor, c=closure: c() * f)
            assert all(torch.isfinite(p).all() for p in model.parameters())
        assert closure().item() < 0.5
        assert trainer.statistics().steps == 160
    record_property("times", len(victims))


class BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bad):
        ctx.bad = bad
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.bad, None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_finite_loss_with_a_bad_gradient_leaves_the_batch_out(bad):
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, BRISK)
    train(trainer, closure, 30)
    before = weights(model)
    result = trainer.step(lambda: BadGradient.apply(closure(), bad))
    assert math.isfinite(result.loss)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    assert trainer.statistics().divergences == 1
    strict = HybridTrainer(model, optimizer, HybridTrainerConfig(on_divergence="raise"))
    with pytest.raises(DivergenceError, match="left out"):
        strict.step(lambda: BadGradient.apply(closure(), bad))


def test_resumes_bit_for_bit_in_every_phase(tmp_path):
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, BRISK)
    seen = set()
    results, saved = [], {}
    for step in range(300):
        phase = trainer.engine.phase
        if phase not in seen or step % 97 == 0:
            seen.add(phase)
            saved[step] = tmp_path / f"{step}.pt"
            trainer.save(saved[step])
        results.append(trainer.step(closure))
    assert seen == set(Phase)
    for step, path in saved.items():
        again, optimizer, closure = regression(seed=9)
        resumed = HybridTrainer.load(path, again, optimizer)
        rest = train(resumed, closure, 300 - step)
        assert [r.loss for r in rest] == [r.loss for r in results[step:]]
        assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(again), strict=True))
