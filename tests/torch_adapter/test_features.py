"""What loops use beside a model and an optimizer: each trains as plainly, and is predicted."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from problems import BRISK, regression, weights
from sklearn.datasets import load_diabetes
from torch import nn
from torch.utils.checkpoint import checkpoint

from hybridcore import HybridTrainerConfig, ModelError
from hybridcore_torch import HybridTrainer
from hybridcore_torch.buffers import BufferWatch
from hybridcore_torch.closures import Prober
from hybridcore_torch.decay import Decay
from hybridcore_torch.groups import trainable_parameters
from hybridcore_torch.recovery import RecoveryPoint

STEPS = 420
X = torch.linspace(-1, 1, 64).unsqueeze(1)
Y = torch.sin(3 * X) + 0.3 * torch.cos(7 * X)
CONFIG = HybridTrainerConfig(warmup_steps=40)
IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1)
    )


def adam(model, rate=3e-3, **options):
    return torch.optim.Adam(model.parameters(), rate, **options)


def loss_of(model):
    return lambda: F.mse_loss(model(X), Y)


def plain():
    model = network()
    return model, adam(model), loss_of(model)


def autocast():
    model = network()

    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            out = model(X)
        return F.mse_loss(out.float(), Y)

    return model, adam(model), loss


def compiled():
    model = network()
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)
    return whole, adam(whole), loss_of(whole)


def recomputed():
    model = network()
    return (
        model,
        adam(model),
        lambda: F.mse_loss(model[4](checkpoint(model[:4], X, use_reentrant=False)), Y),
    )


def groups_of_parameters():
    model = network()
    groups = [
        {"params": model[0].parameters(), "lr": 1e-3},
        {"params": [*model[2].parameters(), *model[4].parameters()], "weight_decay": 1e-4},
    ]
    return model, torch.optim.AdamW(groups, 3e-3, weight_decay=0.0), loss_of(model)


def fused():
    model = network()
    return model, adam(model, fused=True), loss_of(model)


def foreach():
    model = network()
    return model, adam(model, foreach=True), loss_of(model)


def adafactor():
    model = network()
    return model, torch.optim.Adafactor(model.parameters(), 1e-2), loss_of(model)


def muon():
    model = network()
    matrices = [model[2].weight]
    others = [p for p in model.parameters() if p is not model[2].weight]
    optimizer = Together(
        torch.optim.Muon(matrices, 1e-3, weight_decay=0.0), torch.optim.Adam(others, 3e-3)
    )
    return model, optimizer, loss_of(model)


class Together(torch.optim.Optimizer):
    """Two optimizers as one, as loops that use Muon for matrices write it."""

    def __init__(self, *parts):
        self.parts = parts
        groups = [group for part in parts for group in part.param_groups]
        super().__init__(groups, {"lr": 1e-3})
        self.param_groups = groups

    def step(self, closure=None):
        for part in self.parts:
            part.step()


def tied():
    model = network()
    model[2].bias = model[0].bias
    return model, adam(model), loss_of(model)


def channels_last():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(216, 1))
    model = model.to(memory_format=torch.channels_last)
    images = IMAGES.to(memory_format=torch.channels_last)
    target = IMAGES.mean(dim=(1, 2, 3), keepdim=False).unsqueeze(1)
    return model, adam(model, 1e-3), lambda: F.mse_loss(model(images), target)


def meta():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 1))
    model = model.to_empty(device="cpu")
    torch.manual_seed(0)
    for layer in (model[0], model[2]):
        layer.reset_parameters()
    return model, adam(model), loss_of(model)


FEATURES = [
    plain,
    autocast,
    compiled,
    recomputed,
    groups_of_parameters,
    fused,
    foreach,
    adafactor,
    muon,
    tied,
    channels_last,
    meta,
]


def by_hand(build):
    _, optimizer, loss = build()
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


@pytest.mark.parametrize("build", FEATURES, ids=lambda build: build.__name__)
def test_it_is_predicted_and_ends_no_higher(build):
    losses = by_hand(build)
    model, optimizer, loss = build()
    trainer = HybridTrainer(model, optimizer, CONFIG)
    for step in range(STEPS):
        result = trainer.step(loss)
        if step < 40 and not result.was_predicted:
            # Nothing but watching happens in the warm-up.
            assert result.loss == pytest.approx(losses[step], rel=1e-5)
    while trainer.engine.may_roll_back:
        trainer.step(loss)
    statistics = trainer.statistics()
    # What bfloat16 rounds away decides whether a block is worth a leap.
    taken = statistics.secant_steps if build is autocast else 0
    assert statistics.predicted_steps + taken >= 50
    assert all(p.isfinite().all() for p in model.parameters())
    # Below the square of float32's rounding one is as low as the other.
    assert loss().item() <= 1.05 * min(losses[-20:]) + 2.0**-46 * losses[0]


@pytest.mark.parametrize("build", FEATURES, ids=lambda build: build.__name__)
def test_switched_off_it_is_the_plain_loop(build):
    losses = by_hand(build)
    model, optimizer, loss = build()
    trainer = HybridTrainer(model, optimizer, HybridTrainerConfig(enabled=False))
    assert [trainer.step(loss).loss for _ in range(STEPS)] == losses


def compiled_closure():
    model = network()
    closure = torch.compile(loss_of(model), backend="aot_eager", fullgraph=True)
    return model, adam(model), closure


@pytest.mark.parametrize("build", [compiled, compiled_closure], ids=lambda build: build.__name__)
def test_nothing_is_compiled_again(build):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, optimizer, loss = build()
    trainer = HybridTrainer(model, optimizer, CONFIG)
    for _ in range(STEPS):
        trainer.step(loss)
    assert trainer.statistics().probes > 0
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    # One graph with gradients and one without, for the probes.
    assert counters["stats"]["unique_graphs"] <= 2


def test_a_user_s_own_average_follows_the_weights():
    model, optimizer, loss = plain()
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    by_hand_average = copy.deepcopy(list(model.parameters()))
    trainer = HybridTrainer(model, optimizer, CONFIG)
    for step in range(STEPS):
        trainer.step(loss)
        average.update_parameters(model)
        with torch.no_grad():
            for mean, p in zip(by_hand_average, model.parameters(), strict=True):
                mean.copy_(p if step == 0 else torch.lerp(mean, p, 0.1))
    for mean, p in zip(by_hand_average, average.module.parameters(), strict=True):
        torch.testing.assert_close(mean, p, rtol=1e-4, atol=1e-6)


def test_a_user_s_own_average_sees_the_weights_of_predicted_steps():
    model, optimizer, loss = plain()
    average = torch.optim.swa_utils.AveragedModel(model)
    trainer = HybridTrainer(model, optimizer, dataclasses.replace(CONFIG, secant_pairs=0))
    total, moved = [torch.zeros_like(p) for p in model.parameters()], 0
    for _ in range(STEPS):
        before = weights(model)
        result = trainer.step(loss)
        average.update_parameters(model)
        moved += result.was_predicted and not all(map(torch.equal, before, weights(model)))
        for seen, p in zip(total, weights(model), strict=True):
            seen.add_(p)
    assert moved > 5
    for seen, mean in zip(total, average.module.parameters(), strict=True):
        torch.testing.assert_close(seen / STEPS, mean.detach(), rtol=1e-3, atol=1e-5)


# -- each of them by itself, where the whole would not tell that it is broken ---------------------


@pytest.mark.parametrize("pairs", [0, 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_inside_of_autocast_is_predicted_too(dtype, pairs):
    """Autocast keeps the weights that it has cast until it ends, here after several passes."""
    model = network()
    scaler = torch.amp.GradScaler("cpu", 2.0**10) if dtype is torch.float16 else None
    config = dataclasses.replace(CONFIG, secant_pairs=pairs)
    trainer = HybridTrainer(model, adam(model), config, scaler=scaler)
    for _ in range(STEPS):
        with torch.autocast("cpu", dtype):
            trainer.step(lambda: F.mse_loss(model(X).float(), Y))
    statistics = trainer.statistics()
    assert statistics.predicted_steps + statistics.secant_steps >= 50


def test_in_the_rounding_of_half_precision_a_run_does_not_stand_still():
    data = load_diabetes()
    x = torch.tensor(20.0 * data.data, dtype=torch.float32)
    y = torch.tensor((data.target - 152.0) / 77.0, dtype=torch.float32)[:, None]
    torch.manual_seed(1)
    model = nn.Sequential(
        *(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    )
    trainer = HybridTrainer(model, torch.optim.Adam(model.parameters(), 6e-3))
    found = []
    for _ in range(2):
        for _ in range(600):
            with torch.autocast("cpu", torch.bfloat16):
                trainer.step(lambda: F.mse_loss(model(x).float(), y))
        found.append(F.mse_loss(model(x), y).item())
    # It had curvature as far as that goes, and the optimizer has gone on.
    assert trainer.statistics().secant_steps > 100
    assert found[1] < 0.6 * found[0] < 2e-3


def test_a_probe_inside_of_autocast_leaves_the_pass_behind_it_its_graph():
    model = network()
    prober, loss = Prober(model), lambda: F.mse_loss(model(X).float(), Y)
    with torch.autocast("cpu", torch.bfloat16):
        prober.loss(loss, "closure")
        here = prober.loss(loss, "closure")
        with torch.no_grad():
            model[0].weight.mul_(2.0)
        assert prober.loss(loss, "closure") != here
        HybridTrainer(model, adam(model)).step(loss)
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_a_loss_in_half_precision_is_one():
    model = network().bfloat16()
    x, y = X.bfloat16(), Y.bfloat16()
    trainer = HybridTrainer(model, adam(model))
    assert trainer.step(lambda: F.mse_loss(model(x), y)).loss > 0.0


def test_gradients_are_clipped_by_value_in_a_hook_of_the_optimizer():
    def build():
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        optimizer.register_step_pre_hook(
            lambda *_: nn.utils.clip_grad_value_(model.parameters(), 1e-3)
        )
        return model, optimizer, loss_of(model)

    model, optimizer, loss = build()
    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    other, optimizer, loss = build()
    trainer = HybridTrainer(other, optimizer)
    for _ in range(60):
        trainer.step(loss)
    assert all(map(torch.equal, weights(model), weights(other)))


def test_each_group_is_scaled_from_its_own_rate():
    model = network()
    rest = [*model[2].parameters(), *model[4].parameters()]
    groups = [{"params": model[0].parameters(), "lr": 1e-3}, {"params": rest}]
    optimizer, seen = torch.optim.SGD(groups, 3e-2), []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append([g["lr"] for g in o.param_groups]))
    trainer = HybridTrainer(model, optimizer, dataclasses.replace(BRISK, secant_pairs=0))
    for _ in range(300):
        trainer.step(loss_of(model))
    assert any(first != 1e-3 for first, _ in seen)
    assert all(second == pytest.approx(30 * first) for first, second in seen)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 3e-2]


def test_each_group_has_its_own_decay():
    model = network()
    groups = [
        {"params": model[0].parameters()},
        {"params": model[2].parameters(), "weight_decay": 1e-2},
        # At a rate of zero there is none.
        {"params": model[4].parameters(), "weight_decay": 1e-2, "lr": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, 3e-2)
    loss_of(model)().backward()
    decay = Decay(optimizer, list(model.parameters()))
    decaying = model[2].parameters()
    expected = 0.5e-2 * sum(float(p.detach().double().square().sum()) for p in decaying)
    assert decay.penalty() == pytest.approx(expected, rel=1e-6)


class Numbered(torch.optim.SGD):
    """Counts by a number that is no tensor, as optimizers outside of torch do."""

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.state[p]["step"] = self.state[p].get("step", 0) + 1
        return super().step(closure)


OPTIMIZERS = {
    "fused": lambda parameters: torch.optim.Adam(parameters, 1e-2, fused=True),
    "foreach": lambda parameters: torch.optim.Adam(parameters, 1e-2, foreach=True),
    "muon": lambda parameters: torch.optim.Muon(parameters, 1e-2),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, 1e-2),
    "numbered": lambda parameters: Numbered(parameters, 1e-2, momentum=0.9),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_state_of_every_optimizer_comes_back(kind):
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 1, bias=False))
    optimizer = OPTIMIZERS[kind](model.parameters())
    x = torch.randn(8, 6)

    def steps(count):
        for _ in range(count):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    def state():
        return {(p, k): v for p, kept in optimizer.state.items() for k, v in kept.items()}

    steps(3)
    before = copy.deepcopy(list(state().values()))
    point = RecoveryPoint(model, optimizer, None, BufferWatch())
    steps(3)
    point.restore(model, optimizer, None)
    assert len(state()) == len(before) > 0
    for now, then in zip(state().values(), before, strict=True):
        assert type(now) is type(then)
        torch.testing.assert_close(now, then, rtol=0.0, atol=0.0)
    steps(2)


def test_a_scaler_comes_back_with_a_rollback():
    model, optimizer, _ = plain()
    scaler = torch.amp.GradScaler("cpu", 2.0**10)
    scaler.scale(torch.zeros(()))
    point = RecoveryPoint(model, optimizer, scaler, BufferWatch())
    scaler.update(2.0)
    point.restore(model, optimizer, scaler)
    assert scaler.get_scale() == 2.0**10


def test_a_tied_weight_counts_once():
    model, optimizer, _ = tied()
    found = trainable_parameters(model, optimizer)
    assert len(found) == len({id(p) for p in found}) == 5


def test_weights_stay_channels_last():
    model, optimizer, loss = channels_last()
    trainer = HybridTrainer(model, optimizer, CONFIG)
    for _ in range(STEPS):
        trainer.step(loss)
        assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    statistics = trainer.statistics()
    assert statistics.predicted_steps + statistics.secant_steps > 0


def test_a_model_that_is_on_the_meta_device_still_is_refused():
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    with pytest.raises(ModelError, match=r"weight is on the meta device .*to_empty"):
        HybridTrainer(model, adam(model))


def test_a_probe_that_is_no_number_is_told_once(caplog):
    model, optimizer, closure = regression()
    config = dataclasses.replace(BRISK, outer_momentum=False)
    trainer = HybridTrainer(model, optimizer, config, probe=lambda: closure() * math.nan)
    for _ in range(150):
        trainer.step(closure)
    assert trainer.statistics().predicted_steps == 0
    assert caplog.text.count("probe has the loss nan at first") == 1


def test_a_probe_is_of_all_parts():
    model = nn.Linear(1, 1)
    parts = [lambda: model.weight.sum() * 0.0 + 1.0, lambda: model.weight.sum() * 0.0 + 3.0]
    assert Prober(model).loss(parts, "closure") == 2.0
