"""One loop run plain and by hybridcore from the same seed, and what a target cost by each."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from hybridcore import HybridTrainerConfig, Phase
from hybridcore.cli.common import blamed
from hybridcore.cli.compare import SMOOTHING, Run, measured_forward_cost, train
from hybridcore.cli.loops import Loop
from hybridcore.cli.own import Source

# Share of a run's cost that evaluations may add to it; they are not counted.
EVALUATION_SHARE = 0.25
EVALUATIONS = 200

PairWatch = Callable[[int, Run], None]


@dataclass(slots=True)
class Judged:
    """A run and the losses by which it is judged.

    Attributes
    ----------
    run : Run
        Its steps.
    at : list of int
        Indices of the steps after which the loss was evaluated; none of them is a predicted one.
    loss : list of float
        Losses there, on the same batches for every run of a seed.
    """

    run: Run
    at: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)

    def smooth(self) -> list[tuple[int, float]]:
        """Step and median of the newest five evaluations."""
        return [
            (self.at[k], statistics.median(self.loss[max(0, k - SMOOTHING + 1) : k + 1]))
            for k in range(len(self.at))
        ]

    def lowest(self) -> float:
        """Least smoothed loss, NaN where none is finite."""
        finite = [loss for _, loss in self.smooth() if math.isfinite(loss)]
        return min(finite, default=math.nan)

    def first_at(self, target: float) -> int | None:
        """First step at which the smoothed loss is at or below `target`."""
        return next((step for step, loss in self.smooth() if loss <= target), None)

    def last(self) -> float:
        """Smoothed loss at the end."""
        return self.smooth()[-1][1]

    def loss_at(self, cost: float) -> float:
        """Least smoothed loss up to a cost."""
        reached = [loss for step, loss in self.smooth() if self.run.cost[step] <= cost]
        return min(reached, default=math.nan)


class Judge:
    """Takes a loop's steps and evaluates it every so many of them.

    Parameters
    ----------
    source : Source
        Where the loop comes from.
    seed, steps : int
        Its seed, and the steps that it is meant to take.
    forward_cost : float
        Cost of a forward pass in full steps.
    hybrid : bool
        By :class:`hybridcore_torch.HybridTrainer`, or by the plain loop.
    config : HybridTrainerConfig, optional
        Settings of the hybrid run.
    """

    def __init__(
        self,
        source: Source,
        seed: int,
        steps: int,
        forward_cost: float,
        *,
        hybrid: bool,
        config: HybridTrainerConfig | None = None,
    ) -> None:
        self.loop = source.build(seed, steps)
        self._name = source.name
        self._interval = evaluation_interval(self.loop, steps, forward_cost)
        rate = float(self.loop.optimizer.param_groups[0]["lr"])
        self._steps: Generator[Run, None, None] = train(
            self.loop.task,
            self.loop.optimizer,
            self.loop.scheduler,
            rate,
            forward_cost,
            hybrid=hybrid,
            config=config,
        )
        self.judged: Judged | None = None
        self._due = 0

    def step(self) -> Judged:
        """Take a step, and evaluate after it if it is time to."""
        number = 1 if self.judged is None else len(self.judged.run.loss) + 1
        with self.loop.random.used(), blamed(self._name, f"step {number}"):
            run = next(self._steps)
            if self.judged is None:
                self.judged = Judged(run)
            # A jump under way may still be taken back.
            if len(run.loss) >= self._due and run.phase[-1] != Phase.PREDICT.name:
                self._due = len(run.loss) + self._interval
                self.judged.at.append(len(run.loss) - 1)
                self.judged.loss.append(self.loop.task.held_out())
        return self.judged


def evaluation_interval(loop: Loop, steps: int, forward_cost: float) -> int:
    """Return the steps between two evaluations."""
    affordable = math.ceil(loop.evaluation_batches * forward_cost / EVALUATION_SHARE)
    return max(1, steps // EVALUATIONS, affordable)


def forward_cost_of(source: Source, steps: int) -> float:
    """Measure what a forward pass of a loop takes in full steps, on a loop of its own."""
    loop = source.build(0, steps)
    with loop.random.used(), blamed(source.name, "the first steps"):
        return measured_forward_cost(loop.task, loop.optimizer, max(5, min(30, steps // 20)))


@dataclass(slots=True)
class Pair:
    """Plain and hybrid run of one seed.

    Attributes
    ----------
    seed : int
        Seed of both.
    plain, hybrid : Judged
        The runs.
    """

    seed: int
    plain: Judged
    hybrid: Judged

    @property
    def target(self) -> float:
        """Lowest loss of the plain run."""
        return self.plain.lowest()

    def summary(self) -> dict[str, Any]:
        """Figures as plain numbers; a target that was missed costs infinity."""
        plain, hybrid = self.plain.run, self.hybrid.run
        at_plain = self.plain.first_at(self.target)
        at_hybrid = self.hybrid.first_at(self.target)
        figures: dict[str, Any] = {
            "seed": self.seed,
            "target": self.target,
            "plain_cost_to_target": math.nan if at_plain is None else plain.cost[at_plain],
            "hybrid_cost_to_target": math.inf if at_hybrid is None else hybrid.cost[at_hybrid],
            "plain_seconds_to_target": math.nan if at_plain is None else plain.seconds[at_plain],
            "hybrid_seconds_to_target": (
                math.inf if at_hybrid is None else hybrid.seconds[at_hybrid]
            ),
        }
        for name in ("cost", "seconds"):
            figures[f"{name}_ratio"] = (
                figures[f"hybrid_{name}_to_target"] / figures[f"plain_{name}_to_target"]
            )
        equal = min(plain.cost[-1], hybrid.cost[-1])
        return figures | {
            "plain_at_equal_cost": self.plain.loss_at(equal),
            "hybrid_at_equal_cost": self.hybrid.loss_at(equal),
            "equal_cost": equal,
            "plain_final": self.plain.last(),
            "hybrid_final": self.hybrid.last(),
            "plain_total_cost": plain.cost[-1],
            "hybrid_total_cost": hybrid.cost[-1],
            "plain_total_seconds": plain.seconds[-1],
            "hybrid_total_seconds": hybrid.seconds[-1],
            "hybrid_steps": len(hybrid.loss),
            "predicted_share": hybrid.predicted / len(hybrid.loss),
            "statistics": None if hybrid.trainer is None else hybrid.trainer.statistics().to_dict(),
        }


def run_pair(
    source: Source,
    seed: int,
    steps: int,
    forward_cost: float,
    config: HybridTrainerConfig | None = None,
    watch: PairWatch | None = None,
    pairs: list[Pair] | None = None,
) -> Pair:
    """Run plain and hybrid step by step in turn, so that a drifting machine slows both alike.

    Where there is no schedule and the target is not reached, the hybrid run goes on to at most the
    plain one's cost.

    Parameters
    ----------
    source, seed, steps, forward_cost, config
        What to run.
    watch : callable, optional
        Called with the step's number and the hybrid run, every few steps.
    pairs : list of Pair, optional
        Where the pair is put as soon as it has something to show, so that an interrupt leaves it.
    """
    plain = Judge(source, seed, steps, forward_cost, hybrid=False)
    hybrid = Judge(source, seed, steps, forward_cost, hybrid=True, config=config)
    pair = Pair(seed, plain.step(), hybrid.step())
    if pairs is not None:
        pairs.append(pair)
    for step in range(1, steps):
        plain.step()
        hybrid.step()
        if watch is not None and step % 10 == 0:
            watch(step, pair.hybrid.run)
    if hybrid.loop.scheduler is None:
        run, most = pair.hybrid.run, pair.plain.run.cost[-1]
        while run.cost[-1] < most and pair.hybrid.first_at(pair.target) is None:
            # The whole curve is looked at, so not after every step.
            for _ in range(20):
                hybrid.step()
            if watch is not None:
                watch(steps, run)
    return pair
