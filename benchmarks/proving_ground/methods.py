"""Ways to train: the plain loop, hybridcore, and peers, each as a loop that is stepped."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hybridcore import Phase, TrainingStatistics
from hybridcore.cli.workloads import Closure, Schedule, Task, Workload, scheduler
from hybridcore_torch import HybridTrainer

SCHEDULES = ("constant", "linear", "cosine")
EMA_DECAY = 0.99
LOOKAHEAD = {"every": 5, "rate": 0.5}
OUTER = {"every": 20, "rate": 0.8, "momentum": 0.5}


class Plain:
    """The loop as its user would write it.

    Parameters
    ----------
    task, workload
        What is trained.
    rate : float
        Learning rate at the start.
    variant : str
        Name of the schedule, which ends after `steps`.
    steps : int
        Length of the run.
    """

    def __init__(
        self, task: Task, workload: Workload, rate: float, variant: str, steps: int
    ) -> None:
        self.model = task.model
        self.optimizer = workload.optimizer(task.model, rate)
        schedule: Schedule = variant  # type: ignore[assignment]
        self.schedule = scheduler(self.optimizer, schedule, steps)
        self.taken = 0

    def step(self, closure: Closure) -> float | None:
        """Take a step; return its loss, None if it was not computed."""
        self.optimizer.zero_grad()
        loss = closure()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        self.taken += 1
        self.after()
        return loss.item()

    def after(self) -> None:
        """Do what the method does beside the optimizer."""

    def shipped(self) -> contextlib.AbstractContextManager[None]:
        """Put the weights that a user would keep into the model, for the block."""
        return contextlib.nullcontext()

    def statistics(self) -> TrainingStatistics | None:
        """What the method says of itself."""
        return None


class Hybrid(Plain):
    """hybridcore with default settings; on noisy work the average is shipped, as README says."""

    def __init__(
        self, task: Task, workload: Workload, rate: float, variant: str, steps: int
    ) -> None:
        super().__init__(task, workload, rate, variant, steps)
        self.trainer = HybridTrainer(task.model, self.optimizer, scheduler=self.schedule)
        self.noisy = workload.noisy

    def step(self, closure: Closure) -> float | None:
        result = self.trainer.step(closure)
        return None if result.phase is Phase.PREDICT else result.loss

    def shipped(self) -> contextlib.AbstractContextManager[None]:
        return self.trainer.averaged() if self.noisy else super().shipped()

    def statistics(self) -> TrainingStatistics | None:
        return self.trainer.statistics()


class ExponentialAverage(Plain):
    """Exponential moving average of the weights, by torch's own ``swa_utils``."""

    def __init__(
        self, task: Task, workload: Workload, rate: float, variant: str, steps: int
    ) -> None:
        super().__init__(task, workload, rate, variant, steps)
        self.average = AveragedModel(task.model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))

    def after(self) -> None:
        self.average.update_parameters(self.model)

    @contextlib.contextmanager
    def shipped(self) -> Iterator[None]:
        own = [p.detach().clone() for p in self.model.parameters()]
        _put(self.model, list(self.average.module.parameters()))
        try:
            yield
        finally:
            _put(self.model, own)


class Lookahead(Plain):
    """Slow weights that go half of the way every five steps (Zhang et al. 2019, algorithm 1)."""

    def __init__(
        self, task: Task, workload: Workload, rate: float, variant: str, steps: int
    ) -> None:
        super().__init__(task, workload, rate, variant, steps)
        self.slow = [p.detach().clone() for p in self.model.parameters()]

    @torch.no_grad()
    def after(self) -> None:
        if self.taken % LOOKAHEAD["every"]:
            return
        for slow, p in zip(self.slow, self.model.parameters(), strict=True):
            slow.lerp_(p, LOOKAHEAD["rate"])
            p.copy_(slow)


class OuterNesterov(Plain):
    """Nesterov's momentum over the displacements of twenty steps (SNOO 2025; DiLoCo's outer step).

    With displacement ``d`` since the last outer step, ``v <- momentum * v + d``, and the weights go
    to ``slow + rate * (d + momentum * v)``.
    """

    def __init__(
        self, task: Task, workload: Workload, rate: float, variant: str, steps: int
    ) -> None:
        super().__init__(task, workload, rate, variant, steps)
        self.slow = [p.detach().clone() for p in self.model.parameters()]
        self.velocity = [torch.zeros_like(p) for p in self.slow]

    @torch.no_grad()
    def after(self) -> None:
        if self.taken % int(OUTER["every"]):
            return
        for slow, velocity, p in zip(
            self.slow, self.velocity, self.model.parameters(), strict=True
        ):
            moved = p - slow
            velocity.mul_(OUTER["momentum"]).add_(moved)
            slow.add_(moved + OUTER["momentum"] * velocity, alpha=OUTER["rate"])
            p.copy_(slow)


class ScheduleFree(Plain):
    """Schedule-Free AdamW (Defazio et al. 2024) by its authors' package; `variant` is beta 1."""

    def __init__(
        self, task: Task, workload: Workload, rate: float, variant: str, steps: int
    ) -> None:
        super().__init__(task, workload, rate, "constant", steps)
        import schedulefree

        plain = self.optimizer.param_groups[0]
        self.optimizer = schedulefree.AdamWScheduleFree(
            task.model.parameters(),
            lr=rate,
            betas=(float(variant), 0.999),
            weight_decay=plain["weight_decay"],
        )
        self.optimizer.train()  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def shipped(self) -> Iterator[None]:
        self.optimizer.eval()  # type: ignore[attr-defined]
        try:
            yield
        finally:
            self.optimizer.train()  # type: ignore[attr-defined]


def _put(model: nn.Module, values: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for p, value in zip(model.parameters(), values, strict=True):
            p.copy_(value)


@dataclass(frozen=True, slots=True)
class Method:
    """A way to train, and what it is tuned over beside the learning rate.

    Attributes
    ----------
    name, title : str
        What the command line and the tables call it.
    loop : callable
        Builds the loop from task, workload, rate, variant and steps.
    variants : tuple of str
        Schedules, or what stands for them.
    trial_of : str or None
        Name of the method whose best trial it takes, instead of tuning itself.
    """

    name: str
    title: str
    loop: Callable[[Task, Workload, float, str, int], Plain]
    variants: tuple[str, ...] = SCHEDULES
    trial_of: str | None = None


METHODS = {
    method.name: method
    for method in (
        Method("tuned", "tuned schedule", Plain),
        Method("written", "as written", Plain, ("constant",)),
        Method("hybridcore", "hybridcore", Hybrid),
        Method("twin", "hybridcore's loop, plain", Plain, trial_of="hybridcore"),
        Method("ema", "EMA", ExponentialAverage),
        Method("lookahead", "Lookahead", Lookahead),
        Method("snoo", "Nesterov outer step", OuterNesterov),
        Method("schedulefree", "Schedule-Free", ScheduleFree, ("0.9", "0.95", "0.98")),
    )
}


def missing(method: Method) -> str | None:
    """What has to be installed for `method`, None if nothing."""
    if method.name == "schedulefree" and importlib.util.find_spec("schedulefree") is None:
        return "schedulefree is not installed: pip install '.[bench]'"
    return None
