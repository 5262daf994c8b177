"""From recorded trials to cost-to-target, speed-ups and tables."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.proving_ground.methods import METHODS
from benchmarks.proving_ground.runs import Trial, best
from benchmarks.proving_ground.workloads import GROUND

PEERS = ("hybridcore", "ema", "lookahead", "snoo", "schedulefree")
REFERENCE_SAVED = 0.78


class Point(NamedTuple):
    """What a run cost, in full steps, and the score that it reached."""

    cost: float
    score: float


class Reached(NamedTuple):
    """Cost to a target; `bound` is ">" where it was not reached, "<" where the first run did."""

    cost: float
    bound: str = ""


def cost_to_target(points: Iterable[Point], target: float) -> Reached:
    """Cost at which the line through (log cost, log score) first reaches `target`.

    Where no run reaches it, the largest cost with the bound ">"; where the cheapest run is below it
    already, that run's cost with the bound "<".
    """
    ordered = sorted(points)
    if not ordered:
        raise ValueError("points must hold at least one run, got none: run the workload first")
    before: Point | None = None
    for point in ordered:
        if point.score <= target:
            if before is None:
                return Reached(point.cost, "<" if point.score < target else "")
            share = math.log(before.score / target) / math.log(before.score / point.score)
            return Reached(before.cost * (point.cost / before.cost) ** share)
        before = point
    return Reached(ordered[-1].cost, ">")


def cost(trial: Trial) -> float:
    """Work of a run in full steps, counted from outside."""
    return float(trial["backward"] + trial["forward_cost"] * trial["forward_alone"])


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles over seeds, and whether a bound is among them."""

    low: float
    middle: float
    high: float
    bound: str = ""

    @classmethod
    def of(cls, values: list[float], bounds: Iterable[str] = ()) -> Spread:
        """Quartiles of `values`."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0], "".join(sorted(set(bounds))))
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(low, middle, high, "".join(sorted(set(bounds))))

    @property
    def sign(self) -> str:
        """Bound of the ratio: a cost above its bound is a speed-up below it."""
        return {">": "<", "<": ">", "<>": "~", "": ""}[self.bound]

    def __str__(self) -> str:
        return f"{self.sign}{self.middle:.2f} ({self.low:.2f} to {self.high:.2f})"


class Ground:
    """All recorded trials of a folder.

    Parameters
    ----------
    folder : Path
        Where ``run`` wrote.
    """

    def __init__(self, folder: Path) -> None:
        self._trials: dict[tuple[str, str, int], list[Trial]] = {}
        for path in sorted(folder.glob("*.json")):
            content = json.loads(path.read_text(encoding="utf-8"))
            key = content["workload"], content["method"], content["seed"]
            self._trials[key] = content["trials"]

    @property
    def workloads(self) -> list[str]:
        """Names of the workloads on record, in the order of the ground."""
        found = {key[0] for key in self._trials}
        return [name for name in GROUND if name in found]

    def seeds(self, workload: str, method: str) -> list[int]:
        """Seeds on record."""
        return sorted(s for w, m, s in self._trials if (w, m) == (workload, method))

    def chosen(self, workload: str, method: str) -> tuple[float, str]:
        """Rate and variant of the best trial at the full budget on the first seed."""
        tuner = METHODS[method].trial_of or method
        trials = self._trials[workload, tuner, 0]
        choice = best([t for t in trials if t["steps"] == t["full_budget"]])
        return choice["rate"], choice["variant"]

    def runs(self, workload: str, method: str, seed: int) -> list[Trial]:
        """Runs of the best trial at all budgets, shortest first; no number is infinitely bad."""
        chosen = self.chosen(workload, method)
        trials = self._trials[workload, method, seed]
        own = [
            t | {"score": math.inf if t["score"] is None else t["score"]}
            for t in trials
            if (t["rate"], t["variant"]) == chosen
        ]
        return sorted(own, key=lambda t: t["steps"])

    def full(self, workload: str, method: str, seed: int) -> Trial | None:
        """Return the run at the full budget, None if it was not run."""
        runs = self.runs(workload, method, seed)
        return next((t for t in runs if t["steps"] == t["full_budget"]), None)

    def speedup(self, workload: str, method: str, baseline: str) -> Spread | None:
        """How much less `method` costs to the baseline's score at its full budget, over seeds.

        The baseline is held to the same rule: its cost is that at which it first was as good.
        """
        return self._compare(workload, method, baseline, cost)

    def backward_saved(self, workload: str) -> Spread | None:
        """How many backward passes the tuned loop needs for each of hybridcore's, likewise."""
        return self._compare(workload, "hybridcore", "tuned", lambda t: float(t["backward"]))

    def _compare(
        self, workload: str, method: str, baseline: str, price: Callable[[Trial], float]
    ) -> Spread | None:
        ratios, bounds = [], []
        for seed in self.seeds(workload, method):
            target = self._full_of(workload, baseline, seed)
            runs = self.runs(workload, method, seed)
            if target is None or not runs or not math.isfinite(target["score"]):
                continue
            own, other = (
                cost_to_target([Point(price(t), max(t["score"], 1e-30)) for t in each], goal)
                for goal in [max(target["score"], 1e-30)]
                for each in (runs, self.runs(workload, baseline, seed))
            )
            ratios.append(other.cost / own.cost)
            bounds.append(own.bound)
        return Spread.of(ratios, bounds) if ratios else None

    def processor_ratio(self, workload: str) -> Spread | None:
        """Processor time of a step of hybridcore's run over one of its plain twin."""
        ratios = []
        for seed in self.seeds(workload, "twin"):
            own, twin = (self.full(workload, m, seed) for m in ("hybridcore", "twin"))
            if own is not None and twin is not None:
                ratios.append(own["cpu_seconds"] / twin["cpu_seconds"] / (cost(own) / cost(twin)))
        return Spread.of(ratios) if ratios else None

    def self_measured(self) -> tuple[int, int]:
        """Smooth runs whose stated interval holds the truth from the plain twin, and those counted.

        The truth is what the twin costs to the score of the run, over what the run says it cost,
        its own time included. Runs that predicted nothing state no gain and are not counted.
        """
        right = stated = 0
        for workload in self.workloads:
            for seed in self.seeds(workload, "twin") if not GROUND[workload].noisy else []:
                own = self.full(workload, "hybridcore", seed)
                runs = self.runs(workload, "twin", seed)
                if own is None or not runs or own["statistics"]["predicted_steps"] == 0:
                    continue
                low, high = own["statistics"]["measured_speedup_interval"]
                points = [Point(cost(t), max(t["score"], 1e-30)) for t in runs]
                reached = cost_to_target(points, max(own["score"], 1e-30))
                truth = reached.cost / own["statistics"]["cost"]
                stated += 1
                # Infinities are None in a file.
                above = reached.bound == ">" or low is None or low <= truth
                below = reached.bound == "<" or high is None or truth <= high
                right += above and below
        return right, stated

    def _full_of(self, workload: str, method: str, seed: int) -> Trial | None:
        if (workload, method, seed) not in self._trials:
            return None
        return self.full(workload, method, seed)


