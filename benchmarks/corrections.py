"""What corrections are worth: micro-corrections inside a jump, and the scales of layer groups.

    python benchmarks/corrections.py

trains the SIREN and the PINN by jumps. From the start of every jump that follows a forecast it is
made six times: as far as it was meant to go, twice and three times as far, each with the probes on
the way that may cut it short, and without. Then the run goes on from there as if nothing had been.

- The *miss* of a jump is the log loss where it lands less what was forecast for there, its
  *progress* the fall of the log loss from before it to after it has settled, or was taken back.
- At every decision the scales that the corrector forecasts for the layer groups are held against
  those that would have been right, before it learns them. What it removes is
  ``1 - sum (right - forecast)^2 / sum (right - 1)^2``.

Recorded in benchmarks/results/corrections.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hybridcore import HybridTrainerConfig, Phase
from hybridcore.cli.common import environment
from hybridcore.cli.workloads import WORKLOADS
from hybridcore.controller import Controller
from hybridcore.corrector import Corrector
from hybridcore.extrapolation import FORECASTERS
from hybridcore.metrics import finite
from hybridcore.phases import Event
from hybridcore.planning import Flight
from hybridcore_torch import HybridTrainer

RESULTS = Path(__file__).parent / "results" / "corrections.json"
RATES = {"siren": 2e-3, "burgers": 1e-2}
CONFIG = HybridTrainerConfig(secant_pairs=0, group_correction=True)
STRETCHES = (1, 2, 3)


class Blind(Flight):
    """A jump that goes all of its way, whatever is seen there."""

    def correct(self, taken: int, log_loss: float, margin: float) -> Event | None:
        return Event.HORIZON_REACHED if taken == self.last else None


class Observed(Corrector):
    """Corrects nothing, and keeps what it would have said beside what would have been right."""

    pairs: list[tuple[list[float], list[float]]]

    def predict(self, context: Any) -> Any:
        return np.ones_like(super().predict(context))

    def update(self, context: Any, residual: Any) -> bool:
        right = np.clip(np.asarray(residual)[:, 0], 0.0, 2.0)
        self.pairs.append((super().predict(context).tolist(), right.tolist()))
        return super().update(context, residual)


def controller_of(trainer: HybridTrainer) -> Controller:
    controller = trainer.engine.controller
    assert isinstance(controller, Controller)
    return controller


def observe(controller: Controller, pairs: list[Any]) -> None:
    """Let the corrector of a run write down what it says instead of being listened to."""
    corrector = controller.rule.corrector
    if corrector is not None and not isinstance(corrector, Observed):
        corrector.__class__, corrector.pairs = Observed, pairs  # type: ignore[attr-defined]


def fly(
    trainer: HybridTrainer, closure: Callable[[], torch.Tensor], stretch: int, corrected: bool
) -> dict[str, float]:
    """Make the jump under way from its start, and say what came of it."""
    controller = controller_of(trainer)
    flight = controller.in_flight
    reach, horizon = stretch * flight.jump.reach, stretch * flight.horizon
    kind = Flight if corrected else Blind
    fields = {
        **{name: getattr(flight, name) for name in asdict(flight)},
        "jump": replace(flight.jump, reach=reach),
        "horizon": horizon,
        "last": horizon,
        "log_target": flight.log_start + stretch * (flight.log_target - flight.log_start),
    }
    controller.flight, controller.taken = kind(**fields), 0
    interval = CONFIG.correction_interval if corrected else horizon + 1
    controller.config = replace(CONFIG, correction_interval=interval)
    taken = 0
    while controller.phase is Phase.PREDICT:
        trainer.step(closure)
        taken += 1
    landed = math.log(closure().item())
    now = controller.in_flight
    # Where the loss rose, the weights are back at the best point of the way.
    at_best = abs(landed - now.log_best) < 1e-4
    share = now.best_share if corrected and at_best else taken / horizon
    expected = now.expected(share)
    kept = False
    while controller.phase is Phase.CORRECT:
        kept = any(e["event"] == "jump kept" for e in trainer.step(closure).events)
    settled = math.log(closure().item())
    return {
        "share": share,
        "miss": landed - expected,
        "kept": float(kept),
        "progress": flight.log_start - settled,
    }


def train(name: str, seed: int, steps: int) -> tuple[dict[str, list[Any]], list[Any]]:
    """Run a task with all its jumps made six times; the flights by variant, and the scales."""
    task = WORKLOADS[name].build(seed)
    optimizer = WORKLOADS[name].optimizer(task.model, RATES[name])
    trainer = HybridTrainer(task.model, optimizer, CONFIG)
    closure = task.closure(0)
    trainer.step(closure)
    flights: dict[str, list[Any]] = {}
    scales: list[Any] = []
    for _ in range(steps - 1):
        trainer.step(closure)
        controller = controller_of(trainer)
        observe(controller, scales)
        if controller.phase is Phase.PREDICT and controller.taken == 1:
            jump = controller.in_flight.jump
            if jump.extrapolator not in FORECASTERS:
                continue
            state = copy.deepcopy(trainer.state_dict())
            for stretch in STRETCHES:
                for corrected in (False, True):
                    title = f"{stretch}x, {'corrected' if corrected else 'blind'}"
                    flights.setdefault(title, []).append(fly(trainer, closure, stretch, corrected))
                    trainer.load_state_dict(copy.deepcopy(state))
    return flights, scales


def summary(flights: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        title: {
            "jumps": len(found),
            "miss_mean": statistics.fmean(f["miss"] for f in found),
            "miss_variance": statistics.pvariance([f["miss"] for f in found]),
            "miss_mean_square": statistics.fmean(f["miss"] ** 2 for f in found),
            "kept": statistics.fmean(f["kept"] for f in found),
            "progress_mean": statistics.fmean(f["progress"] for f in found),
            "share_mean": statistics.fmean(f["share"] for f in found),
        }
        for title, found in flights.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="fewer than the workload's, for a quick look")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name in RATES:
        together: dict[str, list[Any]] = {}
        pairs: list[Any] = []
        for seed in range(arguments.seeds):
            flights, scales = train(name, seed, arguments.steps or WORKLOADS[name].steps)
            pairs += scales
            for title, found in flights.items():
                together.setdefault(title, []).extend(found)
        said, right = np.array(pairs).transpose(1, 0, 2) if pairs else np.ones((2, 0, 1))
        removed = 1.0 - ((right - said) ** 2).sum() / max(((right - 1.0) ** 2).sum(), 1e-300)
        results[name] = {
            "jumps": summary(together),
            "decisions": len(pairs),
            "group_scales_removed": float(removed),
        }
        print(name, json.dumps(results[name], indent=1), flush=True)
    document = environment() | {
        "command": f"python benchmarks/corrections.py --seeds {arguments.seeds}"
        + (f" --steps {arguments.steps}" if arguments.steps else ""),
        "results": results,
    }
    RESULTS.write_text(json.dumps(finite(document), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
