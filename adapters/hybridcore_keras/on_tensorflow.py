"""The port of the TensorFlow backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any

import tensorflow as tf

from hybridcore_keras.ports import Figures
from hybridcore_keras.stateful import FIGURES, StatefulPort


class TensorFlowPort(StatefulPort):
    """See :class:`hybridcore_keras.ports.Port`.

    Keras's train function takes an iterator of TensorFlow's, or one of Python's over batches. Here
    it becomes a graph of one batch, which is 0.2 ms faster, and the same for batches that a probe
    or an outer step came first on.
    """

    def __init__(self, model: Any) -> None:
        self.strategy = model.distribute_strategy
        with self.strategy.scope():
            super().__init__(model)
        self._iterator: Any = None
        self._probe_function: Any = None
        self._gradient_function: Any = None
        self._traced: list[Any] | None = None
        # For each kind of batches, Keras's functions as graphs of one; a kind cannot be hashed.
        self._graphs: list[tuple[Any, dict[Any, Callable[[Any], Any]]]] = []

    @property
    def variables(self) -> list[Any]:
        """Variables that are trained, in the order of the model."""
        # What is unfrozen or frozen later, Keras leaves as it was compiled.
        if self._traced is None or self.model.run_eagerly:
            return super().variables
        return list(self._traced)

    def _renew(self) -> None:
        self._probe_function = self._gradient_function = self._traced = None
        self._graphs = []

    def begin(self, iterator: Any) -> None:
        """Take the iterator of ``fit``."""
        self._iterator, self._batches = iterator, None

    def finish(self, logs: dict[str, Any]) -> Any:
        """Return what ``fit`` expects of a train function."""
        # Now and then ending an iterator takes TensorFlow about as long as it has been there: one
        # that was kept beyond its epoch would hold up whoever lets go of it.
        self._iterator = None
        return super().finish(logs)

    def abandon(self) -> None:
        """Let go of the batch, because something raised."""
        self._iterator = None
        super().abandon()

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
        self._set_rates(scale, highest)
        self._set_forgetting(forgetting)
        if self._batches is None and not self._takes_batches:
            logs = self._function(self._iterator)
            # They are used up, and what follows in the step must not take those of the next.
            self._batches = []
        else:
            self.pull()
            logs = self._called(self._function, self._batches)
        if self._traced is None:
            self._traced = super().variables
        return logs, self._figures(logs)

    def gradient(self) -> tuple[dict[str, Any], Figures]:
        """Do what :meth:`full` does but for the step itself, and keep the gradients."""
        self.pull()
        if self._gradient_function is None:
            self._gradient_function = self.model._make_function(self._train_step)
        return self._pass(partial(self._called, self._gradient_function), self._batches)

    def probe(self, data: Any) -> float:
        """Loss of `data`, or of the batch where it is None; leaves no trace."""
        if data is None:
            self.pull()
        if self._probe_function is None:
            self._probe_function = self.model._make_function(self._train_step)
        self._probing = True
        try:
            if data is None:
                logs = self._called(self._probe_function, (self._batches or [])[:1])
            else:
                logs = self._probe_function(iter([data]))
            return float(logs[FIGURES])
        finally:
            self._probing = False

    @property
    def _takes_batches(self) -> bool:
        model, eager = self.model, tf.config.functions_run_eagerly()
        return self._alone and model.steps_per_execution == 1 and not (eager or model.run_eagerly)

    def _called(self, function: Any, batches: Any) -> Any:
        """Run `function`, one of Keras's, on `batches` out of the iterator."""
        spec = getattr(self._iterator, "element_spec", None)
        if spec is None or not self._takes_batches:
            return function(iter(batches))
        if not self._graphs or spec is not self._graphs[0][0]:
            known = [graphs for kind, graphs in self._graphs if kind == spec]
            others = [entry for entry in self._graphs if entry[0] != spec]
            self._graphs = [(spec, known[0] if known else {}), *others]
        graphs = self._graphs[0][1]
        if function not in graphs:
            # For the shapes of the iterator: for a batch's own, another size would be traced anew.
            traced = tf.function(lambda batch: function(iter([batch])), autograph=False)
            graphs[function] = traced.get_concrete_function(spec)
        return graphs[function](*batches)

    def _read(self, variable: Any) -> Any:
        # The buffer is shared until the variable is written; TensorFlow copies it then.
        return tf.identity(variable.value)

    # -- several replicas ---------------------------------------------------------------------

    @property
    def _alone(self) -> bool:
        return not isinstance(self.strategy, tf.distribute.MirroredStrategy)

    def _norm_of(self, gradients: list[Any]) -> Any:
        if self._alone:
            return super()._norm_of(gradients)
        context = tf.distribute.get_replica_context()
        present = [g for g in gradients if g is not None]
        return super()._norm_of(context.all_reduce(tf.distribute.ReduceOp.SUM, present))

    def _apply_if(self, good: Any, gradients: list[Any], variables: list[Any] | None) -> None:
        if self._alone:
            super()._apply_if(good, gradients, variables)
            return

        def across(strategy: Any, good: Any, gradients: Any, variables: Any) -> None:
            def apply() -> None:
                strategy.extended.call_for_each_replica(
                    self._plain_apply, args=(gradients, variables)
                )

            all_good = tf.reduce_all(tf.stack(strategy.experimental_local_results(good)))
            tf.cond(all_good, apply, lambda: None)

        # A branch inside one replica could not wait for the others.
        context = tf.distribute.get_replica_context()
        context.merge_call(across, args=(good, gradients, variables))

    def _agreed(self, good: Any) -> Any:
        if self._alone:
            return good
        bad = tf.cast(tf.logical_not(good), tf.float32)
        context = tf.distribute.get_replica_context()
        return tf.equal(context.all_reduce(tf.distribute.ReduceOp.SUM, bad), 0.0)

    def _put_back_unless(self, good: Any, guarded: list[Any], kept: list[Any]) -> None:
        if self._alone:
            super()._put_back_unless(good, guarded, kept)
            return
        for variable, value in zip(guarded, kept, strict=True):
            variable.assign(tf.where(good, tf.identity(variable.value), value))

    def _sum_of_squares(self, values: Any) -> Any:
        return 2.0 * tf.nn.l2_loss(values)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile a function of tensors, in lists and tuples or None.

        It is traced for each kind of arguments once, and once more where shapes differ. To find out
        by itself which of its graphs to run takes TensorFlow about as long as to run one.
        """
        traced = tf.function(function, autograph=False, reduce_retracing=True)
        graphs: dict[Any, Callable[..., Any]] = {}

        def call(*arguments: Any) -> Any:
            kind = _kind(arguments)
            if kind not in graphs:
                graphs[kind] = traced.get_concrete_function(*arguments)
            return graphs[kind](*arguments)

        return call

    def reader(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile a function of the weights, and of what it is given besides."""
        variables = self.variables
        return self.compiled(
            lambda *arguments: function([tf.identity(v.value) for v in variables], *arguments)
        )

    def writer(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile a function that returns values of the weights, and more; put them there."""
        variables = self.variables

        def write(*arguments: Any) -> Any:
            values, more = function(*arguments)
            # Or some were written before memory runs out for others.
            with tf.control_dependencies(values):
                for variable, value in zip(variables, values, strict=True):
                    variable.assign(value)
            return more

        compiled = self.compiled(write)

        def call(*arguments: Any) -> Any:
            with self.strategy.scope():
                return compiled(*arguments)

        return call


def _kind(value: Any) -> Any:
    """Return what has to be equal in values that the same graph takes."""
    if isinstance(value, list | tuple):
        return type(value), *map(_kind, value)
    return value if value is None else (value.shape, value.dtype)
