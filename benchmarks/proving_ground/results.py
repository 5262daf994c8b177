"""From recorded trials to cost-to-target, speed-ups and tables."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.proving_ground.methods import METHODS
from benchmarks.proving_ground.runs import Trial, best, cost
from benchmarks.proving_ground.workloads import GROUND

# Scores below are rounding.
LEAST = 1e-30
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


class Ratio(NamedTuple):
    """What is counted for one seed; whether it is that at most or at least; a target missed."""

    value: float
    at_most: bool = False
    at_least: bool = False
    missed: bool = False


def cost_to_target(points: Iterable[Point], target: float) -> Reached:
    """Cost at which the line through (log cost, log score) first reaches `target`.

    Where no run reaches it, the largest cost with the bound ">"; where the cheapest run is below it
    already, or the first after those that ended in no number, that run's cost with the bound "<".
    """
    ordered = sorted(points)
    if not ordered:
        raise ValueError("points must hold at least one run, got none: run the workload first")
    before: Point | None = None
    for point in ordered:
        if point.score <= target:
            if before is None or math.isinf(before.score):
                return Reached(point.cost, "<" if point.score < target else "")
            share = math.log(before.score / target) / math.log(before.score / point.score)
            return Reached(before.cost * (point.cost / before.cost) ** share)
        before = point
    return Reached(ordered[-1].cost, ">")


def score_at(points: Iterable[Point], cost: float) -> float:
    """Score on the line through (log cost, log score) at `cost`, NaN beyond the points."""
    known = [point for point in sorted(points) if math.isfinite(point.score)]
    if not known:
        return math.nan
    costs, scores = np.log(known).T
    return float(np.exp(np.interp(np.log(cost), costs, scores, left=math.nan, right=math.nan)))


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles over seeds.

    Attributes
    ----------
    low, middle, high : float
        Quartiles.
    sign : str
        "<" where the median is what is shown at most, ">" where it is that at least, "~" where
        either may be, else "".
    count, missed : int
        Seeds, and those on which the target was not reached.
    """

    low: float
    middle: float
    high: float
    sign: str = ""
    count: int = 1
    missed: int = 0

    @classmethod
    def of(cls, ratios: list[Ratio]) -> Spread:
        """Quartiles of what is counted, and whether the median may be another."""
        values = [ratio.value for ratio in ratios]
        middle = statistics.median(values)
        low, high = np.percentile(values, (25, 75)).tolist()
        below = statistics.median(0.0 if r.at_most else r.value for r in ratios) < middle
        above = statistics.median(math.inf if r.at_least else r.value for r in ratios) > middle
        sign = {(True, True): "~", (True, False): "<", (False, True): ">"}.get((below, above), "")
        return cls(low, middle, high, sign, len(ratios), sum(ratio.missed for ratio in ratios))

    def __str__(self) -> str:
        there = f"; {self.count - self.missed} of {self.count} there" if self.missed else ""
        return f"{self.sign}{self.middle:.2f} ({self.low:.2f} to {self.high:.2f}{there})"


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
        """Rate and variant with the best median score at the full budget."""
        name = METHODS[method].trial_of or method
        others = [seed for seed in self.seeds(workload, name) if seed]
        first = self._tuning(workload, method)
        return best(first, [self._tuning(workload, method, seed) for seed in others])

    def edge(self, workload: str, method: str) -> str:
        """Which end of the rates that were tried the best one is, "" where it is inside."""
        rates = sorted({trial["rate"] for trial in self._tuning(workload, method)})
        rate, _ = self.chosen(workload, method)
        return {rates[-1]: "highest", rates[0]: "lowest"}.get(rate, "") if len(rates) > 1 else ""

    def _tuning(self, workload: str, method: str, seed: int = 0) -> list[Trial]:
        trials = self._trials[workload, METHODS[method].trial_of or method, seed]
        full = max(t["full_budget"] for t in trials)
        return [t for t in trials if t["steps"] == full]

    def runs(self, workload: str, method: str, seed: int) -> list[Trial]:
        """Runs of the best trial at all budgets, shortest first; no number is infinitely bad."""
        chosen = self.chosen(workload, method)
        trials = self._trials.get((workload, method, seed), [])
        own = [
            t | {"score": math.inf if t["score"] is None else t["score"]}
            for t in trials
            if (t["rate"], t["variant"]) == chosen
        ]
        return sorted(own, key=lambda t: t["steps"])

    def full(self, workload: str, method: str, seed: int) -> Trial | None:
        """Return the run at the full budget, None if it was not run."""
        runs = self.runs(workload, method, seed)
        full = max((t["full_budget"] for t in runs), default=0)
        return next((t for t in runs if t["steps"] == full), None)

    def speedup(self, workload: str, method: str, baseline: str) -> Spread | None:
        """How much less `method` costs to the baseline's score at its full budget, over seeds.

        The baseline is held to the same rule: its cost is that at which it first was as good. Who
        does not get there counts as what the longest run of either cost.
        """
        return self._compare(workload, method, baseline, cost)

    def backward_saved(self, workload: str) -> Spread | None:
        """How many backward passes the tuned loop needs for each of hybridcore's, likewise."""
        return self._compare(workload, "hybridcore", "tuned", lambda t: float(t["backward"]))

    def _compare(
        self, workload: str, method: str, baseline: str, price: Callable[[Trial], float]
    ) -> Spread | None:
        ratios = []
        for seed in self.seeds(workload, method):
            target = self._full_of(workload, baseline, seed)
            runs = self.runs(workload, method, seed)
            if target is None or not runs or not math.isfinite(target["score"]):
                continue
            goal = max(target["score"], LEAST)
            theirs = _points(self.runs(workload, baseline, seed), price)
            own, other = cost_to_target(_points(runs, price), goal), cost_to_target(theirs, goal)
            if own.bound == ">":
                own = Reached(max(own.cost, *(point.cost for point in theirs)), ">")
            missed = own.bound == ">"
            at_most, at_least = missed or other.bound == "<", own.bound == "<"
            ratios.append(Ratio(other.cost / own.cost, at_most, at_least, missed))
        return Spread.of(ratios) if ratios else None

    def beside_less_training(self, workload: str) -> Spread | None:
        """Score of hybridcore's full run over that of a tuned loop that is as much shorter."""
        ratios = []
        for seed in self.seeds(workload, "hybridcore"):
            own = self.full(workload, "hybridcore", seed)
            if own is None:
                continue
            less = score_at(_points(self.runs(workload, "tuned", seed)), cost(own))
            if math.isfinite(own["score"] / less):
                ratios.append(Ratio(max(own["score"], LEAST) / less))
        return Spread.of(ratios) if ratios else None

    def processor_ratio(self, workload: str) -> Spread | None:
        """Processor time of a step of hybridcore's run over one of its plain twin.

        Of both at full length, taking turns step by step.
        """
        ratios = []
        for seed in self.seeds(workload, "twin"):
            twin = self.full(workload, "twin", seed)
            # Records from before runs were timed side by side have no such run.
            if twin is not None and "beside" in twin:
                own = twin["beside"] | {"forward_cost": twin["forward_cost"]}
                seconds = own["cpu_seconds"] / twin["cpu_seconds"]
                ratios.append(Ratio(seconds / (cost(own) / cost(twin))))
        return Spread.of(ratios) if ratios else None

    def self_measured(self) -> tuple[int, int, int]:
        """Runs whose stated interval holds the truth from the plain twin, those tested, and all.

        The truth is what the twin costs to the score of the run, over what the run says it cost,
        its own time included. A run is tested where the twin got there, or where that it did not
        refutes the interval; those that predicted nothing state no gain.
        """
        right = tested = stated = 0
        for workload in self.workloads:
            for seed in self.seeds(workload, "twin"):
                runs, twin = (self.runs(workload, m, seed) for m in ("hybridcore", "twin"))
                for own in runs if twin else []:
                    if own["statistics"]["predicted_steps"] == 0 or math.isinf(own["score"]):
                        continue
                    stated += 1
                    low, high = own["statistics"]["measured_speedup_interval"]
                    reached = cost_to_target(_points(twin), max(own["score"], LEAST))
                    truth = reached.cost / own["statistics"]["cost"]
                    # Infinities are None in a file.
                    too_high = reached.bound != ">" and low is not None and low > truth
                    too_low = reached.bound != "<" and high is not None and high < truth
                    testable = not reached.bound or too_high or too_low
                    tested += testable
                    right += testable and not (too_high or too_low)
        return right, tested, stated

    def _full_of(self, workload: str, method: str, seed: int) -> Trial | None:
        if (workload, method, seed) not in self._trials:
            return None
        return self.full(workload, method, seed)


