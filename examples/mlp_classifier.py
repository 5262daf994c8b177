"""An MLP on mini-batches, with a falling learning rate: few steps are skipped, each is worth more.

Shows: a scheduler, which the trainer steps, and ``trainer.batches``, which loads no batch that a
jump passes over. Data: scikit-learn's digits.

    python examples/mlp_classifier.py --plain     # the same loop without hybridcore, to compare
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hybridcore_torch import HybridTrainer, HybridTrainerConfig

parser = argparse.ArgumentParser()
parser.add_argument("--quick", action="store_true", help="fewer epochs")
parser.add_argument("--plain", action="store_true", help="without hybridcore")
arguments = parser.parse_args()
epochs = 8 if arguments.quick else 40

torch.manual_seed(0)
torch.set_num_threads(1)
digits = load_digits()
x, y = torch.tensor(digits.data / 16.0, dtype=torch.float32), torch.tensor(digits.target)
order = torch.randperm(len(x))
train, test = order[:1300], order[1300:]
loader = DataLoader(TensorDataset(x[train], y[train]), batch_size=32, shuffle=True)

model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
# Counts all steps, predicted ones too, so that it ends where the loop does.
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, epochs * len(loader))
config = HybridTrainerConfig(enabled=not arguments.plain)
trainer = HybridTrainer(model, optimizer, config, scheduler=schedule)

for epoch in range(epochs):
    for images, labels in trainer.batches(loader):
        trainer.step(lambda: F.cross_entropy(model(images), labels))
    if (epoch + 1) % 4 == 0:
        with torch.no_grad():
            held_out = F.cross_entropy(model(x[test]), y[test]).item()
        rate = schedule.get_last_lr()[0]
        print(f"epoch {epoch + 1}: held-out loss {held_out:.4f}, learning rate {rate:.1e}")
print(trainer.statistics())
