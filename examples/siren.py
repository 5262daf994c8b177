"""A SIREN fits a photograph: every batch is the same, so curvature says where the weights will go.

Shows: what a run does, by ``result.events``, and what it says of its own gain.

    python examples/siren.py
"""

import argparse
import math

import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_image
from torch import nn

from hybridcore_torch import HybridTrainer


class Sine(nn.Module):
    """Linear layer and sine (Sitzmann et al. 2020, section 3.2)."""

    def __init__(self, inputs, outputs, bound):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        nn.init.uniform_(self.linear.weight, -bound, bound)

    def forward(self, x):
        return torch.sin(30.0 * self.linear(x))


parser = argparse.ArgumentParser()
parser.add_argument("--quick", action="store_true", help="fewer steps")
steps = 300 if parser.parse_args().quick else 2000

torch.manual_seed(0)
torch.set_num_threads(1)
picture = torch.tensor(load_sample_image("flower.jpg")).float().mean(dim=2) / 127.5 - 1.0
target = F.avg_pool2d(picture[None], 10)[0]
axes = [torch.linspace(-1, 1, size) for size in target.shape]
points = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
target = target.reshape(-1, 1)

inner = math.sqrt(6 / 48) / 30
model = nn.Sequential(Sine(2, 48, 0.5), Sine(48, 48, inner), Sine(48, 48, inner), nn.Linear(48, 1))
trainer = HybridTrainer(model, torch.optim.Adam(model.parameters(), lr=1e-3))
for step in range(steps):
    result = trainer.step(lambda: F.mse_loss(model(points), target))
    for event in result.events:
        print(f"step {step}: {event}")
with torch.no_grad():
    error = F.mse_loss(model(points), target).item()
told = trainer.statistics()
print(f"{10 * math.log10(4.0 / error):.1f} dB after {told.backward_passes} backward passes")
print(told)
