"""A run in a process that may not allocate more: ``python short_of_memory.py copies``."""

import json
import logging
import resource
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from hybridcore import HybridTrainerConfig
from hybridcore_torch import HybridTrainer

SIZE = 3_000_000


def main(copies):
    """Leave room for about so many copies of the weights, and train."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    torch.set_num_threads(1)
    # The memory that NumPy's BLAS takes at its first call would need room too.
    np.linalg.eigh(np.eye(300))
    torch.manual_seed(0)
    model = nn.ParameterList([torch.linspace(-1.0, 1.0, SIZE)])
    rates = torch.linspace(0.02, 2.0, SIZE)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    config = HybridTrainerConfig(
        warmup_steps=20, min_full_steps=24, horizon=30, secant_pairs=0, averaging=copies == "0"
    )
    trainer = HybridTrainer(model, optimizer, config)

    def closure():
        return (rates * model[0].square()).mean()

    def step():
        return trainer.step(closure)

    for _ in range(3):
        step()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + int((float(copies) + 0.5) * 4 * SIZE)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for _ in range(80):
        result = step()
    summary = trainer.statistics()
    sys.stdout.write(json.dumps([result.loss, summary.to_dict()]))


if __name__ == "__main__":
    main(*sys.argv[1:])
