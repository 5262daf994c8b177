"""What loops use beside a model and an optimizer: each trains as plainly, and is predicted."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from hybridcore import HybridTrainerConfig
from hybridcore_torch import HybridTrainer

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


def test_nothing_is_compiled_again():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, optimizer, loss = compiled()
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
