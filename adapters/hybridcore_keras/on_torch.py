"""The port of the torch backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import keras
import torch

from hybridcore_keras.ports import Figures
from hybridcore_keras.stateful import FIGURES, StatefulPort


class TorchPort(StatefulPort):
    """See :class:`hybridcore_keras.ports.Port`.

    Here nothing is compiled, and a custom ``train_step`` cannot be run without its backward pass:
    its probes then cost about a full step, which the measured cost of a probe shows.
    """

    def begin(self, data: Any) -> None:
        """Take the batch, which ``fit`` has loaded already."""
        self._batches = data

    def pull(self) -> int:
        """Return 1: the batch is here."""
        return 1

    def full(
        self, scale: float = 1.0, highest: float = math.inf, *, forgetting: float = 1.0
    ) -> tuple[dict[str, Any], Figures]:
        """Run Keras's own train function with rates times `scale`; its logs and our figures.

        A `scale` above 1 takes no rate beyond `highest`. Averages of batch norm that are of many
        batches forget so many times as fast as `forgetting` says.
        """
        self._set_rates(scale, highest)
        self._set_forgetting(forgetting)
        logs = self._function(self._batches)
        return logs, self._figures(logs)

    def gradient(self) -> tuple[dict[str, Any], Figures]:
        """Do what :meth:`full` does but for the step itself, and keep the gradients."""
        return self._pass(self._function, self._batches)

    def probe(self, data: Any) -> float:
        """Loss of `data`, or of the batch where it is None; leaves no trace."""
        if data is None:
            assert self._batches is not None
            data = self._batches[0]
        self._probing = True
        try:
            return float(self._train_step(data)[FIGURES])
        finally:
            self._probing = False

    def _probed_loss(self, data: Any) -> Any:
        if type(self.model).train_step is not keras.Model.train_step:
            return super()._probed_loss(data)
        model = self.model
        variables = self._guarded([])
        with torch.no_grad():
            kept = [self._read(variable) for variable in variables]
            x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
            predicted = model(x, training=True) if model._call_has_training_arg else model(x)
            loss = model._compute_loss(
                x=x, y=y, y_pred=predicted, sample_weight=weight, training=True
            )
            for variable, value in zip(variables, kept, strict=True):
                variable.assign(value)
        return loss

    def _read(self, variable: Any) -> Any:
        return variable.value.detach().clone()

    def _sum_of_squares(self, values: Any) -> Any:
        flat = values.reshape(-1)
        return torch.dot(flat, flat)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Run a function of tensors without a graph."""
        return torch.no_grad()(function)

    def reader(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` of copies of the weights, and of what it is given besides."""
        variables = self.variables
        return self.compiled(
            lambda *arguments: function([v.value.clone() for v in variables], *arguments)
        )

    def writer(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function`, which returns values of the weights and more; put them there."""
        variables = self.variables

        def write(*arguments: Any) -> Any:
            values, more = function(*arguments)
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)
            return more

        return self.compiled(write)
