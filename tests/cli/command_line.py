"""Runs commands in this process, and small files that they are given."""

import json
from pathlib import Path

from typer.testing import CliRunner

from hybridcore.cli import app

HEAD = """
import torch
import torch.nn.functional as F
from sklearn.datasets import load_diabetes, load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
"""

# Full batch and smooth: quasi-Newton steps pay.
SMOOTH = (
    HEAD
    + """
def build():
    table = load_diabetes(scaled=True)
    x = torch.tensor(table.data, dtype=torch.float32) * 20.0
    y = torch.tensor(table.target, dtype=torch.float32).unsqueeze(1)
    y = (y - y.mean()) / y.std()
    model = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 1))
    return model, torch.optim.Adam(model.parameters(), lr=3e-3), (x, y), nn.MSELoss()
"""
)

# Batches, shuffling and dropout, all from the random states of torch.
NOISY = (
    HEAD
    + """
def build():
    digits = load_digits()
    x = torch.tensor(digits.data / 16.0, dtype=torch.float32)
    y = torch.tensor(digits.target)
    model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    train = DataLoader(TensorDataset(x[:1200], y[:1200]), batch_size=32, shuffle=True)
    held_out = [(x[1200:], y[1200:])]
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 150)

    def loss(model, batch):
        inputs, labels = batch
        return F.cross_entropy(model(inputs), labels)

    return {"model": model, "optimizer": optimizer, "data": train, "loss": loss,
            "held_out": held_out, "scheduler": scheduler}
"""
)


def write(text, name="own.py"):
    Path(name).write_text(text, encoding="utf-8")
    return name


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def figures(*arguments, code=0):
    """What a command prints with --json."""
    result = call(*arguments, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def is_png(path):
    return Path(path).read_bytes().startswith(b"\x89PNG")


def check_lines(result, words):
    """One line on standard error that says `words`, and exit code 2."""
    assert result.exit_code == 2, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("hybridcore: ")
    assert words in lines[0]
    assert result.stdout == ""
