"""Which jump to take: what the arms promise, and what their promises have been worth."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybridcore.bandit import LinUCB
from hybridcore.config import HybridTrainerConfig
from hybridcore.corrector import Corrector
from hybridcore.dynamics import DeltaHead, DynamicsModel
from hybridcore.extrapolation import FORECASTERS
from hybridcore.planning import ARMS, Flight, Pace, missed_scales
from hybridcore.search import Trial, arm_names, probe_jump, scaled, search
from hybridcore.types import Directive, Observation

CONTEXT = 6
# In the units of the reward, a difference of log(1 + steps).
EXPLORATION = 0.1
# A correction smaller than this is not worth a probe.
LEAST_CORRECTION = 0.02


class DecisionRule:
    """Takes the arm whose probe, corrected by experience, promises the most full steps.

    A probe sees the loss right after a jump, with its fast directions excited; what the jump was
    worth shows only once it has settled. The bandit learns for each arm by how much the two differ,
    more or less than for the other arms. Not to predict is worth the settling steps that it saves.

    Parameters
    ----------
    config : HybridTrainerConfig
        Settings.
    dynamics : DynamicsModel
        Model of the loss. If it is a :class:`DeltaHead` too, and settings ask for corrections of
        the layer groups, its factors are tried beside the corrector's.
    """

    def __init__(self, config: HybridTrainerConfig, dynamics: DynamicsModel) -> None:
        self._config = config
        self._head = dynamics if isinstance(dynamics, DeltaHead) else None
        self.pace = Pace(config)
        self.bandit = LinUCB(arm_names(), CONTEXT, exploration=EXPLORATION)
        self.corrector: Corrector | None = None

    def context(self, path: float, loss: float, slope: float, ahead: float) -> tuple[float, ...]:
        """Features of a decision, of order 1: a constant, and what it is based on.

        Parameters
        ----------
        path, loss : float
            Confidence in [0, 1] in the trajectory, and in the trend of the loss.
        slope : float
            Change of the log loss by one full step.
        ahead : float
            Mean learning rate of the horizon over that of the bank's window.
        """
        worth = self.pace.worth if math.isfinite(self.pace.worth) else 0.0
        decline = math.tanh(slope * self._config.horizon)
        numbers = (path, loss, decline, ahead - 1.0, math.log1p(worth) / 5.0)
        return (1.0, *(number if math.isfinite(number) else 0.0 for number in numbers))

    def learn(
        self, gram: NDArray[np.float64], path: Mapping[str, float], context: tuple[float, ...]
    ) -> None:
        """Learn the groups' scales from how the bank's own end was missed, if settings say so."""
        if not self._config.group_correction:
            return
        if self.corrector is None:
            self.corrector = Corrector(len(gram), CONTEXT)
        missed = missed_scales(gram, max(FORECASTERS, key=path.__getitem__))
        self.corrector.update(context, missed)
        if self._head is not None:
            self._head.teach_delta(missed)

    def choose(
        self,
        gram: NDArray[np.float64],
        path: Mapping[str, float],
        context: tuple[float, ...],
        here: float,
        slope: float,
        reach: float,
    ) -> Generator[Directive, Observation, Flight | None]:
        """Probe the arms and return the jump to take, None for "do not predict".

        Parameters
        ----------
        gram : (groups, m, m) ndarray of float64
            Gram matrices of the bank.
        path : mapping of str to float
            Confidence in [0, 1] in each extrapolator; those below the threshold are not probed.
        context : tuple of float
            From :meth:`context`.
        here : float
            Loss without a jump, positive.
        slope : float
            Change of the log loss by one full step.
        reach : float
            Distance in snapshot intervals at which the arms are probed first.
        """
        arms = [name for name in ARMS if path[name] >= self._config.confidence_threshold]
        trials = yield from search(gram, arms, reach, here)
        values = self.bandit.values(context)
        best: Trial | None = None
        worth = promise = 0.0
        for trial in trials:
            if trial.loss < here:
                promised = self.pace.steps_for(math.log(here) - math.log(trial.loss), slope)
                corrected = math.expm1(math.log1p(promised) + sum(values[trial.arm]))
                # Worths have a ceiling: among those that reach it the lowest loss decides.
                if best is None or (corrected, -trial.loss) > (worth, -best.loss):
                    best, worth, promise = trial, corrected, promised
        horizon = self.pace.horizon(worth)
        if best is None or horizon == 0:
            return None
        best = yield from self._corrected(gram, best, context)
        return Flight(
            best.jump,
            horizon=horizon,
            last=horizon,
            log_start=math.log(here),
            log_target=math.log(best.loss),
            slope=slope,
            log_best=math.log(here),
            promise=promise,
            arm=best.arm,
            context=context,
        )

    def reward(self, flight: Flight, progress: float, spent: int, probes: int) -> None:
        """Learn from a jump that has settled; see :meth:`hybridcore.planning.Pace.reward`."""
        better = self.pace.reward(flight, progress, spent, probes)
        self.bandit.update(flight.arm, flight.context, better)

    def restart(self) -> None:
        """Forget what was learned about layer groups: they are others now."""
        self.corrector = None

    def state_dict(self) -> dict[str, Any]:
        """Return everything learned, as numbers, lists and arrays."""
        corrector = self.corrector
        return {
            "pace": self.pace.state_dict(),
            "bandit": self.bandit.state_dict(),
            "corrector": None if corrector is None else corrector.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned under the same settings."""
        self.pace.load_state_dict(state["pace"])
        self.bandit.load_state_dict(state["bandit"])
        self.corrector = None
        if state["corrector"] is not None:
            self.corrector = Corrector(len(state["corrector"]["scores"][0]), CONTEXT)
            self.corrector.load_state_dict(state["corrector"])

    def _corrected(
        self, gram: NDArray[np.float64], trial: Trial, context: tuple[float, ...]
    ) -> Generator[Directive, Observation, Trial]:
        """Return `trial` with its groups' scales corrected where that lowers the loss."""
        if self.corrector is None:
            return trial
        corrections = [self.corrector.predict(context)]
        if self._head is not None:
            corrections.append(self._head.delta())
        best = trial
        for scales in corrections:
            if np.abs(scales - 1.0).max() > LEAST_CORRECTION:
                corrected = yield from probe_jump(gram, scaled(trial, scales), trial.arm)
                best = min(best, corrected, key=lambda tried: tried.loss)
        return best
