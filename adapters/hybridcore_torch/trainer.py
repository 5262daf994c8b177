"""The trainer: carries out the engine's directives on a PyTorch model."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import nn

from hybridcore import (
    Action,
    CheckpointError,
    ClosureError,
    ConfigError,
    Engine,
    HybridTrainerConfig,
    ModelError,
    Observation,
    Phase,
    ProtocolError,
    StepResult,
    TrainingStatistics,
)
from hybridcore.rotation import Rotation, read_newest
from hybridcore.types import STEPS
from hybridcore_torch import checkpoints, files, sharded
from hybridcore_torch.batches import Batch, Batches, NeedsBatchError
from hybridcore_torch.checks import averages, bad_batch, check_arguments
from hybridcore_torch.closures import Closure, Closures, check_callable
from hybridcore_torch.decay import is_known
from hybridcore_torch.hands import Hands
from hybridcore_torch.others import Others
from hybridcore_torch.ranks import is_sharded
from hybridcore_torch.structure import Structure


class _Taken(NamedTuple):
    """What carrying out a turn of the engine came to."""

    phase: Phase
    predicted: bool
    # Of the turn's step, None where it took none.
    observation: Observation | None
    # Of passes, which are no overhead.
    seconds: float


# Writes into the weights by the loop after which it is told what may be the reason, and steps
# without one after which they are counted anew: a load now and then is none of these.
OFTEN, SELDOM = 5, 100
# Of these one may train what the loss of another depends on.
_TRAINERS: WeakSet[HybridTrainer] = WeakSet()
logger = logging.getLogger("hybridcore")
FIXED = ("model", "optimizer", "config", "scheduler", "scaler", "max_grad_norm", "probe")


class HybridTrainer:
    """Runs a PyTorch training loop by real and predicted steps.

    The trainer calls ``zero_grad``, ``backward``, ``optimizer.step`` and ``scheduler.step``; the
    loop only says how the loss is computed:

        trainer = HybridTrainer(model, optimizer, scheduler=scheduler)
        for x, y in loader:
            result = trainer.step(lambda: F.cross_entropy(model(x), y))

    Parameters
    ----------
    model : torch.nn.Module
        Model to train.
    optimizer : torch.optim.Optimizer
        Optimizer of the model's parameters. Its moments are kept across a jump: resetting them
        was worst on both tasks where it was measured, and decaying them better on one and worse
        on the other (``python benchmarks/moments.py``).
    config : HybridTrainerConfig, optional
        Settings.
    scheduler : optional
        Learning-rate scheduler with ``step()``; called once for every step, predicted or not.
    scaler : torch.amp.GradScaler, optional
        Loss scaler of a mixed-precision loop.
    max_grad_norm : float, optional
        Clip the norm of all gradients to this, positive.
    probe : callable, optional
        Returns the loss of a fixed held-out batch; called in the first step, to see that it does,
        and for probes. Without it, probes use the batch of the step, as those of outer steps do.
    layer_groups : iterable of iterables of Parameter, optional
        Layer groups; by default up to 8 by depth.
    callbacks : sequence of callable
        Each is called with the :class:`hybridcore.StepResult` of every step. One with a method
        ``begin`` is given the trainer first, as :class:`hybridcore.JsonLines` is.

    Raises
    ------
    ModelError, ConfigError
        If the arguments do not fit together; nothing has been changed then.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: HybridTrainerConfig | None = None,
        *,
        scheduler: Any | None = None,
        scaler: torch.amp.GradScaler | None = None,
        max_grad_norm: float | None = None,
        probe: Closure | None = None,
        layer_groups: Iterable[Iterable[torch.nn.Parameter]] | None = None,
        callbacks: Sequence[Callable[[StepResult], object]] = (),
    ) -> None:
        check_arguments(
            model, optimizer, config, scheduler, scaler, max_grad_norm, probe, callbacks
        )
        structure = Structure(model, optimizer, layer_groups)
        self.model = model
        self.optimizer = optimizer
        self.config = HybridTrainerConfig() if config is None else config
        self.scheduler = scheduler
        self.scaler = scaler
        self.max_grad_norm = max_grad_norm
        self.probe = probe
        self.callbacks = tuple(callbacks)
        self._structure = structure
        self._hands = Hands(
            model,
            optimizer,
            scheduler,
            scaler,
            max_grad_norm,
            probe,
            self.config,
            structure,
        )
        self._probed = False
        self._disturbed = self._disturbed_at = 0
        self._others = Others()
        self.engine = self._new_engine(self._hands.pairs)
        if self._hands.room.snapshots != self.config.snapshots:
            self.engine.regroup(self._hands.pairs, self._hands.room.snapshots)
            self.engine.take_events()
        for callback in self.callbacks:
            begin = getattr(callback, "begin", None)
            if callable(begin):
                begin(self)
        _TRAINERS.add(self)

    def __setattr__(self, name: str, value: object) -> None:
        if name in FIXED and name in vars(self):
            raise ModelError(
                f"{name} cannot be replaced in a trainer: build a new one, and go on by its "
                "load_state_dict() if nothing but the object is new"
            )
        super().__setattr__(name, value)

    # -- the loop ---------------------------------------------------------------------------

    def step(self, closure: Closures) -> StepResult:
        """Take one step, real or predicted.

        Parameters
        ----------
        closure : callable or sequence of callables
            Returns the loss of the present batch, a scalar tensor with its graph. Called once in
            most full steps, not in most predicted ones, and several times where a jump is chosen,
            an outer step is weighed or it is found out whether batches are the same. Several
            closures are the parts of one batch, of equal size, that is too large for one pass:
            gradients are accumulated over them, and the loss of the step is their mean.

        Raises
        ------
        ClosureError
            If the closure does not return a loss; nothing has been changed then.
        ModelError
            If gradients are sparse, or if nothing can be trained any more.
        DivergenceError
            With ``on_divergence="raise"``, after a batch whose loss or gradients were not finite
            was left out.
        """
        check_callable(closure)
        self._check_own_weights("step()")
        return self._step(closure)

    def batches(self, loader: Iterable[Batch]) -> Batches[Batch]:
        """Return the batches of `loader` that are needed; call :meth:`step` for each of them.

        Predicted steps of a jump are taken here, without loading a batch. A loader with a length
        makes for as many steps as it has batches: those at its end are left out. The predicted
        steps of outer momentum take their batches, and do not use them.
        """
        return Batches(loader, self._skip)

    def _skip(self) -> bool:
        self._check_own_weights("batches()")
        if not self.config.enabled:
            return False
        if self.engine.touches_weights:
            self._check_structure()
        if self.engine.needs_batch:
            return False
        with contextlib.suppress(NeedsBatchError):
            self._step(None)
            return True
        return False

    def finish(self, closure: Closures | None = None) -> None:
        """End a jump, or a trial of the optimizer, that is under way: for after the loop.

        Until it has been validated the weights may be worse than those before it. Both are
        evaluated, and those with the lower loss stay. An outer step that has led to no number is
        taken back, for which the newest is evaluated where no full step has followed it. Where
        there is nothing to end nothing is done. It is no step, and training may go on after it:

            for x, y in loader:
                trainer.step(lambda: F.cross_entropy(model(x), y))
            trainer.finish(lambda: F.cross_entropy(model(x), y))

        Parameters
        ----------
        closure : callable or sequence of callables, optional
            As for :meth:`step`, of the last batch for instance. Not needed with ``probe=``.

        Raises
        ------
        ClosureError
            If there is neither, or if it does not return a loss; nothing has been changed then.
        """
        if closure is None and self.probe is None:
            raise ClosureError(
                "finish() needs a closure that returns the loss of a batch, got None: pass one as "
                "to step(), or build the trainer with probe="
            )
        if closure is not None:
            check_callable(closure)
        self._check_own_weights("finish()")
        if not self.config.enabled:
            return
        self._try_probe()
        self._check_structure()
        self.engine.finish()
        try:
            self._take_turn(closure, a_step=False)
        finally:
            # Around it, autocast would go on with what it has cast of weights that were taken back.
            torch.clear_autocast_cache()
        self._hands.let_go(False, self.engine.holds_mark, self.engine.holds_pairs)

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Put the running average of the weights into the model, for as long as the block lasts.

        Keep these weights where batches are noisy and the rate does not decay; on smooth work they
        lag behind. The average is of about the last 17th of the run. Buffers are the run's own:

            with trainer.averaged():
                accuracy = evaluate(model)
                torch.save(model.state_dict(), "model.pt")

        During a jump it is that from before it. With ``enabled=False`` the weights are the run's
        own, and during a jump for which the average had to give way to the setting `memory`.

        Raises
        ------
        ConfigError
            With ``averaging=False``.
        """
        if not self.config.averaging:
            raise ConfigError(
                "averaged() needs the setting averaging=True, got False: build the trainer with "
                "it, which costs one copy of the weights"
            )
        if not self._hands.room.plan.average:
            raise ConfigError(
                "averaged() needs room for one copy of the weights, and the setting "
                f"memory={self.config.memory!r} leaves none: build the trainer with more"
            )
        self._check_own_weights("averaged()")
        if self.config.enabled:
            self._check_structure()
        return self._hands.averaged()

    def statistics(self) -> TrainingStatistics:
        """Return the summary of the run so far."""
        return dataclasses.replace(self.engine.statistics(), memory=dict(self._hands.peaks))

    def _step(self, closure: Closures | None) -> StepResult:
        start = perf_counter()
        engine = self.engine
        if not self.config.enabled:
            assert closure is not None
            observation = self._hands.stepper.plain(closure)
            engine.count_plain(observation)
            phase, working, predicted = Phase.FULL, observation.seconds, False
        else:
            self._try_probe()
            touches = engine.touches_weights
            if touches or self._hands.disturbed():
                self._check_structure()
                touches = engine.touches_weights
            phase, predicted, of_step, working = self._take_turn(self._watched(closure))
            assert of_step is not None
            observation = of_step
            if touches:
                self._hands.let_go(engine.may_roll_back, engine.holds_mark, engine.holds_pairs)
            else:
                self._hands.watch()
            self._stand_back()
        seconds = perf_counter() - start
        engine.count_time(phase, seconds, seconds - working)
        forecast = engine.forecast_loss
        result = StepResult(
            observation.loss if math.isnan(forecast) else forecast,
            phase,
            predicted,
            engine.prediction_error,
            engine.confidence,
            None if math.isnan(observation.gradient_norm) else observation.gradient_norm,
            1e3 * seconds,
            {"learning_rate": observation.learning_rate},
            engine.take_events(),
        )
        for callback in self.callbacks:
            callback(result)
        bad = not (observation.applied or observation.overflow) and math.isnan(forecast)
        if bad and self.config.on_divergence == "raise":
            raise bad_batch(observation, engine.counters.steps, self.model)
        return result

    def _new_engine(self, pairs: int) -> Engine:
        config = self.config
        if config.outer_momentum and averages(self.optimizer):
            # Its own average would not move along.
            name = type(self.optimizer).__name__
            logger.info("optimizer %s averages by itself: there are no outer steps", name)
            config = dataclasses.replace(config, outer_momentum=False)
        return Engine(config, pairs)

    def _take_turn(self, closure: Closures | None, *, a_step: bool = True) -> _Taken:
        """Carry out what the engine asks for until its turn, which is `a_step`, is over."""
        engine, hands = self.engine, self._hands
        phase, predicted, of_step, working = engine.phase, False, None, 0.0
        with_graph = torch.is_grad_enabled()
        try:
            while (a_step and of_step is None) or not engine.step_done:
                directive = engine.next()
                try:
                    seen = hands.carry_out(directive, closure)
                except (MemoryError, RuntimeError) as error:
                    if not hands.make_room(error):
                        raise
                else:
                    if directive.action in STEPS:
                        phase, of_step = engine.phase, seen
                        predicted = directive.action is Action.SKIP
                    working += seen.seconds
                    engine.observe(seen)
                if hands.torn:
                    engine.abandon()
                    self._start_over()
                    if a_step and closure is None and of_step is None:
                        raise NeedsBatchError
        except BaseException:
            # An interrupt can fall between entering and leaving a block of torch's own.
            torch.set_grad_enabled(with_graph)
            engine.abandon()
            hands.abandon()
            if hands.torn:
                self._start_over()
            raise
        return _Taken(phase, predicted, of_step, working)

    def _check_own_weights(self, call: str) -> None:
        average = self._hands.average
        if average is not None and average.shown:
            raise ProtocolError(
                f"{call} inside averaged(): the model holds the average there, so leave the with "
                "block first"
            )

    # -- structure --------------------------------------------------------------------------

    def _try_probe(self) -> None:
        if not self._probed:
            self._hands.try_probe()
            self._probed = True

    def _check_structure(self) -> None:
        """Start over with snapshots if parameters were added, frozen or resized, or written into.

        Weights stay as they are, in a jump too: what was frozen or replaced must not move any more.
        """
        disturbed = self._hands.disturbed()
        # A hook at the optimizer may be new.
        loses_pairs = self.engine.holds_pairs and not is_known(self.optimizer)
        if self._structure.renew() or disturbed or loses_pairs:
            self._start_over()
        if disturbed:
            step = self.engine.counters.steps
            in_a_row = step - self._disturbed_at < SELDOM
            self._disturbed, self._disturbed_at = self._disturbed * in_a_row + 1, step
        if self._disturbed == OFTEN and disturbed and not averages(self.optimizer):
            logger.warning(
                "the weights were written between steps %d times, so that nothing is predicted: "
                "leave optimizer.step(), which the trainer calls, out of the loop if it is there; "
                "where another trainer holds them too, or weights are clamped or projected after "
                "each step, there is nothing to gain",
                OFTEN,
            )

    def _watched(self, closure: Closures | None) -> Closures | None:
        """Return `closure`; now and then it notices weights that somebody else trains."""
        # Sharded weights are not the parameters that a graph leads to.
        if closure is None or self._structure.sharded or not self._others.are_due():
            return closure
        # As they are now: what is new is looked at later, where no weights are touched.
        own = [p for group in self.optimizer.param_groups for p in group["params"]]
        others = [p for t in list(_TRAINERS) if t is not self for p in t._structure.parameters]
        return self._others.watched(closure, own, others)

    @property
    def _predicts(self) -> bool:
        """Whether there is anything to stand back from, and the weights are the run's own."""
        hands = self._hands
        shown = hands.average is not None and hands.average.shown
        return self.config.enabled and not shown and bool(hands.room.snapshots or hands.room.pairs)

    def _stand_back(self) -> None:
        """Predict nothing any more, if it has noticed some, here and where they are trained."""
        if not self._others.found:
            return
        found, self._others.found = self._others.found, set()
        theirs = [
            t for t in list(_TRAINERS) if any(id(p) in found for p in t._structure.parameters)
        ]
        able = [t for t in (self, *theirs) if t._predicts]
        if not able:
            return
        for trainer in able:
            trainer._hands.predict_nothing()
            trainer._start_over()
        logger.warning(
            "the loss depends on parameters (%d) that are not in this optimizer and are written "
            "elsewhere again and again, as in a game, so that nothing is predicted%s: put those "
            "that are to lower one loss into groups of one optimizer, and what averages weights "
            "under no_grad()",
            len(found),
            ", nor by the trainer of these" if theirs else "",
        )

    def _start_over(self) -> None:
        try:
            self._forget_copies()
        except BaseException:
            # An interrupt in the midst of it: the engine would ask for copies that are gone.
            self._forget_copies()
            raise

    def _forget_copies(self) -> None:
        self._hands.restart()
        self.engine.regroup(self._hands.pairs, self._hands.room.snapshots)

    # -- state ------------------------------------------------------------------------------

    def state_dict(self, *, snapshots: bool = True) -> dict[str, Any]:
        """Return all that training needs to go on as if it had not been interrupted.

        Model, optimizer, scheduler and scaler are included, and the global random states of torch,
        NumPy and Python; where the loop is in its data is not. ``torch.load`` reads all of it back
        with ``weights_only=True``. As in torch, the tensors of model and optimizer are the live
        ones: clone them to keep them while training goes on.

        Without `snapshots` it holds no snapshots, pairs and average, by far the most of it, but
        while a jump may have to be taken back: a run that goes on from there takes new ones first.
        Where weights are sharded over ranks there never are, and a jump is taken back in it.
        """
        self._check_own_weights("state_dict()")
        if self.config.enabled:
            self._check_structure()
        return checkpoints.collect(self, snapshots)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned, random states included.

        Raises
        ------
        CheckpointError
            If the state is of another version, model, optimizer, scheduler, scaler or clipping;
            nothing has been changed then, but that a jump under way ends where layers have been
            frozen or added since the last step.
        """
        self._check_own_weights("load_state_dict()")
        if self.config.enabled and self._structure.renew():
            # Frozen since the last step, for instance, as the state is.
            self._start_over()
        checkpoints.restore(self, state)
        self._others = Others()

    def save(self, path: str | Path, *, snapshots: bool = True) -> None:
        """Write :meth:`state_dict` to `path`; a failure leaves a file that was there untouched.

        The file is one of safetensors, with a checksum over all of it and nothing pickled. What is
        no number, string or tensor in the states of model, optimizer and scheduler is an error.

        Where the weights are sharded over ranks, `path` is a folder that all of them write into by
        ``torch.distributed.checkpoint``, so every rank has to call this. There are no snapshots in
        it, and it holds a jump under way as it was before; any number of ranks may load it.
        """
        state = self.state_dict(snapshots=snapshots)
        (sharded.write if is_sharded(self.model) else files.write)(state, path)

    def save_every(
        self,
        steps: int,
        folder: str | Path,
        *,
        keep: int = 3,
        snapshots: bool = True,
        before_jumps: bool = False,
    ) -> None:
        """From now on save to ``folder/step-<number>.safetensors`` every so many steps.

        One that fails, on a full disk for instance, is logged as an error, and training goes on.

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
        if is_sharded(self.model):
            raise ConfigError(
                f"save_every({steps}) writes files, and the weights are sharded over ranks: call "
                "save(folder) on every rank, every so many steps"
            )
        saver = files.saver(self, Rotation(steps, folder, keep), snapshots, before_jumps)
        self.callbacks = (*self.callbacks, saver)

    @classmethod
    def load(
        cls, path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, **arguments: Any
    ) -> HybridTrainer:
        """Build a trainer and restore into it what :meth:`save` wrote.

        Parameters
        ----------
        path : str or Path
            File or folder of :meth:`save`, or folder of :meth:`save_every`: then the newest
            readable one.
        model, optimizer
            Built as for the run that was saved; their state is overwritten, and so are the global
            random states.
        **arguments
            Further arguments of the constructor as they were, callbacks among them; ``config`` is
            the saved one. :meth:`save_every` has to be called again.

        Raises
        ------
        FileNotFoundError, CheckpointError
            If there is none, or if it is damaged or does not fit; nothing has been changed then.
        ConfigError
            If there is a ``config``, or `path` is no path.
        """
        if "config" in arguments:
            raise ConfigError("load() takes its settings from the file: leave config= out")
        if sharded.is_folder_of_shards(path):
            state = sharded.read(path, model, optimizer)
        else:
            state = read_newest(path, files.read)
        try:
            config = HybridTrainerConfig.from_dict(state["config"])
        except (ConfigError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{path} holds settings not known here: {error}") from error
        trainer = cls(model, optimizer, config, **arguments)
        trainer.load_state_dict(state)
        return trainer
