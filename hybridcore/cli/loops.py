"""A loop that is ready to run: what ``build()`` returned, checked, or a built-in workload."""

from __future__ import annotations

import functools
import inspect
import random
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from hybridcore.cli.common import UserError, blamed
from hybridcore.cli.workloads import WORKLOADS, Closure, Task, scheduler
from hybridcore.errors import HybridCoreError
from hybridcore_torch import HybridTrainer

PARTS = ("model", "optimizer", "data", "loss")
OPTIONAL = ("scheduler", "held_out")
EVALUATION_BATCHES = 8
_ONCE = "can be gone through once only: make it a list or a DataLoader"
# Modules with weights to train of the loops that were built before.
_taken: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass(slots=True)
class Random:
    """Random states of torch, NumPy and Python that belong to one of several runs."""

    states: tuple[Any, ...] = field(default_factory=lambda: _random_states())

    @contextmanager
    def used(self) -> Iterator[None]:
        """Go on from these states in the block, and put those of outside back after it."""
        outside = _random_states()
        set_random_states(self.states)
        try:
            yield
        finally:
            self.states = _random_states()
            set_random_states(outside)


def _random_states() -> tuple[Any, ...]:
    device = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    return torch.get_rng_state(), device, np.random.get_state(), random.getstate()  # noqa: NPY002


def set_random_states(states: tuple[Any, ...]) -> None:
    """Put random states back."""
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state_all(states[1])
    np.random.set_state(states[2])  # noqa: NPY002
    random.setstate(states[3])


@dataclass(slots=True)
class Loop:
    """A loop that is ready to run.

    Attributes
    ----------
    task : Task
        Model, batches in their order, and the loss by which the run is judged.
    optimizer, scheduler
        The user's.
    evaluation_batches : int
        Batches that one evaluation takes.
    judged_by : str
        What the evaluated loss is of.
    random : Random
        The loop's own random state.
    """

    task: Task
    optimizer: torch.optim.Optimizer
    scheduler: Any | None
    evaluation_batches: int
    judged_by: str
    random: Random


