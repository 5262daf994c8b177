"""Small real problems that the adapter's tests train on."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from hybridcore import HybridTrainerConfig

# Short phases, so that a few hundred steps hold several jumps.
BRISK = HybridTrainerConfig(warmup_steps=20, min_full_steps=24, horizon=30, correction_interval=10)


def digits():
    data = load_digits()
    return torch.tensor(data.data / 16.0, dtype=torch.float32), torch.tensor(data.target)


def regression(seed=0, learning_rate=1e-2):
    """Logistic regression on all digits at once: model, optimizer, closure."""
    x, y = digits()
    torch.manual_seed(seed)
    model = nn.Linear(64, 10)
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    return model, optimizer, lambda: F.cross_entropy(model(x), y)


def weights(model):
    return [p.detach().clone() for p in model.parameters()]
