"""hybridcore in Hugging Face's ``Trainer``: the same class with predicted steps."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput

from hybridcore import ClosureError, ConfigError, ModelError
from hybridcore_torch import files
from hybridcore_torch.accelerate import build, check_accelerator
from hybridcore_torch.trainer import HybridTrainer

__all__ = ["Trainer"]

logger = logging.getLogger("hybridcore")

FILE = "hybridcore.safetensors"
OWN = {"config", "probe", "layer_groups", "callbacks"}
# Optimizers that update a parameter inside of the backward pass.
IN_BACKWARD = ("lomo", "layerwise")


class Trainer(transformers.Trainer):  # type: ignore[misc]
    """``transformers.Trainer`` whose steps are taken by :class:`~hybridcore_torch.HybridTrainer`.

    Everything else is Hugging Face's: data, schedule, logs, evaluation, checkpoints. Gradients are
    accumulated, clipped and scaled as ``TrainingArguments`` say. A checkpoint holds one more file,
    ``hybridcore.safetensors``, and ``train(resume_from_checkpoint=...)`` reads it. With a subclass
    of Hugging Face's: ``class Mine(hybridcore_torch.huggingface.Trainer, Seq2SeqTrainer)``.

    Parameters
    ----------
    *args, **kwargs
        As for ``transformers.Trainer``.
    hybrid : mapping, optional
        Arguments of :class:`~hybridcore_torch.HybridTrainer`: ``config``, ``probe``,
        ``layer_groups``, ``callbacks``.

    Attributes
    ----------
    hybrid : HybridTrainer or None
        What takes the steps, from ``train()`` on.
    """

    def __init__(self, *args: Any, hybrid: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if not (hybrid is None or isinstance(hybrid, Mapping)):
            raise ConfigError(
                f"hybrid must be a mapping, got {type(hybrid).__name__}: give it as "
                "{'config': HybridTrainerConfig(...)}"
            )
        arguments = dict(hybrid or {})
        if arguments.keys() - OWN:
            raise ConfigError(
                f"hybrid has {sorted(arguments.keys() - OWN)}: it takes {', '.join(sorted(OWN))}, "
                "and the rest comes from TrainingArguments"
            )
        super().__init__(*args, **kwargs)
        self._arguments = arguments
        self.hybrid: HybridTrainer | None = None
        self._parts: list[Callable[[], object]] = []
        self._gradient_norm: float | None = None
        self._stepped = False

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train; see ``transformers.Trainer``. What is refused is refused before the first step."""
        try:
            return super().train(*args, **kwargs)
        finally:
            # Accelerate's state is one for the process, and the last step has left it at False.
            self.accelerator.sync_gradients = True

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Take a step of hybridcore with the last part of a batch; see ``transformers.Trainer``."""
        step = super().training_step
        self._parts.append(lambda: step(model, inputs, num_items_in_batch))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        assert self.hybrid is not None
        parts, self._parts = self._parts, []
        result = self.hybrid.step([self._closure(part, len(parts)) for part in parts])
        self._gradient_norm, self._stepped = result.gradient_norm, True
        # The optimizer has been stepped. The loop calls Accelerate's next, which does nothing now.
        self.accelerator.sync_gradients = False
        return torch.tensor(result.loss, device=self.args.device)

    def _closure(self, part: Callable[[], object], parts: int) -> Callable[[], torch.Tensor]:
        """Return what computes the loss of one of `parts`, of which the mean is to be the whole."""

        def closure() -> torch.Tensor:
            with _caught(self.accelerator) as losses:
                part()
            if not losses:
                raise ClosureError(
                    "training_step() did not call accelerator.backward(), so that its loss is not "
                    "known: call it there, or override compute_loss() instead"
                )
            # Hugging Face's are shares of the whole, and add up.
            return losses[0] if parts == 1 else losses[0] * parts

        return closure

    # -- what the loop of transformers would do to gradients that have been used ---------------

    def _clip_grad_norm(self, model: nn.Module) -> None:
        return None

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float | None:
        if not self._stepped:
            raise ModelError(
                f"training_step() of {type(self).__name__} took no step of hybridcore: call "
                "super().training_step() in it, or override compute_loss() instead"
            )
        self._stepped = False
        return self._gradient_norm

    # -- the beginning, and checkpoints: transformers has no public hooks where these have to be --

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, Any]:
        self._check()
        prepared = super()._prepare_for_training(
            max_steps, train_dataloader, resume_from_checkpoint
        )
        most = self.args.max_grad_norm
        self.hybrid = build(
            self.accelerator,
            prepared[0],
            self.optimizer,
            max_grad_norm=most if most and most > 0 else None,
            **self._arguments,
        )
        self._parts = []
        if resume_from_checkpoint is not None:
            path = Path(resume_from_checkpoint) / FILE
            if path.is_file():
                self.hybrid.load_state_dict(files.read(path))
            else:
                logger.warning("%s is not there, so hybridcore begins anew", path)
        return prepared  # type: ignore[no-any-return]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.hybrid is not None and self.args.should_save:
            self.hybrid.save(Path(output_dir) / FILE)

    def _check(self) -> None:
        check_accelerator(self.accelerator)
        if any(word in str(self.args.optim.value) for word in IN_BACKWARD):
            raise ConfigError(
                f"optim={self.args.optim.value!r} updates weights inside of the backward pass, so "
                "that no step can be predicted: use one with steps, for example 'adamw_torch'"
            )
        if self.is_distributed_loading_by_transformers:
            raise ConfigError(
                "model was sharded by from_pretrained(), under which weights cannot be predicted: "
                "load it whole, and use one device or data parallelism"
            )
        for callback in self.callback_handler.callbacks:
            if type(callback).on_pre_optimizer_step is not TrainerCallback.on_pre_optimizer_step:
                raise ConfigError(
                    f"callback {type(callback).__name__} has on_pre_optimizer_step(), which would "
                    "be called when the step has been taken: use on_step_end() instead"
                )


@contextlib.contextmanager
def _caught(accelerator: Accelerator) -> Iterator[list[torch.Tensor]]:
    """Collect the losses that ``accelerator.backward`` is given in the block, and do no more."""
    losses: list[torch.Tensor] = []
    vars(accelerator)["backward"] = lambda loss, **_: losses.append(loss)
    try:
        yield losses
    finally:
        del vars(accelerator)["backward"]
