"""Real models on real data, each as a task that any training loop can run."""

from __future__ import annotations

import functools
import gzip
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits, load_sample_image
from torch import nn

Schedule = Literal["constant", "linear", "cosine"]
Closure = Callable[[], torch.Tensor]

FASHION = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True, slots=True)
class Task:
    """A model with its data.

    Attributes
    ----------
    model : torch.nn.Module
        Model with the initial weights of one seed.
    closure : callable
        ``closure(step)`` returns the function that computes the loss of that step's batch.
    held_out : callable
        Computes the loss on held-out data, without gradients. For fitting tasks, where there is no
        such data, the training loss.
    """

    model: nn.Module
    closure: Callable[[int], Closure]
    held_out: Callable[[], float]


@dataclass(frozen=True, slots=True)
class Workload:
    """A task with everything that a fair comparison fixes in advance.

    Attributes
    ----------
    name, title : str
        What the command line and the tables call it.
    build : callable
        ``build(seed)`` makes a fresh :class:`Task`.
    optimizer : callable
        ``optimizer(model, learning_rate)``.
    learning_rates : tuple of float
        Grid that every method tunes over.
    schedule : {"constant", "linear", "cosine"}
        Learning-rate schedule over `steps`.
    steps : int
        Steps of a run.
    noisy : bool
        Whether batches differ from step to step.
    """

    name: str
    title: str
    build: Callable[[int], Task]
    optimizer: Callable[[nn.Module, float], torch.optim.Optimizer]
    learning_rates: tuple[float, ...]
    schedule: Schedule
    steps: int
    noisy: bool


def scheduler(
    optimizer: torch.optim.Optimizer, schedule: Schedule, steps: int
) -> torch.optim.lr_scheduler.LambdaLR | None:
    """Learning-rate scheduler over `steps`, None for a constant rate."""
    if schedule == "constant":
        return None
    if schedule == "linear":
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: max(0.0, 1.0 - t / steps))
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: 0.5 * (1.0 + math.cos(math.pi * min(t / steps, 1.0)))
    )


class Sine(nn.Module):
    """Linear layer followed by a sine (SIREN, Sitzmann et al. 2020, sections 3.1 and 3.2)."""

    def __init__(self, inputs: int, outputs: int, *, first: bool = False) -> None:
        super().__init__()
        self.frequency = 30.0
        self.linear = nn.Linear(inputs, outputs)
        bound = 1.0 / inputs if first else math.sqrt(6.0 / inputs) / self.frequency
        nn.init.uniform_(self.linear.weight, -bound, bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to (n, inputs), giving (n, outputs) in [-1, 1]."""
        angles: torch.Tensor = self.frequency * self.linear(x)
        return torch.sin(angles)


def _photograph(seed: int) -> Task:
    picture = load_sample_image("china.jpg").astype(np.float32).mean(axis=2) / 127.5 - 1.0
    height, width = picture.shape[0] // 8, picture.shape[1] // 8
    small = picture[: 8 * height, : 8 * width].reshape(height, 8, width, 8).mean(axis=(1, 3))
    target = torch.from_numpy(small).reshape(-1, 1)
    axes = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 2)
    torch.manual_seed(seed)
    model = nn.Sequential(Sine(2, 64, first=True), Sine(64, 64), Sine(64, 64), nn.Linear(64, 1))

    def loss() -> torch.Tensor:
        return F.mse_loss(model(points), target)

    return Task(model, lambda step: loss, lambda: _without_gradients(loss))


def _burgers(seed: int) -> Task:
    viscosity = 0.05
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs in (2, 32, 32):
        layers += [nn.Linear(inputs, 32), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(32, 1))
    inside = torch.rand(1500, 2)
    inside[:, 1] = 2.0 * inside[:, 1] - 1.0
    inside.requires_grad_(True)
    x = torch.linspace(-1, 1, 100).unsqueeze(1)
    start, start_value = torch.cat([torch.zeros_like(x), x], 1), -torch.sin(math.pi * x)
    t = torch.linspace(0, 1, 50).unsqueeze(1)
    walls = torch.cat(
        [torch.cat([t, -torch.ones_like(t)], 1), torch.cat([t, torch.ones_like(t)], 1)]
    )

    def loss() -> torch.Tensor:
        u = model(inside)
        (slopes,) = torch.autograd.grad(u.sum(), inside, create_graph=True)
        u_t, u_x = slopes[:, :1], slopes[:, 1:]
        (curvatures,) = torch.autograd.grad(u_x.sum(), inside, create_graph=True)
        residual = u_t + u * u_x - viscosity * curvatures[:, 1:]
        parts = residual, model(start) - start_value, model(walls)
        return torch.stack([part.square().mean() for part in parts]).sum()

    return Task(model, lambda step: loss, lambda: loss().item())


def _classifier(
    seed: int,
    train: tuple[torch.Tensor, torch.Tensor],
    test: tuple[torch.Tensor, torch.Tensor],
    batch: int,
) -> Task:
    x, y = train
    torch.manual_seed(seed)
    classes = int(y.max()) + 1
    model = nn.Sequential(nn.Linear(x.shape[1], 128), nn.ReLU(), nn.Linear(128, classes))

    def closure(step: int) -> Closure:
        # The batch depends on the step's number alone, so every method sees the same one.
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        chosen = torch.randint(len(x), (batch,), generator=generator)
        inputs, labels = x[chosen], y[chosen]
        return lambda: F.cross_entropy(model(inputs), labels)

    return Task(
        model, closure, lambda: _without_gradients(lambda: F.cross_entropy(model(test[0]), test[1]))
    )


def _fashion(seed: int) -> Task:
    return _classifier(seed, _fashion_split("train"), _fashion_split("t10k"), batch=64)


@functools.cache
def _fashion_split(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    with gzip.open(FASHION / f"{name}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 784)
    with gzip.open(FASHION / f"{name}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return torch.tensor(images / 255.0, dtype=torch.float32), torch.tensor(labels.astype(np.int64))


def digits() -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """1,300 images of digits with their labels to train on, and 497 to test."""
    found = load_digits()
    x, y = torch.tensor(found.data / 16.0, dtype=torch.float32), torch.tensor(found.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1300], order[1300:]
    return (x[train], y[train]), (x[test], y[test])


def _digits(seed: int) -> Task:
    return _classifier(seed, *digits(), batch=32)


def _without_gradients(loss: Closure) -> float:
    with torch.no_grad():
        return float(loss())


def _adam(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), learning_rate)


def _adamw(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), learning_rate)


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            "siren",
            "SIREN fits the photograph china.jpg",
            _photograph,
            _adam,
            (1e-3, 2e-3, 4e-3),
            "constant",
            1200,
            noisy=False,
        ),
        Workload(
            "burgers",
            "PINN solves the viscous Burgers equation",
            _burgers,
            _adam,
            (1e-2, 2e-2, 4e-2),
            "constant",
            1500,
            noisy=False,
        ),
        Workload(
            "fashion",
            "MLP classifies Fashion-MNIST, batches of 64",
            _fashion,
            _adamw,
            (4e-3, 8e-3, 1.6e-2),
            "linear",
            1600,
            noisy=True,
        ),
        Workload(
            "digits",
            "MLP classifies digits, batches of 32",
            _digits,
            _adamw,
            (2e-3, 4e-3, 8e-3),
            "linear",
            1600,
            noisy=True,
        ),
    )
}


def classifier_at_hand() -> str:
    """Name of the noisy workload whose data is on this machine."""
    return "fashion" if FASHION.is_dir() else "digits"
