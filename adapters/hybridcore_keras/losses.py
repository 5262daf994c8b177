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
    """Mean of an epoch's losses, forecasts of predicted steps among them."""

    def __init__(self) -> None:
        self.full_steps = 0
        self.forecasts: list[float] = []

    def with_forecast(self, logs: dict[str, Any], forecast: float) -> dict[str, Any]:
        """Return `logs` with `forecast` taken into the mean that they hold."""
        if not math.isfinite(forecast):
            return dict(logs)
        steps = self.full_steps + len(self.forecasts)
        before = float(logs["loss"]) * steps if steps else 0.0
        self.forecasts.append(forecast)
        return {**logs, "loss": (before + forecast) / (steps + 1)}
