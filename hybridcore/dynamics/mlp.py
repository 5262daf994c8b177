"""A small network that learns online by how much a mixture of simple forecasts misses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybridcore.dynamics.conformal import ConformalScale
from hybridcore.dynamics.linear import LinearDynamics
from hybridcore.dynamics.mixture import KNOTS, ExpertMixture
from hybridcore.dynamics.protocol import Forecast
from hybridcore.dynamics.stacking import Stacking
from hybridcore.state import FEATURES, TrainingState
from hybridcore.types import Observation

Array = NDArray[np.float64]

HIDDEN = 32
# The network speaks at the knots of the mixture; in between it is interpolated over the log of the
# horizon.
PLACES = np.log(KNOTS)
CAPACITY = 512
UPDATE_INTERVAL = 4
BATCH = 16
LEARNING_RATE = 1e-3
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
MOST_MISS = 10.0
LOG_SCALE_LIMIT = 4.0


class MLPDynamics:
    """Corrects an :class:`ExpertMixture`: ``mean += share * std * miss(x)``, ``std *= exp(s(x))``.

    A network of one hidden layer maps the 64 features of :mod:`hybridcore.state` to the miss and
    the log-scale s at each of ``KNOTS``; the share is that of :class:`Stacking`. It learns from
    forecasts that have come due, by the negative log likelihood of a Laplace distribution, in
    mini-batches drawn from a ring of recent steps every ``UPDATE_INTERVAL`` steps with Adam (Kingma
    & Ba 2015). It starts as the mixture itself: its last layer is zero.

    Parameters
    ----------
    seed : int
        Of the first layer and of the batches.
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._trend = LinearDynamics()
        self._mixture = ExpertMixture()
        self._state = TrainingState()
        inputs, outputs = len(FEATURES), 2 * len(KNOTS)
        first = np.random.default_rng(seed).normal(size=(inputs, HIDDEN)) / math.sqrt(inputs)
        self._weights = [first, np.zeros(HIDDEN), np.zeros((HIDDEN, outputs)), np.zeros(outputs)]
        self._moments = [[np.zeros_like(w) for w in self._weights] for _ in range(2)]
        self._count = self._updates = self._segment = 0
        self._features = np.zeros((CAPACITY, inputs))
        self._logs = np.zeros(CAPACITY)
        # What the mixture said at each knot, and the stretch of full steps that a step belongs to.
        self._means = np.zeros((CAPACITY, len(KNOTS)))
        self._stds = np.full((CAPACITY, len(KNOTS)), math.inf)
        self._segments = np.full(CAPACITY, -1)
        knots = tuple(int(horizon) for horizon in KNOTS)
        self._calibration, self._stacking = ConformalScale(knots), Stacking(knots)
        self._answers: tuple[Array, Array] | None = None

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
        slot = self._count % CAPACITY
        self._features[slot] = self._state.features()
        self._logs[slot] = math.log(observation.loss)
        self._segments[slot] = self._segment
        self._mixture.observe(float(self._logs[slot]))
        self._means[slot], self._stds[slot] = means, stds = self._mixture.at_knots()
        self._calibration.settle(float(self._logs[slot]))
        self._stacking.settle(float(self._logs[slot]))
        self._answers = None
        miss, width = self._answer()
        moved = miss * np.where(np.isfinite(stds), stds, 0.0)
        self._stacking.follow(means, moved)
        means = means + self._stacking.shares * moved
        stds = stds * np.exp(width)
        self._calibration.follow(list(map(Forecast, means.tolist(), stds.tolist())))
        self._count += 1
        if self._count % UPDATE_INTERVAL == 0:
            self._learn()
            self._answers = None

    def forecast(self, horizon: float) -> Forecast:
        """Forecast of the log loss `horizon` full steps after the last one observed."""
        raw = self._corrected(self._mixture.forecast(horizon), horizon)
        return Forecast(raw.mean, raw.std * self._calibration.factor(horizon))

    def restart(self) -> None:
        """Forget the trend: the weights have moved by other means than full steps."""
        self._trend.restart()
        self._mixture.restart()
        self._state.restart()
        self._calibration.restart()
        self._stacking.restart()
        self._segment += 1
        self._answers = None

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state as numbers, lists and arrays."""
        return {
            "trend": self._trend.state_dict(),
            "mixture": self._mixture.state_dict(),
            "state": self._state.state_dict(),
            "weights": [w.copy() for w in self._weights],
            "moments": [[m.copy() for m in row] for row in self._moments],
            "counts": [self._count, self._updates, self._segment],
            "features": self._features.copy(),
            "logs": self._logs.copy(),
            "means": self._means.copy(),
            "stds": self._stds.copy(),
            "segments": self._segments.copy(),
            "calibration": self._calibration.state_dict(),
            "stacking": self._stacking.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        self._trend.load_state_dict(state["trend"])
        self._mixture.load_state_dict(state["mixture"])
        self._state.load_state_dict(state["state"])
        self._weights = [np.array(w, dtype=np.float64) for w in state["weights"]]
        self._moments = [[np.array(m, dtype=np.float64) for m in row] for row in state["moments"]]
        self._count, self._updates, self._segment = (int(n) for n in state["counts"])
        for name in ("features", "logs", "means", "stds"):
            setattr(self, f"_{name}", np.array(state[name], dtype=np.float64))
        self._segments = np.array(state["segments"], dtype=np.int64)
        self._calibration.load_state_dict(state["calibration"])
        self._stacking.load_state_dict(state["stacking"])
        self._answers = None

    def _corrected(self, base: Forecast, horizon: float) -> Forecast:
        """Correct what the mixture says, as far as corrections are believed; not calibrated."""
        if not math.isfinite(base.std):
            return base
        at = math.log(max(horizon, 1.0))
        shift, width = (float(np.interp(at, PLACES, answer)) for answer in self._answer())
        share = self._stacking.share(horizon)
        return Forecast(base.mean + share * shift * base.std, base.std * math.exp(width))

    def _answer(self) -> tuple[Array, Array]:
        """Miss and log-scale at the knots, for the newest step."""
        if self._answers is None:
            features = self._state.features()[None].astype(np.float64)
            _, miss, log_scale = self._outputs(features)
            self._answers = miss[0], log_scale[0]
        return self._answers

    def _outputs(self, features: Array) -> tuple[Array, Array, Array]:
        """Hidden values (B, HIDDEN), miss and log-scale (B, knots) of each."""
        w1, b1, w2, b2 = self._weights
        hidden = np.tanh(features @ w1 + b1)
        out = hidden @ w2 + b2
        miss, raw = out[:, : len(KNOTS)], out[:, len(KNOTS) :]
        return (
            hidden,
            np.clip(miss, -MOST_MISS, MOST_MISS),
            np.clip(raw, -LOG_SCALE_LIMIT, LOG_SCALE_LIMIT),
        )

    def _learn(self) -> None:
        """One step of Adam on a batch of forecasts that have come due."""
        # Drawn by the count, so that the generator needs no state of its own.
        rng = np.random.default_rng([self._seed, self._count])
        oldest = max(0, self._count - CAPACITY)
        steps = rng.integers(oldest, self._count, BATCH)
        due = steps[:, None] + KNOTS
        slots, ends = steps % CAPACITY, due % CAPACITY
        stds = self._stds[slots]
        known = (due < self._count) & np.isfinite(stds) & (stds > 0.0)
        known &= self._segments[slots][:, None] == self._segments[ends]
        if not known.any():
            return
        missed = np.zeros_like(stds)
        missed[known] = (self._logs[ends] - self._means[slots])[known] / stds[known]
        missed = np.clip(missed, -MOST_MISS, MOST_MISS)
        features = self._features[slots]
        hidden, miss, log_scale = self._outputs(features)
        # Laplace: |e| / b + log b with b = exp(log_scale) / sqrt(2), so that its std is exp().
        inverse = math.sqrt(2.0) * np.exp(-log_scale)
        error = missed - miss
        share = known / known.sum()
        d_out = np.hstack((-np.sign(error) * inverse, 1.0 - np.abs(error) * inverse))
        d_out *= np.hstack((share, share))
        d_hidden = (d_out @ self._weights[2].T) * (1.0 - hidden * hidden)
        gradients = [features.T @ d_hidden, d_hidden.sum(0), hidden.T @ d_out, d_out.sum(0)]
        self._updates += 1
        correct1 = 1.0 - BETA1**self._updates
        correct2 = 1.0 - BETA2**self._updates
        for w, g, m, v in zip(self._weights, gradients, *self._moments, strict=True):
            m += (1.0 - BETA1) * (g - m)
            v += (1.0 - BETA2) * (g * g - v)
            w -= LEARNING_RATE * (m / correct1) / (np.sqrt(v / correct2) + EPSILON)
