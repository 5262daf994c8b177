"""What has to come back: buffers, state of the optimizer, scaler, and parameters if asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from hybridcore.memory import CODED, Kind
from hybridcore_torch.buffers import BufferWatch, can_come_back
from hybridcore_torch.ranks import local


class RecoveryPoint:
    """Copies of all training state; parameters are among it where the snapshot bank keeps none.

    The steps of the user's loop are not undone by a rollback, so learning rates and whatever else a
    schedule, or the user, has written into the parameter groups stay as they are.

    Parameters
    ----------
    model, optimizer, scaler
        The objects to copy now, and to restore in place later.
    watch : BufferWatch
        Copies the model's buffers.
    kind : Kind
        How the bank keeps snapshots; float32 of the optimizer goes with them: in bfloat16, or to
        the host.
    parameters : iterable of Tensor
        Those that are copied too.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None,
        watch: BufferWatch,
        kind: Kind = "exact",
        parameters: Iterable[torch.Tensor] = (),
    ) -> None:
        def kept(tensor: torch.Tensor) -> torch.Tensor:
            if kind in CODED and tensor.dtype is torch.float32 and tensor.numel() > 1:
                return tensor.to(torch.bfloat16)
            tensor = tensor.detach()
            return tensor.to("cpu", copy=True) if kind == "host" else tensor.clone()

        kept_buffers = {id(one.buffer): one.copy for one in watch.keep(model.modules())}
        self._buffers = {
            name: kept_buffers[id(b)] for name, b in model.named_buffers() if id(b) in kept_buffers
        }
        self._optimizer = _copied(state_of(optimizer), kept)
        self._scaler = None if scaler is None else copy.deepcopy(scaler.state_dict())
        self._weights = [p.detach().clone() for p in parameters]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, wherever they are."""
        sizes = [kept.nbytes for kept in (*self._buffers.values(), *self._weights)]
        _copied(self._optimizer["state"], lambda t: sizes.append(local(t).nbytes))
        return sum(sizes)

    def holds(self, parameters: Sequence[torch.Tensor]) -> bool:
        """Whether it has copies of all these parameters."""
        return [p.shape for p in parameters] == [w.shape for w in self._weights]

    @torch.no_grad()
    def load_weights(self, parameters: Sequence[torch.Tensor]) -> None:
        """Put the `parameters` that were copied back, and nothing else."""
        torch._foreach_copy_(list(parameters), self._weights)

    @torch.no_grad()
    def restore(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        """Put everything but the parameters back."""
        for name, buffer in model.named_buffers():
            # A cache that has grown or is new since is not of the weights: it may stay.
            saved = self._buffers.get(name)
            if saved is not None and saved.shape == buffer.shape and can_come_back(buffer):
                buffer.copy_(saved)
        present, saved = state_of(optimizer), self._optimizer["state"]
        # Tensors are written in place: a second copy of all of them would take the most memory, and
        # load_state_dict gives them the dtype of the weights.
        live = {id(state) for state in optimizer.state.values()}
        in_place = _copy_over(present["state"], saved)
        if not in_place:
            present["state"] = copy.deepcopy(saved)
        if not (in_place and all(id(state) in live for state in present["state"].values())):
            stale = _stale(optimizer)
            optimizer.load_state_dict(present)
            optimizer.state.update(stale)
        if scaler is not None and self._scaler is not None:
            scaler.load_state_dict(self._scaler)

    def state_dict(self) -> dict[str, Any]:
        """Return the copies as tensors, numbers and dictionaries."""
        return {
            "buffers": dict(self._buffers),
            "optimizer": self._optimizer,
            "scaler": self._scaler,
            "weights": list(self._weights),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> RecoveryPoint:
        """Build from what :meth:`state_dict` returned."""
        point = cls.__new__(cls)
        point._buffers = dict(state["buffers"])
        point._optimizer = state["optimizer"]
        point._scaler = state["scaler"]
        # States from before version 7 have none.
        point._weights = list(state.get("weights", []))
        return point


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return ``optimizer.state_dict()``, without states of parameters that are in no group.

    Those stay behind where a user has replaced a layer in a group, and torch stumbles over them.
    """
    stale = _stale(optimizer)
    for p in stale:
        del optimizer.state[p]
    try:
        return optimizer.state_dict()
    finally:
        optimizer.state.update(stale)


def _stale(optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, Any]:
    held = {p for group in optimizer.param_groups for p in group["params"]}
    return {
        p: state
        for p, state in optimizer.state.items()
        if isinstance(p, torch.Tensor) and p not in held
    }


def _copied(value: Any, kept: Callable[[torch.Tensor], object]) -> Any:
    """Copy nested containers, with tensors as `kept` makes them."""
    if isinstance(value, torch.Tensor):
        return kept(value)
    if type(value) is dict:
        return {key: _copied(item, kept) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(item, kept) for item in value)
    return copy.deepcopy(value)


def _copy_over(present: dict[Any, Any], saved: dict[Any, Any]) -> bool:
    """Write `saved` into the tensors of `present`; False, and nothing written, if they differ."""

    def alike(mine: Any, other: Any) -> bool:
        if isinstance(mine, torch.Tensor) and isinstance(other, torch.Tensor):
            return mine.shape == other.shape
        return type(mine) is type(other) and not isinstance(mine, torch.Tensor | dict | list)

    same = present.keys() == saved.keys() and all(
        isinstance(values, dict)
        and values.keys() == saved[key].keys()
        and all(alike(value, saved[key][name]) for name, value in values.items())
        for key, values in present.items()
    )
    for key, values in saved.items() if same else ():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                present[key][name].copy_(value)
            else:
                present[key][name] = copy.deepcopy(value)
    return same
