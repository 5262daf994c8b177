"""A table, in batches: jumps judged on data of their own, and a stop where that data says so.

Shows: ``probe=``, a closure over a fixed batch that is not trained on, settings of one's own, and
early stopping beside it. Data: scikit-learn's breast cancer table.

    python examples/tabular.py
"""

import argparse
import copy
import math

import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer
from torch import nn

from hybridcore_torch import HybridTrainer, HybridTrainerConfig

parser = argparse.ArgumentParser()
parser.add_argument("--quick", action="store_true", help="fewer steps")
steps = 600 if parser.parse_args().quick else 5000

torch.manual_seed(0)
torch.set_num_threads(1)
table = load_breast_cancer()
x = torch.tensor(table.data).float()
x, y = (x - x.mean(dim=0)) / x.std(dim=0), torch.tensor(table.target).float()
train, held_out, test = torch.randperm(len(x)).split([330, 120, 119])

model = nn.Sequential(nn.Linear(30, 16), nn.Tanh(), nn.Linear(16, 1), nn.Flatten(0))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


def loss(rows):
    return F.binary_cross_entropy_with_logits(model(x[rows]), y[rows])


# Jumps are shorter and sooner than by default, as the run is short.
config = HybridTrainerConfig(warmup_steps=50, min_full_steps=40, horizon=40)
trainer = HybridTrainer(model, optimizer, config, probe=lambda: loss(held_out))
best, least, waited = None, math.inf, 0
for step in range(steps):
    batch = train[torch.randint(len(train), (128,))]
    trainer.step(lambda: loss(batch))
    # Not in the middle of a jump, whose weights may be taken back.
    if step % 20 == 19 and not trainer.engine.may_roll_back:
        with torch.no_grad():
            seen = loss(held_out).item()
        waited = 0 if seen < least else waited + 1
        if seen < least:
            best, least = copy.deepcopy(model.state_dict()), seen
        if waited == 10:
            print(f"stopped after step {step + 1}")
            break
model.load_state_dict(best)
with torch.no_grad():
    right = ((model(x[test]) > 0) == (y[test] > 0.5)).float().mean().item()
print(f"held-out loss {least:.4f}, accuracy on the test rows {right:.3f}")
print(trainer.statistics())
