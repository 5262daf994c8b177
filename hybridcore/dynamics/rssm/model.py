"""The RSSM ensemble as a model of the loss."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hybridcore.dynamics.conformal import ConformalScale
from hybridcore.dynamics.linear import LinearDynamics
from hybridcore.dynamics.mixture import ExpertMixture
from hybridcore.dynamics.protocol import Forecast
from hybridcore.dynamics.rssm.ensemble import RSSMEnsemble
from hybridcore.dynamics.stacking import Stacking
from hybridcore.state import TrainingState
from hybridcore.types import Observation

KNOTS = (15, 75)
# Forecasts are followed at every so many steps: a rollout costs more than all else.
FOLLOW_INTERVAL = 15
LEAST_UPDATES = 25
HEADS = 8
MOST_FACTOR = 2.0
LEAST_MAGNITUDE = 0.1


class RSSMDynamics:
    """An :class:`RSSMEnsemble` on the 64 features of :class:`hybridcore.state.TrainingState`.

    The ensemble forecasts how the level of an :class:`hybridcore.dynamics.mixture.ExpertMixture`
    moves away from the mixture's path, and is believed as far as that was right
    (:class:`hybridcore.dynamics.stacking.Stacking`): it begins as the mixture. Its intervals are
    widened or narrowed until nine in ten of its recent forecasts were covered.

    - *Predicts* the log loss, and with its head by how much jumps will miss.
    - *Pays* nowhere that was measured: below a line on 75 % of the windows 15 steps ahead, as the
      mixture is without it (``benchmarks/results/forecast_skill-fresh.json``).
    - *Hurts* where it jumps later: 0.60 / 0.74 of plain's cost on SIREN and PINN where the default
      came to 0.59 / 0.63 (``benchmarks/results/ablation.json``, from before it had the mixture).
    - *Costs* a forward pass of five members a step, a truncated backward pass every few, and
      compiling when first used; ``benchmarks/bench_rssm.py`` measures them.
    - *Source*: Hafner et al. 2019 (PlaNet), section 3; 2021 (DreamerV2), section 2.1; 2023
      (DreamerV3).

    Parameters
    ----------
    seed : int
        Of the ensemble.
    members : int
        Models in the ensemble.
    device : {"auto", "cpu", "cuda"}
        Where the ensemble's kernels run.
    """

    def __init__(
        self, seed: int = 0, members: int = 5, device: Literal["auto", "cpu", "cuda"] = "auto"
    ) -> None:
        self._trend = LinearDynamics()
        self._mixture = ExpertMixture()
        self._state = TrainingState()
        self._ensemble = RSSMEnsemble(seed, members, device=device)
        # In follow intervals, which are the calibration's steps.
        follows = tuple(h // FOLLOW_INTERVAL for h in KNOTS)
        self._calibration, self._stacking = ConformalScale(follows), Stacking(follows)
        self._count = 0
        self._line = math.nan
        self._groups = HEADS

    @property
    def slope(self) -> float:
        """Change of the log loss that one more full step is expected to make."""
        return self._trend.slope

    @property
    def noise(self) -> float:
        """Standard deviation of one log loss about its trend; infinite while nothing is known."""
        return self._trend.noise

    @property
    def is_stable(self) -> bool:
        """True once the trend is known and does not rise beyond its own uncertainty."""
        return self._trend.is_stable

    def observe(self, observation: Observation) -> None:
        """Take what one full step showed; ignored where the loss is not finite and positive."""
        if not 0.0 < observation.loss < math.inf:
            return
        self._trend.observe(observation)
        self._state.update(observation)
        log_loss = math.log(observation.loss)
        self._mixture.observe(log_loss)
        level = self._mixture.mean(0.0)
        # NaN after a restart: then no full step led here.
        self._ensemble.observe(self._state.features(), level - self._line)
        self._line = self._mixture.mean(1.0)
        self._count += 1
        if self._count % FOLLOW_INTERVAL == 0:
            self._calibration.settle(log_loss)
            self._stacking.settle(log_loss)
            # The longest first: it holds the others.
            moved = [self._moved(h) for h in reversed(KNOTS)][::-1]
            plain = [self._mixture.mean(h) for h in KNOTS]
            self._stacking.follow(plain, moved)
            self._calibration.follow([self._forecast(h) for h in KNOTS])

    def forecast(self, horizon: float) -> Forecast:
        """Forecast of the log loss `horizon` full steps after the last one observed."""
        raw = self._forecast(horizon)
        return Forecast(raw.mean, raw.std * self._calibration.factor(horizon / FOLLOW_INTERVAL))

    def teach_delta(self, missed: NDArray[np.float64]) -> None:
        """Take the factor and the cosine (groups, 2) by which one extrapolation missed.

        The head's ten targets are the mean factor, the mean cosine as far as it is positive, and
        for each of 8 groups its factor over the mean one. Fewer groups than 8 are repeated, of
        more neighbours share a target.
        """
        self._groups = len(missed)
        factors, cosines = np.clip(missed, 0.0, MOST_FACTOR).T
        magnitude = max(float(factors.mean()), LEAST_MAGNITUDE)
        heads = np.zeros(HEADS)
        for head in range(HEADS):
            heads[head] = factors[self._groups_of(head)].mean() / magnitude
        direction = min(float(cosines.mean()), 1.0)
        self._ensemble.teach_delta(np.concatenate(([magnitude, direction], heads)))

    def delta(self) -> NDArray[np.float64]:
        """Factors (groups,) on the displacements of the next one, 1 where it is right as it is.

        Magnitude times the group's scale, drawn towards 1 as far as the direction is doubtful.
        """
        magnitude, direction, *heads = self._ensemble.delta()
        factors = np.ones(self._groups)
        for head, scale in enumerate(heads):
            factors[self._groups_of(head)] = 1.0 + direction * (magnitude * scale - 1.0)
        return factors

    def restart(self) -> None:
        """Forget the trend: the weights have moved by other means than full steps."""
        self._trend.restart()
        self._mixture.restart()
        self._state.restart()
        self._ensemble.restart()
        self._calibration.restart()
        self._stacking.restart()
        self._line = math.nan

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state as numbers, lists and arrays."""
        return {
            "trend": self._trend.state_dict(),
            "mixture": self._mixture.state_dict(),
            "state": self._state.state_dict(),
            "ensemble": self._ensemble.state_dict(),
            "calibration": self._calibration.state_dict(),
            "stacking": self._stacking.state_dict(),
            "count": self._count,
            "line": self._line,
            "groups": self._groups,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        self._ensemble.load_state_dict(state["ensemble"])
        self._trend.load_state_dict(state["trend"])
        self._mixture.load_state_dict(state["mixture"])
        self._state.load_state_dict(state["state"])
        self._calibration.load_state_dict(state["calibration"])
        self._stacking.load_state_dict(state["stacking"])
        self._count, self._line = int(state["count"]), float(state["line"])
        self._groups = int(state["groups"])

    def _groups_of(self, head: int) -> slice:
        """Layer groups that one of the 8 scales speaks of."""
        first = head * self._groups // HEADS
        return slice(first, max(first + 1, (head + 1) * self._groups // HEADS))

    def _forecast(self, horizon: float) -> Forecast:
        """Before calibration: the mixture, moved as far as the ensemble is believed.

        The spread is the mixture's, and what the ensemble doubts of its move.
        """
        base = self._mixture.forecast(horizon)
        share = self._stacking.share(horizon / FOLLOW_INTERVAL)
        if share == 0.0 or not math.isfinite(base.std) or self._ensemble.updates < LEAST_UPDATES:
            return base
        rollout = self._ensemble.forecast(max(1, round(horizon)))
        doubt = share * share * float(rollout.epistemic[-1])
        return Forecast(
            base.mean + share * self._moved(horizon), math.sqrt(base.std * base.std + doubt)
        )

    def _moved(self, horizon: float) -> float:
        """How far the ensemble says that the level will have left the mixture's path."""
        if horizon == 0.0 or self._ensemble.updates < LEAST_UPDATES:
            return 0.0
        return float(self._ensemble.forecast(max(1, round(horizon))).mean[-1])