def of_workload(name: str, seed: int, steps: int) -> Loop:
    """Build a built-in workload at the middle of its learning rates."""
    workload = WORKLOADS[name]
    task = workload.build(seed)
    rate = workload.learning_rates[len(workload.learning_rates) // 2]
    optimizer = workload.optimizer(task.model, rate)
    schedule = scheduler(optimizer, workload.schedule, steps)
    judged_by = "held-out loss" if workload.noisy else "training loss"
    return Loop(task, optimizer, schedule, 1, judged_by, Random())


def of_parts(name: str, parts: object) -> Loop:
    """Check what ``build()`` of `name` returned, and make a loop of it; :class:`UserError`."""
    if isinstance(parts, Mapping):
        missing = [part for part in PARTS if part not in parts]
        unknown = [part for part in parts if part not in PARTS + OPTIONAL]
        if missing or unknown:
            problem = f"lacks {missing[0]!r}" if missing else f"has an unknown {unknown[0]!r}"
            raise UserError(
                f"{name}: the dictionary of build() {problem}: it takes {listed(PARTS)}, and "
                f"optionally {listed(OPTIONAL)}"
            )
    elif isinstance(parts, tuple | list) and len(parts) == len(PARTS):
        parts = dict(zip(PARTS, parts, strict=True))
    else:
        got = f"{len(parts)} values" if isinstance(parts, tuple | list) else type(parts).__name__
        raise UserError(f"{name}: build() returned {got}: return {listed(PARTS)}")
    model, optimizer, data, loss = (parts[part] for part in PARTS)
    # It checks model, optimizer and scheduler, and says what to do; it touches none of them.
    try:
        HybridTrainer(model, optimizer, scheduler=parts.get("scheduler"))
    except HybridCoreError as error:
        raise UserError(f"{name}: build() returned parts that do not fit: {error}") from error
    compute = _loss_of(name, model, loss)
    trained = {m for m in model.modules() if any(p.requires_grad for p in m.parameters(False))}
    if any(module in _taken for module in trained):
        raise UserError(
            f"{name}: build() returned weights that an earlier call returned: make the model in "
            "build(), so that each run has its own"
        )
    _taken.update(trained)
    batches = _batches(name, "data", data)
    held_out = parts.get("held_out")
    source = batches if held_out is None else _batches(name, "held_out", held_out)
    # From the very same random state: looking at data must not change what the loop sees.
    before = Random()
    with before.used():
        fixed = _first(source(), EVALUATION_BATCHES)
    if not fixed:
        raise UserError(f"{name}: {'data' if held_out is None else 'held_out'} {_ONCE}")
    endless = _endless(name, batches)

    def closure(step: int) -> Closure:
        batch = next(endless)
        return functools.partial(compute, batch)

    def evaluate() -> float:
        with Random().used(), _evaluating(model):
            values = [_without_gradients(functools.partial(compute, batch)) for batch in fixed]
        return float(np.mean(values))

    with blamed(name, "loss"), Random().used():
        value = compute(fixed[0])
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.requires_grad:
        got = (
            f"a tensor of shape {tuple(value.shape)}"
            + ("" if value.requires_grad else " without gradients")
            if isinstance(value, torch.Tensor)
            else type(value).__name__
        )
        raise UserError(
            f"{name}: loss returned {got}: return a scalar tensor that depends on the model"
        )
    judged_by = "training loss" if held_out is None else "held-out loss"
    task = Task(model, closure, evaluate)
    return Loop(task, optimizer, parts.get("scheduler"), len(fixed), judged_by, Random())


def _loss_of(name: str, model: nn.Module, loss: Any) -> Callable[[Any], torch.Tensor]:
    if not callable(loss):
        raise UserError(f"{name}: loss is a {type(loss).__name__}: make it loss(model, batch)")
    if isinstance(loss, nn.Module) or getattr(loss, "__module__", "") == "torch.nn.functional":

        def criterion(batch: Any) -> torch.Tensor:
            if not (isinstance(batch, tuple | list) and len(batch) == 2):
                raise UserError(
                    f"{name}: a criterion needs batches (x, y): make the loss loss(model, batch)"
                )
            value: torch.Tensor = loss(model(batch[0]), batch[1])
            return value

        return criterion
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = inspect.signature(loss).parameters.values()
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{name}: what loss takes cannot be read: write it as def loss(model, batch)"
        ) from error
    count = sum(p.kind in kinds and p.default is p.empty for p in parameters)
    if count > 2:
        raise UserError(f"{name}: loss takes {count} arguments: make it loss(model, batch)")

    def called(batch: Any) -> torch.Tensor:
        value: torch.Tensor = loss(*(model, batch)[2 - count :])
        return value

    return called


def _batches(name: str, part: str, data: Any) -> Callable[[], Iterable[Any]]:
    if data is None or isinstance(data, torch.Tensor):
        return lambda: [data]
    if isinstance(data, tuple) and all(isinstance(item, torch.Tensor) for item in data):
        return lambda: [data]
    if not isinstance(data, Iterable):
        raise UserError(
            f"{name}: {part} is a {type(data).__name__}: make it an iterable of batches, such as "
            "a DataLoader"
        )
    if isinstance(data, Mapping):
        raise UserError(
            f"{name}: {part} is a {type(data).__name__}: if it is one batch, put it into a list"
        )
    if isinstance(data, Iterator):
        raise UserError(f"{name}: {part} is a {type(data).__name__}, which {_ONCE}")
    with blamed(name, part):
        first = next(iter(data), None)
    if first is None:
        raise UserError(f"{name}: {part} is empty: give it at least one batch")
    return lambda: data


def _first(batches: Iterable[Any], most: int) -> list[Any]:
    return [batch for batch, _ in zip(batches, range(most), strict=False)]


def _endless(name: str, batches: Callable[[], Iterable[Any]]) -> Iterator[Any]:
    while True:
        with blamed(name, "data"):
            iterator = iter(batches())
        held = False
        while True:
            with blamed(name, "data"):
                try:
                    batch = next(iterator)
                except StopIteration:
                    break
            held = True
            yield batch
        if not held:
            raise UserError(f"{name}: data {_ONCE}")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _without_gradients(compute: Closure) -> float:
    try:
        with torch.no_grad():
            return float(compute())
    except RuntimeError:
        # A loss that differentiates inside needs its graph.
        value: float = compute().item()
        return value


def listed(names: Iterable[str]) -> str:
    """Names as a reader lists them."""
    *most, last = names
    return f"{', '.join(most)} and {last}"
