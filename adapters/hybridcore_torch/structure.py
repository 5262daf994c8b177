"""What is trained now, and noticing that it is something else."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from hybridcore_torch.groups import Group, by_depth, by_user, trainable_parameters
from hybridcore_torch.ranks import is_sharded, reshard


class Structure:
    """Trainable parameters of an optimizer, in layer groups.

    Parameters
    ----------
    model, optimizer
        As for :class:`hybridcore_torch.HybridTrainer`.
    layer_groups : iterable of iterables of Parameter or None
        The user's groups; None where they go by depth.

    Attributes
    ----------
    parameters : list of Parameter
        What is trained.
    sharded : bool
        Whether it is spread over ranks.

    Raises
    ------
    ModelError
        If there is nothing to train, or if `layer_groups` are not groups of it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        layer_groups: Iterable[Iterable[nn.Parameter]] | None,
    ) -> None:
        reshard(model)
        self._model, self._optimizer = model, optimizer
        self.sharded = is_sharded(model)
        self.parameters = trainable_parameters(model, optimizer)
        self._groups: list[Group] | None = None
        if layer_groups is not None:
            self._groups = by_user(layer_groups, self.parameters)
        self._present = self._look()

    @property
    def sizes(self) -> list[int] | None:
        """How many parameters the user's groups have."""
        return None if self._groups is None else [len(group) for group in self._groups]

    @property
    def layers(self) -> list[Group]:
        """The layer groups."""
        return by_depth(self.parameters) if self._groups is None else self._groups

    def renew(self) -> bool:
        """Take note of parameters that were added, frozen or resized; False if there are none.

        In the user's groups, new ones make one more.
        """
        if self.sharded:
            reshard(self._model)
        if self._look() == self._present:
            return False
        reshard(self._model)
        self.sharded = is_sharded(self._model)
        self.parameters = trainable_parameters(self._model, self._optimizer)
        if self._groups is not None:
            known = {id(p) for p in self.parameters}
            groups = [[p for p in group if id(p) in known] for group in self._groups]
            named = {id(p) for group in groups for p in group}
            groups.append([p for p in self.parameters if id(p) not in named])
            self._groups = [group for group in groups if group]
        self._present = self._look()
        return True

    def _look(self) -> list[tuple[object, ...]]:
        return [
            (id(p), p.requires_grad, p.shape, _strides(p), p.dtype, p.device)
            for group in self._optimizer.param_groups
            for p in group["params"]
        ]


def _strides(parameter: torch.Tensor) -> tuple[int, ...] | None:
    dense = parameter.layout is torch.strided and not parameter.is_nested
    return parameter.stride() if dense else None
