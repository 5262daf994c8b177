"""Learning rates: where the schedule stands, and the factor on it in a step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

from keras import ops
from keras.optimizers.schedules import LearningRateSchedule

# What an optimizer counted when a fit ended, and the batches that it did not count by then, which
# are nowhere in it, and the next fit may have a callback of its own.
_SKIPPED: WeakKeyDictionary[Any, tuple[int, int]] = WeakKeyDictionary()


class Rates:
    """Replaces how an optimizer looks up its learning rate.

    A ``LearningRateSchedule`` is a function of ``optimizer.iterations``, which counts the steps
    that Keras itself took. Predicted steps are added to it here, so that a schedule stands where
    it would in plain ``fit`` after as many batches.

    Parameters
    ----------
    optimizer : keras.optimizers.Optimizer
        Optimizer of the model; of a ``LossScaleOptimizer`` the inner one is meant.

    Attributes
    ----------
    offset : integer variable, tensor or int
        Batches that the optimizer does not count: predicted or left out.
    scale : float variable or tensor
        Factor on every learning rate inside a step.
    highest : float variable or tensor
        Rate beyond which a factor above 1 does not go.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        self._plain = self.optimizer._get_current_learning_rate
        self._inside = False
        self.offset: Any = 0
        self.scale: Any = 1.0
        self.highest: Any = math.inf

    def install(self) -> None:
        """Take over the optimizer's look-up."""
        if self._counted() < _SKIPPED.get(self.optimizer, (0, 0))[0]:
            # It was put back to an earlier state since then.
            self.skipped = 0
        vars(self.optimizer)["_get_current_learning_rate"] = self._current

    def remove(self) -> None:
        """Give it back."""
        vars(self.optimizer).pop("_get_current_learning_rate", None)
        _SKIPPED[self.optimizer] = self._counted(), self.skipped

    @property
    def skipped(self) -> int:
        """Batches that the optimizer does not count, those of other callbacks among them."""
        return _SKIPPED.get(self.optimizer, (0, 0))[1]

    @skipped.setter
    def skipped(self, batches: int) -> None:
        _SKIPPED[self.optimizer] = 0, batches

    def _counted(self) -> int:
        iterations = self.optimizer._iterations
        # With JAX a model has no variables of its own while fit runs.
        return 0 if iterations._value is None else int(ops.convert_to_numpy(iterations))

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """While a step runs or is traced, rates are scaled; elsewhere the user sees his own."""
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    @property
    def follow_schedule(self) -> bool:
        """Whether they depend on how many batches there were."""
        return isinstance(self.optimizer._learning_rate, LearningRateSchedule)

    def unscaled(self) -> Any:
        """Learning rate as the user set it."""
        if self.follow_schedule:
            schedule = self.optimizer._learning_rate
            return schedule(self.optimizer._iterations + self.offset)
        return self._plain()

    def _current(self) -> Any:
        rate = self.unscaled()
        if not self._inside:
            return rate
        return ops.minimum(rate * self.scale, ops.maximum(rate, self.highest))
