"""A loop of one's own, as the command line takes it.

hybridcore compare examples/own_loop.py      # does hybridcore help here?
python examples/own_loop.py                  # train with it, and record the run
hybridcore report own-loop.jsonl             # look at what it did
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_diabetes
from torch import nn

from hybridcore_torch import HybridTrainer, JsonLines


def build():
    table = load_diabetes(scaled=True)
    x = torch.tensor(table.data, dtype=torch.float32) * 20.0
    y = torch.tensor(table.target, dtype=torch.float32).unsqueeze(1)
    y = (y - y.mean()) / y.std()
    model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    return model, optimizer, (x, y), nn.MSELoss()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    steps = 300 if parser.parse_args().quick else 1500

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, optimizer, (x, y), criterion = build()
    # A recording is never overwritten: the last one has to go first.
    recording = Path("own-loop.jsonl")
    recording.unlink(missing_ok=True)
    with JsonLines(recording) as stream:
        trainer = HybridTrainer(model, optimizer, callbacks=[stream])
        for _ in range(steps):
            trainer.step(lambda: criterion(model(x), y))
        print(trainer.statistics())


if __name__ == "__main__":
    main()
