"""Plain against hybrid, metered from outside: what a target loss costs by each."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from time import perf_counter, process_time
from typing import Any

import torch

from hybridcore import HybridTrainerConfig, Phase
from hybridcore.cli.workloads import Closure, Task, Workload, scheduler
from hybridcore_torch import HybridTrainer

SMOOTHING = 5
Watch = Callable[[str, int, str, float], None]


@dataclass(slots=True)
class Meter:
    """Counts what a run does with the closure, whoever calls it.

    Attributes
    ----------
    forward, backward : int
        Calls of the closure, and backward passes through what it returned.
    """

    forward: int = 0
    backward: int = 0

    def watch(self, closure: Closure) -> Closure:
        """Return `closure`, counted."""

        def counted() -> torch.Tensor:
            self.forward += 1
            loss = closure()
            if loss.requires_grad:
                loss.register_hook(self._count)  # type: ignore[no-untyped-call]
            return loss

        return counted

    def _count(self, gradient: torch.Tensor) -> None:
        self.backward += 1

    def cost(self, forward_cost: float) -> float:
        """Work so far in full steps; a forward pass alone counts `forward_cost`."""
        return self.backward + forward_cost * (self.forward - self.backward)


@dataclass(slots=True)
class Run:
    """One training run, step by step.

    Attributes
    ----------
    learning_rate : float
        Rate at the start of the schedule.
    cost, seconds : list of float
        Work in full steps, and wall-clock seconds, up to the end of each step.
    loss : list of float
        Training loss of each step; of a predicted one, its forecast.
    phase : list of str
        Name of the phase of each step.
    held_out : float
        Held-out loss at the end.
    cpu_seconds : float
        Processor time of the whole run.
    statistics : dict or None
        What a hybrid run says of itself.
    """

    learning_rate: float
    cost: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    phase: list[str] = field(default_factory=list)
    held_out: float = math.nan
    cpu_seconds: float = 0.0
    statistics: dict[str, Any] | None = None

    def smooth(self) -> list[tuple[int, float]]:
        """Step and median of the last five real losses, from the fifth on."""
        real = [(i, v) for i, v in enumerate(self.loss) if self.phase[i] != Phase.PREDICT.name]
        return [
            (real[k][0], statistics.median(v for _, v in real[k - SMOOTHING + 1 : k + 1]))
            for k in range(SMOOTHING - 1, len(real))
        ]

    def final(self, noisy: bool) -> float:
        """Figure by which a run is judged: held-out loss, or training loss where all is seen."""
        return self.held_out if noisy else self.smooth()[-1][1]

    def first_at(self, target: float) -> int | None:
        """First step at which the smoothed loss is at or below `target`."""
        return next((step for step, loss in self.smooth() if loss <= target), None)

    def loss_at(self, cost: float) -> float:
        """Smoothed loss when the work reached `cost`."""
        best = math.nan
        for step, loss in self.smooth():
            if self.cost[step] > cost:
                break
            best = loss
        return best

    @property
    def predicted(self) -> int:
        """Number of predicted steps."""
        return self.phase.count(Phase.PREDICT.name)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the step-by-step lists."""
        lists = ("cost", "seconds", "loss", "phase")
        summary = {k: v for k, v in asdict(self).items() if k not in lists}
        return summary | {"steps": len(self.loss), "predicted": self.predicted}


def train(
    workload: Workload,
    seed: int,
    learning_rate: float,
    steps: int,
    forward_cost: float,
    *,
    hybrid: bool,
    config: HybridTrainerConfig | None = None,
    watch: Watch | None = None,
    target: float | None = None,
) -> Run:
    """Train once and record every step.

    Parameters
    ----------
    workload, seed, learning_rate, steps
        What to train; runs with the same seed start from the same weights and see the same batches.
    forward_cost : float
        Cost of a forward pass in full steps, from :func:`forward_cost`.
    hybrid : bool
        By :class:`HybridTrainer`, or by the plain loop.
    config : HybridTrainerConfig, optional
        Settings of the hybrid run.
    watch : callable, optional
        Called every few steps with the method, the step, the phase and the loss.
    target : float, optional
        For a hybrid run at a constant rate: go on past `steps`, to at most the cost of `steps` full
        ones, until the smoothed loss is this low.
    """
    task = workload.build(seed)
    optimizer = workload.optimizer(task.model, learning_rate)
    schedule = scheduler(optimizer, workload.schedule, steps)
    trainer = HybridTrainer(task.model, optimizer, config, scheduler=schedule) if hybrid else None
    method = "hybridcore" if hybrid else "plain"
    meter, run, elapsed, cpu = Meter(), Run(learning_rate), 0.0, process_time()
    recent: list[float] = []
    while True:
        step = len(run.loss)
        if step >= steps:
            reached = target is None or statistics.median(recent[-SMOOTHING:]) <= target
            if reached or not hybrid or run.cost[-1] >= steps:
                break
        closure = meter.watch(task.closure(step))
        start = perf_counter()
        if trainer is None:
            optimizer.zero_grad()
            loss = closure()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if schedule is not None:
                schedule.step()
            value, phase = loss.item(), "PLAIN"
        else:
            result = trainer.step(closure)
            value, phase = result.loss, result.phase.name
        elapsed += perf_counter() - start
        run.loss.append(value)
        run.phase.append(phase)
        run.cost.append(meter.cost(forward_cost))
        run.seconds.append(elapsed)
        if phase != Phase.PREDICT.name:
            recent.append(value)
        if watch is not None and step % 10 == 0:
            watch(method, step, phase, value)
    run.cpu_seconds = process_time() - cpu
    run.held_out = task.held_out()
    if trainer is not None:
        run.statistics = trainer.statistics().to_dict()
    return run


