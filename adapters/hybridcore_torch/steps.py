"""One real step: what the plain loop does, and the same while being watched."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import nn

from hybridcore import ClosureError, ModelError, Observation
from hybridcore_torch import buffers
from hybridcore_torch.buffers import BufferWatch
from hybridcore_torch.closures import Closure, Closures, training_loss
from hybridcore_torch.gradients import are_wide, gradient_norm, loss_and_norm, wide_norm
from hybridcore_torch.groups import outside
from hybridcore_torch.ranks import Ranks

logger = logging.getLogger("hybridcore")

NAN = float("nan")
Keep = Callable[[], object]
Scale = Callable[[tuple[float, ...]], float]


class Stepper:
    """Takes real steps with the user's optimizer, scheduler and scaler.

    Parameters
    ----------
    model, optimizer, scheduler, scaler, max_grad_norm
        As for :class:`hybridcore_torch.HybridTrainer`.
    ranks : Ranks
        Makes one loss and one norm of those of all ranks.

    Attributes
    ----------
    buffers : BufferWatch
        Copies the model's buffers.
    late : bool
        Whether nothing is fetched from the device before the backward pass, and then once, but
        for samples of large buffers: the model is not on the CPU.
    updating : bool
        Whether the newest full step got through its passes: what it raises then is none of theirs.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any | None,
        scaler: torch.amp.GradScaler | None,
        max_grad_norm: float | None,
        ranks: Ranks,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._scaler = scaler
        self._max_grad_norm = max_grad_norm
        self._ranks = ranks
        # What of a step the plain loop would not have done.
        self._watching = 0.0
        self._written: int | None = None
        self._unscaled = False
        self._told_of_schedule = self._told_of_none = self.updating = False
        self.buffers = BufferWatch()
        self.refresh()

    def refresh(self) -> None:
        """Look at the model and the optimizer again, after parameters were added or removed."""
        # Where the schedule was left; None where it may be elsewhere by now.
        self._epoch: int | None = None
        self.modules = list(self._model.modules())
        norms = (m for m in self.modules if isinstance(m, nn.modules.batchnorm._NormBase))
        self._norms = [norm for norm in norms if norm.running_mean is not None]
        self.late = not all(p.is_cpu for p in self._model.parameters())
        usual = self._scaler is None and self._max_grad_norm is None and not self._ranks.several
        self._is_usual = usual and are_wide(self._used())

    @property
    def learning_rate(self) -> float:
        """Learning rate of the first parameter group."""
        return float(self._optimizer.param_groups[0]["lr"])

    @property
    def _learning_rates(self) -> tuple[float, ...]:
        return tuple([float(group["lr"]) for group in self._optimizer.param_groups])

    def advance_schedule(self) -> None:
        """Let the scheduler, if there is one, take a step."""
        if self._scheduler is None:
            return
        moved = self._epoch is not None and self._epoch != self._present_epoch
        if moved and not self._told_of_schedule:
            self._told_of_schedule = True
            logger.warning(
                "the scheduler was stepped between two steps: leave scheduler.step() out of the "
                "loop, which the trainer calls"
            )
        self._scheduler.step()
        self._epoch = self._present_epoch

    @property
    def _present_epoch(self) -> int | None:
        return getattr(self._scheduler, "last_epoch", None)

    def plain(self, closure: Closures) -> Observation:
        """Do what the plain loop does, and nothing else."""
        start = perf_counter()
        self._optimizer.zero_grad()
        self._written = self._first_written()
        loss = self._gradients(closure, guarded=False)
        norm = NAN
        if self._max_grad_norm is not None:
            if self._scaler is not None:
                self._scaler.unscale_(self._optimizer)
            norm = self._clip(self._max_grad_norm)
        rate = self.learning_rate
        self._update()
        if self._scaler is not None:
            self._scaler.update()
        self.advance_schedule()
        return Observation(loss.item(), norm, rate, perf_counter() - start)

    def full(
        self,
        closure: Closures,
        scale: Scale,
        *,
        keep: Keep | None = None,
        update: bool = True,
        forgetting: float = 1.0,
    ) -> Observation:
        """Take the step unless loss or gradients are not finite; the schedule advances anyway.

        Parameters
        ----------
        closure : callable or sequence of callables
            Computes the loss; several, that of one part of the batch each.
        scale : callable
            ``scale(rates)`` returns the factor on every learning rate, for this step only.
        keep : callable, optional
            Called where weights and gradients, not yet clipped, belong together.
        update : bool
            False leaves the weights and the optimizer alone.
        forgetting : float
            How many times as fast averages of many batches forget, as those of batch norm.
        """
        try:
            return self._full(closure, scale, keep, update, forgetting)
        except BaseException as error:
            if isinstance(error, ClosureError):
                # Nothing has been changed then, and parts before this one have left gradients.
                self._drop_gradients()
            if self._unscaled and self._scaler is not None:
                # Or it would take this batch's gradients for unscaled in every later step.
                self._scaler.update(self._scaler.get_scale())
                self._unscaled = False
            raise

    def _full(
        self,
        closure: Closures,
        scale: Scale,
        keep: Keep | None,
        update: bool,
        forgetting: float,
    ) -> Observation:
        self.updating = False
        kept = self.buffers.keep(self.modules)
        start = perf_counter()
        self._drop_gradients()
        norm, overflow = NAN, False
        self._watching = 0.0
        try:
            if self._is_usual and keep is None and callable(closure) and not self.late:
                value, norm = self._usual_gradients(closure)
                gone_through = math.isfinite(value)
            else:
                loss = self._gradients(closure, guarded=not self.late)
                # Elsewhere than on the CPU they come over together, after the backward pass.
                value = NAN if self.late else loss.item()
                gone_through = self.late or math.isfinite(value) or self._ranks.several
                if gone_through:
                    value, norm = self._watched_norm(loss, value, keep, clip=update)
        except BaseException as error:
            buffers.put_back(kept)
            sparse = [g for p in self._used() if (g := p.grad) is not None and g.is_sparse]
            if sparse and isinstance(error, NotImplementedError):
                raise ModelError(
                    "a gradient is sparse, which cannot be watched: leave sparse=True out of the "
                    "embedding and use a dense optimizer"
                ) from error
            raise
        self.updating = True
        rates = self._learning_rates
        if gone_through:
            if math.isfinite(norm):
                if not norm:
                    self._tell_of_none()
                if update:
                    self._update_scaled(scale(rates))
            else:
                # All of them, or a norm that is not finite would stay so for every later batch.
                for parameter in self._clipped():
                    parameter.grad = None
                # A scale below one cannot be what made them overflow.
                scaled = self._scaler is not None and self._scaler.get_scale() >= 1.0
                overflow = scaled and math.isfinite(value)
            if self._scaler is not None:
                self._scaler.update()
                self._unscaled = False
        self.advance_schedule()
        applied = math.isfinite(norm)
        if not applied:
            # A bad batch has been through the running statistics of normalisation layers.
            buffers.put_back(kept)
        elif forgetting != 1.0 and not self._ranks.several:
            # Of several ranks each has moved from what another one had.
            buffers.hasten(kept, self._norms, forgetting)
        seconds = perf_counter() - start - self._watching
        return Observation(
            *(value, norm, rates[0], seconds),
            applied=applied,
            overflow=overflow,
            other_rates=rates[1:],
            backward=gone_through,
        )

    def follow(self) -> None:
        """Let the optimizer see the gradients at a rate of zero, so that its moments stay fresh.

        It sees them as in a step of its own, clipped.
        """
        if self._max_grad_norm is not None:
            self._clip(self._max_grad_norm)
        self._update_scaled(0.0)

    def _drop_gradients(self) -> None:
        """Do what ``optimizer.zero_grad`` does."""
        zero_grad = self._optimizer.zero_grad
        if getattr(zero_grad, "__func__", None) is not torch.optim.Optimizer.zero_grad:
            zero_grad()
            self._written = self._first_written()
            return
        self._written = None
        # torch's own does the same in a record for the profiler, which takes longer than all else.
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def _usual_gradients(self, closure: Closure) -> tuple[float, float]:
        """Compute the gradients in most loops; return the loss and their norm, NaN where it is bad.

        It comes to the same as what is below, in fewer calls: on a short step each counts.
        """
        loss = training_loss(closure)
        self._check_no_gradients()
        value = loss.item()
        if not math.isfinite(value):
            return value, NAN
        loss.backward()  # type: ignore[no-untyped-call]
        start = perf_counter()
        norm = wide_norm([g for p in self._used() if (g := p.grad) is not None])
        self._watching = perf_counter() - start
        return value, norm

    def _used(self) -> list[torch.nn.Parameter]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _gradients(self, closure: Closures, *, guarded: bool) -> torch.Tensor:
        """Compute the loss and its gradients, part by part, and return the mean loss.

        With `guarded` a loss that is not finite is not gone through backwards.
        """
        # Where other ranks may wait in the backward pass, a bad loss goes through it too.
        guarded = guarded and not self._ranks.several
        if callable(closure):
            return self._gradient(closure, 1, guarded)
        # Several stand for one batch in parts.
        *others, last = closure
        losses: list[torch.Tensor] = []
        with self._unsynchronised():
            for part in others:
                losses.append(self._gradient(part, len(others) + 1, guarded, first=not losses))
                if guarded and not math.isfinite(losses[-1].item()):
                    return losses[-1]
        losses.append(self._gradient(last, len(others) + 1, guarded, first=False))
        return torch.stack(losses).mean()

    def _gradient(
        self, closure: Closure, parts: int, guarded: bool, *, first: bool = True
    ) -> torch.Tensor:
        loss = training_loss(closure)
        if first:
            self._check_no_gradients()
        if not guarded or math.isfinite(loss.item()):
            self._backward(loss if parts == 1 else loss / parts)
        return loss.detach()

    def _tell_of_none(self) -> None:
        """Say, once, that nothing is trained, if there are no gradients at all."""
        if not self._told_of_none and all(p.grad is None for p in self._used()):
            self._told_of_none = True
            logger.warning(
                "no parameter of the optimizer got a gradient, so nothing is trained: let the "
                "closure return a loss of the trainer's own model"
            )

    def _unsynchronised(self) -> contextlib.AbstractContextManager[None]:
        """Keep a data-parallel model from averaging gradients before the last part of a batch."""
        no_sync = getattr(self._model, "no_sync", None)
        return contextlib.nullcontext() if no_sync is None else no_sync()

    def _first_written(self) -> int | None:
        """How often the gradient of the first parameter was written, None where there is none."""
        first = self._optimizer.param_groups[0]["params"][:1]
        return None if not first or first[0].grad is None else first[0].grad._version

    def _check_no_gradients(self) -> None:
        # An optimizer of the user's own may keep gradients of zero.
        if self._first_written() != self._written:
            self._optimizer.zero_grad()
            raise ClosureError(
                "closure called backward(), which the trainer does: leave backward(), zero_grad() "
                "and step() out, and only compute and return the loss"
            )

    def _backward(self, loss: torch.Tensor) -> None:
        scaled = loss if self._scaler is None else self._scaler.scale(loss)
        scaled.backward()  # type: ignore[no-untyped-call]

    def _clip(self, most: float) -> float:
        norm = nn.utils.clip_grad_norm_(self._clipped(), most)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def _clipped(self) -> list[torch.nn.Parameter]:
        # Parameters outside the model, of a learned loss for instance, are clipped with the rest.
        # Looked up each time: a layer that was added may train before the structure is looked at.
        return [*self._model.parameters(), *outside(self._model, self._optimizer)]

    def _clipped_or_used(self, most: float | None) -> list[torch.nn.Parameter]:
        """Parameters whose gradients have to be finite."""
        if most is not None:
            return self._clipped()
        return self._used()

    def _watched_norm(
        self, loss: torch.Tensor, value: float, keep: Keep | None, *, clip: bool
    ) -> tuple[float, float]:
        """Clip the gradients; return the loss of all ranks and the norm before.

        The norm is not finite if either is not.
        """
        if self._scaler is not None:
            self._unscaled = True
            self._scaler.unscale_(self._optimizer)
        most = self._max_grad_norm if clip else None
        if most is not None and keep is None and not self._ranks.several and not self.late:
            return value, self._clip(most)
        start = perf_counter()
        watched = self._clipped_or_used(most)
        if self.late:
            value, norm = loss_and_norm(loss, watched, self._ranks)
        else:
            norm = gradient_norm(watched, self._ranks)
        value, norm = self._ranks.agree(value, norm)
        if not math.isfinite(value):
            norm = NAN
        if keep is not None and math.isfinite(norm):
            keep()
        # On other devices the norm waits for the backward pass, which is not watching.
        if not self.late:
            self._watching = perf_counter() - start
        if most is not None and math.isfinite(norm):
            nn.utils.clip_grad_norm_(self._clipped(), most)
        return value, norm

    def _update(self) -> None:
        if self._scaler is None:
            self._optimizer.step()
        else:
            self._scaler.step(self._optimizer)

    def _update_scaled(self, scale: float) -> None:
        if scale == 1.0:
            self._update()
            return
        own = [(group, group["lr"]) for group in self._optimizer.param_groups]
        scaled = [rate * scale for _, rate in own]
        try:
            for (group, _), rate in zip(own, scaled, strict=True):
                group["lr"] = rate
            self._update()
        finally:
            for (group, rate), changed in zip(own, scaled, strict=True):
                group["lr"] = _unscaled(group["lr"], rate, changed, scale)


def _unscaled(found: Any, own: Any, scaled: Any, scale: float) -> Any:
    """Learning rate to go on with, where `found` is what a step at `scaled` has left.

    A schedule that is stepped in a hook of the optimizer's step has set it, from the rate that it
    found there or from a record of its own.
    """
    if found is scaled or found == scaled:
        return own
    # Nothing but a record of its own takes it away from zero.
    if not scale:
        return found
    return found if abs(found - own) <= abs(found - scaled) else found / scale