def _points(runs: Iterable[Trial], price: Callable[[Trial], float] = cost) -> list[Point]:
    return [Point(price(trial), max(trial["score"], LEAST)) for trial in runs]


def tables(ground: Ground) -> str:
    """Markdown tables of all that is on record."""
    methods = [m for m in PEERS if any(ground.seeds(w, m) for w in ground.workloads)]
    parts = [_speedups(ground, methods, baseline) for baseline in ("tuned", "written")]
    right, tested, stated = ground.self_measured()
    claimed = f"{REFERENCE_SAVED:.0%}"
    parts.append(_of_hybridcore(ground))
    parts.append(
        f"Backward passes saved at equal final score; the reference claims {claimed}. "
        f"Of {stated} runs that predicted, at all budgets, the plain twin can test {tested}; the "
        f"interval that the run states of its own speed-up holds the truth in {right} of these."
    )
    for edge in ("highest", "lowest"):
        found = []
        for name in ground.workloads:
            known = [m for m in ("tuned", "written", *methods) if ground.seeds(name, m)]
            at_edge = [METHODS[m].title for m in known if ground.edge(name, m) == edge]
            if at_edge:
                found.append(f"{GROUND[name].title} ({', '.join(at_edge)})")
        if found:
            parts.append(f"Best at the {edge} rate that was tried: {'; '.join(found)}.")
    return "\n\n".join(parts)


