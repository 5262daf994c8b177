"""Accelerate: a loop without ``accelerator.backward``, on scikit-learn's digits.

python examples/accelerate_loop.py, or accelerate launch examples/accelerate_loop.py
"""

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from sklearn.datasets import load_digits

from hybridcore_torch.accelerate import hybrid_trainer

parser = argparse.ArgumentParser()
parser.add_argument("--quick", action="store_true", help="fewer steps")
steps = 300 if parser.parse_args().quick else 1000

accelerator = Accelerator()
torch.manual_seed(0)
digits = load_digits()
x = torch.tensor(digits.data / 16.0, dtype=torch.float32).to(accelerator.device)
y = torch.tensor(digits.target).to(accelerator.device)
model = torch.nn.Linear(64, 10)
model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=1e-2))

trainer = hybrid_trainer(accelerator, model, optimizer)
for step in range(steps):
    result = trainer.step(lambda: F.cross_entropy(model(x), y))
    if step % 100 == 99:
        accelerator.print(f"step {step + 1}: {result.phase.name:7} loss {result.loss:.4f}")
accelerator.print(trainer.statistics())
