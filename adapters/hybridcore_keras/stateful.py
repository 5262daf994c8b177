"""The watched step where variables are changed in place: TensorFlow and torch."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
from keras import ops

from hybridcore_keras.checks import check_steps, other_optimizers, unused
from hybridcore_keras.gradients import gradient_norm
from hybridcore_keras.losses import batch_loss, check_reports_loss, loss_trackers
from hybridcore_keras.ports import (
    Figures,
    Replaced,
    accumulators,
    build_optimizer,
    built,
    hastened,
    is_built,
    own_statistics,
    recurrent_states,
    slow_averages,
)
from hybridcore_keras.rates import Rates

FIGURES = "hybrid_figures"
_GRADIENTS = "hybrid_gradients"


def _held(value: float, dtype: str) -> Any:
    """Return a variable that a compiled step reads, and no replica changes."""
    return keras.Variable(value, trainable=False, dtype=dtype, aggregation="only_first_replica")


class _Seen(threading.local):
    """What the present batch has shown so far; of replicas each is traced in a thread."""

    trackers: Sequence[Any] = ()
    norm: Any = None
    scale: Any = None
    # Those of the optimizer.
    steps = 0


class StatefulPort:
    """What the ports of TensorFlow and torch share; see :class:`hybridcore_keras.ports.Port`.

    ``model.train_step`` and ``optimizer.apply`` are replaced on the two instances, and Keras then
    compiles its train function as ever: loss, gradient norm and the decision to leave a bad batch
    out are part of the one compiled step.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.optimizer = model.optimizer
        self.rates = Rates(self.optimizer)
        self.rates.scale = _held(1.0, "float32")
        self.rates.highest = _held(math.inf, "float32")
        self.rates.offset = _held(0, "int")
        self._plain_step = model.train_step
        self._plain_apply = self.optimizer.apply
        self.replaced = Replaced(
            (model, "train_step", self._train_step), (self.optimizer, "apply", self._apply)
        )
        self._plain_function: Any = None
        self._function: Any = None
        self._scale, self._highest, self._offset = 1.0, math.inf, 0
        # How many times as fast averages of many batches forget.
        self._forgetting, self._assigned, self._hastens = _held(1.0, "float32"), math.nan, False
        self.gradients: list[Any] = []
        self._applier: Any = None
        self._follower: Any = None
        self._probing = False
        # While the gradients of a pass are kept instead of being applied.
        self._keeping = False
        self._kept: dict[int, Any] = {}
        self._seen = _Seen()
        self._unused: list[Any] = []
        self._batches: list[Any] | None = None
        self._state_beside: list[Any] | None = None
        # Whether a pass has come to its end, and with it all that makes variables.
        self._passed = False

    @property
    def variables(self) -> list[Any]:
        """Trainable variables, in the order of the model."""
        return list(self.model.trainable_variables)

    # -- taking over ------------------------------------------------------------------------

    def install(self) -> bool:
        """Take over the rates, and have Keras build a train function around the watched step."""
        model, plain = self.model, self.model.train_function
        if is_built(model) and type(model).train_step is keras.Model.train_step:
            # TensorFlow gives variables that are made in a step no value if it is interrupted.
            build_optimizer(model)
        self.rates.install()
        self._unused = other_optimizers(model)
        self._hastens, self._assigned = bool(slow_averages(model)), math.nan
        new = self._function is None or plain is not self._plain_function
        if new:
            self._function, self._plain_function = None, plain
            self._applier = self._follower = self._state_beside = None
            self._renew()
            self._function = built(model, self.replaced)
        self._set_rates(self._scale, self._highest)
        return new

    def _renew(self) -> None:
        """Forget what was compiled before."""

    def remove(self) -> None:
        """Give the optimizer its rates back."""
        self.rates.remove()

    # -- inside the compiled step -----------------------------------------------------------

    def _train_step(self, data: Any) -> dict[str, Any]:
        if self._probing:
            return {FIGURES: self._probed_loss(data)}
        model = self.model
        self._seen.trackers = trackers = loss_trackers(model)
        running = [(self._read(t.total), self._read(t.count)) for t in trackers]
        guarded = self._guarded(trackers)
        kept = [self._read(variable) for variable in guarded]
        for tracker in trackers:
            tracker.reset_state()
        self._seen.norm = self._seen.scale = ops.zeros((), "float32")
        self._kept, self._seen.steps = {}, 0
        statistics = own_statistics(model) if self._keeping else hastened(model, self._forgetting)
        rate = ops.cast(self.rates.unscaled(), "float32")
        with self.rates.inside(), unused(self._unused), statistics:
            logs = self._plain_step(data)
        check_reports_loss(model, logs)
        check_steps(self._seen.steps)
        logs = dict(logs)
        totals = [self._read(tracker.total) for tracker in trackers]
        counts = [self._read(tracker.count) for tracker in trackers]
        loss = batch_loss(totals, counts, logs)
        good = self._agreed(ops.logical_and(ops.isfinite(loss), ops.isfinite(self._seen.norm)))
        self._put_back_unless(good, guarded, kept)
        for tracker, before, total, count in zip(trackers, running, totals, counts, strict=True):
            tracker.total.assign(before[0] + ops.where(good, total, ops.zeros_like(total)))
            tracker.count.assign(before[1] + ops.where(good, count, ops.zeros_like(count)))
        if trackers and "loss" in logs:
            total, count = sum(t.total.value for t in trackers), sum(t.count for t in trackers)
            # Where all batches so far were left out there is no mean, and zero would be the best.
            used = ops.logical_and(ops.not_equal(sum(counts), 0.0), ops.not_equal(count, 0.0))
            mean = ops.divide_no_nan(total, count)
            logs["loss"] = ops.where(used, mean, ops.cast(logs["loss"], mean.dtype))
        norm = ops.cast(self._seen.norm, "float32")
        logs[FIGURES] = ops.stack([loss, norm, rate, self._seen.scale])
        if self._keeping:
            logs[_GRADIENTS] = [
                self._kept.get(id(v), ops.zeros(v.shape, v.dtype)) for v in self.variables
            ]
        return logs

    def _probed_loss(self, data: Any) -> Any:
        """Loss of a step that applies no gradient; the compiler drops what would compute them."""
        trackers = loss_trackers(self.model)
        variables = [*self._guarded([]), *(v for t in trackers for v in t.variables)]
        kept = [self._read(variable) for variable in variables]
        for tracker in trackers:
            tracker.reset_state()
        logs = self._plain_step(data)
        check_reports_loss(self.model, logs)
        totals = [self._read(tracker.total) for tracker in trackers]
        counts = [self._read(tracker.count) for tracker in trackers]
        loss = batch_loss(totals, counts, logs)
        for variable, value in zip(variables, kept, strict=True):
            variable.assign(value)
        return loss

    def _apply(self, gradients: Any, variables: Any = None) -> None:
        if self._probing:
            return
        self._seen.steps += 1
        gradients = list(gradients)
        variables = None if variables is None else list(variables)
        optimizer = self.optimizer
        if not optimizer.built:
            # Variables cannot be made in a branch.
            with keras.name_scope(optimizer.name):
                optimizer.build(variables)
        self._seen.norm = self._unscale(self._norm_of(gradients))
        if self._keeping:
            owners = optimizer._trainable_variables if variables is None else variables
            pairs = zip(owners, gradients, strict=True)
            self._kept |= {id(v): ops.convert_to_tensor(g) for v, g in pairs if g is not None}
            return
        if hasattr(optimizer, "inner_optimizer"):
            # It leaves bad gradients out by itself, and learns from them.
            self._seen.scale = ops.cast(self._read(optimizer.dynamic_scale), "float32")
            self._plain_apply(gradients, variables)
            return
        good = ops.isfinite(self._seen.norm)
        for tracker in self._seen.trackers:
            good = ops.logical_and(good, ops.isfinite(tracker.total))
        self._apply_if(good, gradients, variables)

    def _norm_of(self, gradients: list[Any]) -> Any:
        return gradient_norm(gradients, self._sum_of_squares)

    def _agreed(self, good: Any) -> Any:
        """Whether the batch is `good` on all replicas."""
        return good

    def _apply_if(self, good: Any, gradients: list[Any], variables: list[Any] | None) -> None:
        def apply() -> None:
            self._plain_apply(gradients, variables)

        ops.cond(good, apply, lambda: None)

    def _unscale(self, norm: Any) -> Any:
        if hasattr(self.optimizer, "inner_optimizer"):
            return norm / self.optimizer.dynamic_scale
        factor = self.optimizer.loss_scale_factor
        return norm if factor is None else norm / factor

    def _guarded(self, trackers: Sequence[Any]) -> list[Any]:
        """Variables that a step changes besides the weights, but for those of `trackers`."""
        tracked = {id(v) for tracker in trackers for v in tracker.variables}
        return list({id(v): v for v in self._beside() if id(v) not in tracked}.values())

    def _put_back_unless(self, good: Any, guarded: list[Any], kept: list[Any]) -> None:
        def put_back() -> None:
            for variable, value in zip(guarded, kept, strict=True):
                variable.assign(value)

        if guarded:
            ops.cond(good, lambda: None, put_back)

    def _read(self, variable: Any) -> Any:
        """Value of `variable` now, whatever is done to it later."""
        raise NotImplementedError

    def _sum_of_squares(self, values: Any) -> Any:
        """Sum of the squares of a float32 tensor."""
        raise NotImplementedError

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile a function of tensors."""
        raise NotImplementedError

    # -- around it --------------------------------------------------------------------------

    @contextlib.contextmanager
    def alone(self, batch: Any) -> Iterator[None]:
        """Hold `batch` as one of ``fit``'s, where no ``fit`` runs."""
        self.install()
        self._batches = [batch]
        try:
            with self.replaced:
                yield
        finally:
            self.abandon()
            self.remove()

    def _set_rates(self, scale: float, highest: float) -> None:
        # Between the two lines an interrupt may come.
        if scale != self._scale:
            self._scale = math.nan
            self.rates.scale.assign(scale)
            self._scale = scale
        if highest != self._highest:
            self._highest = math.nan
            self.rates.highest.assign(highest)
            self._highest = highest
        if self.rates.skipped != self._offset:
            self._offset = -1
            self.rates.offset.assign(self.rates.skipped)
            self._offset = self.rates.skipped

    def _set_forgetting(self, forgetting: float) -> None:
        if forgetting != self._assigned:
            self._assigned = math.nan
            if self._hastens:
                self._forgetting.assign(forgetting)
            self._assigned = forgetting

    def skip(self, batches: int) -> None:
        """Count `batches` for the schedule without training on them."""
        self.rates.skipped += batches
        if self.rates.follow_schedule:
            # At once, as other callbacks, and what they compile, may look at the learning rate.
            self._set_rates(self._scale, self._highest)

    def finish(self, logs: dict[str, Any]) -> Any:
        """Return what ``fit`` expects of a train function."""
        self._batches = None
        return logs

    def abandon(self) -> None:
        """Let go of the batch, because something raised."""
        self._batches = None
        if not self._passed:
            # A function that was left while it made variables takes no more.
            self._function = None

    # -- quasi-Newton steps -------------------------------------------------------------------

    def _pass(self, function: Any, data: Any) -> tuple[dict[str, Any], Figures]:
        """Run `function`, built to keep gradients, on `data`."""
        self._set_rates(1.0, math.inf)
        self._keeping = True
        try:
            logs = dict(function(data))
        finally:
            self._keeping = False
        self.gradients = list(logs.pop(_GRADIENTS))
        return logs, self._figures(logs)

    def apply(self, scale: float, highest: float = math.inf) -> None:
        """Take the step of the optimizer with the gradients kept, at rates times `scale`."""
        self._set_rates(self._scale, self._highest)
        if self._applier is None:
            self._applier = self.compiled(self._applied)
        # Not by the variables that a pass reads: to write them takes as long as some steps.
        figures = (ops.convert_to_tensor(value, "float32") for value in (scale, highest))
        self._applier(self.gradients, *figures)

    def follow(self) -> None:
        """Let the optimizer see the gradients kept at a rate of zero, and leave the weights."""
        self._set_rates(self._scale, self._highest)
        if self._follower is None:
            self._follower = self.compiled(self._followed)
        self._follower(self.gradients)

    def _applied(self, gradients: Sequence[Any], scale: Any, highest: Any) -> None:
        rates = self.rates
        held, (rates.scale, rates.highest) = (rates.scale, rates.highest), (scale, highest)
        try:
            with rates.inside():
                self._plain_apply(list(gradients), self.variables)
        finally:
            rates.scale, rates.highest = held

    def _followed(self, gradients: Sequence[Any]) -> None:
        # Momentum moves the weights at a rate of zero too.
        kept = [self._read(variable) for variable in self.variables]
        self._applied(gradients, ops.zeros((), "float32"), ops.full((), math.inf, "float32"))
        for variable, value in zip(self.variables, kept, strict=True):
            variable.assign(value)

    def count(self) -> None:
        """Have ``optimizer.iterations`` count a pass that no step of the optimizer followed."""
        self.optimizer._iterations.assign_add(1)

    def buffers(self) -> list[Any]:
        """Copy the state of model and metrics but for the weights."""
        if self._state_beside is None:
            # Keras looks through all layers for it, which takes a third of a short pass.
            self._state_beside = self._beside()
        return [self._read(variable) for variable in self._state_beside]

    def put_back_buffers(self, kept: Sequence[Any]) -> None:
        """Undo what was done since :meth:`buffers`."""
        for variable, value in zip(self._state_beside or (), kept, strict=True):
            variable.assign(value)

    def _beside(self) -> list[Any]:
        model = self.model
        beside = [*model.non_trainable_variables, *model.metrics_variables]
        return [*beside, *recurrent_states(model)]

    def _figures(self, logs: dict[str, Any]) -> Figures:
        self._passed = True
        return Figures(*ops.convert_to_numpy(logs.pop(FIGURES)).tolist())

    def others(self) -> list[Any]:
        """Variables that a rollback restores besides the weights.

        Rate and iterations stay where they are: the one is the user's, the other counts passes.
        """
        inner = self.rates.optimizer
        model = self.model
        beside = [*model.non_trainable_variables, *recurrent_states(model)]
        found = [*beside, *self.optimizer.variables]
        return [v for v in found if v is not inner._learning_rate and v is not inner._iterations]

    def keep(self) -> list[Any]:
        """Copy all training state but weights, iterations and the user's learning rate."""
        return [self._read(variable) for variable in self.others()]

    def put_back(self, kept: Sequence[Any]) -> None:
        """Undo what was done since :meth:`keep`; the schedule goes on where it stands."""
        for variable, value in zip(self.others(), kept, strict=True):
            variable.assign(value)
        for variable in accumulators(self.rates.optimizer):
            variable.assign(ops.zeros(variable.shape, variable.dtype))
