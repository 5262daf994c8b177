"""hybridcore in a loop of Accelerate's: a trainer of what ``accelerator.prepare`` returned."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from hybridcore import ConfigError, HybridTrainerConfig, ModelError
from hybridcore_torch.trainer import HybridTrainer

__all__ = ["hybrid_trainer"]

REPLICATED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
PRECISIONS = ("no", "bf16", "fp16")


def hybrid_trainer(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: AcceleratedOptimizer,
    config: HybridTrainerConfig | None = None,
    *,
    scheduler: Any | None = None,
    **arguments: Any,
) -> HybridTrainer:
    """Build a trainer that steps a prepared optimizer, and register it for checkpointing.

    ``trainer.step`` does what ``accelerator.backward``, ``accelerator.clip_grad_norm_``,
    ``optimizer.step`` and ``scheduler.step`` do, with Accelerate's loss scaler::

        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        trainer = hybrid_trainer(accelerator, model, optimizer)
        for x, y in loader:
            trainer.step(lambda: F.cross_entropy(model(x), y))

    ``accelerator.save_state`` and ``load_state`` carry its state.

    Parameters
    ----------
    accelerator : accelerate.Accelerator
        What prepared the others.
    model, optimizer
        As ``accelerator.prepare`` returned them.
    config : HybridTrainerConfig, optional
        Settings.
    scheduler : optional
        Learning-rate scheduler, prepared or not; called once for every step, predicted or not.
    **arguments
        Further arguments of :class:`~hybridcore_torch.HybridTrainer`: ``max_grad_norm``, ``probe``,
        ``layer_groups``, ``callbacks``.

    Raises
    ------
    ConfigError, ModelError
        If the accelerator does what a predicted step cannot be kept in step with, or the arguments
        do not fit together; nothing has been changed then.
    """
    check_accelerator(accelerator)
    if accelerator.gradient_accumulation_steps != 1:
        raise ConfigError(
            f"accelerator has gradient_accumulation_steps={accelerator.gradient_accumulation_steps}"
            ", but a step has to see its whole batch: build Accelerator() without it, leave "
            "accelerator.accumulate() out, and give step() a list of closures, one for each part"
        )
    if isinstance(getattr(scheduler, "scheduler", None), ReduceLROnPlateau):
        scheduler = scheduler.scheduler  # type: ignore[union-attr]
    trainer = build(accelerator, model, optimizer, config, scheduler=scheduler, **arguments)
    accelerator.register_for_checkpointing(trainer)
    return trainer


def check_accelerator(accelerator: Accelerator) -> None:
    """Raise :class:`ConfigError` where the optimizer is not one that can be stepped from here."""
    if accelerator.distributed_type not in REPLICATED:
        raise ConfigError(
            f"accelerator has distributed_type {accelerator.distributed_type.value}, under which "
            "weights cannot be predicted: use one device or data parallelism, or FSDP2's "
            "fully_shard with HybridTrainer itself"
        )
    if accelerator.mixed_precision not in PRECISIONS:
        raise ConfigError(
            f"accelerator has mixed_precision={accelerator.mixed_precision!r}, which keeps scales "
            "of its own from pass to pass: use one of " + ", ".join(PRECISIONS)
        )


def build(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: AcceleratedOptimizer,
    *rest: Any,
    **more: Any,
) -> HybridTrainer:
    """Build a trainer with the optimizer inside of `optimizer` and Accelerate's loss scaler."""
    if not isinstance(optimizer, AcceleratedOptimizer):
        raise ModelError(
            f"optimizer must be one that accelerator.prepare() returned, got "
            f"{type(optimizer).__name__}: prepare model and optimizer first"
        )
    return HybridTrainer(model, optimizer.optimizer, *rest, scaler=accelerator.scaler, **more)
