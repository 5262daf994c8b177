"""Runs of the proving ground: one trial metered from outside, and all of them, resumable."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from benchmarks.proving_ground.methods import METHODS, Method, missing
from hybridcore.cli.common import environment
from hybridcore.cli.compare import SMOOTHING, Meter, forward_cost
from hybridcore.cli.workloads import Workload
from hybridcore.metrics import finite

RESULTS = Path(__file__).parents[1] / "results" / "proving_ground"
BUDGETS = (0.35, 0.5, 0.7, 1.0, 1.4)
# Settings that go from the first seed, on which all are tried, to the others: what is best on one
# may be so by luck.
FINALISTS = 4
Trial = dict[str, Any]
Settings = tuple[float, str]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is run.

    Attributes
    ----------
    seeds : int
        Seeds, from 0.
    budgets : tuple of float
        Multiples of a workload's steps; 1 must be among them.
    more : tuple of float
        Further ones, for a method that leaves passes out: until it has spent as many as others.
    shrink : float
        Factor on the steps of every workload but `whole`.
    whole : str
        Name of a workload that keeps its steps, or "".
    rates : int
        Learning rates of the grid that are tried, from the middle outwards.
    """

    seeds: int = 5
    budgets: tuple[float, ...] = BUDGETS
    more: tuple[float, ...] = (2.0, 2.8)
    shrink: float = 1.0
    whole: str = ""
    rates: int = 7


# Something is predicted in one of them, after the warm-up.
QUICK = Plan(seeds=1, budgets=(0.5, 1.0), more=(), shrink=0.03, whole="logistic", rates=1)


class Training:
    """One loop that is metered from outside.

    Parameters
    ----------
    workload, method
        What is trained, and how.
    rate, variant, steps
        As for the loops of `methods`.
    seed : int
        Of weights and batches.
    """

    def __init__(
        self, workload: Workload, method: Method, rate: float, variant: str, seed: int, steps: int
    ) -> None:
        self.workload = workload
        self.task = workload.build(seed)
        self.loop = method.loop(self.task, workload, rate, variant, steps)
        self.settings = {"rate": rate, "variant": variant, "steps": steps}
        self.meter = Meter()
        self.losses: list[float] = []
        self.lowest = math.inf
        self.cpu = self.wall = 0.0
        self.taken = 0

    def step(self) -> None:
        """Take the next step."""
        closure = self.meter.watch(self.task.closure(self.taken))
        began_cpu, began = process_time(), perf_counter()
        loss = self.loop.step(closure)
        self.wall += perf_counter() - began
        self.cpu += process_time() - began_cpu
        self.taken += 1
        if loss is not None:
            self.losses.append(loss)
            if len(self.losses) >= SMOOTHING:
                self.lowest = min(self.lowest, statistics.median(self.losses[-SMOOTHING:]))

    def spent(self) -> Trial:
        """What it has cost: passes, of which those forward alone are counted beside, and time."""
        return {
            "backward": self.meter.backward,
            "forward_alone": self.meter.forward - self.meter.backward,
            "cpu_seconds": self.cpu,
            "wall_seconds": self.wall,
        }

    def result(self) -> Trial:
        """What it cost and what came out, as plain numbers."""
        with self.loop.shipped():
            shipped = self.task.held_out()
        summary = self.loop.statistics()
        return {
            **self.settings,
            **self.spent(),
            "score": shipped if self.workload.noisy else min(self.lowest, shipped),
            "statistics": None if summary is None else summary.to_dict(),
        }


def train(
    workload: Workload,
    method: Method,
    rate: float,
    variant: str,
    seed: int,
    steps: int,
    beside: Method | None = None,
) -> Trial:
    """Train once and return what it cost and what came out, as plain numbers.

    With `beside` a second loop takes its steps in turn with those of the first, and what it has
    spent is in the result too: the time of one is only worth something next to that of another in
    the same minutes.
    """
    run = Training(workload, method, rate, variant, seed, steps)
    other = None if beside is None else Training(workload, beside, rate, variant, seed, steps)
    for _ in range(steps):
        run.step()
        if other:
            other.step()
    return run.result() | ({"beside": other.spent()} if other else {})


class Record:
    """The file of one workload, method and seed: its trials, written after each."""

    def __init__(self, folder: Path, workload: str, method: str, seed: int) -> None:
        self.path = folder / f"{workload}-{method}-{seed}.json"
        self.content: dict[str, Any] = {
            **environment(),
            "command": "python -m benchmarks.proving_ground run --all",
            "workload": workload,
            "method": method,
            "seed": seed,
            "trials": [],
        }
        if self.path.exists():
            self.content = json.loads(self.path.read_text(encoding="utf-8"))

    def find(self, rate: float, variant: str, steps: int) -> Trial | None:
        """Return the trial with these settings, None if it was not run."""
        wanted = (rate, variant, steps)
        for trial in self.content["trials"]:
            if (trial["rate"], trial["variant"], trial["steps"]) == wanted:
                return trial  # type: ignore[no-any-return]
        return None

    def add(self, trial: Trial) -> None:
        """Append `trial`, and write the file in one move."""
        self.content["trials"].append(trial)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".part")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)


