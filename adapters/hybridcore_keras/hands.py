"""What carries out the engine's directives on a Keras model, through a port."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any, TypeVar

import keras
from keras import ops

from hybridcore import Action, ConfigError, Directive, HybridTrainerConfig, Observation
from hybridcore.memory import CODED, Room
from hybridcore.raised import Raised, before_the_point, brief
from hybridcore_keras.averages import WeightAverage
from hybridcore_keras.checks import ends_the_data, goes_on_from
from hybridcore_keras.groups import by_depth, by_user
from hybridcore_keras.memory import is_out_of_memory, size_of
from hybridcore_keras.ports import Figures, Port
from hybridcore_keras.secants import SecantBank, affordable
from hybridcore_keras.snapshots import SnapshotBank, bytes_of

logger = logging.getLogger("hybridcore")

NAN = float("nan")
Copy = TypeVar("Copy")


class Hands:
    """Does what a directive says and reports what was seen.

    It decides nothing but which copies of the weights to do without when memory runs out.
    Snapshots, secant pairs and the average are made when first asked for.

    Parameters
    ----------
    port : Port
        The model and one batch of ``fit``.
    config : HybridTrainerConfig
        Settings.
    probe : tuple or None
        Held-out batch on which jumps are judged; None for the batch of the step.
    layer_groups : list of lists of variables or None
        The user's layer groups; None where they go by depth.

    Attributes
    ----------
    logs : dict
        What the newest pass told Keras.
    bank : SnapshotBank or None
        Snapshots.
    average : WeightAverage or None
        Running average of the weights.
    secants : SecantBank or None
        Secant pairs.
    recovery : list of tensor or None
        What the last ``SAVE`` kept, for as long as it may be asked for; in a tuple what is kept in
        fewer bits.
    start : list of tensor or None
        What was there at the first secant pair, the flat weights first, for as long as there are
        pairs; otherwise as `recovery`.
    room : Room
        Copies of the weights that there is room for.
    pairs : int
        Secant pairs that there is room for.
    peaks : dict of str to int
        Most bytes that each kind of copies has taken so far.
    torn : bool
        Whether the copies of the weights are not those that the engine knows of, because memory
        ran out, or another callback has written the weights.
    """

    def __init__(
        self,
        port: Port,
        config: HybridTrainerConfig,
        probe: tuple[Any, ...] | None,
        layer_groups: list[list[Any]] | None,
    ) -> None:
        self.port = port
        self._probe = probe
        self._probe_data: tuple[Any, ...] = ()
        self._tried = probe is None
        self._raised = Raised("the model", lambda e: ends_the_data(e) or is_out_of_memory(e))
        self._compiled = False
        self._layer_groups = layer_groups
        self.logs: dict[str, Any] = {}
        # Of the newest pass.
        self._figures = Figures(NAN, NAN, NAN, 0.0)
        self.room = Room(config, config.secant_pairs, host=False)
        if not goes_on_from(port.model.optimizer):
            self.room.predict_nothing()
            logger.warning(
                "optimizer Ftrl puts the weights where sums of its gradients say, wherever they "
                "were moved to, so that nothing is predicted: take another one, such as Adagrad"
            )
        self._sums = port.compiled(_sums)
        self.peaks = dict.fromkeys(("snapshots", "secant pairs", "average", "recovery"), 0)
        self.check_groups()
        self.restart()

    def check_groups(self) -> None:
        """Raise :class:`hybridcore.ModelError` unless the user's groups are of what is trained."""
        if self._layer_groups is not None and self.port.model.built:
            by_user(self._layer_groups, self.port.variables)

    def restart(self) -> None:
        """Drop all copies of the weights: the variables are others now."""
        self.bank: SnapshotBank | None = None
        self.average: WeightAverage | None = None
        self.secants: SecantBank | None = None
        self.recovery: list[Any] | None = None
        self.start: list[Any] | None = None
        # State of the model before a trial point was evaluated, while it may be taken back.
        self._before_trial: list[Any] | None = None
        self._on_trial = self.torn = False
        # Whether nobody can have written the weights since they were looked at.
        self._looked = False
        self.room.measure(size_of(self.port.model))
        self.pairs = self.pairs_of(self.room)

    def pairs_of(self, room: Room) -> int:
        """Secant pairs that there is `room` for."""
        return affordable(self.port.model, room.pairs, room.plan.pairs)

    def fingerprint(self) -> list[float] | None:
        """Return sums that tell whether the weights are others, None where there are no copies."""
        if self.identities is None:
            return None
        present = [ops.convert_to_tensor(variable.value) for variable in self.port.variables]
        return [float(value) for value in ops.convert_to_numpy(self._sums(present))]

    @property
    def identities(self) -> list[int] | None:
        """Which variables there are copies of, None while there are no copies."""
        kept = self.bank or self.average or self.secants
        return None if kept is None else kept.identities

    def carry_out(self, directive: Directive) -> Observation:
        """Do what `directive` says."""
        port, action = self.port, directive.action
        if not self._looked and action is not Action.SKIP:
            self._looked = True
            if self.secants is not None and not self.secants.is_there():
                # Another callback has written the weights, which stay so.
                self.restart()
                self.torn = True
                return Observation()
        if action is Action.FULL:
            observation = self._full(directive)
            # Only now: in the first pass TensorFlow makes what has not been built before.
            self._try_probe()
            return observation
        # First of all, because at the end of the data there is no step to take.
        batches = 0
        if action is not Action.MARK and (self._probe is None or action is not Action.PROBE):
            batches = port.pull()
        if action is Action.GRADIENT:
            return self._gradient()
        if action is Action.PROBE:
            return self._evaluate(directive)
        if action is Action.BASE:
            return self._new_base(directive)
        if action is Action.SKIP:
            port.skip(batches)
            self._on_trial = False
        elif action is Action.MOVE:
            assert directive.coefficients is not None
            grows = self.snapshots.grows
            self.snapshots.move(directive.coefficients, take=directive.snapshot)
            if grows:
                self._measure()
        elif action is Action.REACH:
            assert self.secants is not None
            assert directive.coefficients is not None
            self._on_trial = True
            self.secants.reach(directive.coefficients)
            self._on_trial = bool(directive.coefficients.any())
        elif action is Action.MARK:
            self.snapshots.save()
        elif action is Action.SAVE:
            self.recovery = None
            if self.room.plan.in_turn:
                # A new one begins where the jump has ended.
                self.average = None
            self.snapshots.save()
            self.recovery = self._kept()
            self._measure()
        elif action is Action.ROLLBACK and directive.at_start:
            assert self.start is not None
            assert self.secants is not None
            weights, *others = self.start
            self._take_back()
            self._put_back(others)
            self.secants.put(weights)
        elif action is Action.ROLLBACK:
            self._take_back()
            self._roll_back()
        return Observation()

    def let_go(self, recovery: bool, mark: bool, pairs: bool) -> None:
        """End a step: drop copies of the weights that will not be asked for any more."""
        self._take_back()
        self._looked = False
        if not recovery:
            self.recovery = None
            if self.bank is not None and not mark:
                self.bank.forget()
        if not pairs:
            self.secants, self.start, self._on_trial = None, None, False

    def abandon(self) -> None:
        """Undo what the present step did to the weights, because something raised in it."""
        if self.bank is not None:
            self.bank.put_back()
        if self._on_trial:
            assert self.secants is not None
            self.secants.back_to_base()
            self._on_trial = False
        self._take_back()

    def break_off(self) -> None:
        """Undo the present step, and a jump or a trial that nobody will validate any more."""
        self.abandon()
        if self.recovery is not None:
            self._roll_back()

    def make_room(self, error: BaseException) -> bool:
        """Make do with fewer copies of the weights, if that is what `error` asks for.

        What the present step did to the weights is undone, and a jump that cannot be validated any
        more is taken back. The copies that are left have to be made anew.

        Returns
        -------
        bool
            False if memory has not run out, or if there is nothing here that could be done without.
        """
        if self.room.is_bare or not is_out_of_memory(error):
            return False
        self.abandon()
        if self.recovery is not None:
            self._roll_back()
        left = self.room.give_up(self.pairs)
        self.pairs = self.pairs_of(self.room)
        # Not the text: TensorFlow's is a page.
        kind = type(error).__name__
        logger.warning("memory has run out (%s), so from now on there are %s", kind, left)
        self.bank = self.average = self.secants = self.start = None
        self.torn = True
        return True

    @property
    def snapshots(self) -> SnapshotBank:
        """The bank of snapshots."""
        if self.bank is None:
            self.bank = self.new_bank(self.room)
        return self.bank

    def new_bank(self, room: Room) -> SnapshotBank:
        """Return an empty bank for as many snapshots as there is `room` for."""
        variables = self.port.variables
        if self._layer_groups is None:
            groups = by_depth([math.prod(v.shape) for v in variables])
        else:
            groups = by_user(self._layer_groups, variables)
        return SnapshotBank(groups, room.snapshots, self.port, room.plan.kind)

    def _measure(self) -> None:
        """Bring the peaks up to date."""
        parts = (self.bank, self.secants, self.average)
        sizes = [0 if part is None else part.nbytes for part in parts]
        sizes[1] += bytes_of(self.start)
        for name, size in zip(self.peaks, [*sizes, bytes_of(self.recovery)], strict=True):
            self.peaks[name] = max(self.peaks[name], size)

    def _kept(self) -> list[Any]:
        return [self._thrifty(value) for value in self.port.keep()]

    def _put_back(self, kept: list[Any]) -> None:
        """Put back what :meth:`_kept` returned."""
        self.port.put_back([ops.cast(v[0], "float32") if isinstance(v, tuple) else v for v in kept])

    def _thrifty(self, value: Any) -> Any:
        """Return a tensor of the recovery point, in a tuple and fewer bits if snapshots are so."""
        large = "float32" in str(value.dtype) and math.prod(value.shape) > 1
        coded = self.room.plan.kind in CODED and large
        return (ops.cast(value, "bfloat16"),) if coded else value

    # -- passes -----------------------------------------------------------------------------

    def _full(self, directive: Directive) -> Observation:
        port, start = self.port, perf_counter()
        rates = directive.learning_rate_scale, *directive.highest_rates
        if directive.pair:
            figures = self._gradients(port.buffers() if self._is_elsewhere else None)
        else:
            self.logs, figures = port.full(*rates, forgetting=directive.forgetting)
        observation = _seen(figures, start)
        if not observation.applied:
            if not observation.overflow:
                port.skip(1)
            # Else the schedule of plain fit does not go on either.
            return observation
        self._on_trial = False
        if directive.pair:
            on_trial = self.recovery is not None
            self._spare(lambda: self._take_pair(directive.fresh_pairs))
            if self.torn and on_trial:
                # The weights are those from before the trial, and the gradients of others.
                port.count()
                return observation
            port.apply(*rates)
        if self.secants is not None:
            self.secants.here = None
        return observation._replace(gram=self._spare(lambda: self._copy(directive)))

    def _gradients(self, kept: list[Any] | None) -> Figures:
        """Figures of a pass whose gradients are kept; no numbers where a tried point raises.

        Keras's own step is not asked for more than once: the optimizer may have taken it before
        something raised.

        Parameters
        ----------
        kept : list of tensor or None
            What the model's state was before; None where no point is tried.
        """
        try:
            self.logs, self._figures = self.port.gradient()
        except Exception as error:
            if kept is None:
                raise
            self.port.put_back_buffers(kept)
            if not self._raises_only_there(error, self.port.gradient):
                raise
            return self._figures._replace(loss=NAN, gradient_norm=NAN)
        return self._figures

    def _spare(self, copy: Callable[[], Copy]) -> Copy | None:
        """Copy weights in a step that has been taken, and must not be taken again."""
        try:
            return copy()
        except Exception as error:
            if not self.make_room(error):
                raise
            return None

    def _copy(self, directive: Directive) -> Any:
        """Take the weights into average and bank, where a full step asks for it."""
        self._add_to_average(directive.average)
        if directive.snapshot:
            grows = self.snapshots.grows
            self.snapshots.take(fresh=directive.fresh_bank, exact=directive.exact)
            if grows:
                self._measure()
        return self.snapshots.gram() if directive.gram else None

    def _add_to_average(self, weight: float) -> None:
        waits = self.room.plan.in_turn and self.recovery is not None
        if not (weight and self.room.average) or waits:
            return
        new = self.average is None
        self.average = self.average or WeightAverage(self.port)
        self.average.add(weight)
        if new:
            self._measure()

    def _gradient(self) -> Observation:
        self._before_trial = self.port.buffers()
        start = perf_counter()
        figures = self._gradients(self._before_trial)
        return _seen(figures, start)._replace(objective=figures.loss)

    def _evaluate(self, directive: Directive) -> Observation:
        coefficients, at_start = directive.coefficients, directive.at_start
        if at_start and self.start is None:
            return Observation()
        moved = at_start or coefficients is not None
        elsewhere = directive.at_mark or moved
        if elsewhere:
            self.snapshots.set_aside()
        try:
            if directive.at_mark:
                self.snapshots.restore()
            elif self.start is not None and at_start:
                assert self.secants is not None
                self.secants.put(self.start[0])
            elif coefficients is not None:
                self.snapshots.move(coefficients)
            own = self._probe is None or directive.own_batch
            if own and not self._compiled:
                # The first one compiles, and would tell a wrong price of all.
                self._compiled = True
                if math.isnan(self._loss(own, moved)):
                    return Observation()
            start = perf_counter()
            loss = self._loss(own, moved)
            objective = loss if directive.own_batch else NAN
            return Observation(loss=loss, seconds=perf_counter() - start, objective=objective)
        finally:
            if elsewhere:
                self.snapshots.put_back()

    def _loss(self, own: bool, moved: bool) -> float:
        """Loss of a probe; NaN where the point that was tried makes it raise, or it is the user's.

        The user's own has been evaluated before, and without it training can go on.
        """
        batch = None if own else self._held_out()
        try:
            return self.port.probe(batch)
        except Exception as error:
            if not own and self._raised.by_the_probe(error):
                return NAN
            if self._raises_only_there(error, lambda: self.port.probe(batch), moved=moved):
                return NAN
            raise

    def _raises_only_there(
        self, error: Exception, evaluate: Callable[[], object], *, moved: bool = False
    ) -> bool:
        """Whether it has raised `error` because of where the weights were put to try."""
        if not (moved or self._on_trial or self._is_elsewhere):
            return False
        to_base = self.secants.back_to_base if self._on_trial and self.secants else None
        before = before_the_point(
            self.bank, to_base, moved=moved, recovers=self.recovery is not None
        )
        return self._raised.only_there(error, lambda: self._without_trace(evaluate), before)

    @property
    def _is_elsewhere(self) -> bool:
        """Whether a jump or a trial of the optimizer has led to the weights."""
        return self.recovery is not None and self.bank is not None and not self.bank.waits

    def _without_trace(self, evaluate: Callable[[], object]) -> None:
        kept = self.port.buffers()
        try:
            evaluate()
        finally:
            self.port.put_back_buffers(kept)

    def _try_probe(self) -> None:
        """Evaluate the user's probe once, to learn in the first step whether that can be done."""
        if self._tried:
            return
        self._tried = True
        try:
            loss = self.loss_of("probe", self._held_out())
        except Exception as error:
            if is_out_of_memory(error):
                # A probe for which there is no room is done without, once it is needed.
                return
            raise
        if not math.isfinite(loss):
            logger.warning(
                "probe has the loss %s at first, and no jump or quasi-Newton step is kept while "
                "that is no finite number: look for NaN in its batch",
                loss,
            )

    def check_batch(self, batch: tuple[Any, ...]) -> None:
        """Raise :class:`hybridcore.ConfigError` unless a `batch` can be evaluated.

        At the weights from before a jump or a trial, as where that has led the loss may raise.
        """
        if self.recovery is None:
            return
        self.snapshots.set_aside()
        try:
            self.snapshots.restore()
            self.loss_of("batch", batch)
        finally:
            self.snapshots.put_back()

    def loss_of(self, name: str, batch: tuple[Any, ...]) -> float:
        """Loss of the user's `batch`, which is the argument `name`; it leaves no trace.

        Raises
        ------
        ConfigError
            If it cannot be evaluated, unless that is for want of memory.
        """
        try:
            return self.port.probe(batch)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            shapes = keras.tree.map_structure(lambda v: tuple(getattr(v, "shape", ())), batch)
            # In the text too, as Keras cuts the cause off an error that leaves fit.
            raise ConfigError(
                f"{name} with parts of shapes {shapes} cannot be evaluated: pass a batch such as "
                "fit takes from its data, (x, y) or (x, y, sample_weight); it raised "
                f"{brief(error)}"
            ) from error

    def _held_out(self) -> tuple[Any, ...]:
        """Return the user's probe, brought to the device once."""
        if not self._probe_data:
            self._probe_data = on_device(self._probe or ())
        return self._probe_data

    # -- quasi-Newton steps -----------------------------------------------------------------

    def _take_pair(self, fresh: bool) -> None:
        begins = False
        if self.secants is None:
            if self.bank is not None:
                # The descent needs no snapshots, and takes new ones when it has ended.
                self.bank.clear()
            self.secants, begins = SecantBank(self.port, self.pairs), True
        elif fresh:
            self.secants.clear()
        new = self.secants.is_empty
        self.secants.take()
        if begins:
            self.start = [self.secants.base, *self._kept()]
        if new:
            self._measure()

    def _new_base(self, directive: Directive) -> Observation:
        """Make the trial point the base; the optimizer sees its gradients at a rate of zero."""
        self._take_pair(fresh=False)
        assert self.secants is not None
        self._before_trial, self._on_trial = None, False
        start = perf_counter()
        self.port.follow()
        seconds = perf_counter() - start
        self._add_to_average(directive.average)
        return Observation(seconds=seconds, secants=self.secants.products())

    def _take_back(self) -> None:
        """Undo what a pass at a trial point in vain did to the model's state, and count it."""
        if self._before_trial is not None:
            self.port.put_back_buffers(self._before_trial)
            self._before_trial = None
            self.port.count()

    def _roll_back(self) -> None:
        assert self.recovery is not None
        self.snapshots.restore()
        self._put_back(self.recovery)
        self.recovery = None


def on_device(batch: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a user's batch as tensors."""
    return tuple(keras.tree.map_structure(_tensor, part) for part in batch)


def _tensor(value: Any) -> Any:
    return None if value is None else ops.convert_to_tensor(value)


def _sums(values: Sequence[Any]) -> Any:
    wide = [ops.cast(value, "float32") for value in values]
    return ops.stack([ops.sum(part) for value in wide for part in (value, value * value)])


def _seen(figures: Figures, start: float) -> Observation:
    loss, norm, rate, scale = figures
    applied = math.isfinite(loss) and math.isfinite(norm)
    # A scale below one cannot be what made them overflow.
    overflow = scale >= 1.0 and math.isfinite(loss) and not applied
    seconds = perf_counter() - start
    return Observation(loss, norm, rate, seconds, applied=applied, overflow=overflow)
