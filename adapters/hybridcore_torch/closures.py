"""Calling the user's closure: for a step, and for a probe that must leave no trace."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from hybridcore import ClosureError
from hybridcore_torch import buffers
from hybridcore_torch.buffers import BufferWatch
from hybridcore_torch.ranks import reshard

Closure = Callable[[], torch.Tensor]
# Several stand for one batch in parts, whose loss is their mean.
Closures = Closure | Sequence[Closure]


def parts(closure: Closures) -> Sequence[Closure]:
    """Return the closures of the parts of a batch; of a whole one, the only one."""
    return (closure,) if callable(closure) else closure


def check_callable(closure: object) -> None:
    """Raise :class:`ClosureError` unless `closure` can be called, or is a list of such."""
    if callable(closure):
        return
    if isinstance(closure, Iterator):
        raise ClosureError(
            f"closure must be callable or a list of callables, got {type(closure).__name__}, which "
            "could be gone through once only: make a list of it"
        )
    in_parts = isinstance(closure, Sequence) and not isinstance(closure, str)
    if in_parts and not closure:
        raise ClosureError("closure is an empty list: pass one closure for each part of the batch")
    for part in closure if in_parts else (closure,):  # type: ignore[attr-defined]
        if not callable(part):
            raise ClosureError(
                f"closure must be callable, got {type(part).__name__}: pass a function that "
                "computes the loss, for example lambda: loss_fn(model(x), y)"
            )


def training_loss(closure: Closure) -> torch.Tensor:
    """Call `closure` and check that what it returns can be trained on.

    Raises
    ------
    ClosureError
        If it does not return a scalar tensor with a graph.
    """
    loss = _called(closure)
    if not (isinstance(loss, torch.Tensor) and loss.numel() == 1):
        raise _no_loss(loss, "closure")
    if loss.is_complex():
        raise ClosureError("closure returned a complex loss: return a real one, such as its .abs()")
    if not loss.requires_grad:
        raise ClosureError(
            "closure returned a loss without a graph (detached, or computed under no_grad): "
            "return the loss tensor itself, without .detach() or .item()"
        )
    return loss


class Prober:
    """Evaluates a closure without gradients and without a trace.

    Buffers (running statistics) and random states are put back, so a probe changes nothing, and
    probes of one step see the same dropout masks. A loss that differentiates inside, as that of a
    physics-informed network, cannot run without a graph: that is found out once and remembered.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._needs_graph = False
        self._buffers = BufferWatch()

    def loss(self, closure: Closures, name: str) -> float:
        """Loss of `closure` at the present weights; `name` is what an error calls it."""
        if not self._needs_graph:
            try:
                with self._no_trace(), torch.no_grad():
                    return _mean(closure, name)
            except RuntimeError:
                pass
        # From the state that the first attempt began with, so that both see the same data.
        with self._no_trace(), torch.enable_grad():
            value = _mean(closure, name)
        self._needs_graph = True
        return value

    def gradients(self, closure: Closures, parameters: Sequence[torch.Tensor]) -> None:
        """Go through `closure` forward and backward, as a step does, and keep nothing of it."""
        with self._no_trace(), torch.enable_grad():
            for part in parts(closure):
                torch.autograd.grad(training_loss(part), parameters, allow_unused=True)

    @contextlib.contextmanager
    def _no_trace(self) -> Iterator[None]:
        kept = self._buffers.keep(self._model.modules())
        devices = {p.device.index for p in self._model.parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(devices=sorted(d for d in devices if d is not None)):
            try:
                yield
            finally:
                buffers.put_back(kept)
                reshard(self._model)


def _mean(closure: Closures, name: str) -> float:
    total = 0.0
    for part in parts(closure):
        loss = _called(part)
        if not (isinstance(loss, torch.Tensor) and loss.numel() == 1):
            raise _no_loss(loss, name)
        total += float(loss.detach())
    return total / len(parts(closure))


def _called(closure: Closure) -> Any:
    # Around the step, autocast keeps what it has cast: of weights that have moved since then, or
    # without a graph.
    torch.clear_autocast_cache()
    return closure()


def _no_loss(loss: object, name: str) -> ClosureError:
    if isinstance(loss, torch.Tensor):
        return ClosureError(
            f"{name} returned a tensor of shape {tuple(loss.shape)}, not a scalar: reduce it, for "
            "example with .mean()"
        )
    return ClosureError(
        f"{name} returned {type(loss).__name__}, not a loss: end it with `return loss`, the "
        "tensor that you would call backward() on"
    )
