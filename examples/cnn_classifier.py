"""A small CNN in bfloat16 at a constant rate, judged at the running average of its weights.

Shows: autocast in the closure, clipping by the trainer, and ``trainer.averaged()`` to evaluate and
to save. Data: Fashion-MNIST where the Debian package dataset-fashion-mnist is installed, else
scikit-learn's digits.

    python examples/cnn_classifier.py
"""

import argparse
import gzip
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from hybridcore_torch import HybridTrainer

FOLDER = Path("/usr/share/datasets/fashion-mnist")


def images():
    if not FOLDER.is_dir():
        digits = load_digits()
        return torch.tensor(digits.images / 16.0).float().unsqueeze(1), torch.tensor(digits.target)
    pixels = gzip.decompress((FOLDER / "train-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((FOLDER / "train-labels-idx1-ubyte.gz").read_bytes())[8:]
    x = np.frombuffer(pixels, np.uint8)[: 12_000 * 784].reshape(-1, 1, 28, 28) / np.float32(255)
    return torch.from_numpy(x), torch.tensor(np.frombuffer(labels, np.uint8)[:12_000]).long()


parser = argparse.ArgumentParser()
parser.add_argument("--quick", action="store_true", help="fewer steps")
steps = 200 if parser.parse_args().quick else 2000

torch.manual_seed(0)
torch.set_num_threads(1)
x, y = images()
cut = 9 * len(x) // 10
layers = [nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU()]
model = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(10))
model(x[:1])  # gives the lazy layer its size, before the optimizer
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
trainer = HybridTrainer(model, optimizer, max_grad_norm=1.0)


def loss(rows):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.cross_entropy(model(x[rows]).float(), y[rows])


@torch.no_grad()
def accuracy():
    return (model(x[cut:]).argmax(dim=1) == y[cut:]).float().mean().item()


for _ in range(steps):
    rows = torch.randint(cut, (64,))
    trainer.step(lambda: loss(rows))
print(f"accuracy of the last weights {accuracy():.3f}")
with trainer.averaged():
    print(f"accuracy of the average {accuracy():.3f}")
    torch.save(model.state_dict(), "cnn.pt")
