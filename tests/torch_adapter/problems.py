"""Small real problems that the adapter's tests train on."""

import functools

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from hybridcore import HybridTrainerConfig
from hybridcore_torch import HybridTrainer

# Short phases, so that a few hundred steps hold several jumps.
BRISK = HybridTrainerConfig(warmup_steps=20, min_full_steps=24, horizon=30, correction_interval=10)


def digits():
    data = load_digits()
    return torch.tensor(data.data / 16.0, dtype=torch.float32), torch.tensor(data.target)


def flat(tensors):
    """All values of `tensors` in one NumPy vector, in float64."""
    return torch.cat([t.detach().double().reshape(-1) for t in tensors]).numpy()


def regression(seed=0, learning_rate=1e-2):
    """Logistic regression on all digits at once: model, optimizer, closure."""
    x, y = digits()
    torch.manual_seed(seed)
    model = nn.Linear(64, 10)
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    return model, optimizer, lambda: F.cross_entropy(model(x), y)


def noisy(
    seed=0, config=None, rate=1e-2, steps=None, groups=1, schedule=None, optimizer=torch.optim.Adam
):
    """A network on mini-batches of digits: trainer, closure of a random batch, held-out loss.

    With `steps`, the rate falls to zero over so many; with `schedule`, by these factors.
    """
    x, y = digits()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    parameters = list(model.parameters())
    optimizer = optimizer([{"params": parameters[i::groups]} for i in range(groups)], rate)
    if schedule is not None:
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    elif steps is not None:
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    generator, drawn = torch.Generator().manual_seed(seed), []

    def closure():
        # One batch a step, however often it is called.
        if not drawn:
            drawn.append(torch.randint(0, 1200, (16,), generator=generator))
        (batch,) = drawn
        return F.cross_entropy(model(x[batch]), y[batch])

    held_out = lambda: float(F.cross_entropy(model(x[1200:]), y[1200:]).detach())  # noqa: E731
    callbacks = [lambda result: drawn.clear()]
    trainer = HybridTrainer(model, optimizer, config, scheduler=schedule, callbacks=callbacks)
    return trainer, closure, held_out


def leaping(seed):
    """A SIREN at a rate at which Adam starts with a leap where the loss is small already.

    With most seeds: which ones those are depends on the processor.
    """
    torch.manual_seed(seed)
    x = torch.linspace(-1, 1, 200).unsqueeze(1)
    y = torch.sin(9 * x) * torch.cos(23 * x)
    first, second, last = nn.Linear(1, 32), nn.Linear(32, 32), nn.Linear(32, 1)
    model = nn.ModuleList([first, second, last])

    def closure():
        return F.mse_loss(last(torch.sin(15 * second(torch.sin(15 * first(x))))), y)

    return HybridTrainer(model, torch.optim.Adam(model.parameters(), 3e-2)), closure


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def left_by(optimizer, model):
    """Weights that its steps leave, as a list that grows: before an outer step moves them on."""
    left, step = [weights(model)], optimizer.step

    # As a schedule does: a hook may do anything, so that there are no quasi-Newton steps then.
    @functools.wraps(step)
    def stepped(*arguments, **named):
        step(*arguments, **named)
        left.append(weights(model))

    optimizer.step = stepped
    return left
