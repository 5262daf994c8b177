"""The loss of one batch, from the running means that Keras keeps."""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

from hybridcore import ModelError


def loss_trackers(model: Any) -> list[Any]:
    """Means named "loss" of `model`: Keras's own, and that of a custom ``train_step``."""
    found = [
        metric
        for metric in [getattr(model, "_loss_tracker", None), *model.metrics]
        if isinstance(metric, keras.metrics.Mean) and metric.name == "loss"
    ]
    return list({id(metric): metric for metric in found}.values())


def batch_loss(totals: list[Any], counts: list[Any], logs: dict[str, Any]) -> Any:
    """Loss of the batch on which trackers that began at zero ended at `totals` and `counts`.

    A custom ``train_step`` that updates none of them reports the loss itself.
    """
    total, count = sum(totals), sum(counts)
    # Comparing with zero, not with its opposite: a count is NaN where the weights of samples are.
    unused = ops.equal(count, 0.0)
    reported = ops.cast(logs["loss"], "float32") if "loss" in logs else ops.zeros((), "float32")
    mean = total / ops.where(unused, ops.ones_like(count), count)
    return ops.where(unused, reported, ops.cast(mean, "float32"))


def check_reports_loss(model: Any, logs: Any) -> None:
    """Raise :class:`hybridcore.ModelError` unless the step told its loss."""
    if not isinstance(logs, dict) or not ("loss" in logs or loss_trackers(model)):
        raise ModelError(
            "train_step must return a dictionary with the key 'loss', or update a "
            "keras.metrics.Mean named 'loss': the loss is what HybridCallback decides by"
        )


class RunningMean:
    """Mean of an epoch's losses, forecasts of predicted steps among them.

    Attributes
    ----------
    full_steps, forecasts : int
        Losses of either kind so far.
    """

    def __init__(self) -> None:
        self.full_steps = self.forecasts = 0
        self._forecast = 0.0

    def add(self, forecast: float) -> None:
        """Count a step of which there is a forecast alone."""
        if math.isfinite(forecast):
            self.forecasts += 1
            self._forecast += forecast

    def of(self, logs: dict[str, Any]) -> dict[str, Any]:
        """Return `logs` of the last full step with the forecasts in the mean that they hold."""
        if not self.forecasts or (self.full_steps and "loss" not in logs):
            return logs
        full = self.full_steps * float(logs["loss"]) if self.full_steps else 0.0
        return {**logs, "loss": (full + self._forecast) / (self.full_steps + self.forecasts)}
