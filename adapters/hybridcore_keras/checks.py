"""Arguments of the callback and the model it is used with, checked before anything is changed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import keras
import numpy as np

from hybridcore import ConfigError, HybridTrainerConfig, ModelError
from hybridcore_keras.ports import is_built


def check_arguments(config: object, probe: object) -> None:
    """Raise an error that names the argument, the value and the fix."""
    if config is not None and not isinstance(config, HybridTrainerConfig):
        raise ConfigError(
            f"config must be a HybridTrainerConfig, got {type(config).__name__}: for a dictionary "
            "use HybridTrainerConfig.from_dict"
        )
    if config is not None and config.snapshot_kind == "host":
        raise ConfigError(
            "snapshot_kind is 'host', and Keras has no way to copy beside a step: leave it at "
            "'auto', or take 'int8'"
        )
    check_batch("probe", probe)


def as_groups(layer_groups: object) -> list[list[Any]] | None:
    """Return the user's layer groups as lists, or None where there are none.

    Raises
    ------
    ConfigError
        If they are not iterables of iterables; a variable is none, for all that it can be indexed.
    """
    if layer_groups is None:
        return None
    if not isinstance(layer_groups, Iterable) or isinstance(layer_groups, Mapping):
        raise ConfigError(
            f"layer_groups must be lists of variables, got {type(layer_groups).__name__}: pass a "
            "list for each group, [[...], [...]]"
        )
    groups = list(layer_groups)
    for group in groups:
        if not isinstance(group, Iterable) or isinstance(group, str) or hasattr(group, "shape"):
            raise ConfigError(
                f"layer_groups must be lists of variables, got {type(group).__name__} in the place "
                "of one: pass a list for each group, [[...], [...]]"
            )
    return [list(group) for group in groups]


def check_batch(name: str, batch: object) -> None:
    """Raise :class:`hybridcore.ConfigError` unless the argument `name` is a batch or None."""
    if batch is not None and not (isinstance(batch, tuple) and 1 <= len(batch) <= 3):
        raise ConfigError(
            f"{name} must be a held-out batch (x,), (x, y) or (x, y, sample_weight), got "
            f"{type(batch).__name__}: pass the arrays of one batch as a tuple"
        )
    parts = [] if batch is None else keras.tree.flatten(batch)
    rows = [np.shape(part)[:1] for part in parts if part is not None]
    if any(row != rows[0] for row in rows):
        raise ConfigError(
            f"{name} has parts of {', '.join(str(*row) for row in rows)} rows: they must be equal"
        )
    if rows and rows[0] == (0,):
        raise ConfigError(f"{name} has 0 rows: pass a batch of at least 1")


def check_model(model: Any) -> None:
    """Raise :class:`hybridcore.ModelError` where a model cannot be trained by predicted steps."""
    if getattr(model, "history", None) is None:
        raise ModelError(
            "model has no history, so that this is no fit(): pass HybridCallback to "
            "fit(..., callbacks=[...]), as it works on fit's own train function"
        )
    optimizer = model.optimizer
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ModelError(
            f"model.optimizer must be a Keras optimizer, got {type(optimizer).__name__}: pass one "
            "to compile()"
        )
    if type(optimizer).__name__ == "MultiOptimizer":
        raise ModelError(
            "MultiOptimizer keeps several counts of iterations and learning rates, which cannot be "
            "kept in step with predicted batches: use one optimizer for the whole model"
        )
    if is_built(model) and not model.trainable_variables:
        raise ModelError(
            "model has no trainable variable (all layers have trainable=False or none has "
            "weights): unfreeze at least one and compile again"
        )


def goes_on_from(optimizer: Any) -> bool:
    """Whether a step of `optimizer` goes on from wherever the weights have been moved to.

    That of Ftrl puts them where sums of its gradients say (McMahan et al. 2013, algorithm 1).
    """
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    return not isinstance(inner, keras.optimizers.Ftrl)


def check_steps(steps: int) -> None:
    """Raise :class:`hybridcore.ModelError` unless ``train_step`` took one step of the optimizer."""
    if steps != 1:
        raise ModelError(
            f"train_step applies model.optimizer {steps} times in a batch, and it must once: sum "
            "the losses of a batch, let Keras accumulate gradients (gradient_accumulation_steps of "
            "the optimizer), or train without HybridCallback. Keras compiles train_step by itself, "
            "so that a decorator such as tf.function, which hides its steps, has to go"
        )


def other_optimizers(model: Any) -> list[Any]:
    """Optimizers that `model` or a layer in it holds besides its own, in use or not."""
    own = model.optimizer, getattr(model.optimizer, "inner_optimizer", None)
    held = [value for layer in model._flatten_layers() for value in vars(layer).values()]
    held += [one for value in held if isinstance(value, list | tuple) for one in value]
    held += [one for value in held if isinstance(value, dict) for one in value.values()]
    found = {id(one): one for one in held if isinstance(one, keras.optimizers.Optimizer)}
    return [one for one in found.values() if not any(one is mine for mine in own)]


@contextlib.contextmanager
def unused(optimizers: Iterable[Any]) -> Iterator[None]:
    """Raise :class:`hybridcore.ModelError` where one of `optimizers` takes a step in the block."""

    def refused(*_: Any, **__: Any) -> Any:
        raise ModelError(
            "train_step takes steps of an optimizer besides model.optimizer, and a predicted batch "
            "or a probe can be kept from one only: use one optimizer for the whole model, or train "
            "without HybridCallback"
        )

    for one in optimizers:
        vars(one)["apply"] = refused
    try:
        yield
    finally:
        for one in optimizers:
            vars(one).pop("apply", None)


def ends_the_data(error: BaseException) -> bool:
    """Whether an epoch of unknown length just found its end; TensorFlow has a name of its own."""
    return isinstance(error, StopIteration) or type(error).__name__ == "OutOfRangeError"