def tables(ground: Ground) -> str:
    """Markdown tables of all that is on record."""
    parts = []
    for baseline in ("tuned", "written"):
        methods = [m for m in PEERS if any(ground.seeds(w, m) for w in ground.workloads)]
        title = METHODS[baseline].title
        parts.append(
            f"| speed-up against {title} | " + " | ".join(METHODS[m].title for m in methods)
        )
        parts[-1] += " |\n|---" + "|---" * len(methods) + "|"
        for noisy, kind in ((False, "smooth"), (True, "noisy")):
            medians: dict[str, list[float]] = {m: [] for m in methods}
            for name in ground.workloads:
                if GROUND[name].noisy is not noisy:
                    continue
                cells = []
                for method in methods:
                    spread = ground.speedup(name, method, baseline)
                    cells.append("-" if spread is None else str(spread))
                    medians[method].append(math.nan if spread is None else spread.middle)
                parts.append(f"| {GROUND[name].title} | " + " | ".join(cells) + " |")
            # Over all workloads or not at all: a mean over the easy ones says nothing.
            means = [
                "-"
                if not v or any(map(math.isnan, v))
                else f"**{statistics.geometric_mean(v):.2f}**"
                for v in medians.values()
            ]
            if any(medians.values()):
                parts.append(f"| **{kind}, geometric mean** | " + " | ".join(means) + " |")
        parts.append("")
    parts.append("| hybridcore | rate, schedule | backward passes saved | processor time by cost |")
    parts.append("|---|---|---|---|")
    for name in ground.workloads:
        if not ground.seeds(name, "hybridcore"):
            continue
        rate, variant = ground.chosen(name, "hybridcore")
        saved, ratio = ground.backward_saved(name), ground.processor_ratio(name)
        shown = "-" if saved is None else f"{saved.sign}{1 - 1 / saved.middle:.0%}"
        parts.append(f"| {GROUND[name].title} | {rate:g}, {variant} | {shown} | {ratio or '-'} |")
    right, stated = ground.self_measured()
    parts.append("")
    parts.append(
        f"Backward passes saved at equal final score; the reference claims {REFERENCE_SAVED:.0%}. "
        f"Of {stated} smooth runs that predicted, the interval that the run states of its own "
        f"speed-up holds the truth in {right}."
    )
    return "\n".join(parts)