def _speedups(ground: Ground, methods: list[str], baseline: str) -> str:
    lines = [
        _row(f"speed-up against {METHODS[baseline].title}", (METHODS[m].title for m in methods)),
        _row("---", ["---"] * len(methods)),
    ]
    for kind, names in _kinds(ground):
        spreads = {m: [ground.speedup(name, m, baseline) for name in names] for m in methods}
        for index, name in enumerate(names):
            lines.append(_row(GROUND[name].title, (spreads[m][index] for m in methods)))
        lines.append(_row(f"**{kind}, geometric mean**", map(_mean, spreads.values())))
    return "\n".join(lines)


def _of_hybridcore(ground: Ground) -> str:
    titles = [
        "rate, schedule",
        "processor time by cost",
        "speed-up in processor time",
        "loss by that of less training",
        "backward passes saved",
    ]
    lines = [_row("hybridcore against tuned schedule", titles), _row("---", ["---"] * len(titles))]
    for kind, names in _kinds(ground):
        in_time: list[Spread | None] = []
        for name in names:
            if not ground.seeds(name, "hybridcore"):
                in_time.append(None)
                continue
            rate, variant = ground.chosen(name, "hybridcore")
            saved, ratio = ground.backward_saved(name), ground.processor_ratio(name)
            timed = ground.speedup(name, "hybridcore", "tuned")
            if timed is not None:
                timed = (
                    None if ratio is None else replace(timed, middle=timed.middle / ratio.middle)
                )
            in_time.append(timed)
            cells = [
                f"{rate:g}, {variant}",
                ratio,
                None if timed is None else f"{timed.sign}{timed.middle:.2f}",
                ground.beside_less_training(name),
                None if saved is None else f"{saved.sign}{1 - 1 / saved.middle:.0%}",
            ]
            lines.append(_row(GROUND[name].title, cells))
        mean = ["", "", _mean(in_time), "", ""]
        lines.append(_row(f"**{kind}, geometric mean**", mean))
    return "\n".join(lines)


def _kinds(ground: Ground) -> Iterator[tuple[str, list[str]]]:
    for noisy, kind in ((False, "smooth"), (True, "noisy")):
        names = [name for name in ground.workloads if GROUND[name].noisy is noisy]
        if names:
            yield kind, names


def _mean(spreads: list[Spread | None]) -> str:
    # Over all workloads or not at all: a mean over the easy ones says nothing.
    known = [spread for spread in spreads if spread is not None]
    if len(known) < len(spreads):
        return "-"
    middle = statistics.geometric_mean(spread.middle for spread in known)
    signs = {spread.sign for spread in known if spread.sign}
    return f"**{signs.pop() if len(signs) == 1 else '~' if signs else ''}{middle:.2f}**"


def _row(title: str, cells: Iterable[object]) -> str:
    return f"| {title} | " + " | ".join("-" if c is None else str(c) for c in cells) + " |"
