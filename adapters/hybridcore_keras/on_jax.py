"""The port of the JAX backend, where all state travels through ``train_step``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import keras
from jax import tree_util

from hybridcore import ModelError
from hybridcore_keras.gradients import gradient_norm
from hybridcore_keras.losses import batch_loss, check_reports_loss, loss_trackers
from hybridcore_keras.ports import Figures
from hybridcore_keras.rates import Rates

_FIGURES = "hybrid_figures"
_WEIGHTS, _OTHERS, _OPTIMIZER, _METRICS = range(4)


class JAXPort:
    """See :class:`hybridcore_keras.ports.Port`.

    Keras compiles ``train_step(state, data)``. The state gets a fifth part, the position of the
    schedule and the factor on the rates, because a compiled function reads no variables. Keras's
    function frees the state it is given, so whatever is kept is a copy.
    """

    def __init__(self, model: Any) -> None:
        if keras.distribution.distribution() is not None:
            raise ModelError(
                "keras.distribution is not supported with the JAX backend: train on one device"
            )
        self.model = model
        self.optimizer = model.optimizer
        self.variables: list[Any] = list(model.trainable_variables)
        self.skipped = 0
        self.rates = Rates(self.optimizer)
        self._plain_step = model.train_step
        self._plain_apply = self.optimizer.stateless_apply
        self._plain_function: Any = None
        self._function: Any = None
        self._probe_function: Any = None
        self._probing = False
        self._told: tuple[Any, Any] | None = None
        self._state: list[Any] = []
        self._iterator: Any = None
        self._batches: list[Any] | None = None

    # -- taking over ------------------------------------------------------------------------

    def install(self) -> None:
        """Have Keras build its train function around the watched step; once for a ``compile``."""
        model = self.model
        self.rates.install()
        vars(self.optimizer)["stateless_apply"] = self._apply
        vars(model)["train_step"] = self._train_step
        if self._function is None or model.train_function is not self._plain_function:
            self._plain_function = model.train_function
            model.make_train_function(force=True)
            self._function = model.train_function
            self._probe_function = None
            self.variables = list(model.trainable_variables)

    def remove(self) -> None:
        """Give model and optimizer back as they were."""
        vars(self.model).pop("train_step", None)
        vars(self.optimizer).pop("stateless_apply", None)
        self.rates.remove()
        self.model.train_function = self._plain_function

    # -- inside the compiled step -----------------------------------------------------------

    def _train_step(self, state: Any, data: Any) -> Any:
        *old, extras = state
        trackers, places = self._trackers()
        metrics = list(old[_METRICS])
        for place in places:
            metrics[place] = jnp.zeros_like(metrics[place])
        self.rates.offset, self.rates.scale = extras
        self._told = None
        try:
            with self.rates.inside():
                logs, new = self._plain_step((*old[:_METRICS], metrics), data)
        finally:
            self.rates.offset, self.rates.scale = self.skipped, 1.0
        check_reports_loss(self.model, logs)
        logs, new = dict(logs), list(new)
        new[_METRICS] = list(new[_METRICS])
        totals = [new[_METRICS][place] for place in places[0::2]]
        counts = [new[_METRICS][place] for place in places[1::2]]
        loss = batch_loss(totals, counts, logs)
        norm, rate = self._told or (jnp.zeros(()), jnp.zeros(()))
        for place in places:
            new[_METRICS][place] += old[_METRICS][place]
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        for part in range(4):
            if part == _OPTIMIZER and hasattr(self.optimizer, "inner_optimizer"):
                # It leaves bad gradients out by itself, and learns from them.
                continue
            new[part] = [jnp.where(good, a, b) for a, b in zip(new[part], old[part], strict=True)]
        if trackers and "loss" in logs:
            total = sum(new[_METRICS][place] for place in places[0::2])
            count = sum(new[_METRICS][place] for place in places[1::2])
            mean = total / jnp.where(count == 0.0, 1.0, count)
            logs["loss"] = jnp.where(sum(counts) == 0.0, logs["loss"], mean)
        logs[_FIGURES] = jnp.stack([jnp.asarray(v, jnp.float32) for v in (loss, norm, rate)])
        return logs, (*new, extras)

    def _probe_step(self, state: Any, data: Any) -> Any:
        """Loss of a step that applies no gradient; the compiler drops what would compute them."""
        _, places = self._trackers()
        metrics = list(state[_METRICS])
        for place in places:
            metrics[place] = jnp.zeros_like(metrics[place])
        logs, new = self._plain_step((*state[:_METRICS], metrics), data)
        check_reports_loss(self.model, logs)
        totals = [new[_METRICS][place] for place in places[0::2]]
        return batch_loss(totals, [new[_METRICS][place] for place in places[1::2]], logs)

    def _apply(self, variables: Any, gradients: Any, weights: Any) -> Any:
        if self._probing:
            return weights, variables
        norm = gradient_norm(gradients, lambda v: jnp.vdot(v, v))
        mapping = list(zip(self.optimizer.variables, variables, strict=True))
        with keras.StatelessScope(state_mapping=mapping):
            if hasattr(self.optimizer, "inner_optimizer"):
                norm = norm / self.optimizer.dynamic_scale.value
            elif self.optimizer.loss_scale_factor is not None:
                norm = norm / self.optimizer.loss_scale_factor
            self._told = norm, jnp.asarray(self.rates.unscaled())
        return self._plain_apply(variables, gradients, weights)

    def _trackers(self) -> tuple[list[Any], list[int]]:
        """Trackers of the loss, and where the metrics' state holds their totals and counts."""
        trackers = loss_trackers(self.model)
        positions = {id(v): place for place, v in enumerate(self.model.metrics_variables)}
        return trackers, [positions[id(v)] for t in trackers for v in (t.total, t.count)]

    # -- around it --------------------------------------------------------------------------

    def begin(self, state: Any, iterator: Any) -> None:
        """Take the state and the iterator of ``fit``."""
        self._state, self._iterator = list(state), iterator

    def pull(self) -> int:
        """Take the batches of one execution out of the iterator, and return how many."""
        if self._batches is None:
            batches = list(islice(self._iterator, self.model.steps_per_execution))
            if not batches:
                raise StopIteration
            self._batches = batches
        return len(self._batches)

    def full(self, scale: float) -> tuple[dict[str, Any], Figures]:
        """Run Keras's own train function with rates times `scale`; its logs and our figures."""
        extras = (jnp.asarray(self.skipped, jnp.int32), jnp.asarray(scale, jnp.float32))
        iterator = self._iterator if self._batches is None else iter(self._batches)
        logs, state = self._function((*self._state, extras), iterator)
        self._state = list(state[:4])
        return logs, Figures(*jax.device_get(logs.pop(_FIGURES)).tolist())

    def probe(self, data: Any) -> float:
        """Loss of `data`, or of the batch where it is None; leaves no trace."""
        if data is None:
            self.pull()
            assert self._batches is not None
            data = self._batches[0]
        if self._probe_function is None:
            eager = self.model.run_eagerly or not self.model.jit_compile
            self._probe_function = self._probe_step if eager else jax.jit(self._probe_step)
        self._probing = True
        try:
            return float(self._probe_function(tuple(self._state), data))
        finally:
            self._probing = False

    def skip(self, batches: int) -> None:
        """Count `batches` for the schedule without training on them."""
        self.skipped += batches
        self.rates.offset = self.skipped

    def finish(self, logs: dict[str, Any]) -> Any:
        """Return what ``fit`` expects of a train function."""
        state = tuple(self._state)
        self.abandon()
        return logs, state

    def abandon(self) -> None:
        """Let go of the batch, because something raised."""
        self._state, self._iterator, self._batches = [], None, None

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile a function of tensors."""
        return jax.jit(function)  # type: ignore[no-any-return]

    def reader(self, function: Callable[[Sequence[Any]], Any]) -> Callable[[], Any]:
        """Compile a function of the weights; what it returns shares no memory with them."""
        compiled = self.compiled(function)
        return lambda: _copies(compiled(self._state[_WEIGHTS]))

    def assign(self, values: Sequence[Any]) -> None:
        """Put the weights at `values`, one for each of `variables`."""
        self._state[_WEIGHTS] = _copies(list(values))

    def keep(self) -> list[Any]:
        """Copy all training state but the weights and the user's learning rate."""
        found = [*self._state[_OTHERS], *self._state[_OPTIMIZER]]
        return list(_copies(found))

    def put_back(self, kept: Sequence[Any]) -> None:
        """Undo what was done since :meth:`keep`; the schedule goes on where it stands."""
        optimizer, inner = self.optimizer, self.rates.optimizer
        size = len(self._state[_OTHERS])
        new, now = list(_copies(list(kept[size:]))), self._state[_OPTIMIZER]
        for place, variable in enumerate(optimizer.variables):
            if variable is inner._learning_rate:
                new[place] = now[place]
            elif variable is inner._iterations:
                self.skipped += int(now[place]) - int(new[place])
        self.rates.offset = self.skipped
        self._state[_OTHERS], self._state[_OPTIMIZER] = list(_copies(list(kept[:size]))), new


def _copies(values: Any) -> Any:
    return tree_util.tree_map(lambda value: jnp.array(value, copy=True), values)
