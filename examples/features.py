"""What loops use beside a model and an optimizer, one line each, on a small regression.

python examples/features.py
"""

import argparse
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from hybridcore_torch import HybridTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--quick", action="store_true", help="fewer steps")
steps = 200 if parser.parse_args().quick else 500
torch.set_num_threads(1)
x = torch.linspace(-1, 1, 64).unsqueeze(1)
y = torch.sin(3 * x)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1)
    )


def loss_of(model):
    return lambda: F.mse_loss(model(x).float(), y)


def adam(model, **options):
    return torch.optim.Adam(model.parameters(), 3e-3, **options)


def autocast(dtype, scaler=None):
    """In the closure, or around the step: either will do."""
    model = network()

    def loss():
        with torch.autocast("cpu", dtype):
            return loss_of(model)()

    return HybridTrainer(model, adam(model), scaler=scaler), loss


def accumulation():
    """Parts of equal size, whose loss is their mean."""
    model = network()
    halves = zip(x.chunk(2), y.chunk(2), strict=True)
    parts = [lambda a=a, b=b: F.mse_loss(model(a), b) for a, b in halves]
    return HybridTrainer(model, adam(model)), parts


def clipped_by_norm():
    model = network()
    return HybridTrainer(model, adam(model), max_grad_norm=1.0), loss_of(model)


def clipped_by_value():
    """Whatever else is done to gradients goes there too."""
    model = network()
    optimizer = adam(model)
    optimizer.register_step_pre_hook(lambda *_: nn.utils.clip_grad_value_(model.parameters(), 0.1))
    return HybridTrainer(model, optimizer), loss_of(model)


def compiled():
    """The model, or the closure."""
    model = torch.compile(network(), backend="aot_eager")
    return HybridTrainer(model, adam(model)), loss_of(model)


def recomputed():
    model = network()
    halfway = lambda: checkpoint(model[:2], x, use_reentrant=False)  # noqa: E731
    return HybridTrainer(model, adam(model)), lambda: F.mse_loss(model[2:](halfway()), y)


def groups_of_parameters():
    model = network()
    head = {"params": model[4].parameters(), "lr": 1e-3, "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([{"params": model[:4].parameters()}, head], 3e-3)
    return HybridTrainer(model, optimizer), loss_of(model)


def optimized_by(make):
    model = network()
    return HybridTrainer(model, make(model)), loss_of(model)


def muon(model):
    """Of matrices alone, which these layers without a bias are."""
    for layer in (model[0], model[2], model[4]):
        layer.bias = None
    return torch.optim.Muon(model.parameters(), 3e-3)


def tied():
    model = network()
    model[2].bias = model[0].bias
    return HybridTrainer(model, adam(model)), loss_of(model)


def channels_last():
    torch.manual_seed(0)
    images = torch.rand(16, 3, 8, 8).to(memory_format=torch.channels_last)
    layers = nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(216, 1)
    model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    means = images.mean(dim=(1, 2, 3)).unsqueeze(1)
    return HybridTrainer(model, adam(model)), lambda: F.mse_loss(model(images), means)


def begun_on_meta():
    """Made without memory, and given values before optimizer and trainer are built."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 1))
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for layer in (model[0], model[2]):
        layer.reset_parameters()
    return HybridTrainer(model, adam(model)), loss_of(model)


def own_average():
    """A callback sees each step; so may the loop, after ``step``."""
    model = network()
    average = torch.optim.swa_utils.AveragedModel(model)
    follow = lambda result: average.update_parameters(model)  # noqa: E731
    return HybridTrainer(model, adam(model), callbacks=[follow]), loss_of(model)


FEATURES = {
    "autocast, bfloat16": lambda: autocast(torch.bfloat16),
    "autocast, float16, loss scaler": lambda: autocast(
        torch.float16, torch.amp.GradScaler("cpu", init_scale=2.0**10)
    ),
    "gradient accumulation": accumulation,
    "clipping by norm": clipped_by_norm,
    "clipping by value": clipped_by_value,
    "torch.compile": compiled,
    "activation checkpointing": recomputed,
    "parameter groups": groups_of_parameters,
    "fused optimizer": lambda: optimized_by(lambda model: adam(model, fused=True)),
    "foreach optimizer": lambda: optimized_by(lambda model: adam(model, foreach=True)),
    "Muon": lambda: optimized_by(muon),
    "Adafactor": lambda: optimized_by(lambda m: torch.optim.Adafactor(m.parameters(), 1e-2)),
    "tied weights": tied,
    "channels-last": channels_last,
    "meta device": begun_on_meta,
    "an average of one's own": own_average,
}

for name, build in FEATURES.items():
    start = time.perf_counter()
    trainer, loss = build()
    for _ in range(steps):
        result = trainer.step(loss)
    statistics = trainer.statistics()
    print(
        f"{name:31} loss {result.loss:.2e}, {statistics.backward_passes} backward passes in "
        f"{statistics.steps} steps, {time.perf_counter() - start:.1f} s"
    )
