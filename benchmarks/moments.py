"""What to do with Adam's moments after a jump: keep, decay or reset them.

    python benchmarks/moments.py

trains the SIREN and the PINN with each choice, from the same seeds, and records the lowest loss
within the same number of steps in benchmarks/results/moments.json. The trainer itself keeps them.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

import torch

from hybridcore import HybridTrainerConfig, Phase, StepResult
from hybridcore.cli.demo import environment
from hybridcore.cli.workloads import WORKLOADS
from hybridcore_torch import HybridTrainer

RESULTS = Path(__file__).parent / "results" / "moments.json"
# The best rates of plain training, so that a larger effective rate is no gain by itself.
RATES = {"siren": 2e-3, "burgers": 1e-2}


def lowest_log_loss(name: str, seed: int, choice: str, steps: int) -> float:
    """Log of the lowest loss reached, with `choice` made after every jump."""
    workload = WORKLOADS[name]
    task = workload.build(seed)
    optimizer = workload.optimizer(task.model, RATES[name])

    def after_jump(result: StepResult) -> None:
        landed = result.phase is Phase.PREDICT and trainer.engine.phase is Phase.CORRECT
        if not landed or choice == "keep":
            return
        if choice == "reset":
            optimizer.state.clear()
        for state in optimizer.state.values():
            state["exp_avg"].mul_(0.5)
            state["exp_avg_sq"].mul_(0.5)

    # Jumps alone: quasi-Newton steps leave the optimizer nothing to do on these two tasks.
    config = HybridTrainerConfig(secant_pairs=0)
    trainer = HybridTrainer(task.model, optimizer, config, callbacks=[after_jump])
    losses = [trainer.step(task.closure(step)) for step in range(steps)]
    real = [result.loss for result in losses if not result.was_predicted]
    # The lowest of running medians: a run at these rates may end in a spike.
    return math.log(min(statistics.median(real[k - 5 : k]) for k in range(5, len(real) + 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=800)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = {}
    for name in RATES:
        for choice in ("keep", "decay", "reset"):
            values = [
                lowest_log_loss(name, seed, choice, arguments.steps)
                for seed in range(arguments.seeds)
            ]
            table[f"{name}, {choice}"] = [math.exp(value) for value in values]
            print(f"{name:8} {choice:6} {math.exp(statistics.median(values)):.3g}", flush=True)
    document = environment() | {
        "command": f"python benchmarks/moments.py --seeds {arguments.seeds} "
        f"--steps {arguments.steps}",
        "lowest_loss": table,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
