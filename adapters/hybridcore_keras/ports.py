"""What the callback needs of a backend, and which one Keras runs on."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import keras
from keras import ops
from keras.layers import BatchNormalization

from hybridcore import Engine, HybridTrainerConfig, ModelError
from hybridcore.controller import Controller
from hybridcore.outer import hastening
from hybridcore_keras.rates import Rates


class Figures(NamedTuple):
    """What a full step tells of its last batch.

    Attributes
    ----------
    loss, gradient_norm : float
        Of it.
    learning_rate : float
        The one that was used, without our factor.
    loss_scale : float
        What the optimizer multiplied the loss by, 0 where it would not lower that if gradients
        overflowed.
    """

    loss: float
    gradient_norm: float
    learning_rate: float
    loss_scale: float


class Replaced:
    """Methods that stand in for those of model and optimizer, for as long as a block lasts.

    No longer, because Keras does not tell where ``fit`` is cut off between two steps.

    Parameters
    ----------
    *methods : tuple of (object, str, callable)
        Whose method, which one, and what stands in for it.
    """

    def __init__(self, *methods: tuple[Any, str, Callable[..., Any]]) -> None:
        self._methods = [(vars(owner), name, method) for owner, name, method in methods]

    def __enter__(self) -> None:
        for owned, name, method in self._methods:
            owned[name] = method

    def __exit__(self, *_: object) -> None:
        for owned, name, _method in self._methods:
            owned.pop(name, None)


class Port(Protocol):
    """One batch of ``fit`` on one backend, and the model's state.

    Between :meth:`begin` and :meth:`finish` the port holds the batch that ``fit`` asked for.

    Attributes
    ----------
    model : keras.Model
        The model.
    rates : Rates
        Learning rates, and the batches that ``optimizer.iterations`` does not count: predicted or
        left out.
    gradients : list of tensor
        Those that :meth:`gradient` left, one for each of `variables`.
    replaced : Replaced
        What has to hold while anything but :meth:`install` and :meth:`remove` is called.
    """

    model: Any
    rates: Rates
    gradients: list[Any]
    replaced: Replaced

    @property
    def variables(self) -> list[Any]:
        """Trainable variables, in the order of the model."""
        ...

    def install(self) -> bool:
        """Take over the rates, and have Keras build a train function around the watched step.

        Returns
        -------
        bool
            Whether it was built, which is done once for a ``compile``.
        """
        ...

    def remove(self) -> None:
        """Give the optimizer its rates back."""
        ...

    def begin(self, *arguments: Any) -> None:
        """Take what ``fit`` passed to the train function."""
        ...

    def alone(self, batch: Any) -> contextlib.AbstractContextManager[None]:
        """Hold `batch` as one of ``fit``'s, where no ``fit`` runs."""
        ...

    def pull(self) -> int:
        """Take one execution's batches out of the iterator, and return how many.

        After :meth:`full` in the same step no more are taken.

        Raises
        ------
        StopIteration
            Where there is none.
        """
        ...

    def full(
        self, scale: float = 1.0, highest: float = math.inf, *, forgetting: float = 1.0
    ) -> tuple[dict[str, Any], Figures]:
        """Run Keras's own train function with rates times `scale`; its logs and our figures.

        A `scale` above 1 takes no rate beyond `highest`. Averages of batch norm that are of many
        batches forget so many times as fast as `forgetting` says.
        """
        ...

    def gradient(self) -> tuple[dict[str, Any], Figures]:
        """Do what :meth:`full` does but for the step itself, and keep the gradients."""
        ...

    def apply(self, scale: float, highest: float = math.inf) -> None:
        """Take the step of the optimizer with the gradients kept, at rates times `scale`."""
        ...

    def follow(self) -> None:
        """Let the optimizer see the gradients kept at a rate of zero, and leave the weights."""
        ...

    def count(self) -> None:
        """Have ``optimizer.iterations`` count a pass that no step of the optimizer followed."""
        ...

    def buffers(self) -> list[Any]:
        """Copy the state of model and metrics but for the weights."""
        ...

    def put_back_buffers(self, kept: Sequence[Any]) -> None:
        """Undo what was done since :meth:`buffers`."""
        ...

    def probe(self, data: Any) -> float:
        """Loss of `data`, or of the batch where it is None; leaves no trace."""
        ...

    def skip(self, batches: int) -> None:
        """Count `batches` for the schedule without training on them."""
        ...

    def finish(self, logs: dict[str, Any]) -> Any:
        """Return what ``fit`` expects of a train function."""
        ...

    def abandon(self) -> None:
        """Let go of the batch, because something raised."""
        ...

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile a function of tensors."""
        ...

    def reader(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile a function of the weights, and of what it is given besides.

        What it returns shares no memory with the weights.
        """
        ...

    def writer(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile a function of tensors that returns values, one for each of `variables`, and more.

        What is made of it puts the weights at the values, if all of them could be computed, and
        returns what is more. That shares no memory with the weights.
        """
        ...

    def others(self) -> list[Any]:
        """Variables that :meth:`keep` copies, in its order."""
        ...

    def keep(self) -> list[Any]:
        """Copy all training state but weights, iterations and the user's learning rate."""
        ...

    def put_back(self, kept: Sequence[Any]) -> None:
        """Undo what was done to it since :meth:`keep`; the schedule goes on where it stands.

        So does the cycle in which gradients are accumulated: their sums begin anew, as an update
        of too few gradients does less harm than one of gradients elsewhere.
        """
        ...


def port_of(model: Any) -> Port:
    """Build the port of Keras's present backend."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        from hybridcore_keras.on_tensorflow import TensorFlowPort

        return TensorFlowPort(model)
    if backend == "torch":
        from hybridcore_keras.on_torch import TorchPort

        return TorchPort(model)
    if backend == "jax":
        from hybridcore_keras.on_jax import JAXPort

        return JAXPort(model)
    raise ModelError(
        f"Keras backend {backend!r} is not supported: set KERAS_BACKEND to tensorflow, torch or "
        "jax before keras is imported"
    )


def scope_of(model: Any) -> contextlib.AbstractContextManager[Any]:
    """Return where variables of `model` may be made and written."""
    strategy = getattr(model, "distribute_strategy", None)
    return contextlib.nullcontext() if strategy is None else strategy.scope()


def is_built(model: Any) -> bool:
    """Whether `model` has all of its variables: a subclass may be built before its layers are."""
    return all(layer.built for layer in model._flatten_layers())


def recurrent_states(model: Any) -> list[Any]:
    """Variables of stateful recurrent layers, which Keras does not list among those of `model`."""
    layers = [layer for layer in model._flatten_layers() if getattr(layer, "stateful", False)]
    found = keras.tree.flatten([getattr(layer, "states", None) for layer in layers])
    # A wrapper holds those of its layers too.
    distinct = {id(one): one for one in found if isinstance(one, keras.Variable)}
    return list(distinct.values())


@contextlib.contextmanager
def own_statistics(model: Any) -> Iterator[None]:
    """Have batch norm take the statistics of the batch for its averages, as all others are equal.

    Of a layer that is called more than once in a step it is their mean. Averages over steps would
    be of older weights, and quasi-Newton steps are long.
    """
    layers = [one for one in model._flatten_layers() if isinstance(one, BatchNormalization)]
    momenta = [layer.momentum for layer in layers]
    try:
        for layer in layers:
            vars(layer)["call"] = _averaging(layer)
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            vars(layer).pop("call", None)
            layer.momentum = momentum


def slow_averages(model: Any) -> list[Any]:
    """Layers of batch norm whose averages :func:`hybridcore.outer.hastening` is for."""
    replicas = getattr(getattr(model, "distribute_strategy", None), "num_replicas_in_sync", 1)
    layers = (one for one in model._flatten_layers() if isinstance(one, BatchNormalization))
    # Of several replicas each has values of its own in a step.
    return [layer for layer in layers if replicas == 1 and _most(layer) > 1.0]


def _most(layer: Any) -> float:
    return hastening(1.0 - layer.momentum, math.inf)


@contextlib.contextmanager
def hastened(model: Any, forgetting: Any) -> Iterator[None]:
    """Have :func:`slow_averages` forget faster; where `forgetting` is 1 all is as ever, to the bit.

    It is a tensor. Each batch is a call of its own, and for one `hybridcore.outer.hastening` is the
    lesser of it and the most there is.
    """
    layers = slow_averages(model)
    try:
        for layer in layers:
            vars(layer)["call"] = _hastening(layer, forgetting)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("call", None)


def _hastening(layer: Any, forgetting: Any) -> Callable[..., Any]:
    plain, most = layer.call, _most(layer)

    def call(*arguments: Any, training: Any = None, **named: Any) -> Any:
        if not training:
            return plain(*arguments, training=training, **named)
        averages = layer.moving_mean, layer.moving_variance
        kept = [ops.copy(average) for average in averages]
        outputs = plain(*arguments, training=training, **named)
        for average, before in zip(averages, kept, strict=True):
            now = ops.copy(average)
            times = ops.minimum(ops.cast(forgetting, now.dtype), most)
            average.assign(ops.where(times == 1.0, now, before + times * (now - before)))
        return outputs

    return call


def _averaging(layer: Any) -> Callable[..., Any]:
    plain, calls = layer.call, 0

    def call(*arguments: Any, training: Any = None, **named: Any) -> Any:
        nonlocal calls
        if training:
            layer.momentum, calls = calls / (calls + 1.0), calls + 1
        return plain(*arguments, training=training, **named)

    return call


def built(model: Any, replaced: Replaced) -> Any:
    """Have Keras build a train function of `model` around what is `replaced`, and return it."""
    plain = model.train_function
    try:
        with replaced:
            model.make_train_function(force=True)
        return model.train_function
    finally:
        model.train_function = plain


def accumulators(optimizer: Any) -> list[Any]:
    """Variables in which an optimizer, but for a wrapper around it, sums gradients of batches."""
    return list(getattr(optimizer, "_accumulated_gradients", ()))


def new_engine(config: HybridTrainerConfig, pairs: int, model: Any) -> Engine:
    """Return an engine that knows how many executions of `model` an update of the weights takes."""
    steps = executions_of_an_update(model)
    return Engine(config, pairs, partial(Controller, accumulation_steps=steps))


def executions_of_an_update(model: Any) -> int:
    """Count those that an update of the weights takes, where the optimizer sums gradients."""
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    # With enabled=False the optimizer may be anything.
    batches = getattr(optimizer, "gradient_accumulation_steps", None) or 1
    return int(batches // math.gcd(batches, model.steps_per_execution))


def build_optimizer(model: Any) -> None:
    """Have the optimizer of `model` make its variables, which it does in its first step else."""
    if not model.optimizer.built:
        with scope_of(model):
            model.optimizer.build(model.trainable_variables)
