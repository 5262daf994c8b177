"""What carries out the engine's directives on a model and its optimizer."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import nn

from hybridcore import (
    Action,
    CheckpointError,
    Directive,
    HybridTrainerConfig,
    Observation,
)
from hybridcore.memory import Kind, Room
from hybridcore.raised import Raised, before_the_point
from hybridcore_torch import buffers
from hybridcore_torch.averages import WeightAverage
from hybridcore_torch.closures import Closure, Closures, Prober
from hybridcore_torch.decay import is_known
from hybridcore_torch.memory import is_out_of_memory, size_of
from hybridcore_torch.ranks import Ranks, reshard
from hybridcore_torch.recovery import RecoveryPoint
from hybridcore_torch.secants import SecantBank, affordable, fits
from hybridcore_torch.snapshots import SnapshotBank
from hybridcore_torch.steps import NAN, Stepper
from hybridcore_torch.structure import Structure
from hybridcore_torch.writes import Writes

logger = logging.getLogger("hybridcore")

# What numbers that are out of range raise, torch's LinAlgError among them.
NUMERICAL = (ArithmeticError, ValueError, RuntimeError)


class Copies(NamedTuple):
    """All copies of the weights that there may be, as the attributes of :class:`Hands`."""

    bank: SnapshotBank | None
    secants: SecantBank | None
    average: WeightAverage | None
    recovery: RecoveryPoint | None
    start: RecoveryPoint | None


class Hands:
    """Does what a directive says and reports what was seen.

    It decides nothing but which copies of the weights to do without when memory runs out.

    Snapshots, secant pairs and the average are made when first asked for.

    Parameters
    ----------
    model, optimizer, scheduler, scaler, max_grad_norm, probe
        As for :class:`hybridcore_torch.HybridTrainer`.
    config : HybridTrainerConfig
        Settings.
    structure : Structure
        What is trained.

    Attributes
    ----------
    stepper : Stepper
        Takes the real steps.
    average : WeightAverage or None
        Running average of the weights.
    recovery : RecoveryPoint or None
        What the last ``SAVE`` kept, for as long as it may be asked for.
    start : RecoveryPoint or None
        What was there at the first secant pair, for as long as there are pairs.
    pairs : int
        Secant pairs that there is room for.
    peaks : dict of str to int
        Most bytes that each kind of copies has taken so far.
    room : Room
        Copies of the weights that there is room for.
    moved : bool
        Whether an outer step has led to where the weights are, and no good batch has followed yet.
    torn : bool
        Whether the copies of the weights are not those that the engine knows of, because memory
        ran out or the step was interrupted.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any | None,
        scaler: torch.amp.GradScaler | None,
        max_grad_norm: float | None,
        probe: Closure | None,
        config: HybridTrainerConfig,
        structure: Structure,
    ) -> None:
        if not getattr(scaler, "is_enabled", lambda: True)():
            # Nothing overflows by what it does.
            scaler = None
        self._model, self._optimizer = model, optimizer
        self._scaler, self._probe = scaler, probe
        self._prober = Prober(model)
        self._ranks = Ranks(model)
        # Where there are several, the others would go on with what they have.
        self._raised = Raised("closure", lambda e: self._ranks.several or is_out_of_memory(e))
        self.stepper = Stepper(model, optimizer, scheduler, scaler, max_grad_norm, self._ranks)
        # A scaled loss overflows now and then, which a line search would take for its own fault,
        # and in a group of processes each sees a loss of its own.
        none = scaler is not None or self._ranks.several
        self.room = Room(config, 0 if none else config.secant_pairs)
        self._ranks.check_alike(
            config.to_dict()
            | {
                "max_grad_norm": max_grad_norm,
                "scaler": scaler is not None,
                "scheduler": None if scheduler is None else type(scheduler).__name__,
                "optimizer": type(optimizer).__name__,
                "probe": probe is not None,
                "trainable parameters": [tuple(p.shape) for p in structure.parameters],
                "layer_groups": structure.sizes,
            }
        )
        self.peaks = dict.fromkeys(("snapshots", "secant pairs", "average", "recovery"), 0)
        self._structure = structure
        self._told_of_optimizer = False
        self.restart()

    def restart(self) -> None:
        """Drop all copies of the weights: the parameters are others now."""
        self._parameters = self._structure.parameters
        self.room.measure(size_of(self._parameters, self._optimizer, self._ranks))
        self.bank: SnapshotBank | None = None
        self.secants: SecantBank | None = None
        self.average: WeightAverage | None = None
        self.recovery: RecoveryPoint | None = None
        self.start: RecoveryPoint | None = None
        self._on_trial = self._moving = self._taking = self._going_back = False
        self.moved = self.torn = False
        self._writes = Writes(self._parameters)
        self._kept: buffers.Kept = []
        self.pairs = self.pairs_of(self.room.pairs)
        if self.room.pairs and not (self._told_of_optimizer or is_known(self._optimizer)):
            self._told_of_optimizer = True
            name = type(self._optimizer).__name__
            logger.info(
                "optimizer %s may do more in a step than lower the loss, or lowers something else: "
                "there are no quasi-Newton steps",
                name,
            )
        self.stepper.refresh()

    def make_room(self, error: BaseException) -> bool:
        """Make do with fewer copies of the weights, if that is what `error` asks for.

        What the present step did to the weights is undone, and a jump that cannot be validated any
        more is taken back. The copies that are left have to be made anew.

        Returns
        -------
        bool
            False if memory has not run out, or if there is nothing here that could be done without,
            or in a group of processes, the others of which would go on with what they have.
        """
        if self.room.is_bare or self._ranks.several or not is_out_of_memory(error):
            return False
        self.abandon()
        if self.recovery is not None:
            self._roll_back()
        left = self.room.give_up(self.pairs)
        # As text: a handler that keeps the error would keep the copies in its frames.
        logger.warning("memory has run out, so from now on there are %s: %s", left, str(error))
        self.bank = self.secants = self.start = self.average = None
        self.torn = True
        return True

    def predict_nothing(self) -> None:
        """Do without copies to predict from; a jump that cannot be validated is taken back."""
        if self.recovery is not None:
            self._roll_back()
        self.room.predict_nothing()

    def try_probe(self) -> None:
        """Evaluate the user's probe, if there is one, to learn at once whether that can be done."""
        if self._probe is not None:
            loss = self._prober.loss(self._probe, "probe")
            if not math.isfinite(loss):
                logger.warning(
                    "probe has the loss %s at first, and no jump or quasi-Newton step is kept "
                    "while that is no finite number: look for NaN in its batch",
                    loss,
                )

    def carry_out(self, directive: Directive, closure: Closures | None) -> Observation:
        """Do what `directive` says; `closure` may be None where it needs no batch."""
        action = directive.action
        if self._ranks.several:
            self._ranks.check_even()
        self._ranks.turn += 1
        self._moving = False
        if action is Action.FULL or action is Action.GRADIENT:
            assert closure is not None
            return self._pass(directive, closure)
        if action is Action.PROBE:
            return self._evaluate(directive, closure)
        if action is Action.BASE:
            return self._base(directive)
        if action is Action.SKIP:
            rate = self.stepper.learning_rate
            self.stepper.advance_schedule()
            self._on_trial = False
            return Observation(learning_rate=rate)
        if action is Action.MOVE:
            assert directive.coefficients is not None
            # Within a jump it can be done again, from the same snapshots.
            # An outer step is under way until the engine has been told of it.
            self._moving, grows = directive.snapshot, self.snapshots.grows
            self.snapshots.move(directive.coefficients, take=directive.snapshot)
            self.moved = directive.snapshot
            if grows:
                self._measure()
        elif action is Action.REACH:
            assert self.secants is not None
            assert directive.coefficients is not None
            away = bool(directive.coefficients.any())
            if not away:
                # Before the weights, whose memory a buffer may share.
                buffers.put_back(self._kept)
            self._kept, self._on_trial = [], True
            self.secants.reach(directive.coefficients)
            self._on_trial = away
        elif action is Action.MARK:
            self.snapshots.save()
        elif action is Action.SAVE:
            if self.room.plan.in_turn:
                # A new one begins where the jump has ended.
                self.average = None
            self.snapshots.save()
            self.recovery = self._recovery_point()
            self._measure()
        elif action is Action.ROLLBACK and directive.at_start:
            self._go_back()
        elif action is Action.ROLLBACK:
            self._roll_back()
        return Observation()

    def _go_back(self) -> None:
        assert self.start is not None
        self._going_back = True
        self.start.load_weights(self._parameters)
        self.start.restore(self._model, self._optimizer, self._scaler)
        self._going_back = False

    def _recovery_point(self, parameters: Iterable[torch.Tensor] = ()) -> RecoveryPoint:
        model, optimizer, watch = self._model, self._optimizer, self.stepper.buffers
        kind = self.room.plan.kind
        return RecoveryPoint(model, optimizer, self._scaler, watch, kind, parameters)

    def _roll_back(self) -> None:
        assert self.recovery is not None
        self.snapshots.restore()
        self.recovery.restore(self._model, self._optimizer, self._scaler)
        self.recovery = None

    def before_the_jump(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return copies of the states of model and optimizer that a rollback would restore."""
        assert self.recovery is not None
        self.snapshots.set_aside()
        try:
            self.snapshots.restore()
            model = self._model.state_dict()
            model = type(model)((name, copy.deepcopy(value)) for name, value in model.items())
        finally:
            self.snapshots.put_back()
        saved = self.recovery.state_dict()
        model |= {name: value for name, value in saved["buffers"].items() if name in model}
        # Rates go on as the schedule does.
        groups = self._optimizer.state_dict()["param_groups"]
        return model, saved["optimizer"] | {"param_groups": groups}

    def abandon(self) -> None:
        """Undo what the present step did to the weights, because the user's code raised in it."""
        if self.bank is not None:
            self.bank.put_back()
        if self._on_trial:
            assert self.secants is not None
            buffers.put_back(self._kept)
            self.secants.back_to_base()
            self._on_trial = False
        if self._going_back:
            # Half of it must not stay undone.
            self._go_back()
        if self._moving and self.bank is not None:
            self.bank.return_to_newest()
        if self._moving or self._taking:
            # The bank may be a snapshot short, or have a base that the engine does not know of.
            self.torn = True
        self.watch()

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the average into the weights for the block, if there is one."""
        if self.average is None:
            yield
            return
        try:
            with self.average.in_place():
                yield
        finally:
            reshard(self._model)
            if self._writes.noted:
                self.watch()

    def disturbed(self) -> bool:
        """Whether somebody has written into the weights since :meth:`watch`."""
        return self._writes.found

    def watch(self) -> None:
        """Take note of how the weights are, if there are copies of them."""
        if self.bank is not None or self.secants is not None:
            self._writes.note()
        else:
            self._writes.forget()

    def let_go(self, recovery: bool, mark: bool, pairs: bool) -> None:
        """Drop copies of the weights that will not be asked for any more."""
        if not recovery:
            self.recovery = None
            if self.bank is not None and not mark:
                self.bank.forget()
        if not pairs:
            self.secants, self.start, self._on_trial = None, None, False
        self._moving = False
        self.watch()

    @property
    def snapshots(self) -> SnapshotBank:
        """The bank of snapshots."""
        if self.bank is None:
            layers, room = self._structure.layers, self.room
            self.bank = SnapshotBank(layers, room.snapshots, self._ranks, room.plan.kind)
        return self.bank

    def _measure(self) -> None:
        """Bring the peaks up to date."""
        kept = ((self.bank,), (self.secants, self.start), (self.average,), (self.recovery,))
        for name, parts in zip(self.peaks, kept, strict=True):
            size = sum(part.nbytes for part in parts if part is not None)
            self.peaks[name] = max(self.peaks[name], size)

    def pairs_of(self, wanted: int) -> int:
        """Secant pairs that there is room for, where so many are `wanted`."""
        return affordable(self._optimizer, self._parameters, wanted, self.room.plan.pairs)

    def copies_from(self, state: dict[str, Any], snapshots: int, pairs: int) -> Copies:
        """Build the copies of the weights that a saved state holds, and leave those here alone.

        Raises
        ------
        CheckpointError
            If they are of other layer groups or parameters, or not of so many `pairs`.
        """
        bank = secants = average = recovery = start = None
        if state["bank"] is not None:
            kind: Kind = state["bank"].get("kind", "exact")
            bank = SnapshotBank(self._structure.layers, snapshots, self._ranks, kind)
            if not bank.takes(state["bank"]):
                raise CheckpointError(
                    "state was saved with other layer groups: pass the same layer_groups to the "
                    "trainer"
                )
            bank.load_state_dict(state["bank"])
        if state["secants"] is not None:
            if not fits(state["secants"], self._parameters, pairs):
                raise CheckpointError(
                    "state was saved with secant pairs of other parameters: freeze them likewise"
                )
            secants = SecantBank(self._optimizer, self._parameters, pairs)
            secants.load_state_dict(state["secants"])
        if state["average"] is not None:
            average = WeightAverage(self._parameters)
            torch._foreach_copy_(average.values, state["average"])
        if state["recovery"] is not None:
            recovery = RecoveryPoint.from_state_dict(state["recovery"])
        if state["start"] is not None:
            start = RecoveryPoint.from_state_dict(state["start"])
            if secants is None or not start.holds(self._parameters):
                raise CheckpointError(
                    "state is damaged: it holds where quasi-Newton steps began, but "
                    f"{'no pairs' if secants is None else 'not of these parameters'}: pass what "
                    "state_dict() gave"
                )
        return Copies(bank, secants, average, recovery, start)

    def take_over(self, copies: Copies, room: Room, moved: bool) -> None:
        """Put copies of the weights that :meth:`copies_from` built in the place of those here."""
        self.room, self.pairs = room, self.pairs_of(room.pairs)
        self.bank, self.secants, self.average, self.recovery, self.start = copies
        self._on_trial, self.moved = False, moved
        self._measure()
        self.stepper.refresh()
        self.watch()

    def new_average(self) -> WeightAverage:
        """Return an average that starts where the weights are."""
        self.average = WeightAverage(self._parameters)
        return self.average

    def new_secants(self) -> SecantBank:
        """Return an empty bank of secant pairs."""
        self.secants = SecantBank(self._optimizer, self._parameters, self.pairs)
        return self.secants

    def _pass(self, directive: Directive, closure: Closures) -> Observation:
        self._writes.forget()
        update = directive.action is Action.FULL
        if not update:
            # A trial point that is taken back must not stay in running statistics.
            self._kept = self.stepper.buffers.keep(self.stepper.modules)
        keep = (lambda: self._take_pair(directive.fresh_pairs)) if directive.pair else None
        start = perf_counter()
        try:
            observation = self.stepper.full(
                closure,
                directive.scale_at,
                keep=keep,
                update=update,
                forgetting=directive.forgetting,
            )
        except NUMERICAL as error:
            # An update that raises has changed what it could.
            if self.stepper.updating or not self._raises_only_there(
                error, lambda: self._prober.gradients(closure, self._parameters)
            ):
                raise
            rate = self.stepper.learning_rate
            self.stepper.advance_schedule()
            seconds = perf_counter() - start
            # How far it got is not known.
            return Observation(learning_rate=rate, seconds=seconds, applied=False, backward=False)
        self._taking = False
        if not observation.applied:
            return observation
        if not update:
            objective = observation.loss
            if self.secants is not None:
                objective = self.secants.objective(objective)
            return observation._replace(objective=objective)
        self._on_trial = self.moved = False
        try:
            self._add_to_average(directive.average)
            if directive.snapshot:
                self._taking, grows = True, self.snapshots.grows
                self.snapshots.take(fresh=directive.fresh_bank, exact=directive.exact)
                self._taking = False
                if grows:
                    self._measure()
                if directive.gram:
                    return observation._replace(gram=self.snapshots.gram())
        except (MemoryError, RuntimeError) as error:
            # The step has been taken, and must not be taken again.
            if not self.make_room(error):
                raise
        return observation

    def _base(self, directive: Directive) -> Observation:
        self._take_pair(fresh=False)
        self._on_trial = False
        start = perf_counter()
        self.stepper.follow()
        seconds = perf_counter() - start
        products = None
        if self.secants is not None:
            # Some optimizers move the weights at a rate of zero too.
            self.secants.back_to_base()
            self._add_to_average(directive.average)
            products = self.secants.products()
        self._taking = False
        return Observation(seconds=seconds, secants=products)

    def _take_pair(self, fresh: bool) -> None:
        self._taking = True
        is_new = self.secants is None
        if self.secants is None:
            if self.bank is not None:
                # The descent needs no snapshots, and takes new ones when it has ended.
                self.bank.clear()
            self.new_secants()
            self.start = self._recovery_point(self._parameters)
        elif fresh:
            self.secants.clear()
        assert self.secants is not None
        self.secants.take()
        if is_new:
            self._measure()

    def _add_to_average(self, weight: float) -> None:
        if not weight:
            return
        waits = self.room.plan.in_turn and self.recovery is not None
        if self.room.average and not waits:
            new = self.average is None
            (self.average or self.new_average()).add(weight)
            if new:
                self._measure()

    def _evaluate(self, directive: Directive, closure: Closures | None) -> Observation:
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
            elif at_start:
                assert self.start is not None
                self.start.load_weights(self._parameters)
            elif coefficients is not None:
                self.snapshots.move(coefficients)
            start = perf_counter()
            if self._probe is None or directive.own_batch:
                assert closure is not None
                loss = self._loss(closure, "closure", moved=moved)
            else:
                loss = self._loss(self._probe, "probe", moved=moved)
            loss, _ = self._ranks.agree(loss)
            seconds, objective = perf_counter() - start, NAN
            if directive.own_batch:
                objective = loss if self.secants is None else self.secants.objective(loss)
            return Observation(loss=loss, seconds=seconds, objective=objective)
        finally:
            if elsewhere:
                self.snapshots.put_back()

    def _loss(self, batch: Closures, name: str, *, moved: bool) -> float:
        """Loss of a probe; NaN where the point that was tried makes it raise, or it is the user's.

        The user's own has been evaluated before, and without it training can go on.
        """
        try:
            return self._prober.loss(batch, name)
        except NUMERICAL as error:
            if name == "probe" and self._raised.by_the_probe(error):
                return NAN
            if self._raises_only_there(error, lambda: self._prober.loss(batch, name), moved=moved):
                return NAN
            raise

    def _raises_only_there(
        self, error: Exception, evaluate: Callable[[], object], *, moved: bool = False
    ) -> bool:
        """Whether it has raised `error` because of where the weights were put to try."""
        bank = self.bank
        elsewhere = bank is not None and not bank.waits and (self.recovery or self.moved)
        if not (moved or self._on_trial or elsewhere):
            return False
        to_base = self.secants.back_to_base if self._on_trial and self.secants else None
        before = before_the_point(
            self.bank, to_base, moved=moved, recovers=self.recovery is not None
        )
        return self._raised.only_there(error, evaluate, before)
