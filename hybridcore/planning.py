"""How regular a trajectory is, what a jump is, and when to try the next one.

A bank of snapshots can be held against itself: forecast its newest snapshots from its older ones
and see how far off the forecast is. Where noise moves the weights, yesterday's displacement says
nothing about tomorrow's and the forecast is no better than standing still; where the trajectory is
smooth it is exact. The test costs no forward pass, since the Gram matrix holds all of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybridcore.bandit import NO_PREDICTION
from hybridcore.config import HybridTrainerConfig
from hybridcore.corrector import Corrector
from hybridcore.extrapolation import EXTRAPOLATORS, FORECASTERS
from hybridcore.meter import NOMINAL_PROBE_COST
from hybridcore.phases import Event
from hybridcore.residuals import group_scales

# An average leads back, not ahead: it serves to judge a jump, not to make one.
ARMS = (*FORECASTERS, "anderson")
BACKTEST_INTERVALS = (1, 2)
# Error of a forecast, relative to the distance moved, at which nothing can be trusted.
WORTHLESS_ERROR = 0.5
MOST_REACH = 8
# Steps to the next look at whether there is room for snapshots again.
LONG = 1000
MOST_PATIENCE = 16
# Looking at the path again costs no forward pass, so that a path which has become regular, as it
# does when a learning rate falls, is not overlooked for long.
MOST_PATIENCE_TO_LOOK = 4
# In `min_full_steps`: a rest while the loss is too noisy for a jump.
LONG_REST = 4


@dataclass(frozen=True, slots=True)
class Jump:
    """A way through parameter space: an extrapolator and how far it is taken.

    Attributes
    ----------
    extrapolator : str
        Name in :data:`hybridcore.extrapolation.EXTRAPOLATORS`.
    reach : float
        Distance in snapshot intervals, at least 0. Methods without a horizon ignore it.
    scales : tuple of float
        Factor on the displacement of each layer group; empty where all are taken as they are.
    """

    extrapolator: str
    reach: float
    scales: tuple[float, ...] = ()

    def coefficients(self, gram: NDArray[np.float64], share: float = 1.0) -> NDArray[np.float64]:
        """Affine coefficients (groups, m) of the point after a `share` in [0, 1] of the way.

        The trajectory of all groups together is followed. A forecast is followed along its own
        path, which may bend; a method that names one point along the straight line to it.

        Parameters
        ----------
        gram : (groups, m, m) ndarray of float64
            Gram matrices of the bank.
        share : float
            How much of the way, in [0, 1].
        """
        groups, m = gram.shape[:2]
        extrapolate, joint = EXTRAPOLATORS[self.extrapolator], gram.sum(axis=0)
        start = np.zeros(m)
        start[-1] = 1.0
        if self.extrapolator in FORECASTERS:
            way = extrapolate(joint, share * self.reach) - start
        else:
            way = share * (extrapolate(joint, self.reach) - start)
        scales = np.array(self.scales or (1.0,) * groups)
        return start + scales[:, None] * way


@dataclass(slots=True)
class Flight:
    """The jump under way: where it started, where it is meant to land, how it goes.

    Attributes
    ----------
    jump : Jump
        Way that is followed.
    horizon : int
        Predicted steps that the whole way stands for.
    last : int
        Predicted steps after which it ends: the horizon, or less if probes cut it short.
    log_start, log_target : float
        Log loss at the start, and at the end of the way when it was chosen.
    log_best, best_share : float
        Least log loss on the way so far, and the share of the way at which it was.
    slope : float
        Change of the log loss by one full step before the jump.
    promise : float
        Full steps that the jump seemed worth when it was chosen.
    arm : str
        Arm of the bandit that the jump is.
    context : tuple of float
        Features at the decision.
    """

    jump: Jump
    horizon: int
    last: int
    log_start: float
    log_target: float
    slope: float
    log_best: float
    best_share: float = 0.0
    promise: float = 0.0
    arm: str = NO_PREDICTION
    context: tuple[float, ...] = ()

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Flight:
        """Build from what ``dataclasses.asdict`` made of one, tuples as lists or not."""
        jump = Jump(**{**fields["jump"], "scales": tuple(fields["jump"]["scales"])})
        return cls(**{**fields, "jump": jump, "context": tuple(fields["context"])})

    def expected(self, share: float) -> float:
        """Log loss forecast for a `share` of the way."""
        return self.log_start + share * (self.log_target - self.log_start)

    def correct(self, taken: int, log_loss: float, margin: float) -> Event | None:
        """Take in the log loss after `taken` predicted steps; shorten the rest where it fell short.

        Parameters
        ----------
        taken : int
            Predicted steps so far, the present one among them.
        log_loss : float
            Log loss that a probe found there.
        margin : float
            Rise of the log loss that its own noise explains.

        Returns
        -------
        Event or None
            ``DIVERGED`` where the loss rose from the best point of the way, ``CONFIDENCE_LOST``
            where nothing of the rest is left, ``HORIZON_REACHED`` at its end, else None.
        """
        share, event = taken / self.horizon, None
        if log_loss > self.log_best + margin:
            event = Event.DIVERGED
        elif taken == self.last:
            event = Event.HORIZON_REACHED
        else:
            rest = Corrector.refine(share, self.expected(share), log_loss - margin)
            self.last = taken + round(rest * (self.last - taken))
            if self.last == taken:
                event = Event.CONFIDENCE_LOST
        if log_loss < self.log_best:
            self.log_best, self.best_share = log_loss, share
        return event


class Pace:
    """When to try again and how many steps to predict, learned from what jumps were worth.

    Attributes
    ----------
    snapshots : int
        Snapshots that there is room for; with 0 there are no jumps.
    wait : int
        Full steps in the present phase after which a jump may be chosen.
    patience : int
        Factor on the wait after a failure, doubled by each and halved by each success.
    worth : float
        Full steps that a jump has gained, net of its settling; NaN before the first.
    surprise : float
        By how much jumps turned out to be worth more than they promised, as a difference of
        ``log(1 + steps)``; NaN before the first.
    arm_values : dict of str to float
        Worth by extrapolator; it can be negative.
    """

    def __init__(self, config: HybridTrainerConfig) -> None:
        self._config = config
        self.snapshots = config.snapshots
        self.wait = config.min_full_steps
        self.patience = 1
        self.worth = math.nan
        self.surprise = math.nan
        self.arm_values: dict[str, float] = {}

    def until_snapshot(self, taken: int) -> int:
        """Full steps after number `taken` of the phase until the one that ends in a snapshot.

        Snapshots are spread over the last of the wait, and go on at the same distance after it.
        """
        if not self.snapshots:
            return LONG
        lead, interval = self.wait - taken - 1, self._config.snapshot_interval
        return max(lead % interval, lead - interval * (self.snapshots - 1))

    def look_later(self, taken: int) -> None:
        """Wait, after full step number `taken` of the phase, for the path to become regular."""
        least = self._config.min_full_steps
        self.wait = taken + min(self.back_off(least), MOST_PATIENCE_TO_LOOK * least)

    def rest(self, taken: int) -> None:
        """Wait, after full step number `taken` of the phase, for the loss to become calm."""
        self.wait = taken + LONG_REST * self._config.min_full_steps

    def put_off(self) -> None:
        """Put off a look at the path, which would end the outer steps that hold it in view."""
        self.wait += self._config.min_full_steps

    def back_off(self, least: int) -> int:
        """Full steps to wait before the next attempt: `least`, and twice as many each time."""
        steps = least * self.patience
        self.patience = min(2 * self.patience, MOST_PATIENCE)
        return steps

    def horizon(self, worth: float) -> int:
        """Return how many steps to predict: the real ones that the jump replaces, within settings.

        A jump stands for what it seems `worth`, in full steps, or for what jumps have been worth
        once they had settled. One that is worth less than its settling steps stands for none.
        """
        if math.isfinite(self.worth):
            worth = max(worth, self.worth)
        if worth < self._config.snapshot_interval:
            return 0
        return max(1, round(min(worth, self._config.horizon)))

    def reward(self, flight: Flight, progress: float, spent: int, probes: int) -> float:
        """Learn from a jump that has settled; return how much better it was than others.

        Parameters
        ----------
        flight : Flight
            The jump.
        progress : float
            Decrease of the log loss since before the jump; 0 if it was given up.
        spent, probes : int
            Full steps and probes that it took.

        Returns
        -------
        float
            Its surprise less that of the jumps before it.
        """
        steps = self.steps_for(progress, flight.slope)
        name = flight.jump.extrapolator
        self.worth = _blend(self.worth, max(0.0, steps - spent))
        self.credit(name, steps - spent)
        # Probes count at their nominal cost here: a decision must not depend on the clock.
        if progress > 0.0 and steps >= spent + NOMINAL_PROBE_COST * probes:
            self.patience = max(1, self.patience // 2)
            self.wait = self._config.min_full_steps
        else:
            self.wait = self.back_off(self._config.min_full_steps)
        surprise = math.log1p(steps) - math.log1p(flight.promise)
        # Against the others: that jumps settle to more than they promise says nothing of an arm.
        better = 0.0 if math.isnan(self.surprise) else surprise - self.surprise
        self.surprise = _blend(self.surprise, surprise)
        return better

    def credit(self, arm: str, steps: float) -> float:
        """Take note that `arm` gained so many full steps, net; return them."""
        most = float(MOST_REACH * self._config.horizon)
        gained = max(-most, min(steps, most))
        self.arm_values[arm] = _blend(self.arm_values.get(arm, math.nan), gained)
        return steps

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state as plain numbers."""
        names = ("snapshots", "wait", "patience", "worth", "surprise")
        return {name: getattr(self, name) for name in names} | {"arms": dict(self.arm_values)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        # Before there could be fewer than the settings ask for, there was no such entry.
        self.snapshots = int(state.get("snapshots", self._config.snapshots))
        self.wait, self.patience = int(state["wait"]), int(state["patience"])
        self.worth, self.surprise = float(state["worth"]), float(state["surprise"])
        # Some savers leave out what is empty.
        self.arm_values = dict(state.get("arms", {}))

    def steps_for(self, progress: float, slope: float) -> float:
        """Full steps that would have made `progress` in log loss at `slope` per step."""
        if progress <= 0.0:
            return 0.0
        if slope >= 0.0:
            # Full steps would have made none, but no jump is worth more for being the only way.
            return float(self._config.horizon)
        return min(progress / -slope, float(MOST_REACH * self._config.horizon))


def _blend(old: float, new: float) -> float:
    """Mean that forgets half of its past with each new value."""
    return new if math.isnan(old) else 0.5 * (old + new)


def path_confidence(gram: NDArray[np.float64]) -> dict[str, float]:
    """Confidence in [0, 1] in each extrapolator, from how well it forecast the bank's own end.

    ``1 - (error / WORTHLESS_ERROR)^2``, not below 0, with the error of the forecast relative to the
    distance really moved, the worst over ``BACKTEST_INTERVALS``. Methods that name a point instead
    of forecasting a time cannot be tested so: they get the best forecaster's figure, which says
    whether the trajectory is regular at all.

    Parameters
    ----------
    gram : (m, m) ndarray of float64
        Gram matrix of the bank's snapshots, oldest first, m at least 4.
    """
    forecasts = {
        name: min(_backtest(name, gram, ahead) for ahead in BACKTEST_INTERVALS)
        for name in FORECASTERS
    }
    best = max(forecasts.values())
    return {name: forecasts.get(name, best) for name in ARMS}


def _backtest(name: str, gram: NDArray[np.float64], ahead: int) -> float:
    known = len(gram) - ahead
    error = np.zeros(len(gram))
    error[:known] = EXTRAPOLATORS[name](gram[:known, :known], float(ahead))
    error[-1] -= 1.0
    moved = np.zeros(len(gram))
    moved[known - 1], moved[-1] = 1.0, -1.0
    distance = float(moved @ gram @ moved)
    if distance <= 0.0:
        return 0.0
    missed = max(0.0, float(error @ gram @ error)) / distance
    return max(0.0, 1.0 - missed / WORTHLESS_ERROR**2)


def missed_scales(gram: NDArray[np.float64], name: str) -> NDArray[np.float64]:
    """Factors and cosines by which a forecast of the bank's own end missed, shape (groups, 2).

    The forecast is that of the extrapolator `name` over the longest of ``BACKTEST_INTERVALS``; see
    :func:`hybridcore.residuals.group_scales`.
    """
    groups, m = gram.shape[:2]
    known = m - max(BACKTEST_INTERVALS)
    predicted, actual = np.zeros(m), np.zeros(m)
    predicted[:known] = EXTRAPOLATORS[name](gram.sum(axis=0)[:known, :known], float(m - known))
    predicted[known - 1] -= 1.0
    actual[known - 1], actual[-1] = -1.0, 1.0
    return group_scales(gram, np.tile(predicted, (groups, 1)), np.tile(actual, (groups, 1)))


def learning_rate_ahead(rates: Sequence[float], horizon: int) -> float:
    """Mean learning rate of the next `horizon` steps over that of the window `rates`.

    The distance that training covers goes with the sum of its learning rates, not with its steps.
    The schedule belongs to the user and is not known ahead: its present trend is continued, never
    below zero.
    """
    window = np.asarray(rates, dtype=np.float64)
    mean = float(window.mean()) if len(window) else 0.0
    if not mean > 0.0 or len(window) < 2:
        return 1.0
    trend = (window[-1] - window[0]) / (len(window) - 1)
    ahead = np.maximum(0.0, window[-1] + trend * np.arange(1, horizon + 1))
    return float(ahead.mean() / mean)
