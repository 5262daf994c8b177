"""Arguments of the trainer, checked before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hybridcore import (
    ConfigError,
    DivergenceError,
    HybridTrainerConfig,
    ModelError,
    Observation,
)
from hybridcore_torch.decay import bare


def are_finite(model: nn.Module) -> bool:
    """Whether all parameters are finite numbers."""
    dense = [p for p in model.parameters() if p.layout is torch.strided]
    return all(bool(torch.isfinite(p).all()) for p in dense)


def bad_batch(observation: Observation, step: int, model: nn.Module) -> DivergenceError:
    """Return the error for a batch that was left out in step number `step`."""
    fix = "the batch was left out and the optimizer took no step; lower the learning rate or check "
    fix += "the data"
    if not are_finite(model):
        fix = "the weights themselves are not finite: go back to a checkpoint"
    return DivergenceError(
        f"loss {observation.loss:g} with gradient norm {observation.gradient_norm:g} in step "
        f"{step}: {fix}"
    )


def averages(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `optimizer` keeps an average of the weights, as those of ``schedulefree`` do.

    They go between it and the weights that are trained by ``train()`` and ``eval()``, which what
    Accelerate has prepared has in any case.
    """
    return all(callable(getattr(bare(optimizer), mode, None)) for mode in ("train", "eval"))


def check_arguments(
    model: object,
    optimizer: object,
    config: object,
    scheduler: Any,
    scaler: object,
    max_grad_norm: object,
    probe: object,
    callbacks: object,
) -> None:
    """Raise an error that names the argument, the value and the fix."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    lazy = next((n for n, p in model.named_parameters() if nn.parameter.is_lazy(p)), None)
    if lazy is not None:
        raise ModelError(
            f"parameter {lazy} of a lazy layer has no shape yet: call the model on one batch first"
        )
    meta = next((n for n, p in model.named_parameters() if p.is_meta), None)
    if meta is not None:
        raise ModelError(
            f"parameter {meta} is on the meta device and has no values: call model.to_empty(device="
            "...) and initialize it before optimizer and trainer are built"
        )
    if not isinstance(optimizer, torch.optim.Optimizer):
        several = isinstance(optimizer, list | tuple)
        fix = "build it from model.parameters() first"
        raise ModelError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}: "
            f"{'put the parameters into groups of one optimizer' if several else fix}"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ModelError(
            "optimizer LBFGS calls the closure by itself and cannot be stepped from outside: use "
            "a first-order optimizer such as Adam or SGD"
        )
    for group in optimizer.param_groups:
        rate = group.get("lr")
        if not isinstance(rate, int | float | torch.Tensor):
            raise ModelError(
                f"optimizer {type(optimizer).__name__} has learning rate {rate!r} in a parameter "
                "group: give it a number, which settling after a jump scales"
            )
    if config is not None and not isinstance(config, HybridTrainerConfig):
        if callable(getattr(config, "step", None)):
            raise ConfigError(
                f"config must be a HybridTrainerConfig, got {type(config).__name__}: pass it as "
                "scheduler="
            )
        raise ConfigError(
            f"config must be a HybridTrainerConfig, got {type(config).__name__}: for a dictionary "
            "use HybridTrainerConfig.from_dict"
        )
    if scheduler is not None:
        if isinstance(scheduler, type) or not callable(getattr(scheduler, "step", None)):
            got = f"the class {scheduler.__name__}" if isinstance(scheduler, type) else None
            raise ModelError(
                f"scheduler must have a step() method, got {got or type(scheduler).__name__}: "
                "build one from torch.optim.lr_scheduler with this optimizer"
            )
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise ModelError(
                "scheduler ReduceLROnPlateau needs a metric at each step: leave scheduler=None and "
                "call it yourself after each validation"
            )
        if getattr(scheduler, "optimizer", optimizer) is not optimizer:
            raise ModelError(
                "scheduler drives another optimizer: build it from the optimizer given here"
            )
    calls = ("scale", "unscale_", "step", "update", "get_scale")
    scales = all(callable(getattr(scaler, call, None)) for call in calls)
    if scaler is not None and (isinstance(scaler, type) or not scales):
        raise ModelError(
            f"scaler must be a torch.amp.GradScaler, got {scaler!r}: pass GradScaler(), or None in "
            "full precision and bfloat16"
        )
    if max_grad_norm is not None:
        number = isinstance(max_grad_norm, int | float) and not isinstance(max_grad_norm, bool)
        if not number or not 0.0 < float(max_grad_norm) < float("inf"):  # type: ignore[arg-type]
            raise ConfigError(
                f"max_grad_norm must be a finite positive number or None, got {max_grad_norm!r}: "
                "with None gradients are not clipped, and StepResult.gradient_norm is their norm"
            )
    if probe is not None and not callable(probe):
        raise ConfigError(
            f"probe must be a callable that returns a loss, got {type(probe).__name__}"
        )
    if not isinstance(callbacks, Sequence) or not all(callable(c) for c in callbacks):
        raise ConfigError(
            f"callbacks must be a sequence of callables that take a StepResult, got {callbacks!r}: "
            "pass a list of them, of one too"
        )
