"""The port of the JAX backend, where all state travels through ``train_step``."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax import tree_util

from hybridcore import ModelError
from hybridcore_keras.checks import check_steps, other_optimizers, unused
from hybridcore_keras.gradients import gradient_norm
from hybridcore_keras.losses import batch_loss, check_reports_loss, loss_trackers
from hybridcore_keras.ports import (
    Figures,
    Replaced,
    accumulators,
    built,
    hastened,
    own_statistics,
)
from hybridcore_keras.rates import Rates

_FIGURES = "hybrid_figures"
_GRADIENTS = "hybrid_gradients"
_WEIGHTS, _OTHERS, _OPTIMIZER, _METRICS = range(4)
_PARTS = ("trainable", "non_trainable", "optimizer", "metrics")


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
        self.rates = Rates(self.optimizer)
        self._plain_step = model.train_step
        self._plain_apply = self.optimizer.stateless_apply
        self.replaced = Replaced(
            (model, "train_step", self._train_step),
            (self.optimizer, "stateless_apply", self._apply),
        )
        self._plain_function: Any = None
        self._function: Any = None
        self._probe_function: Any = None
        self._gradient_function: Any = None
        self._applier: Any = None
        self.gradients: list[Any] = []
        self._probing = False
        # While the gradients of a pass are kept instead of being applied.
        self._keeping = False
        self._kept: list[Any] = []
        self._told: tuple[Any, Any, Any] | None = None
        # Steps of the optimizer in the present batch.
        self._steps = 0
        self._unused: list[Any] = []
        self._state: list[Any] = []
        self._iterator: Any = None
        self._batches: list[Any] | None = None

    # -- taking over ------------------------------------------------------------------------

    def install(self) -> bool:
        """Take over the rates, and have Keras build a train function around the watched step."""
        model, plain = self.model, self.model.train_function
        self.rates.install()
        self._unused = other_optimizers(model)
        new = self._function is None or plain is not self._plain_function
        if new:
            self._function, self._plain_function = None, plain
            self._probe_function = self._gradient_function = self._applier = None
            self.variables = list(model.trainable_variables)
            self._function = built(model, self.replaced)
        return new

    def remove(self) -> None:
        """Give the optimizer its rates back."""
        self.rates.remove()

    # -- inside the compiled step -----------------------------------------------------------

    def _train_step(self, state: Any, data: Any) -> Any:
        *old, extras = state
        trackers, places = self._trackers()
        metrics = list(old[_METRICS])
        for place in places:
            metrics[place] = jnp.zeros_like(metrics[place])
        forgetting = self._take(extras)
        self._told, self._steps = None, 0
        model = self.model
        statistics = own_statistics(model) if self._keeping else hastened(model, forgetting)
        try:
            with self.rates.inside(), unused(self._unused), statistics:
                logs, new = self._plain_step((*old[:_METRICS], metrics), data)
        finally:
            self._settle_rates()
        check_reports_loss(self.model, logs)
        check_steps(self._steps)
        logs, new = dict(logs), list(new)
        new[_METRICS] = list(new[_METRICS])
        totals = [new[_METRICS][place] for place in places[0::2]]
        counts = [new[_METRICS][place] for place in places[1::2]]
        loss = batch_loss(totals, counts, logs)
        assert self._told is not None
        norm, rate, scale = self._told
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
            # Where all batches so far were left out there is no mean, and zero would be the best.
            used = (sum(counts) != 0.0) & (count != 0.0)
            logs["loss"] = jnp.where(used, mean, logs["loss"])
        figures = loss, norm, rate, scale
        logs[_FIGURES] = jnp.stack([jnp.asarray(value, jnp.float32) for value in figures])
        return logs, (*new, extras)

    def _gradient_step(self, state: Any, data: Any) -> Any:
        """Step that applies no gradient and reports all of them."""
        self._keeping = True
        try:
            logs, state = self._train_step(state, data)
        finally:
            self._keeping = False
        return {**logs, _GRADIENTS: self._kept}, state

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
        self._steps += 1
        norm, scale = gradient_norm(gradients, lambda v: jnp.sum(v * v)), jnp.zeros(())
        mapping = list(zip(self.optimizer.variables, variables, strict=True))
        with keras.StatelessScope(state_mapping=mapping):
            if hasattr(self.optimizer, "inner_optimizer"):
                scale = self.optimizer.dynamic_scale.value
                norm = norm / scale
            elif self.optimizer.loss_scale_factor is not None:
                norm = norm / self.optimizer.loss_scale_factor
            self._told = norm, jnp.asarray(self.rates.unscaled()), scale
        if self._keeping:
            self._kept = list(gradients)
            return weights, variables
        return self._plain_apply(variables, gradients, weights)

    def _trackers(self) -> tuple[list[Any], list[int]]:
        """Trackers of the loss, and where the metrics' state holds their totals and counts."""
        trackers = loss_trackers(self.model)
        positions = {id(v): place for place, v in enumerate(self.model.metrics_variables)}
        return trackers, [positions[id(v)] for t in trackers for v in (t.total, t.count)]

    # -- around it --------------------------------------------------------------------------

    def begin(self, state: Any, iterator: Any) -> None:
        """Take the state and the iterator of ``fit``."""
        self._state, self._iterator, self._batches = list(state), iterator, None

    @contextlib.contextmanager
    def alone(self, batch: Any) -> Iterator[None]:
        """Hold `batch` as one of ``fit``'s, where no ``fit`` runs."""
        model = self.model
        owners = (
            model.trainable_variables,
            model.non_trainable_variables,
            self.optimizer.variables,
            model.metrics_variables,
        )
        self.install()
        self._state = [_copies([variable.value for variable in part]) for part in owners]
        self._batches = [batch]
        try:
            with self.replaced:
                yield
        finally:
            for part, values in zip(owners, self._state, strict=True):
                for variable, value in zip(part, values, strict=True):
                    variable.assign(value)
            self.abandon()
            self.remove()

    def pull(self) -> int:
        """Take the batches of one execution out of the iterator, and return how many."""
        if self._batches is None:
            batches = list(islice(self._iterator, self.model.steps_per_execution))
            if not batches:
                raise StopIteration
            self._batches = batches
        return len(self._batches)

    def full(
        self, scale: float = 1.0, highest: float = math.inf, *, forgetting: float = 1.0
    ) -> tuple[dict[str, Any], Figures]:
        """Run Keras's own train function with rates times `scale`; its logs and our figures.

        A `scale` above 1 takes no rate beyond `highest`. Averages of batch norm that are of many
        batches forget so many times as fast as `forgetting` says.
        """
        iterator = self._iterator if self._batches is None else iter(self._batches)
        logs, state = self._function(
            (*self._state, self._extras(scale, highest, forgetting)), iterator
        )
        self._state = list(state[:4])
        if self._batches is None:
            # They are used up, and what follows in the step must not take those of the next.
            self._batches = []
        return logs, _figures(logs)

    def _extras(self, scale: float, highest: float, forgetting: float = 1.0) -> tuple[Any, Any]:
        # A compiled function takes arrays of NumPy at once; to make JAX's takes 0.2 ms.
        return np.int32(self.rates.skipped), np.array((scale, highest, forgetting), np.float32)

    def _take(self, extras: tuple[Any, Any]) -> Any:
        """Take the rates of a step, and return how fast it forgets."""
        self.rates.offset, (self.rates.scale, self.rates.highest, forgetting) = extras
        return forgetting

    def _settle_rates(self) -> None:
        self.rates.offset, self.rates.scale, self.rates.highest = self.rates.skipped, 1.0, math.inf

    def _jitted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        eager = self.model.run_eagerly or not self.model.jit_compile
        return function if eager else jax.jit(function)

    def gradient(self) -> tuple[dict[str, Any], Figures]:
        """Do what :meth:`full` does but for the step itself, and keep the gradients."""
        self.pull()
        assert self._batches is not None
        if self._gradient_function is None:
            self._gradient_function = self._jitted(self._gradient_step)
        state = (*self._state, self._extras(1.0, math.inf))
        logs, state = self._gradient_function(state, self._batches[0])
        self._state = list(state[:4])
        self.gradients = list(logs.pop(_GRADIENTS))
        return logs, _figures(logs)

    def apply(self, scale: float, highest: float = math.inf) -> None:
        """Take the step of the optimizer with the gradients kept, at rates times `scale`."""
        weights, variables = self._stepped(scale, highest)
        self._state[_WEIGHTS], self._state[_OPTIMIZER] = list(weights), list(variables)

    def follow(self) -> None:
        """Let the optimizer see the gradients kept at a rate of zero, and leave the weights."""
        self._state[_OPTIMIZER] = list(self._stepped(0.0, math.inf)[1])

    def _stepped(self, scale: float, highest: float) -> tuple[Any, Any]:
        if self._applier is None:
            self._applier = self._jitted(self._applied)
        parts = self._state[_OPTIMIZER], self.gradients, self._state[_WEIGHTS]
        weights, variables = self._applier(*parts, self._extras(scale, highest))
        return weights, variables

    def _applied(self, variables: Any, gradients: Any, weights: Any, extras: Any) -> Any:
        self._take(extras)
        try:
            with self.rates.inside():
                return self._plain_apply(variables, gradients, weights)
        finally:
            self._settle_rates()

    def count(self) -> None:
        """Have ``optimizer.iterations`` count a pass that no step of the optimizer followed."""
        iterations = self.rates.optimizer._iterations
        variables = list(self._state[_OPTIMIZER])
        for place, variable in enumerate(self.optimizer.variables):
            if variable is iterations:
                variables[place] = variables[place] + 1
        self._state[_OPTIMIZER] = variables

    def buffers(self) -> list[Any]:
        """Copy the state of model and metrics but for the weights."""
        return list(_copies([list(self._state[_OTHERS]), list(self._state[_METRICS])]))

    def put_back_buffers(self, kept: Sequence[Any]) -> None:
        """Undo what was done since :meth:`buffers`."""
        self._state[_OTHERS], self._state[_METRICS] = _copies(list(kept))

    def probe(self, data: Any) -> float:
        """Loss of `data`, or of the batch where it is None; leaves no trace."""
        if data is None:
            self.pull()
            assert self._batches is not None
            data = self._batches[0]
        if self._probe_function is None:
            self._probe_function = self._jitted(self._probe_step)
        self._probing = True
        try:
            return float(self._probe_function(tuple(self._state), data))
        finally:
            self._probing = False

    def skip(self, batches: int) -> None:
        """Count `batches` for the schedule without training on them."""
        self.rates.skipped += batches
        self.rates.offset = self.rates.skipped

    def finish(self, logs: dict[str, Any]) -> Any:
        """Return what ``fit`` expects of a train function."""
        state = tuple(self._state)
        self._state, self._iterator, self._batches = [], None, None
        return logs, state

    def abandon(self) -> None:
        """Let go of the batch, because something raised."""
        if self._state:
            # Keras gives the model back what the step before left, and that has been freed.
            self.model._jax_state = {
                f"{part}_variables": values
                for part, values in zip(_PARTS, self._state, strict=True)
            }
        self._state, self._iterator, self._batches = [], None, None

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile a function of tensors."""
        return jax.jit(function)  # type: ignore[no-any-return]

    def reader(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile a function of the weights, and of what it is given besides."""
        compiled = self.compiled(lambda *arguments: _copies(function(*arguments)))
        return lambda *arguments: compiled(self._state[_WEIGHTS], *arguments)

    def writer(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile a function that returns values of the weights, and more; put them there."""
        compiled = self.compiled(lambda *arguments: _copies(function(*arguments)))

        def write(*arguments: Any) -> Any:
            values, more = compiled(*arguments)
            self._state[_WEIGHTS] = list(values)
            return more

        return write

    def others(self) -> list[Any]:
        """Variables that :meth:`keep` copies, in its order."""
        return [*self.model.non_trainable_variables, *self.optimizer.variables]

    def keep(self) -> list[Any]:
        """Copy all training state but weights, iterations and the user's learning rate."""
        found = [*self._state[_OTHERS], *self._state[_OPTIMIZER]]
        return list(_copies(found))

    def put_back(self, kept: Sequence[Any]) -> None:
        """Undo what was done since :meth:`keep`; the schedule goes on where it stands."""
        optimizer, inner = self.optimizer, self.rates.optimizer
        size = len(self._state[_OTHERS])
        new, now = list(_copies(list(kept[size:]))), self._state[_OPTIMIZER]
        sums = {id(variable) for variable in accumulators(inner)}
        for place, variable in enumerate(optimizer.variables):
            if variable is inner._learning_rate or variable is inner._iterations:
                new[place] = now[place]
            elif id(variable) in sums:
                new[place] = jnp.zeros_like(new[place])
        self._state[_OTHERS], self._state[_OPTIMIZER] = list(_copies(list(kept[:size]))), new


def _figures(logs: dict[str, Any]) -> Figures:
    return Figures(*np.asarray(logs.pop(_FIGURES)).tolist())


_copies: Callable[[Any], Any] = jax.jit(lambda values: tree_util.tree_map(jnp.copy, values))
