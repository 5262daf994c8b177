"""How far each layer group should be taken along a predicted displacement, learned from misses.

For every jump :func:`hybridcore.residuals.group_scales` says by which factor each group's
displacement should have been multiplied. Two forecasts of that factor are made from the features at
the decision: a ridge regression that is updated recursively, and the mean of the most similar past
cases. Both are tried on every new case before they learn from it. Their errors there weigh the one
against the other, and what their blend explained there says how much of it is believed:

``scale = 1 + familiarity * confidence * blend``

- `confidence` in [0, 1], by group: the least-squares gain of the truth on the blend over the cases
  forecast so far, with a prior worth ``PRIOR_CASES`` cases that the gain is 0. Without evidence, or
  where residuals are noise, it is close to 0 and the displacement is left as it is.
- `familiarity` in [0, 1]: 1 as long as the nearest past context is within ``REACH`` times the
  distance at which new contexts have usually found theirs, then falling with the square of it.

- *Predicts* by which factor each group's displacement will have missed.
- *Pays* nowhere that was measured: 0.60 / 0.63 of plain's cost on SIREN and PINN, where the default
  came to 0.59 / 0.63 (``benchmarks/results/ablation.json``, older than outer momentum), so it is
  off by default. It explains 8 % of what the factors should have been
  (``benchmarks/results/corrections.json``).
- *Hurts* little: a forward pass decides whether the scaled jump is the better one.
- *Costs* that pass for each jump.
- *Source*: Haykin, Adaptive Filter Theory, for the recursive regression; the store of similar
  cases is the reference's.

:meth:`Corrector.refine` is the micro-correction inside a jump. It guards jumps that go too far, and
gains nothing for those that were chosen by a probe (the same file, and the table of it in
``benchmarks/README.md``).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hybridcore.residuals import LARGEST, ResidualStore

Array = NDArray[np.float64]

FORGETTING = 0.98
RIDGE = 4.0
NEIGHBOURS = 8
LEAST_CASES = 5
PRIOR_CASES = 4.0
REACH = 2.0
MOST_SCALE = 2.0
# Excess log loss over a forecast at which the forecast has failed: an error of 20 %.
MOST_EXCESS = math.log(1.2)
# A probe after less of the way than this says as little about the rest as one there.
LEAST_SHARE = 0.2
_CONSTANT = 1e-8


class RecursiveRidge:
    """Discounted ridge regression of several targets on one vector of features.

    Minimises ``sum_i forgetting^(n - i) |y_i - [1, z_i] B|^2 + RIDGE |B|^2``, where z are the
    features standardised by their own discounted mean and deviation. It is recursive least squares
    in its information form (Haykin, Adaptive Filter Theory): the weighted moments are carried on
    and solved when asked, which is exact, and other than the covariance form keeps the ridge at
    full strength while the past fades. One update costs O(d^2), one forecast O(d^3), once a jump.

    Attributes
    ----------
    weight : float
        Discounted number of cases.
    """

    def __init__(self, dimension: int, targets: int, forgetting: float) -> None:
        self._forgetting = forgetting
        self.weight = 0.0
        self._mean = np.zeros(dimension)
        self._target = np.zeros(targets)
        # Sums of products about the means: those of raw features would lose their digits.
        self._scatter = np.zeros((dimension, dimension))
        self._cross = np.zeros((dimension, targets))

    def update(self, features: Array, target: Array) -> None:
        """Take one case: finite features (d,), finite targets (t,)."""
        past = self._forgetting * self.weight
        self.weight = past + 1.0
        offset, surprise = features - self._mean, target - self._target
        self._mean = self._mean + offset / self.weight
        self._target = self._target + surprise / self.weight
        share = past / self.weight
        self._scatter = self._forgetting * self._scatter + share * np.outer(offset, offset)
        self._cross = self._forgetting * self._cross + share * np.outer(offset, surprise)

    def predict(self, features: Array) -> Array:
        """Forecast of the targets (t,), 0 while there is no case."""
        level = self._target * (self.weight / (self.weight + RIDGE))
        deviation = np.sqrt(np.diag(self._scatter) / max(self.weight, 1.0))
        varies = deviation > _CONSTANT * np.abs(self._mean)
        if not varies.any():
            return level
        deviation = deviation[varies]
        moments = self._scatter[np.ix_(varies, varies)] / deviation[:, None] / deviation
        moments[np.diag_indices_from(moments)] += RIDGE
        slopes = np.linalg.solve(moments, self._cross[varies] / deviation[:, None])
        return np.asarray(level + (features - self._mean)[varies] / deviation @ slopes)

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state as numbers and copies of the arrays."""
        return {
            "weight": self.weight,
            "mean": self._mean.copy(),
            "target": self._target.copy(),
            "scatter": self._scatter.copy(),
            "cross": self._cross.copy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        names = ("mean", "target", "scatter", "cross")
        arrays = [np.array(state[name], dtype=np.float64) for name in names]
        self.weight = float(state["weight"])
        self._mean, self._target, self._scatter, self._cross = arrays


class Corrector:
    """Learns a scale for each layer group's displacement; 1, no correction, until it knows better.

    Parameters
    ----------
    groups : int
        Layer groups, at least 1.
    dimension : int
        Features of a context, at least 1.
    forgetting : float
        Factor in (0, 1] on the weight of all cases with each new one.

    Raises
    ------
    ValueError
        If one of them is out of range.
    """

    def __init__(self, groups: int, dimension: int, forgetting: float = FORGETTING) -> None:
        for name, value in (("groups", groups), ("dimension", dimension)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if not 0.0 < forgetting <= 1.0:
            raise ValueError(f"forgetting must lie in (0, 1], got {forgetting!r}")
        self._shape = (groups, dimension)
        self._forgetting = float(forgetting)
        self._store = ResidualStore()
        self._ridge = RecursiveRidge(dimension, groups, self._forgetting)
        # Discounted sums over forecast cases: squared errors of ridge and neighbours, products of
        # blend and truth, squares of the blend, squares of the truth.
        self._scores = np.zeros((5, groups))
        # Discounted number of forecast cases, and sum of their distances to the nearest before.
        self._cases = 0.0
        self._distances = 0.0

    @property
    def confidence(self) -> Array:
        """Share in [0, 1] of the learned correction that is applied, by group, shape (groups,)."""
        _, _, products, power, truth = self._scores
        prior = PRIOR_CASES * truth / max(self._cases, 1.0)
        return np.clip(products / np.maximum(power + prior, 1.0 / LARGEST), 0.0, 1.0)

    def predict(self, context: ArrayLike) -> Array:
        """Scale of each group's next displacement.

        Parameters
        ----------
        context : (dimension,) array_like of float
            Features at the decision. Where one is not finite, nothing is corrected.

        Returns
        -------
        (groups,) ndarray of float64
            Factors in [0, 2].

        Raises
        ------
        ValueError
            If `context` has another shape.
        """
        x = self._checked(context)
        forecast = self._forecast(x)
        if forecast is None:
            return np.ones(self._shape[0])
        ridge, near, distance = forecast
        usual = REACH * self._distances / max(self._cases, 1e-12)
        familiarity = 1.0 if distance <= usual else (usual / distance) ** 2
        correction = familiarity * self.confidence * self._blend(ridge, near)
        return np.clip(1.0 + correction, 0.0, MOST_SCALE)

    def update(self, context: ArrayLike, residual: ArrayLike) -> bool:
        """Learn from one jump.

        Parameters
        ----------
        context : (dimension,) array_like of float
            Features at its decision.
        residual : (groups, 2) array_like of float
            What :func:`hybridcore.residuals.group_scales` made of it. Factors are cut to [0, 2].

        Returns
        -------
        bool
            False if a number was not finite; then nothing is learned.

        Raises
        ------
        ValueError
            If a shape does not fit.
        """
        x, missed = self._checked(context), np.asarray(residual, dtype=np.float64)
        if missed.shape != (self._shape[0], 2):
            raise ValueError(f"residual must have shape ({self._shape[0]}, 2), got {missed.shape}")
        if not (np.isfinite(x).all() and np.isfinite(missed).all()):
            return False
        truth = np.clip(missed[:, 0], 0.0, MOST_SCALE) - 1.0
        forecast = self._forecast(x)
        if forecast is not None:
            ridge, near, distance = forecast
            blend = self._blend(ridge, near)
            errors = (ridge - truth) ** 2, (near - truth) ** 2
            scores = np.stack([*errors, blend * truth, blend**2, truth**2])
            self._scores = self._forgetting * self._scores + scores
            self._cases = self._forgetting * self._cases + 1.0
            self._distances = self._forgetting * self._distances + distance
        self._ridge.update(x, truth)
        self._store.add(x, np.stack([truth + 1.0, missed[:, 1]], axis=1))
        return True

    @staticmethod
    def refine(share_done: float, expected_log_loss: float, seen_log_loss: float) -> float:
        """Factor in [0, 1] on the rest of the way, from one probe inside the horizon.

        The excess of the probe over its forecast is taken to grow in proportion to the way. The
        rest is cut so that the excess at its end is no more than ``MOST_EXCESS``: with share s done
        and excess e, the way may go on to the share s MOST_EXCESS / e. The factor is 1 for a probe
        on or below its forecast, never rises with the excess, and is 0 from ``MOST_EXCESS`` on, and
        where a number is not finite.
        """
        numbers = (share_done, expected_log_loss, seen_log_loss)
        if not all(math.isfinite(number) for number in numbers):
            return 0.0
        excess = seen_log_loss - expected_log_loss
        if excess <= 0.0:
            return 1.0
        if excess >= MOST_EXCESS:
            return 0.0
        rest = 1.0 - min(max(share_done, 0.0), 1.0)
        way = max(share_done, LEAST_SHARE) * (MOST_EXCESS - excess)
        # Multiplied out: neither the excess nor the rest may be divided by.
        return 1.0 if way >= excess * rest else way / (excess * rest)

    def _checked(self, context: ArrayLike) -> Array:
        x = np.asarray(context, dtype=np.float64)
        if x.shape != self._shape[1:]:
            raise ValueError(f"context must have shape {self._shape[1:]}, got {x.shape}")
        return np.where(np.isfinite(x), np.clip(x, -LARGEST, LARGEST), np.nan)

    def _forecast(self, x: Array) -> tuple[Array, Array, float] | None:
        """Corrections by ridge and by neighbours (groups,), and the distance to the nearest."""
        if len(self._store) < LEAST_CASES or not np.isfinite(x).all():
            return None
        _, distances, residuals = self._store.nearest(x, NEIGHBOURS)
        ridge = np.clip(self._ridge.predict(x), -1.0, MOST_SCALE - 1.0)
        return ridge, residuals[:, :, 0].mean(axis=0) - 1.0, float(distances[0])

    def _blend(self, ridge: Array, near: Array) -> Array:
        """Mean of both, weighted by the inverse of their mean squared errors so far."""
        errors, total = self._scores[:2], self._scores[0] + self._scores[1]
        share = np.where(total > 0.0, errors[1] / np.where(total > 0.0, total, 1.0), 0.5)
        return share * ridge + (1.0 - share) * near

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state, without the settings, as numbers, dicts and copies of arrays."""
        return {
            "store": self._store.state_dict(),
            "ridge": self._ridge.state_dict(),
            "scores": self._scores.copy(),
            "cases": self._cases,
            "distances": self._distances,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` of a corrector of the same shape returned."""
        scores = np.array(state["scores"], dtype=np.float64)
        if (scores.shape[1], len(state["ridge"]["mean"])) != self._shape:
            raise ValueError(
                f"scores and ridge must be those of {self._shape[0]} groups and {self._shape[1]} "
                "features: load the state into a corrector like the one that it came from"
            )
        store = ResidualStore()
        store.load_state_dict(state["store"])
        cases, distances = float(state["cases"]), float(state["distances"])
        self._ridge.load_state_dict(state["ridge"])
        self._store, self._scores, self._cases, self._distances = store, scores, cases, distances
