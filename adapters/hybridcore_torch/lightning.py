"""hybridcore in Lightning: a callback that takes the steps of ``trainer.fit``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.loops.optimization.automatic import _AutomaticOptimization
from lightning.pytorch.plugins import (
    DoublePrecision,
    HalfPrecision,
    MixedPrecision,
    Precision,
)
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.call import _call_strategy_hook
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from hybridcore import ConfigError, HybridTrainerConfig, StepResult
from hybridcore_torch.closures import Closure
from hybridcore_torch.trainer import HybridTrainer

__all__ = ["HybridCallback"]

STRATEGIES = (SingleDeviceStrategy, DDPStrategy)
PRECISIONS = (Precision, MixedPrecision, HalfPrecision, DoublePrecision)
# Hooks around what a predicted step leaves out and the trainer does otherwise.
MODULE_HOOKS = (
    "backward",
    "configure_gradient_clipping",
    "optimizer_step",
    "optimizer_zero_grad",
)
HOOKS = (
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
)


class HybridCallback(Callback):  # type: ignore[misc]
    """Lets :class:`~hybridcore_torch.HybridTrainer` take the steps of ``trainer.fit``.

    The module stays as it is; ``training_step`` computes the loss, and is not called in most
    predicted steps::

        callback = HybridCallback()
        Trainer(callbacks=[callback]).fit(module, data)
        print(callback.hybrid.statistics())

    Lightning goes on to load data, to step schedules, to log, to validate and to save. Gradients
    are accumulated, clipped and scaled as its ``Trainer`` says. Its checkpoints carry the state,
    random states included. What ``training_step`` logs in a forward pass without gradients, which
    only looks where a jump or an outer step leads, is left out of the logs.

    Parameters
    ----------
    config : HybridTrainerConfig, optional
        Settings.
    probe, layer_groups, callbacks
        As for :class:`~hybridcore_torch.HybridTrainer`.

    Attributes
    ----------
    hybrid : HybridTrainer or None
        What takes the steps, from the beginning of ``fit`` on.
    """

    def __init__(
        self,
        config: HybridTrainerConfig | None = None,
        *,
        probe: Closure | None = None,
        layer_groups: Iterable[Iterable[torch.nn.Parameter]] | None = None,
        callbacks: Sequence[Callable[[StepResult], object]] = (),
    ) -> None:
        self.hybrid: HybridTrainer | None = None
        self._arguments: dict[str, Any] = {
            "config": config,
            "probe": probe,
            "layer_groups": layer_groups,
            "callbacks": callbacks,
        }
        self._saved: dict[str, Any] | None = None
        self._replaced: _AutomaticOptimization | None = None

    def setup(self, trainer: LightningTrainer, pl_module: LightningModule, stage: str) -> None:
        """Forget a state that was loaded for another run."""
        self._saved = None

    def on_fit_start(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        """Take over the steps.

        Raises
        ------
        ConfigError, ModelError
            If module or trainer do what a predicted step cannot be kept in step with; nothing has
            been changed then.
        """
        _check(trainer, pl_module)
        self.hybrid = HybridTrainer(
            trainer.model,
            trainer.optimizers[0],
            scaler=getattr(trainer.precision_plugin, "scaler", None),
            max_grad_norm=trainer.gradient_clip_val or None,
            **self._arguments,
        )
        loop = trainer.fit_loop.epoch_loop
        self._replaced = loop.automatic_optimization
        loop.automatic_optimization = _Steps(self._replaced, self.hybrid)
        # The optimizer is restored by Lightning after this, and so is what draws the order of the
        # data: they have to find the random states.
        if self._saved is not None:
            self.hybrid.load_state_dict(self._saved)

    def on_train_start(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        """Go on with the random states of the checkpoint in the middle of an epoch too."""
        loop = trainer.fit_loop
        goes_on = loop.restarted_mid_epoch and not loop.epoch_loop.batch_progress.is_last_batch
        if self._saved is not None and goes_on:
            # The loader has drawn from them to begin, as it did not in the run that was saved.
            assert self.hybrid is not None
            self.hybrid.load_state_dict(self._saved)
        self._saved = None

    def teardown(self, trainer: LightningTrainer, pl_module: LightningModule, stage: str) -> None:
        """Give the steps back, and keep `hybrid` to be looked at."""
        if self._replaced is not None:
            trainer.fit_loop.epoch_loop.automatic_optimization = self._replaced
            self._replaced = None

    def on_exception(
        self, trainer: LightningTrainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the steps back."""
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        """Return the state for Lightning's checkpoint, which holds tensors of both only once."""
        return {} if self.hybrid is None else self.hybrid.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned, when ``fit`` begins."""
        self._saved = state_dict


class _Steps(_AutomaticOptimization):  # type: ignore[misc]
    """What Lightning does with a batch, done by a hybrid trainer.

    No public hook of Lightning's can leave the backward pass out.
    """

    def __init__(self, replaced: _AutomaticOptimization, hybrid: HybridTrainer) -> None:
        super().__init__(replaced.trainer)
        # The very same, so that steps are counted on, here and when it is put back.
        self.optim_progress = replaced.optim_progress
        self._hybrid = hybrid
        self._parts: list[Any] = []
        self._extra: dict[str, Any] = {}

    def run(self, optimizer: Any, batch_idx: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Take a step with the last part of a batch; return the loss for the hooks that follow."""
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._parts = []
        self._parts.append(partial(self._loss, kwargs))
        if self.trainer.fit_loop._should_accumulate():
            return {}
        parts, self._parts, self._extra = self._parts, [], {}
        progress = self.optim_progress.optimizer.step
        progress.increment_ready()
        result = self._hybrid.step(parts)
        progress.increment_completed()
        return {**self._extra, "loss": torch.tensor(result.loss)}

    def _loss(self, kwargs: dict[str, Any]) -> torch.Tensor | None:
        looks = not torch.is_grad_enabled()
        with _unlogged(self.trainer.lightning_module) if looks else contextlib.nullcontext():
            output = _call_strategy_hook(self.trainer, "training_step", *kwargs.values())
        result = self.output_result_cls.from_training_step_output(output)
        if not looks:
            self._extra = result.extra
        return result.closure_loss  # type: ignore[no-any-return]


