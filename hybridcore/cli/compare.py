"""Plain against hybrid, metered from outside: what a target loss costs by each."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from time import perf_counter, process_time
from typing import Any

import torch

from hybridcore import HybridTrainerConfig, Phase
from hybridcore.cli.workloads import Closure, Task, Workload, scheduler
from hybridcore_torch import HybridTrainer

SMOOTHING = 5
Watch = Callable[[float, int, "Run"], None]


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
    task : Task
        What is trained.
    trainer : HybridTrainer or None
        None in a plain run.
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
    task: Task
    trainer: HybridTrainer | None
    cost: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    phase: list[str] = field(default_factory=list)
    held_out: float = math.nan
    cpu_seconds: float = 0.0
    statistics: dict[str, Any] | None = None

    def finish(self) -> Run:
        """Take the figures that belong to the end of the run."""
        self.held_out = self.task.held_out()
        if self.trainer is not None:
            self.statistics = self.trainer.statistics().to_dict()
        return self

    def smooth(self) -> list[tuple[int, float]]:
        """Step and median of the last five real losses, from the fifth on."""
        real = [(i, v) for i, v in enumerate(self.loss) if self.phase[i] != Phase.PREDICT.name]
        return [
            (real[k][0], statistics.median(v for _, v in real[k - SMOOTHING + 1 : k + 1]))
            for k in range(SMOOTHING - 1, len(real))
        ]

    def score(self, noisy: bool) -> float:
        """Figure by which a run is judged: held-out loss at the end, or the lowest training loss.

        Where every batch is the whole, the lowest is what the user would keep, and the harder
        target: a plain run at a high rate may end in a spike.
        """
        return self.held_out if noisy else self.lowest()

    def lowest(self) -> float:
        """Least smoothed training loss."""
        return min(loss for _, loss in self.smooth())

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
        """Return the figures of the run, without the lists."""
        return {
            "learning_rate": self.learning_rate,
            "steps": len(self.loss),
            "predicted": self.predicted,
            "cost": self.cost[-1],
            "seconds": self.seconds[-1],
            "cpu_seconds": self.cpu_seconds,
            "final_training_loss": self.smooth()[-1][1],
            "lowest_training_loss": self.lowest(),
            "held_out": self.held_out,
            "statistics": self.statistics,
        }


def training(
    workload: Workload,
    seed: int,
    learning_rate: float,
    forward_cost: float,
    *,
    hybrid: bool,
    steps: int | None = None,
    config: HybridTrainerConfig | None = None,
) -> Generator[Run, None, None]:
    """Train a workload step by step, for ever; yields the record after each step.

    Runs with the same seed start from the same weights and see the same batches.

    Parameters
    ----------
    workload, seed, learning_rate
        What to train.
    forward_cost : float
        Cost of a forward pass in full steps, from :func:`forward_cost`.
    hybrid : bool
        By :class:`HybridTrainer`, or by the plain loop.
    steps : int, optional
        Steps after which a falling schedule ends; by default the workload's.
    config : HybridTrainerConfig, optional
        Settings of the hybrid run.
    """
    task = workload.build(seed)
    optimizer = workload.optimizer(task.model, learning_rate)
    schedule = scheduler(optimizer, workload.schedule, steps or workload.steps)
    yield from train(
        task, optimizer, schedule, learning_rate, forward_cost, hybrid=hybrid, config=config
    )


def train(
    task: Task,
    optimizer: torch.optim.Optimizer,
    schedule: Any | None,
    learning_rate: float,
    forward_cost: float,
    *,
    hybrid: bool,
    config: HybridTrainerConfig | None = None,
) -> Generator[Run, None, None]:
    """Train `task` step by step, for ever; yields the record after each step."""
    trainer = HybridTrainer(task.model, optimizer, config, scheduler=schedule) if hybrid else None
    meter = Meter()
    run = Run(learning_rate, task, trainer)
    elapsed = 0.0
    while True:
        closure = meter.watch(task.closure(len(run.loss)))
        cpu, start = process_time(), perf_counter()
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
        run.cpu_seconds += process_time() - cpu
        run.loss.append(value)
        run.phase.append(phase)
        run.cost.append(meter.cost(forward_cost))
        run.seconds.append(elapsed)
        yield run


def forward_cost(workload: Workload) -> float:
    """Measure what a forward pass of a workload takes in full steps."""
    task = workload.build(0)
    return measured_forward_cost(task, workload.optimizer(task.model, workload.learning_rates[0]))


def measured_forward_cost(task: Task, optimizer: torch.optim.Optimizer, repeats: int = 30) -> float:
    """Measure what a forward pass takes in full steps: medians of interleaved timings.

    It trains the model.
    """
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
        """Plain run with the best score."""
        return min(self.plain, key=lambda run: run.score(self.workload.noisy))

    @property
    def best_hybrid(self) -> Run:
        """Hybrid run that got to the target for the least cost, or else that got lowest."""
        noisy = self.workload.noisy
        if noisy:
            return min(self.hybrid, key=lambda run: run.score(noisy))
        return min(self.hybrid, key=lambda run: (self._cost_to_target(run), run.score(noisy)))

    @property
    def target(self) -> float:
        """Score of the best plain run."""
        return self.best_plain.score(self.workload.noisy)

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
            "plain_final": plain.score(noisy),
            "hybrid_final": hybrid.score(noisy),
            "plain_total_cost": plain.cost[-1],
            "hybrid_total_cost": hybrid.cost[-1],
            "plain_total_seconds": plain.seconds[-1],
            "hybrid_total_seconds": hybrid.seconds[-1],
            "plain_cpu_seconds": plain.cpu_seconds,
            "hybrid_cpu_seconds": hybrid.cpu_seconds,
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
    config: HybridTrainerConfig | None = None,
    watch: Watch | None = None,
    share: float = 1.0,
) -> Comparison:
    """Train plain and hybrid over the workload's grid, step by step in turn.

    The hybrid run takes a `share` of the plain one's steps, its schedule with it.

    In turn, so that a machine whose speed drifts slows both alike. Then, where the rate is constant
    and the target not reached, the hybrid runs go on, to at most the cost of the plain ones.
    """
    price = forward_cost(workload)
    plain, hybrid, going = [], [], []
    for rate in workload.learning_rates:
        short = round(share * workload.steps)
        loops = [
            training(workload, seed, rate, price, hybrid=is_hybrid, steps=steps, config=config)
            for is_hybrid, steps in ((False, workload.steps), (True, short))
        ]
        for step in range(workload.steps):
            of_plain = next(loops[0])
            if step < short:
                of_hybrid = next(loops[1])
            if watch is not None and step % 10 == 0:
                watch(rate, step, of_hybrid)
        plain.append(of_plain.finish())
        hybrid.append(of_hybrid.finish())
        going.append(loops[1])
    comparison = Comparison(workload, seed, price, plain, hybrid)
    if not workload.noisy and workload.schedule == "constant":
        for run, loop in zip(hybrid, going, strict=True):
            while run.first_at(comparison.target) is None and run.cost[-1] < workload.steps:
                next(loop)
                if watch is not None and len(run.loss) % 10 == 0:
                    watch(run.learning_rate, workload.steps, run)
            run.finish()
    return comparison
