"""The callback: carries out the engine's directives on a Keras model, while ``fit`` runs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from pathlib import Path
from time import perf_counter
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from hybridcore import (
    Action,
    ConfigError,
    Directive,
    DivergenceError,
    Engine,
    HybridTrainerConfig,
    Observation,
    Phase,
    ProtocolError,
    TrainingStatistics,
    checkpoint,
)
from hybridcore.types import STEPS
from hybridcore_keras import memory, saving
from hybridcore_keras.averages import WeightAverage
from hybridcore_keras.checks import check_arguments, check_model, ends_the_data
from hybridcore_keras.groups import by_depth, by_user
from hybridcore_keras.losses import RunningMean
from hybridcore_keras.ports import Port, port_of
from hybridcore_keras.snapshots import SnapshotBank

NAN = float("nan")
PHASES = list(Phase)


class HybridCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Runs ``fit`` by real and predicted steps.

    It is all that changes:

        model.fit(x, y, callbacks=[HybridCallback()])

    One call of Keras's train function is one step: a batch, or as many batches as
    ``steps_per_execution`` says. A full step is Keras's own, compiled as ever. A predicted step
    takes its batch from the data and runs neither forward nor backward pass, but for a probe now
    and then. ``optimizer.iterations`` counts full steps only; learning-rate schedules stand where
    they would in plain ``fit``.

    Used in a second ``fit`` of the same model and optimizer, it goes on where it was.

    Parameters
    ----------
    config : HybridTrainerConfig, optional
        Settings.
    probe : tuple, optional
        A fixed held-out batch, ``(x,)``, ``(x, y)`` or ``(x, y, sample_weight)``, on which jumps
        are judged. Without it, probes use the batch of the step.
    layer_groups : iterable of iterables of keras.Variable, optional
        Layer groups; by default up to 8 by depth.

    Raises
    ------
    ConfigError
        If an argument has the wrong type.

    Notes
    -----
    ``History`` and the ``logs`` of an epoch get ``hybrid_phase`` (position in
    :class:`hybridcore.Phase`, from 0), ``hybrid_measured_speedup`` and
    ``hybrid_backward_reduction``; ``History`` gets the other statistics too. The loss of a
    predicted step is its forecast, in the running mean of the epoch.
    """

    def __init__(
        self,
        config: HybridTrainerConfig | None = None,
        probe: tuple[Any, ...] | None = None,
        layer_groups: Iterable[Iterable[Any]] | None = None,
    ) -> None:
        super().__init__()
        check_arguments(config, probe, layer_groups)
        self.config = HybridTrainerConfig() if config is None else config
        self.probe = probe
        self.layer_groups = None if layer_groups is None else [list(g) for g in layer_groups]
        self.engine = Engine(self.config)
        self._port: Port | None = None
        self._bank: SnapshotBank | None = None
        self._average: WeightAverage | None = None
        self._averages = self.config.averaging
        self._room: int | None = None
        self._fitting = False
        self._recovery: list[Any] | None = None
        self._loaded: dict[str, Any] | None = None
        self._trained: tuple[Any, Any] | None = None
        self._probe_data: Any = None
        self._logs: dict[str, Any] = {}
        self._mean = RunningMean()
        self._began = 0.0

    def statistics(self) -> TrainingStatistics:
        """Return the summary of the run so far."""
        return self.engine.statistics()

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Put the running average of the weights into the model, for as long as the block lasts.

        For use between two calls of ``fit``; evaluate and save these weights where batches are
        noisy. See ``hybridcore_torch.HybridTrainer.averaged``.

        Raises
        ------
        ConfigError
            With ``averaging=False``.
        ProtocolError
            While ``fit`` runs, or inside another such block.
        """
        if not self.config.averaging:
            raise ConfigError(
                "averaged() needs the setting averaging=True, got False: build the callback with "
                "it, which costs one copy of the weights"
            )
        if self._fitting:
            raise ProtocolError("averaged() while fit runs: call it after fit has returned")
        if self._average is not None and self._average.shown:
            raise ProtocolError("averaged() inside averaged(): leave the with block first")
        return contextlib.nullcontext() if self._average is None else self._average.in_place()

    # -- what Keras calls -------------------------------------------------------------------

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Take over the model's train function.

        Raises
        ------
        ModelError
            If the model cannot be trained by predicted steps; nothing has been changed then.
        """
        if not self.config.enabled:
            return
        if self._average is not None and self._average.shown:
            raise ProtocolError("fit() inside averaged(): leave the with block first")
        model = self.model
        check_model(model)
        # A fit that was interrupted did not give the model back.
        interrupted = getattr(model.train_function, "__self__", None)
        if isinstance(interrupted, HybridCallback):
            interrupted._give_back()
        if self._trained is None or self._trained != (model, model.optimizer):
            self._start(model)
        saving.apply_loaded(self)
        self._live.install()
        self._check_structure()
        self._fitting = True
        model.train_function = self._train
        model.__dict__["_get_metrics_result_or_logs"] = self._epoch_logs

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Give the model back as it was."""
        if self.config.enabled:
            self._give_back()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Begin a new running mean of the loss."""
        self._mean = RunningMean()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Add the run's figures to `logs` and to ``History``."""
        summary = self.statistics()
        shown = {
            "hybrid_phase": float(PHASES.index(self.engine.phase)),
            "hybrid_measured_speedup": float(summary.measured_speedup),
            "hybrid_backward_reduction": float(summary.backward_reduction),
        }
        if logs is not None:
            logs.update(shown)
        history = self._model.history.history
        for name, value in summary.to_dict().items():
            if f"hybrid_{name}" not in shown and not isinstance(value, dict | list):
                history.setdefault(f"hybrid_{name}", []).append(value)

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Take the time of a batch of plain ``fit``."""
        if not self.config.enabled:
            self._began = perf_counter()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Count a batch of plain ``fit``."""
        if not self.config.enabled:
            seconds = perf_counter() - self._began
            loss = float((logs or {}).get("loss", NAN))
            self.engine.count_plain(Observation(loss=loss, seconds=seconds))
            self.engine.count_time(Phase.FULL, seconds, 0.0)

    # -- one step ---------------------------------------------------------------------------

    def _train(self, *arguments: Any) -> Any:
        """Stand in for ``model.train_function``."""
        start = perf_counter()
        port, engine = self._live, self.engine
        port.begin(*arguments)
        working = 0.0
        of_step: Observation | None = None
        try:
            while of_step is None or not engine.step_done:
                directive = engine.next()
                try:
                    observation = self._carry_out(directive)
                except Exception as error:
                    # The user's own step has no copy that could be done without.
                    if directive.action is Action.FULL or not memory.make_room(self, error):
                        raise
                else:
                    if directive.action in STEPS:
                        phase, of_step = engine.phase, observation
                        predicted = directive.action is Action.SKIP
                    working += observation.seconds
                    engine.observe(observation)
                if self._room is not None:
                    engine.abandon()
                    engine.regroup(snapshots=self._room)
                    self._room = None
        except BaseException as error:
            engine.abandon()
            port.abandon()
            if not ends_the_data(error):
                self._give_back()
            raise
        if predicted:
            self._logs = self._mean.with_forecast(self._logs, engine.forecast_loss)
        result = port.finish(self._logs)
        seconds = perf_counter() - start
        engine.count_time(phase, seconds, seconds - working)
        if self.config.on_divergence == "raise" and not of_step.applied:
            self._give_back()
            raise DivergenceError(
                f"loss {of_step.loss:g} with gradient norm {of_step.gradient_norm:g} in step "
                f"{engine.counters.steps}: the batch was left out and the weights are as before; "
                "lower the learning rate or check the data"
            )
        return result

    def _full(self, directive: Directive) -> Observation:
        start = perf_counter()
        self._logs, figures = self._live.full(directive.learning_rate_scale)
        seconds = perf_counter() - start
        loss, norm, rate = figures
        self._mean.full_steps += 1
        applied = math.isfinite(loss) and math.isfinite(norm)
        if not applied:
            self._live.skip(1)
        gram = self._copy(directive) if applied else None
        return Observation(loss, norm, rate, seconds, gram, applied)

    def _copy(self, directive: Directive) -> NDArray[np.float64] | None:
        """Take the weights into average and bank, where a full step asks for it."""
        try:
            if directive.average and self._averages:
                if self._average is None:
                    self._average = WeightAverage(self._live)
                self._average.add(directive.average)
            if directive.snapshot:
                self._snapshots.take(fresh=directive.fresh_bank)
            return self._snapshots.gram() if directive.gram else None
        except Exception as error:
            # The step has been taken, and must not be taken again.
            if not memory.make_room(self, error):
                raise
            return None

    def _carry_out(self, directive: Directive) -> Observation:
        port, action = self._live, directive.action
        if action is Action.FULL:
            return self._full(directive)
        # First of all, because at the end of the data there is no step to take.
        batches = 0
        if self.probe is None or action is not Action.PROBE:
            batches = port.pull()
        if action is Action.SKIP:
            port.skip(batches)
        elif action is Action.PROBE:
            return self._probe(directive)
        elif action is Action.MOVE:
            assert directive.coefficients is not None
            self._snapshots.move(directive.coefficients)
            if directive.snapshot:
                self._snapshots.take(fresh=False)
        elif action is Action.SAVE:
            self._snapshots.save()
            self._recovery = port.keep()
        elif action is Action.ROLLBACK:
            self._roll_back()
        return Observation()

    def _roll_back(self) -> None:
        assert self._recovery is not None
        self._snapshots.restore()
        self._live.put_back(self._recovery)
        self._recovery = None

    def _probe(self, directive: Directive) -> Observation:
        coefficients = directive.coefficients
        if coefficients is not None:
            self._snapshots.set_aside()
        try:
            if coefficients is not None:
                self._snapshots.move(coefficients)
            start = perf_counter()
            if self.probe is not None and self._probe_data is None:
                self._probe_data = tuple(
                    keras.tree.map_structure(ops.convert_to_tensor, part) for part in self.probe
                )
            loss = self._live.probe(self._probe_data)
            return Observation(loss=loss, seconds=perf_counter() - start)
        finally:
            if coefficients is not None:
                self._snapshots.put_back()

    # -- the model --------------------------------------------------------------------------

    def _start(self, model: Any) -> None:
        """Begin a run with a model or an optimizer that is new here."""
        if self._trained is not None:
            self.engine = Engine(self.config)
        self._bank = self._average = self._recovery = None
        self._averages = self.config.averaging
        self._port = port_of(model)
        self._trained = (model, model.optimizer)
        if self.layer_groups is not None and model.built:
            by_user(self.layer_groups, self._port.variables)

    def _check_structure(self) -> None:
        """Start over with snapshots if layers were frozen or thawed since the last ``fit``."""
        present = [id(variable) for variable in self._live.variables]
        kept = self._bank or self._average
        if kept is not None and present != kept.identities:
            self._bank = self._average = self._recovery = None
            self.engine.regroup()

    def _give_back(self) -> None:
        self._fitting = False
        if self._port is not None and self._trained is not None:
            self._trained[0].__dict__.pop("_get_metrics_result_or_logs", None)
            self._port.remove()

    def _epoch_logs(self, logs: Any) -> Any:
        """Stand in for the model's method, which knows nothing of predicted steps."""
        if logs is self._logs and self._mean.forecasts:
            return logs
        return type(self._model)._get_metrics_result_or_logs(self._model, logs)

    @property
    def _live(self) -> Port:
        assert self._port is not None
        return self._port

    @property
    def _snapshots(self) -> SnapshotBank:
        if self._bank is None:
            variables = self._live.variables
            if self.layer_groups is None:
                groups = by_depth([math.prod(v.shape) for v in variables])
            else:
                groups = by_user(self.layer_groups, variables)
            self._bank = SnapshotBank(groups, self.engine.snapshots, self._live)
        return self._bank

    # -- state ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what the callback knows, as numbers, strings, lists and NumPy arrays.

        Weights and optimizer are Keras's to save, at the same moment.
        """
        return saving.collect(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned, at once or when ``fit`` begins.

        Raises
        ------
        CheckpointError
            If the state is of another version or was saved with other settings.
        """
        saving.restore(self, state)

    def save(self, path: str | Path) -> None:
        """Write :meth:`state_dict` to `path`; a failure leaves a file that was there untouched.

        Raises
        ------
        OSError
            If the file cannot be written.
        """
        checkpoint.write(path, self.state_dict())

    def load(self, path: str | Path) -> None:
        """Take back what :meth:`save` wrote, as :meth:`load_state_dict` does.

        Raises
        ------
        FileNotFoundError, CheckpointError
            If there is no such file, or if it is damaged or does not fit.
        """
        saving.restore(self, checkpoint.read(path))
