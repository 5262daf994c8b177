"""What has to come back besides the parameters: buffers, optimizer, scheduler, scaler."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


class RecoveryPoint:
    """Copies of all training state but the parameters, which the snapshot bank keeps.

    Parameters
    ----------
    model, optimizer, scheduler, scaler
        The objects to copy now, and to restore in place later.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any | None,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        self._buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
        self._optimizer = copy.deepcopy(optimizer.state_dict())
        self._scheduler = None if scheduler is None else copy.deepcopy(scheduler.state_dict())
        self._scaler = None if scaler is None else copy.deepcopy(scaler.state_dict())

    @torch.no_grad()
    def restore(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any | None,
        scaler: torch.amp.GradScaler | None,
        steps_since: int,
    ) -> None:
        """Put everything back; a schedule is then brought up to date with the loop.

        Parameters
        ----------
        steps_since : int
            Steps that the schedule has taken since. The steps of the user's loop are not undone by
            a rollback, so a schedule that is restored is advanced by as many.
        """
        for name, buffer in model.named_buffers():
            # A cache that has grown or is new since is not of the weights: it may stay.
            saved = self._buffers.get(name)
            written = 0 not in buffer.stride() or buffer.numel() < 2
            if written and saved is not None and saved.shape == buffer.shape:
                buffer.copy_(saved)
        state = copy.deepcopy(self._optimizer)
        if scheduler is None:
            # Rates then belong to the user alone, who may have changed them since.
            state["param_groups"] = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict(state)
        if scaler is not None and self._scaler is not None:
            scaler.load_state_dict(self._scaler)
        if scheduler is not None and self._scheduler is not None:
            scheduler.load_state_dict(copy.deepcopy(self._scheduler))
            for _ in range(steps_since):
                scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the copies as tensors, numbers and dictionaries."""
        return {
            "buffers": dict(self._buffers),
            "optimizer": self._optimizer,
            "scheduler": self._scheduler,
            "scaler": self._scaler,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> RecoveryPoint:
        """Build from what :meth:`state_dict` returned."""
        point = cls.__new__(cls)
        point._buffers = dict(state["buffers"])
        point._optimizer = state["optimizer"]
        point._scheduler = state["scheduler"]
        point._scaler = state["scaler"]
        return point