def forward_cost(workload: Workload, repeats: int = 30) -> float:
    """Measure what a forward pass takes in full steps: medians of interleaved timings."""
    task = workload.build(0)
    optimizer = workload.optimizer(task.model, workload.learning_rates[0])
    forward, full = [], []
    for step in range(repeats):
        closure = task.closure(step)
        start = perf_counter()
        _evaluate(task, closure)
        middle = perf_counter()
        optimizer.zero_grad()
        closure().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        forward.append(middle - start)
        full.append(perf_counter() - middle)
    return statistics.median(forward) / statistics.median(full)


def _evaluate(task: Task, closure: Closure) -> None:
    try:
        with torch.no_grad():
            closure()
    except RuntimeError:
        # A loss that differentiates inside needs its graph.
        closure()


@dataclass(slots=True)
class Comparison:
    """Plain and hybrid runs of one seed over the whole grid.

    Attributes
    ----------
    workload, seed
        What was trained.
    forward_cost : float
        Cost of a forward pass in full steps, measured.
    plain, hybrid : list of Run
        One run for each learning rate of the grid.
    """

    workload: Workload
    seed: int
    forward_cost: float
    plain: list[Run]
    hybrid: list[Run]

    @property
    def best_plain(self) -> Run:
        """Plain run that ended lowest."""
        return min(self.plain, key=lambda run: run.final(self.workload.noisy))

    @property
    def best_hybrid(self) -> Run:
        """Hybrid run that got to the target for the least cost, or else that ended lowest."""
        noisy = self.workload.noisy
        if noisy:
            return min(self.hybrid, key=lambda run: run.final(noisy))
        return min(self.hybrid, key=lambda run: (self._cost_to_target(run), run.final(noisy)))

    @property
    def target(self) -> float:
        """Final loss of the best plain run."""
        return self.best_plain.final(self.workload.noisy)

    def summary(self) -> dict[str, Any]:
        """Figures of the table, as plain numbers; a target that was missed costs infinity."""
        noisy, plain, hybrid = self.workload.noisy, self.best_plain, self.best_hybrid
        figures: dict[str, Any] = {
            "workload": self.workload.name,
            "seed": self.seed,
            "schedule": self.workload.schedule,
            "learning_rates": list(self.workload.learning_rates),
            "forward_cost": self.forward_cost,
            "target": self.target,
            "plain_learning_rate": plain.learning_rate,
            "hybrid_learning_rate": hybrid.learning_rate,
            "plain_final": plain.final(noisy),
            "hybrid_final": hybrid.final(noisy),
            "plain_total_cost": plain.cost[-1],
            "hybrid_total_cost": hybrid.cost[-1],
            "plain_total_seconds": plain.seconds[-1],
            "hybrid_total_seconds": hybrid.seconds[-1],
            "predicted_share": hybrid.predicted / len(hybrid.loss),
            "train_less_final": plain.loss_at(hybrid.cost[-1]),
            "runs": [
                {"method": method, **run.to_dict()}
                for method, runs in (("plain", self.plain), ("hybridcore", self.hybrid))
                for run in runs
            ],
        }
        if hybrid.statistics is not None:
            figures["measured_speedup"] = hybrid.statistics["measured_speedup"]
            figures["self_measured_cost"] = hybrid.statistics["cost"]
        if noisy:
            return figures
        at_plain, at_hybrid = plain.first_at(self.target), hybrid.first_at(self.target)
        assert at_plain is not None
        figures["plain_cost_to_target"] = plain.cost[at_plain]
        figures["plain_seconds_to_target"] = plain.seconds[at_plain]
        figures["hybrid_cost_to_target"] = self._cost_to_target(hybrid)
        figures["hybrid_seconds_to_target"] = (
            math.inf if at_hybrid is None else hybrid.seconds[at_hybrid]
        )
        figures["cost_ratio"] = figures["hybrid_cost_to_target"] / figures["plain_cost_to_target"]
        figures["seconds_ratio"] = (
            figures["hybrid_seconds_to_target"] / figures["plain_seconds_to_target"]
        )
        same = next(r for r in self.hybrid if r.learning_rate == plain.learning_rate)
        figures["same_rate_cost_ratio"] = (
            self._cost_to_target(same) / figures["plain_cost_to_target"]
        )
        return figures

    def _cost_to_target(self, run: Run) -> float:
        step = run.first_at(self.target)
        return math.inf if step is None else run.cost[step]


def compare(
    workload: Workload,
    seed: int,
    steps: int | None = None,
    config: HybridTrainerConfig | None = None,
    watch: Watch | None = None,
) -> Comparison:
    """Train plain and hybrid over the workload's grid, from the same weights and batches."""
    steps = workload.steps if steps is None else steps
    price = forward_cost(workload)
    rates = workload.learning_rates
    plain = [train(workload, seed, rate, steps, price, hybrid=False, watch=watch) for rate in rates]
    target = min(run.final(workload.noisy) for run in plain)
    extend = target if not workload.noisy and workload.schedule == "constant" else None
    hybrid = [
        train(
            workload,
            seed,
            rate,
            steps,
            price,
            hybrid=True,
            config=config,
            watch=watch,
            target=extend,
        )
        for rate in rates
    ]
    return Comparison(workload, seed, price, plain, hybrid)
