"""What the parts of a decision and the models of the loss each add to cost-to-target.

    python benchmarks/ablation.py

trains the SIREN and the PINN plain and by jumps with each part left out or put in, from the same
seeds, and records in benchmarks/results/ablation.json the cost to plain's lowest loss as a share of
plain's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import torch

from hybridcore import HybridTrainerConfig
from hybridcore.bandit import LinUCB
from hybridcore.cli.common import environment
from hybridcore.cli.compare import Run, forward_cost, training
from hybridcore.cli.workloads import WORKLOADS
from hybridcore.controller import Controller
from hybridcore.divergence import DivergenceMonitor, RecoveryAction
from hybridcore.metrics import finite

RESULTS = Path(__file__).parent / "results" / "ablation.json"
# The best rates of plain training.
RATES = {"siren": 2e-3, "burgers": 1e-2}


class Indifferent(LinUCB):
    """A bandit that has no opinion."""

    def values(self, context: object) -> dict[str, tuple[float, float]]:
        return dict.fromkeys(super().values((0.0,) * 6), (0.0, 0.0))


class Unmoved(DivergenceMonitor):
    """A monitor that never asks for anything."""

    def action(self) -> RecoveryAction:
        return RecoveryAction.CONTINUE


def unchanged(controller: Controller) -> None:
    """Leave everything as it is."""


def without_bandit(controller: Controller) -> None:
    """Let the probes alone decide."""
    controller.rule.bandit.__class__ = Indifferent


def without_monitor(controller: Controller) -> None:
    """Let no divergence shorten or forbid a jump."""
    controller.monitor.__class__ = Unmoved


# Both tasks have the same batch in each step, and would leave little to jumps otherwise.
JUMPS = HybridTrainerConfig(secant_pairs=0)
CORRECTED = replace(JUMPS, group_correction=True)

Variant: TypeAlias = tuple[HybridTrainerConfig, Callable[[Controller], None]]

VARIANTS: dict[str, Variant] = {
    "default": (JUMPS, unchanged),
    "without the bandit": (JUMPS, without_bandit),
    "without the monitor": (JUMPS, without_monitor),
    "with group correction": (CORRECTED, unchanged),
    "mlp": (replace(JUMPS, dynamics="mlp"), unchanged),
    "rssm": (replace(JUMPS, dynamics="rssm"), unchanged),
    "rssm with its head": (replace(CORRECTED, dynamics="rssm"), unchanged),
}


def cost_to(target: float, loop: Iterator[Run], limit: float) -> float:
    """Cost at which `loop` reaches `target`, infinite if that is more than `limit`."""
    for run in loop:
        if len(run.loss) % 10 == 0 or run.cost[-1] > limit:
            step = run.first_at(target)
            if step is not None:
                return run.cost[step]
            if run.cost[-1] > limit:
                break
    return math.inf


def hybrid(name: str, seed: int, price: float, variant: Variant) -> Iterator[Run]:
    """Train with one variant, step by step."""
    config, alter = variant
    loop = training(WORKLOADS[name], seed, RATES[name], price, hybrid=True, config=config)
    for run in loop:
        if len(run.loss) == 1:
            assert run.trainer is not None
            controller = run.trainer.engine.controller
            assert isinstance(controller, Controller)
            alter(controller)
        yield run


def measure(
    variants: dict[str, Variant], seeds: int, few: int | None = None
) -> dict[str, list[float]]:
    """Cost to plain's lowest loss as a share of plain's, by task and variant, one for each seed."""
    ratios: dict[str, list[float]] = {}
    for name in RATES:
        steps = few or WORKLOADS[name].steps
        price = forward_cost(WORKLOADS[name])
        targets = []
        for seed in range(seeds):
            loop = training(WORKLOADS[name], seed, RATES[name], price, hybrid=False)
            run = list(itertools.islice(loop, steps))[-1]
            target = run.lowest()
            step = run.first_at(target)
            assert step is not None
            targets.append((target, run.cost[step]))
        for title, variant in variants.items():
            found = ratios[f"{name}, {title}"] = [
                cost_to(target, hybrid(name, seed, price, variant), 1.5 * cost) / cost
                for seed, (target, cost) in enumerate(targets)
            ]
            shown = " ".join(f"{ratio:.2f}" for ratio in found)
            print(f"{name:8} {title:22} {statistics.median(found):.3f}  ({shown})", flush=True)
    return ratios


def record(variants: dict[str, Variant], results: Path) -> None:
    """Measure as the command line asks, and write what came out to `results`."""
    parser = argparse.ArgumentParser(
        description=(sys.modules["__main__"].__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="fewer than the workload's, for a quick look")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ratios = measure(variants, arguments.seeds, arguments.steps)
    document = environment() | {
        "command": f"python benchmarks/{Path(sys.argv[0]).name} --seeds {arguments.seeds}"
        + (f" --steps {arguments.steps}" if arguments.steps else ""),
        "cost_ratios": ratios,
    }
    results.parent.mkdir(exist_ok=True)
    results.write_text(json.dumps(finite(document), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    record(VARIANTS, RESULTS)
