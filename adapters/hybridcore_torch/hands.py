"""What carries out the engine's directives on a model and its optimizer."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from time import perf_counter
from typing import Any

import torch
from torch import nn

from hybridcore import Action, Directive, HybridTrainerConfig, Observation
from hybridcore_torch import buffers
from hybridcore_torch.averages import WeightAverage
from hybridcore_torch.closures import Closure, Closures, Prober
from hybridcore_torch.groups import Group, by_depth, by_user
from hybridcore_torch.ranks import Ranks
from hybridcore_torch.recovery import RecoveryPoint
from hybridcore_torch.secants import SecantBank, affordable
from hybridcore_torch.snapshots import SnapshotBank
from hybridcore_torch.steps import NAN, Stepper

logger = logging.getLogger("hybridcore")


class Hands:
    """Does what a directive says and reports what was seen; decides nothing.

    Snapshots, secant pairs and the average are made when first asked for.

    Parameters
    ----------
    model, optimizer, scheduler, scaler, max_grad_norm, probe
        As for :class:`~hybridcore_torch.HybridTrainer`.
    config : HybridTrainerConfig
        Settings.
    parameters : list of Parameter
        What is trained.
    groups : list of lists of Parameter or None
        The user's layer groups; None where they go by depth.

    Attributes
    ----------
    stepper : Stepper
        Takes the real steps.
    average : WeightAverage or None
        Running average of the weights.
    recovery : RecoveryPoint or None
        What the last ``SAVE`` kept, for as long as it may be asked for.
    pairs : int
        Secant pairs that there is room for.
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
        parameters: Group,
        groups: list[Group] | None,
    ) -> None:
        self._model, self._optimizer = model, optimizer
        self._scheduler, self._scaler, self._probe = scheduler, scaler, probe
        self._config = config
        self._prober = Prober(model)
        self._ranks = Ranks()
        self.stepper = Stepper(model, optimizer, scheduler, scaler, max_grad_norm, self._ranks)
        # A scaled loss overflows now and then, which a line search would take for its own fault.
        self._wanted = config.secant_pairs if scaler is None else 0
        self.restart(parameters, groups)

    def restart(self, parameters: Group, groups: list[Group] | None) -> None:
        """Drop all copies of the weights: the parameters are others now."""
        self._parameters, self._groups = parameters, groups
        self.bank: SnapshotBank | None = None
        self.secants: SecantBank | None = None
        self.average: WeightAverage | None = None
        self.recovery: RecoveryPoint | None = None
        self.steps_since_recovery = 0
        self._on_trial = False
        self._kept: buffers.Kept = []
        self.pairs = affordable(self._optimizer, parameters, self._wanted)
        self.stepper.refresh()

    def carry_out(self, directive: Directive, closure: Closures | None) -> Observation:
        """Do what `directive` says; `closure` may be None where it needs no batch."""
        action = directive.action
        self._ranks.turn += 1
        if action is Action.FULL or action is Action.GRADIENT:
            assert closure is not None
            return self._pass(directive, closure)
        if action is Action.PROBE:
            assert closure is not None
            return self._evaluate(directive, closure)
        if action is Action.BASE:
            return self._base(directive)
        if action is Action.SKIP:
            self.stepper.advance_schedule()
            self.steps_since_recovery += 1
            self._on_trial = False
        elif action is Action.MOVE:
            assert directive.coefficients is not None
            self.snapshots.move(directive.coefficients, take=directive.snapshot)
        elif action is Action.REACH:
            assert self.secants is not None
            assert directive.coefficients is not None
            self.secants.reach(directive.coefficients)
            self._on_trial = bool(directive.coefficients.any())
            if not self._on_trial:
                buffers.put_back(self._kept)
        elif action is Action.MARK:
            self.snapshots.save()
        elif action is Action.SAVE:
            self.snapshots.save()
            self.recovery = RecoveryPoint(
                self._model, self._optimizer, self._scheduler, self._scaler
            )
            self.steps_since_recovery = 0
        elif action is Action.ROLLBACK:
            assert self.recovery is not None
            self.snapshots.restore()
            self.recovery.restore(
                self._model,
                self._optimizer,
                self._scheduler,
                self._scaler,
                self.steps_since_recovery,
            )
            self.recovery = None
        return Observation()

    def abandon(self) -> None:
        """Undo what the present step did to the weights, because the user's code raised in it."""
        if self._on_trial:
            assert self.secants is not None
            self.secants.back_to_base()
            self._on_trial = False

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the average into the weights for the block, if there is one."""
        if self.average is None:
            yield
            return
        with self.average.in_place():
            yield
        if self.secants is not None:
            self.secants.put_back()

    def disturbed(self) -> bool:
        """Whether somebody has written into the weights since a quasi-Newton step left them."""
        return self.secants is not None and self.secants.disturbed()

    def let_go(self, recovery: bool, pairs: bool) -> None:
        """Drop copies of the weights that will not be asked for any more."""
        if not recovery:
            self.recovery = None
        if not pairs:
            self.secants = None

    @property
    def snapshots(self) -> SnapshotBank:
        """The bank of snapshots."""
        if self.bank is None:
            groups = (
                by_depth(self._parameters)
                if self._groups is None
                else by_user(self._groups, self._parameters)
            )
            self.bank = SnapshotBank(groups, self._config.snapshots, self._ranks)
        return self.bank

    def new_average(self) -> WeightAverage:
        """Return an average that starts where the weights are."""
        self.average = WeightAverage(self._parameters)
        return self.average

    def new_secants(self) -> SecantBank:
        """Return an empty bank of secant pairs."""
        self.secants = SecantBank(self._optimizer, self._parameters, self.pairs)
        return self.secants

    def _pass(self, directive: Directive, closure: Closures) -> Observation:
        update = directive.action is Action.FULL
        if not update:
            # A trial point that is taken back must not stay in running statistics.
            self._kept = buffers.keep(self.stepper.modules)
        elif self.secants is not None:
            self.secants.expect_writes()
        keep = (lambda: self._take_pair(directive.fresh_pairs)) if directive.pair else None
        observation = self.stepper.full(
            closure, directive.learning_rate_scale, keep=keep, update=update
        )
        self.steps_since_recovery += 1
        if not observation.applied:
            return observation
        if not update:
            objective = observation.loss
            if self.secants is not None:
                objective = self.secants.objective(objective)
            return observation._replace(objective=objective)
        self._add_to_average(directive.average)
        if directive.snapshot:
            self.snapshots.take(fresh=directive.fresh_bank)
            if directive.gram:
                return observation._replace(gram=self.snapshots.gram())
        return observation

    def _base(self, directive: Directive) -> Observation:
        self._take_pair(fresh=False)
        self._on_trial = False
        start = perf_counter()
        self.stepper.follow()
        seconds = perf_counter() - start
        if self.secants is None:
            return Observation(seconds=seconds)
        # Some optimizers move the weights at a rate of zero too.
        self.secants.back_to_base()
        self._add_to_average(directive.average)
        return Observation(seconds=seconds, secants=self.secants.products())

    def _take_pair(self, fresh: bool) -> None:
        if self.secants is None:
            try:
                self.new_secants()
            except (MemoryError, RuntimeError) as error:
                logger.warning("no room for secant pairs, so none are kept: %s", error)
                return
        elif fresh:
            self.secants.clear()
        assert self.secants is not None
        self.secants.take()

    def _add_to_average(self, weight: float) -> None:
        if weight:
            (self.average or self.new_average()).add(weight)

    def _evaluate(self, directive: Directive, closure: Closures) -> Observation:
        coefficients = directive.coefficients
        elsewhere = directive.at_mark or coefficients is not None
        if elsewhere:
            self.snapshots.set_aside()
        try:
            if directive.at_mark:
                self.snapshots.restore()
            elif coefficients is not None:
                self.snapshots.move(coefficients)
            start = perf_counter()
            if self._probe is None or directive.own_batch:
                loss = self._prober.loss(closure, "closure")
            else:
                loss = self._prober.loss(self._probe, "probe")
            loss, _ = self._ranks.agree(loss)
            seconds, objective = perf_counter() - start, NAN
            if directive.own_batch:
                objective = loss if self.secants is None else self.secants.objective(loss)
            return Observation(loss=loss, seconds=seconds, objective=objective)
        finally:
            if elsewhere:
                self.snapshots.put_back()
