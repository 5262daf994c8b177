"""How far off jumps land when they go too far, with probes on the way and without.

Shows: settings of one's own, and what a step tells: ``prediction_error`` where a probe held a
forecast against the truth, and the events of a jump. A jump is chosen by a probe at its end, so it
lands where it was forecast, whatever the horizon, and probes on the way find little to correct.
``benchmarks/corrections.py`` makes the jumps of two real tasks longer than they were chosen.

    python examples/correction_accuracy.py
"""

import argparse
import statistics

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from hybridcore_torch import HybridTrainer, HybridTrainerConfig

parser = argparse.ArgumentParser()
parser.add_argument("--quick", action="store_true", help="fewer steps")
steps = 300 if parser.parse_args().quick else 2000

torch.set_num_threads(1)
digits = load_digits()
x, y = torch.tensor(digits.data / 16.0).float(), torch.tensor(digits.target)


def run(interval, horizon):
    """Train with a probe every `interval` predicted steps: errors of forecasts, jumps, loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    # Jumps alone: every batch is the same here, and curvature would leave little to them.
    config = HybridTrainerConfig(
        secant_pairs=0, outer_momentum=False, horizon=horizon, correction_interval=interval
    )
    trainer = HybridTrainer(model, optimizer, config)
    errors, events = [], []
    for _ in range(steps):
        result = trainer.step(lambda: F.cross_entropy(model(x), y))
        errors += [] if result.prediction_error is None else [result.prediction_error]
        events += [event["event"] for event in result.events]
    return errors, events, result.loss


print("probe every  horizon  jumps  cut short  taken back  median error of forecasts  loss")
for horizon in (75, 150, 225):
    for interval in (15, horizon):
        errors, events, loss = run(interval, horizon)
        counts = [events.count(e) for e in ("jump", "jump cut short", "jump rolled back")]
        error = statistics.median(errors) if errors else 0.0
        print("{:11}  {:7}  {:5}  {:9}  {:10}".format(interval, horizon, *counts), end="  ")
        print(f"{error:25.3f}  {loss:.2e}")
