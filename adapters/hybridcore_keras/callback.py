"""The callback: carries out the engine's directives on a Keras model, while ``fit`` runs."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from time import perf_counter
from typing import Any

import keras

from hybridcore import (
    Action,
    ConfigError,
    DivergenceError,
    Engine,
    HybridTrainerConfig,
    ModelError,
    Observation,
    Phase,
    ProtocolError,
    TrainingStatistics,
    checkpoint,
)
from hybridcore.rotation import Rotation, Saver, read_newest
from hybridcore.types import STEPS
from hybridcore_keras import saving
from hybridcore_keras.checks import (
    as_groups,
    check_arguments,
    check_batch,
    check_model,
    ends_the_data,
)
from hybridcore_keras.fits import Fit
from hybridcore_keras.hands import Hands, on_device
from hybridcore_keras.history import report
from hybridcore_keras.losses import RunningMean
from hybridcore_keras.ports import executions_of_an_update, new_engine, port_of

NAN = float("nan")
# Bad batches in a row from which on the logs say so.
HOPELESS = 10
_CUT_OFF = "if fit was cut off, call on_train_end() of this callback first"


class HybridCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Runs ``fit`` by real and predicted steps.

    It is all that changes:

        model.fit(x, y, callbacks=[HybridCallback()])

    One call of Keras's train function is one step: a batch, or as many batches as
    ``steps_per_execution`` says. A full step is Keras's own, compiled as ever. A predicted step
    takes its batch from the data and runs neither forward nor backward pass, but for a probe now
    and then. ``optimizer.iterations`` counts full steps only; learning-rate schedules stand where
    they would in plain ``fit``. Quasi-Newton steps are full steps too, whether the optimizer sees
    their gradients or the trial point is taken back. Where the optimizer sums gradients of batches
    (``gradient_accumulation_steps``), settings that are numbers of steps count updates.

    Used in a second ``fit`` of the same model and optimizer, it goes on where it was; another
    callback begins anew, but for the place of the schedule.

    Parameters
    ----------
    config : HybridTrainerConfig, optional
        Settings.
    probe : tuple, optional
        A fixed held-out batch, ``(x,)``, ``(x, y)`` or ``(x, y, sample_weight)``, on which jumps
        are judged; None stands for a part that is missing. The first step evaluates it, and
        ``fit`` raises :class:`hybridcore.ConfigError` there where that fails. Without it, probes
        use the batch of the step, as those of outer steps do.
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

    Attributes
    ----------
    epoch : int
        Epoch of ``fit`` that is under way or comes next, from 0. After :meth:`load` it is the
        ``initial_epoch`` to go on from.
    """

    def __init__(
        self,
        config: HybridTrainerConfig | None = None,
        probe: tuple[Any, ...] | None = None,
        layer_groups: Iterable[Iterable[Any]] | None = None,
    ) -> None:
        super().__init__()
        check_arguments(config, probe)
        self.config = HybridTrainerConfig() if config is None else config
        self.probe = probe
        self.layer_groups = as_groups(layer_groups)
        self.engine = Engine(self.config, self.config.secant_pairs)
        self._hands: Hands | None = None
        # The fit that is under way, or was cut off.
        self._fit: Fit | None = None
        self.epoch = 0
        self._loaded: dict[str, Any] | None = None
        # What was put back, until the first epoch begins.
        self._restored: dict[str, Any] | None = None
        self._saver: Saver | None = None
        # Model, its optimizer, and steps that an update takes.
        self._trained: tuple[Any, Any, int] | None = None
        # Fingerprint of the weights as they were left, until they are trained again.
        self._left: list[float] | None = None
        # Bad batches one after the other.
        self._bad = 0
        # What the last full step told, and with the forecasts since then, as it is told to Keras.
        self._full_logs: dict[str, Any] = {}
        self._logs: dict[str, Any] = {}
        # The same of the step before: the last of an epoch may be followed by one of a callback.
        self._logs_before: dict[str, Any] = {}
        self._mean = RunningMean()
        self._began = 0.0
        if not self.config.enabled:
            self._watch_batches()

    def statistics(self) -> TrainingStatistics:
        """Return the summary of the run so far."""
        peaks = {} if self._hands is None else dict(self._hands.peaks)
        return dataclasses.replace(self.engine.statistics(), memory=peaks)

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Put the running average of the weights into the model, for as long as the block lasts.

        For use between two calls of ``fit``; evaluate and save these weights where batches are
        noisy. See ``hybridcore_torch.HybridTrainer.averaged``.

        Raises
        ------
        ConfigError
            With ``averaging=False``, or where `memory` leaves no room for it.
        ProtocolError
            While ``fit`` runs, or inside another such block.
        """
        if not self.config.averaging:
            raise ConfigError(
                "averaged() needs the setting averaging=True, got False: build the callback with "
                "it, which costs one copy of the weights"
            )
        if self._fit is not None:
            raise ProtocolError(
                f"averaged() while fit runs: call it after fit has returned; {_CUT_OFF}"
            )
        if self._hands is not None and not self._hands.room.plan.average:
            raise ConfigError(
                "averaged() needs room for one copy of the weights, and the setting "
                f"memory={self.config.memory!r} leaves none: build the callback with more"
            )
        self._check_own_weights("averaged()")
        average = None if self._hands is None else self._hands.average
        return contextlib.nullcontext() if average is None else average.in_place()

    def finish(self, batch: tuple[Any, ...] | None = None) -> None:
        """End a jump, or a trial of the optimizer, that is under way: for after ``fit``.

        See ``hybridcore_torch.HybridTrainer.finish``. A later ``fit`` may go on.

        Parameters
        ----------
        batch : tuple, optional
            A batch as for `probe`, on which the weights are compared; not needed with ``probe=``.

        Raises
        ------
        ConfigError
            If there is neither, or `batch` cannot be evaluated; nothing has been changed then.
        ProtocolError
            While ``fit`` runs, or inside ``averaged()``.
        """
        check_batch("batch", batch)
        if batch is None and self.probe is None:
            raise ConfigError(
                "finish() needs a batch, got None: pass one as (x, y), or build the callback with "
                "probe="
            )
        if self._fit is not None:
            raise ProtocolError(
                f"finish() while fit runs: call it after fit has returned; {_CUT_OFF}"
            )
        hands, engine = self._hands, self.engine
        if hands is None:
            return
        self._check_own_weights("finish()")
        self._check_structure()
        engine.finish()
        if engine.step_done:
            return
        held = None if batch is None else on_device(batch)
        with hands.port.alone(held):
            try:
                if held is not None:
                    hands.check_batch(held)
            except BaseException:
                # Nothing has been done so far, and it can be called again.
                engine.abandon()
                raise
            try:
                while not engine.step_done:
                    engine.observe(hands.carry_out(engine.next()))
            except BaseException:
                # Half of a rollback is worse than either end of it.
                hands.break_off()
                self._start_over()
                raise
        hands.let_go(False, engine.holds_mark, engine.holds_pairs)
        self._left = hands.fingerprint()

    # -- what Keras calls -------------------------------------------------------------------

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Take over the model's train function.

        Raises
        ------
        ModelError
            If the model cannot be trained by predicted steps; nothing has been changed then.
        CheckpointError
            If a state that was loaded is of another model; nothing has been changed then.
        """
        self._check_own_weights("fit()")
        self._bad = 0
        model, hands, put = self.model, None, None
        known = self._trained == (model, model.optimizer, executions_of_an_update(model))
        if self.config.enabled:
            check_model(model)
            other = Fit.of(model)
            if other is not None and other.only_begins:
                other.callback._give_back()
                raise ModelError(
                    "callbacks holds HybridCallback twice: pass one, as only one can decide "
                    "which steps are taken"
                )
            for cut_off in (other, self._fit):
                # What became of the weights since then is not known here.
                if cut_off is not None:
                    cut_off.end()
            hands = self._hands
            if hands is None or not known:
                hands = Hands(port_of(model), self.config, self.probe, self.layer_groups)
        if self._loaded is not None:
            put = saving.fitted(self, self._loaded, model, hands)
        if not known:
            self._start(model, hands)
        if put is not None:
            put()
        if self._saver is not None:
            self._saver.begin(self.engine)
        if hands is not None:
            try:
                # What was loaded has been fitted to the model as it is compiled now.
                self._take_over(model, hands, goes_on=known and put is None)
            except BaseException:
                self._give_back()
                raise

    def _take_over(self, model: Any, hands: Hands, goes_on: bool) -> None:
        self._fit = Fit(self, model, hands.port)
        if hands.port.install() and goes_on:
            # Compiled anew, the loss may be another one, and a step as many batches.
            self._forget_weights()
        hands.check_groups()
        self._check_structure()
        self._fit.take_over()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Give the model back as it was.

        Keras does not call it after a ``fit`` that was cut off by Ctrl-C or another callback. Call
        it then, if :meth:`finish` or :meth:`averaged` are to follow; it does no harm at any time
        between two calls of ``fit``.
        """
        self._give_back()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Begin a new running mean of the loss.

        Raises
        ------
        CheckpointError
            If another callback put other weights in the place of those that were loaded.
        """
        self._mean = RunningMean()
        self.epoch = epoch
        if self._restored is not None:
            restored, self._restored = self._restored, None
            saving.check_untouched(self.model, restored)
        if self._fit is not None:
            self._fit.begin()
            self._check_structure()
            self._left = None

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Add the run's figures to `logs` and to ``History``."""
        # A loop of the user's own, which is one for enabled=False alone, may have no history.
        history = getattr(getattr(self._model, "history", None), "history", {})
        report(self.statistics(), self.engine.phase, logs, history)
        self.epoch = epoch + 1
        if self._saver is not None:
            self._saver.save(self.engine)

    def _watch_batches(self) -> None:
        # Only where it must be: a callback with these makes Keras read the logs of every batch.
        self.on_train_batch_begin = self._begin_batch
        self.on_train_batch_end = self._end_batch

    def _begin_batch(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Save, which waits until here: after the last batch of an epoch it is done at its end."""
        if self._saver is not None:
            self._saver.save(self.engine)
        self._began = perf_counter()

    def _end_batch(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Count a batch of plain ``fit``, and see whether a checkpoint is due."""
        if not self.config.enabled:
            seconds = perf_counter() - self._began
            loss = float((logs or {}).get("loss", NAN))
            self.engine.count_plain(Observation(loss=loss, seconds=seconds))
            self.engine.count_time(Phase.FULL, seconds, 0.0)
        if self._saver is not None:
            self._saver.count(self.engine)

    # -- one step ---------------------------------------------------------------------------

    def _train(self, *arguments: Any) -> Any:
        """Stand in for ``model.train_function``."""
        start = perf_counter()
        hands, engine = self.hands, self.engine
        hands.port.begin(*arguments)
        working = 0.0
        of_step: Observation | None = None
        try:
            while of_step is None or not engine.step_done:
                directive = engine.next()
                try:
                    observation = hands.carry_out(directive)
                except Exception as error:
                    # The user's own step has no copy that could be done without.
                    if directive.action is Action.FULL or not hands.make_room(error):
                        raise
                else:
                    if directive.action in STEPS:
                        phase, of_step = engine.phase, observation
                        predicted = directive.action is Action.SKIP
                    working += observation.seconds
                    engine.observe(observation)
                if hands.torn:
                    engine.abandon()
                    engine.regroup(hands.pairs, hands.room.snapshots)
                    hands.torn = False
            hands.let_go(engine.may_roll_back, engine.holds_mark, engine.holds_pairs)
            if predicted or math.isfinite(engine.forecast_loss):
                # A trial point that was taken back counts as little as a jump that was never made.
                self._mean.add(engine.forecast_loss)
            else:
                # A bad batch has nothing to tell, unless it is the very first.
                if of_step.applied or not self._full_logs:
                    self._full_logs = hands.logs
                self._mean.full_steps += of_step.applied
            self._logs_before, self._logs = self._logs, self._mean.of(self._full_logs)
            seconds = perf_counter() - start
            engine.count_time(phase, seconds, seconds - working)
        except BaseException as error:
            engine.abandon()
            if ends_the_data(error):
                hands.abandon()
            else:
                # Within a step the copies and what the engine knows of them may not agree.
                try:
                    hands.break_off()
                finally:
                    self._start_over()
            hands.port.abandon()
            raise
        # A trial point may be far off: that is no fault of the batch.
        bad = not (of_step.applied or of_step.overflow) and math.isnan(engine.forecast_loss)
        self._bad = self._bad + 1 if bad else 0
        if self._bad >= HOPELESS:
            # TerminateOnNaN would wait for ever: a bad batch is left out of the mean.
            self._logs = {**self._logs, "loss": NAN}
        if self.config.on_divergence == "raise" and bad:
            # First, as with JAX the model gets its weights back from there.
            hands.port.abandon()
            self._give_back()
            raise DivergenceError(
                f"loss {of_step.loss:g} with gradient norm {of_step.gradient_norm:g} in step "
                f"{engine.counters.steps}: the batch was left out and the optimizer took no step; "
                "lower the learning rate or check the data"
            )
        return hands.port.finish(self._logs)

    # -- the model --------------------------------------------------------------------------

    def _start(self, model: Any, hands: Hands | None) -> None:
        """Begin a run with a model or an optimizer that is new here."""
        pairs = self.config.secant_pairs if hands is None else hands.pairs
        steps = executions_of_an_update(model)
        # The first engine is for an update in every step.
        if self._trained is not None or pairs != self.engine.pairs or steps != 1:
            self.engine = new_engine(self.config, pairs, model)
        if hands is not None and hands.room.snapshots != self.engine.snapshots:
            self.engine.regroup(pairs, hands.room.snapshots)
            self.engine.take_events()
        self._hands, self._full_logs = hands, {}
        self._trained, self._left = (model, model.optimizer, steps), None

    def _start_over(self) -> None:
        """Give the model back, and forget what was known of its weights."""
        self.engine.abandon()
        self._forget_weights()
        self._give_back()

    def _forget_weights(self) -> None:
        self.hands.restart()
        self.engine.regroup(self.hands.pairs, self.hands.room.snapshots)

    def _check_own_weights(self, call: str) -> None:
        average = None if self._hands is None else self._hands.average
        if average is not None and average.shown:
            raise ProtocolError(
                f"{call} inside averaged(): the model holds the average there, so leave the with "
                "block first"
            )

    def _check_structure(self) -> None:
        """Start over with snapshots if layers changed, or weights since they were last trained."""
        present, kept = [id(v) for v in self.hands.port.variables], self.hands.identities
        frozen = kept is not None and present != kept
        if frozen or (self._left is not None and self._left != self.hands.fingerprint()):
            self._forget_weights()
            self._left = None

    def _give_back(self) -> None:
        if self._fit is None:
            return
        self._fit.give_back()
        if self._left is None:
            # In the middle of an epoch, where with JAX a model has no weights of its own.
            getattr(self._fit.model, "jax_state_sync", lambda: None)()
            self._left = self.hands.fingerprint()
        self._fit = None

    def _epoch_logs(self, logs: Any) -> Any:
        """Stand in for the model's method, which knows nothing of predicted steps."""
        if logs is self._logs:
            # The last batch of an epoch is over, and no callback has been told so far.
            self._left = self.hands.fingerprint()
            if self._mean.forecasts:
                return self._mean.of(self._full_logs)
        found = type(self._model)._get_metrics_result_or_logs(self._model, logs)
        if found.get("loss") != 0.0:
            return found
        # Keras's mean of none is zero.
        if logs is self._logs and not self._mean.full_steps:
            # All batches were left out.
            return {**found, "loss": NAN}
        if logs is self._logs_before and self._mean.forecasts:
            # A callback has called train_on_batch, which empties the means, and that was predicted.
            return self._mean.of(self._full_logs)
        return found

    @property
    def hands(self) -> Hands:
        """What carries out directives on the model; there is none before the first ``fit``."""
        assert self._hands is not None
        return self._hands

    # -- state ------------------------------------------------------------------------------

    def state_dict(self, *, snapshots: bool = True) -> dict[str, Any]:
        """Return all that training needs to go on, as numbers, strings, lists and NumPy arrays.

        Values of model and optimizer are included, with the seed generators of layers, which Keras
        itself does not save, and the global random states of Python, NumPy and Keras, and of
        TensorFlow's ``tf.random.get_global_generator()`` or torch. Where ``fit`` is in its data is
        not, nor what operations such as ``tf.random.shuffle`` keep to themselves. From torch's own
        generator Keras draws as ``fit`` begins, so that dropout goes on with others there.

        Without `snapshots` it holds no snapshots, pairs and average, by far the most of it, but
        while a jump may have to be taken back: a run that goes on from there takes new ones first.
        """
        self._check_own_weights("state_dict()")
        return saving.collect(self, snapshots)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned: random states at once, the rest in ``fit``.

        When ``fit`` begins, model and optimizer get the values that they had. Until then
        :meth:`state_dict` and :meth:`save` give what was loaded. The settings must be those of the
        run that was saved, ``enabled`` too: weights may be those of a jump under way.

        Raises
        ------
        CheckpointError
            If the state is of another version, has other settings, or is not of the model that
            this callback has been used with; nothing has been changed then. Without one, ``fit``
            raises it when it begins.
        """
        self._check_own_weights("load_state_dict()")
        saving.restore(self, state)

    def save(self, path: str | Path, *, snapshots: bool = True) -> None:
        """Write :meth:`state_dict` to `path`; a failure leaves a file that was there untouched.

        Raises
        ------
        OSError
            If the file cannot be written.
        """
        checkpoint.write(path, self.state_dict(snapshots=snapshots))

    def save_every(
        self,
        steps: int,
        folder: str | Path,
        *,
        keep: int = 3,
        snapshots: bool = True,
        before_jumps: bool = False,
    ) -> None:
        """From now on save to ``folder/step-<number>.safetensors`` every so many steps of ``fit``.

        One that fails, on a full disk for instance, is logged as an error, and training goes on.
        List this callback behind those that change the learning rate at the end of an epoch.

        Parameters
        ----------
        steps, keep : int
            Steps between two checkpoints, and newest ones that are kept, at least 1 each.
        folder : str or Path
            Where to, made if it is not there; :meth:`load` takes it and reads the newest.
        snapshots : bool
            As for :meth:`state_dict`.
        before_jumps : bool
            Save too where the next step may begin a jump.
        """
        self._saver = Saver(
            Rotation(steps, folder, keep),
            lambda path: self.save(path, snapshots=snapshots),
            lambda: saving.are_finite(self),
            before_jumps,
        )
        self._watch_batches()

    def load(self, path: str | Path) -> None:
        """Take back what :meth:`save` wrote, as :meth:`load_state_dict` does.

        Parameters
        ----------
        path : str or Path
            File of :meth:`save`, or folder of :meth:`save_every`: then the newest readable one.

        Raises
        ------
        FileNotFoundError, CheckpointError
            If there is none, or if it is damaged or does not fit.
        """
        self._check_own_weights("load()")
        saving.restore(self, read_newest(path, lambda file: saving.migrated(checkpoint.read(file))))