@contextlib.contextmanager
def _unlogged(module: LightningModule) -> Iterator[None]:
    """Let ``self.log`` do nothing in the block."""
    vars(module)["log"] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del vars(module)["log"]


def _check(trainer: LightningTrainer, module: LightningModule) -> None:
    """Raise :class:`ConfigError` where predicted steps cannot be kept in step with the rest."""
    name = type(module).__name__
    if not module.automatic_optimization:
        raise ConfigError(
            f"{name} has automatic_optimization=False and takes its steps itself: set it to True, "
            "or use a HybridTrainer in its training_step instead of this callback"
        )
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise ConfigError(
            f"{name}.training_step takes dataloader_iter, and would fetch more batches each time "
            "that it is called: let it take batch"
        )
    for hook in (*MODULE_HOOKS, *HOOKS):
        if is_overridden(hook, module):
            raise ConfigError(_of_hook(name, hook))
    for callback in trainer.callbacks:
        if isinstance(callback, StochasticWeightAveraging):
            raise ConfigError(
                "StochasticWeightAveraging ends in an epoch of its own without steps: leave it "
                "out, and use HybridCallback.hybrid.averaged()"
            )
        for hook in HOOKS:
            if is_overridden(hook, callback):
                raise ConfigError(_of_hook(type(callback).__name__, hook))
    strategy, precision = type(trainer.strategy), type(trainer.precision_plugin)
    if strategy not in STRATEGIES:
        raise ConfigError(
            f"strategy {strategy.__name__} is not one under which weights can be predicted: use "
            "strategy='auto' on one device, or 'ddp'"
        )
    if getattr(trainer.strategy, "_model_averager", None) is not None:
        raise ConfigError(
            "strategy DDPStrategy averages models between steps (ddp_comm_state), and predicted "
            "steps would be left out of it: build it without"
        )
    if precision not in PRECISIONS:
        raise ConfigError(
            f"precision plugin {precision.__name__} is not one under which weights can be "
            "predicted: use precision='32-true', 'bf16-mixed', '16-mixed', 'bf16-true' or '64-true'"
        )
    if trainer.gradient_clip_val and trainer.gradient_clip_algorithm == GradClipAlgorithmType.VALUE:
        raise ConfigError(
            "gradient_clip_algorithm='value' clips each gradient by itself, which the trainer "
            "does not: use gradient_clip_algorithm='norm'"
        )


def _of_hook(owner: str, hook: str) -> str:
    return (
        f"{owner} overrides {hook}(), which would not be called: hybridcore zeroes and clips "
        "gradients, calls backward() and steps the optimizer, and skips them in predicted steps. "
        "Take the override out; schedules belong into configure_optimizers(), and the gradient "
        "norm of each step is given to HybridCallback(callbacks=[...])"
    )
