"""One call of ``fit``: what stands in for a model's own functions, and whether it still may."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hybridcore_keras.ports import Port

if TYPE_CHECKING:
    from hybridcore_keras.callback import HybridCallback

_METRICS = "_get_metrics_result_or_logs"


class Fit:
    """One fit of a model: stands in for its train function, and for its method `_METRICS`.

    Keras does not tell callbacks that a fit is cut off outside of the train function. Whether it
    is still this one is looked up whenever the model calls, therefore.
    """

    def __init__(self, callback: HybridCallback, model: Any, port: Port) -> None:
        self.callback, self.model, self._port = callback, model, port
        self._plain, self._history = model.train_function, model.history
        self._epochs: Any = None

    def take_over(self) -> None:
        """Put it in the place of what it stands in for."""
        vars(self.model)[_METRICS] = self._metrics
        self.model.train_function = self

    def give_back(self) -> None:
        """Undo that; what has been compiled or taken over by another since then stays."""
        self._port.remove()
        if Fit.of(self.model) is self:
            vars(self.model).pop(_METRICS)
        if self.model.train_function is self:
            self.model.train_function = self._plain

    def begin(self) -> None:
        """Learn what tells it from others: History may be the user's, and in two of them."""
        if self._epochs is None:
            # It is a new list in each, and made later than the callback is told of the fit.
            self._epochs = getattr(self._history, "epoch", None)

    @staticmethod
    def of(model: Any) -> Fit | None:
        """Return the one that has taken `model` over, also where it was compiled since then."""
        found = getattr(vars(model).get(_METRICS), "__self__", None)
        return found if isinstance(found, Fit) else None

    @property
    def only_begins(self) -> bool:
        """Whether the model's present fit is this one, and has had no epoch yet."""
        return self._epochs is None and self.model.history is self._history

    @property
    def _goes_on(self) -> bool:
        model = self.model
        return (
            self.callback._fit is self
            and model.train_function is self
            and model.history is self._history
            and (self._epochs is None or self._epochs is self._history.epoch)
        )

    def end(self) -> None:
        """Give the model back after it was cut off, and forget what was known of its weights."""
        if self.callback._fit is self:
            self.callback._start_over()
        else:
            self.give_back()

    def __call__(self, *arguments: Any) -> Any:
        """Take a step."""
        if self._goes_on:
            with self._port.replaced:
                return self.callback._train(*arguments)
        self.end()
        self.model.make_train_function()
        return self.model.train_function(*arguments)

    def _metrics(self, logs: Any) -> Any:
        if self._goes_on:
            return self.callback._epoch_logs(logs)
        self.end()
        return self.model._get_metrics_result_or_logs(logs)
