"""Runs that a new process takes up: ``python resuming.py kind steps folder`` resumes all files."""

import hashlib
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from problems import BRISK, digits
from torch import nn

from hybridcore_torch import HybridTrainer

RUNS = ("adam", "sgd momentum", "adamw, schedule, clipping", "quasi-Newton steps")


def build(kind, seed=0, path=None):
    """Trainer, new or resumed from `path`, and its closure, which draws dropout from torch."""
    x, y = digits()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.BatchNorm1d(16), nn.Linear(16, 10))
    arguments = {}
    if kind in ("adam", "quasi-Newton steps"):
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    elif kind == "sgd momentum":
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
        arguments = {"scheduler": schedule, "max_grad_norm": 0.5}

    def closure():
        # A little noise from torch's own generator: too little to put jumps off, and enough to have
        # no quasi-Newton steps where they are not asked for.
        noise = 0.0 if kind == "quasi-Newton steps" else 3e-3
        return F.cross_entropy(model(x + noise * torch.randn(64)), y)

    if path is not None:
        return HybridTrainer.load(path, model, optimizer, **arguments), closure
    return HybridTrainer(model, optimizer, BRISK, **arguments), closure


def figures(trainer, results):
    """What must be the same to the last bit: each step, and at the end weights and decisions.

    And what happened: of quiet steps it is told later, so in one list, with what is left to tell.
    """
    names = ("loss", "phase", "was_predicted", "prediction_error", "confidence", "gradient_norm")
    steps = [[repr(getattr(r, name)) for name in (*names, "metrics")] for r in results]
    digest = hashlib.sha256()
    for value in trainer.model.state_dict().values():
        digest.update(value.numpy().tobytes())
    summary = trainer.statistics().to_dict()
    # What a clock says is another's each time.
    clocks = ("phase_seconds", "overhead_seconds", "probe_cost", "cost", "measured_speedup")
    for name in (*clocks, "measured_speedup_interval"):
        del summary[name]
    events = [event for result in results for event in result.events]
    events = [repr(event) for event in (*events, *trainer.engine.take_events())]
    return steps, [digest.hexdigest(), json.loads(json.dumps(summary)), events]


def main(kind, steps, folder):
    torch.set_num_threads(1)
    resumed = {}
    for path in sorted(Path(folder).iterdir()):
        trainer, closure = build(kind, seed=9, path=path)
        rest = [trainer.step(closure) for _ in range(int(path.name), int(steps))]
        resumed[path.name] = figures(trainer, rest)
    sys.stdout.write(json.dumps(resumed))


if __name__ == "__main__":
    main(*sys.argv[1:])
