"""A long run: nothing may grow, neither memory nor file handles nor the time of a step.

python benchmarks/soak.py               # 10^6 steps of the engine and 10^5 of torch
python benchmarks/soak.py --share 0.1   # a tenth of them

The figures are recorded in results/soak.json.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import process_time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from hybridcore import Action, Engine, HybridTrainerConfig, Observation
from hybridcore.cli.common import environment
from hybridcore_torch import HybridTrainer

HERE = Path(__file__).parent
PARTS = 20


def engine_step() -> Callable[[], object]:
    """Steps of the engine alone, on a noisy loss that falls."""
    engine, rng, taken = Engine(HybridTrainerConfig()), np.random.default_rng(0), 0

    def step() -> None:
        nonlocal taken
        taken += 1
        loss = float(np.exp(-taken / 3e5) * (1.0 + 0.1 * rng.standard_normal()))
        while True:
            directive = engine.next()
            gram = None
            if directive.gram:
                points = rng.standard_normal((engine.snapshots, 8)).cumsum(axis=0)
                points -= points[-1]
                gram = (points @ points.T)[None]
            applied = directive.action is not Action.FULL or taken % 997 > 0
            engine.observe(Observation(loss, 1.0, 1e-3, 1e-3, gram, applied))
            engine.count_time(engine.phase, 1e-3, 1e-5)
            if engine.step_done:
                return

    return step


def torch_step(folder: str) -> Callable[[], object]:
    """Steps of a trainer: a batch of noise on a small model, and every thousandth a checkpoint."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 4))
    x, y = torch.randn(512, 16), torch.randint(0, 4, (512,))
    trainer = HybridTrainer(model, torch.optim.AdamW(model.parameters(), 1e-3), max_grad_norm=1.0)
    trainer.save_every(1000, folder)

    def step() -> None:
        batch = torch.randint(0, 512, (32,))
        trainer.step(lambda: F.cross_entropy(model(x[batch]), y[batch]))

    return step


def soak(step: Callable[[], object], steps: int) -> dict[str, list[float]]:
    """Run, and note by twentieths of the steps what is in use and the mean processor time."""
    seen: dict[str, list[float]] = {"resident_mib": [], "handles": [], "step_us": []}
    page = resource.getpagesize() / 2**20
    for _ in range(PARTS):
        start = process_time()
        for _ in range(steps // PARTS):
            step()
        spent = process_time() - start
        resident = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        seen["resident_mib"].append(round(resident * page, 1))
        seen["handles"].append(len(os.listdir("/proc/self/fd")))
        seen["step_us"].append(round(1e6 * spent / (steps // PARTS), 2))
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--share", type=float, default=1.0, help="of the steps")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "soak.json")
    arguments = parser.parse_args()
    share = arguments.share
    command = f"python benchmarks/soak.py --share {share:g}"
    runs: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, step, steps in (
            ("engine", engine_step(), int(1e6 * share)),
            ("torch", torch_step(folder), int(1e5 * share)),
        ):
            runs[name] = {"steps": steps} | soak(step, steps)
            print(json.dumps({name: runs[name]}), flush=True)
    document = environment() | {"command": command, "runs": runs}
    arguments.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