def cost(trial: Trial) -> float:
    """Work of a run in full steps, counted from outside."""
    return float(trial["backward"] + trial["forward_cost"] * trial["forward_alone"])


def score(trial: Trial) -> float:
    """Score of a trial; one that ended in no number at all is the worst."""
    return math.inf if trial["score"] is None else float(trial["score"])


def finalists(first: list[Trial]) -> list[Settings]:
    """Rates and variants that are tried on every seed: the best of the first one's trials."""
    return [(t["rate"], t["variant"]) for t in sorted(first, key=score)[:FINALISTS]]


def best(first: list[Trial], others: list[list[Trial]]) -> Settings:
    """Rate and variant with the lowest median score over seeds, among the finalists.

    Seeds on which not all of them are on record do not count.
    """
    chosen = finalists(first)
    seeds = [{(t["rate"], t["variant"]): score(t) for t in trials} for trials in (first, *others)]
    complete = [scores for scores in seeds if all(settings in scores for settings in chosen)]
    return min(chosen, key=lambda settings: statistics.median(s[settings] for s in complete))


def sized(workload: Workload, plan: Plan) -> Workload:
    """`workload` at the size of `plan`."""
    middle = sorted(
        workload.learning_rates,
        key=lambda rate: abs(
            workload.learning_rates.index(rate) - len(workload.learning_rates) // 2
        ),
    )
    shrunk = max(20, round(workload.steps * plan.shrink))
    return replace(
        workload,
        steps=workload.steps if workload.name == plan.whole else shrunk,
        learning_rates=tuple(sorted(middle[: plan.rates])),
    )


def run(
    workloads: list[Workload], methods: list[Method], plan: Plan, folder: Path, say: Say
) -> None:
    """Run what is missing in `folder`: first the tuning of each method, then all budgets."""
    for workload in (sized(workload, plan) for workload in workloads):
        try:
            price = forward_cost(workload)
        except ModuleNotFoundError as error:
            say(f"{workload.name}: left out, {error}")
            continue
        for method in methods:
            lack = missing(method)
            if lack is not None:
                say(f"{workload.name}, {method.name}: left out, {lack}")
                continue
            settings = _tune(workload, method, plan.seeds, folder, price, say)
            for seed in range(plan.seeds):
                spent = 0.0
                for budget in (*plan.budgets, *plan.more):
                    if budget in plan.more and spent >= plan.budgets[-1] * workload.steps:
                        break
                    steps = round(budget * workload.steps)
                    found = _trial(workload, method, *settings, steps, seed, folder, price, say)
                    spent = cost(found)


def _tune(
    workload: Workload, method: Method, seeds: int, folder: Path, price: float, say: Say
) -> Settings:
    """Try all settings on the first seed, and the best of them on the others."""
    if method.trial_of is not None:
        return _tune(workload, METHODS[method.trial_of], seeds, folder, price, say)

    def at(settings: Settings, seed: int) -> Trial:
        return _trial(workload, method, *settings, workload.steps, seed, folder, price, say)

    rates, variants = workload.learning_rates, method.variants
    first = [at((rate, variant), 0) for rate in rates for variant in variants]
    chosen = finalists(first)
    return best(first, [[at(settings, s) for settings in chosen] for s in range(1, seeds)])


def _trial(
    workload: Workload,
    method: Method,
    rate: float,
    variant: str,
    steps: int,
    seed: int,
    folder: Path,
    price: float,
    say: Say,
) -> Trial:
    record = Record(folder, workload.name, method.name, seed)
    found = record.find(rate, variant, steps)
    if found is None:
        # The twin of a run at full length is timed next to it.
        beside = METHODS[method.trial_of] if method.trial_of and steps == workload.steps else None
        found = finite(train(workload, method, rate, variant, seed, steps, beside))
        found["forward_cost"] = price
        found["full_budget"] = workload.steps
        record.add(found)
        shown = "-" if found["score"] is None else f"{found['score']:.4g}"
        say(
            f"{workload.name:14} {method.name:12} seed {seed}  rate {rate:<7g} {variant:9} "
            f"{steps:5} steps  score {shown}  {found['wall_seconds']:.1f} s"
        )
    return found
