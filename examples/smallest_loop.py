"""The smallest loop: what changes in a plain PyTorch loop, on scikit-learn's digits.

python examples/smallest_loop.py
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from hybridcore_torch import HybridTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--quick", action="store_true", help="fewer steps")
steps = 300 if parser.parse_args().quick else 1000

torch.manual_seed(0)
torch.set_num_threads(1)
digits = load_digits()
x = torch.tensor(digits.data / 16.0, dtype=torch.float32)
y = torch.tensor(digits.target)
model = nn.Linear(64, 10)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

trainer = HybridTrainer(model, optimizer)
for step in range(steps):
    result = trainer.step(lambda: F.cross_entropy(model(x), y))
    if step % 100 == 99:
        print(f"step {step + 1}: {result.phase.name:7} loss {result.loss:.4f}")
print(trainer.statistics())
