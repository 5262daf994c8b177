"""Which arm to play: LinUCB with exact inverses, discounted for drift.

An arm is a name, in the engine that of an extrapolator and a horizon; ``"none"``, do not predict,
is always among them. Each arm has a linear model of its reward in the context ``x``, and the arm
with the highest upper confidence bound is played (Li, Chu, Langford & Schapire 2010, algorithm 1,
disjoint models):

    A = ridge * I + sum_s w_s x_s x_s^T        over the plays of the arm
    b = sum_s w_s r_s x_s
    mean  = x^T A^-1 b
    width = exploration * sqrt(x^T A^-1 x)

The weights ``w_s`` forget as those of D-LinUCB do (Russac, Vernade & Cappé 2019), whose ridge is
constant as well. Time passes for all arms with every update, not only for the arm that was played:
what is known of an arm grows old whether or not it is played. So an arm that is left alone returns
to its prior, mean 0 and width ``exploration * |x| / sqrt(ridge)``, and is tried again.

A play is one term of rank one, added to the inverse by Sherman-Morrison in O(d^2). Discounting is
not: with the ridge kept, it changes A in every direction, and of every arm. It is therefore
applied in ticks of `period` updates, at which every inverse is formed anew from its own sums:

    w_s = discount ** (period * ticks since the play)

This is exact for these weights at every update, and the same refresh bounds the rounding that
Sherman-Morrison collects. The period is as long as a tick takes away a tenth at most, so ``w_s``
lies between ``discount ** age`` and ``discount ** (age - period)``. For a discount below 0.94 a
tick is one update and ``w_s`` is ``discount ** age``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hybridcore.errors import CheckpointError

Array: TypeAlias = NDArray[np.float64]

NO_PREDICTION = "none"
# Far outside what a context or a reward should hold, and small enough that no sum can overflow.
CONTEXT_LIMIT = 100.0
REWARD_LIMIT = 100.0
RIDGE_RANGE = (1e-3, 1e6)
LEAST_TICK_WEIGHT = 0.9
MOST_UPDATES_PER_TICK = 64
# Share of the trace below which a ridge is lost in the rounding of a sum and Cholesky may fail.
ROUNDING = 1e-12


class LinUCB:
    """Disjoint LinUCB over named arms, for rewards that drift.

    Parameters
    ----------
    arms : sequence of str
        Different names, :data:`NO_PREDICTION` among them. Where bounds are equal the first wins.
    dimension : int
        Length d of a context, at least 1.
    exploration : float
        Factor on the width (alpha of the paper), finite and not negative. It is in the units of the
        reward: far above what arms differ by, a discounted bandit keeps on exploring.
    ridge : float
        Diagonal that A starts with (lambda), in ``RIDGE_RANGE``.
    discount : float
        Factor in (0, 1] on the weight of what is known, for each update of any arm.

    Raises
    ------
    ValueError
        If a parameter is out of its range, or `arms` lacks :data:`NO_PREDICTION`.

    Notes
    -----
    Contexts are clipped to ``CONTEXT_LIMIT`` and rewards to ``REWARD_LIMIT`` on either side; both
    should be of order 1. What holds NaN or Inf teaches nothing, and at such a context the choice is
    not to predict.
    """

    def __init__(
        self,
        arms: Sequence[str],
        dimension: int,
        *,
        exploration: float = 1.0,
        ridge: float = 1.0,
        discount: float = 0.99,
    ) -> None:
        names = tuple(arms)
        if isinstance(arms, str) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"arms must be a sequence of str, got {arms!r}")
        if len(set(names)) < len(names):
            raise ValueError(f"arms must differ, got {names!r}: drop the repeated ones")
        if NO_PREDICTION not in names:
            raise ValueError(f"arms must hold NO_PREDICTION, got {names!r}: add {NO_PREDICTION!r}")
        if isinstance(dimension, bool) or not isinstance(dimension, int) or dimension < 1:
            raise ValueError(f"dimension must be an int of at least 1, got {dimension!r}")
        if not (math.isfinite(exploration) and exploration >= 0.0):
            raise ValueError(f"exploration must be finite and not negative, got {exploration!r}")
        if not RIDGE_RANGE[0] <= ridge <= RIDGE_RANGE[1]:
            raise ValueError(f"ridge must lie in {list(RIDGE_RANGE)}, got {ridge!r}")
        if not 0.0 < discount <= 1.0:
            raise ValueError(f"discount must lie in (0, 1], got {discount!r}: 1 forgets nothing")
        self.arms = names
        self.dimension = dimension
        self.exploration = float(exploration)
        self.ridge = float(ridge)
        self.discount = float(discount)
        self.period = _updates_per_tick(self.discount)
        self._index = {name: i for i, name in enumerate(names)}
        count = len(names)
        # Symmetric, shape (arms, d, d): sums of w x x^T, and inverses of these plus the ridge.
        self._gram = np.zeros((count, dimension, dimension))
        self._inverse = _inverses(self._gram, self.ridge)
        # Sums of w r x, shape (arms, d).
        self._response = np.zeros((count, dimension))
        self._since_tick = 0

    def select(self, context: ArrayLike, allowed: Collection[str] | None = None) -> str:
        """Arm with the highest upper confidence bound, the first of equals.

        Parameters
        ----------
        context : (d,) array_like of float
            Features at this decision.
        allowed : collection of str, optional
            Arms to choose from; by default all. :data:`NO_PREDICTION` is always allowed.

        Returns
        -------
        str
            Name of the arm; :data:`NO_PREDICTION` where `context` holds NaN or Inf.

        Raises
        ------
        ValueError
            If `context` has another shape or `allowed` holds an unknown arm.
        """
        x = self._checked(context)
        if allowed is None:
            candidates: Sequence[int] = range(len(self.arms))
        else:
            candidates = sorted({self._position(name) for name in (*allowed, NO_PREDICTION)})
        if x is None:
            return NO_PREDICTION
        mean, width = self._bounds(x)
        bound = (mean + width).tolist()
        return self.arms[max(candidates, key=bound.__getitem__)]

    def values(self, context: ArrayLike) -> dict[str, tuple[float, float]]:
        """Mean and width of every arm's reward; their sum is the upper confidence bound.

        Parameters and errors are those of :meth:`select`. All zeros where `context` holds NaN or
        Inf.
        """
        x = self._checked(context)
        if x is None:
            return dict.fromkeys(self.arms, (0.0, 0.0))
        mean, width = self._bounds(x)
        return dict(zip(self.arms, zip(mean.tolist(), width.tolist(), strict=True), strict=True))

    def update(self, arm: str, context: ArrayLike, reward: float) -> None:
        """Learn what `arm` was worth.

        Parameters
        ----------
        arm : str
            The arm that was played.
        context : (d,) array_like of float
            Context at which it was chosen.
        reward : float
            What it gained. If it or `context` is NaN or Inf nothing changes, and no time passes.

        Raises
        ------
        ValueError
            If `arm` is unknown or `context` has another shape.
        """
        i = self._position(arm)
        x = self._checked(context)
        if x is None or not math.isfinite(reward):
            return
        self._gram[i] += np.multiply.outer(x, x)
        self._response[i] += min(max(float(reward), -REWARD_LIMIT), REWARD_LIMIT) * x
        # Sherman & Morrison 1950: (A + x x^T)^-1 = A^-1 - A^-1 x x^T A^-1 / (1 + x^T A^-1 x).
        direction = self._inverse[i] @ x
        scaled = direction / math.sqrt(1.0 + float(x @ direction))
        self._inverse[i] -= np.multiply.outer(scaled, scaled)
        self._since_tick += 1
        if self._since_tick >= self.period:
            self._tick()

    def state_dict(self) -> dict[str, Any]:
        """Return everything learned as a list, arrays and a number; the settings are not in it."""
        return {
            "arms": list(self.arms),
            "gram": self._gram.copy(),
            "inverse": self._inverse.copy(),
            "response": self._response.copy(),
            "since_tick": self._since_tick,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` of a bandit with the same settings returned.

        Raises
        ------
        CheckpointError
            If the state is of other arms or another dimension, or holds NaN or Inf.
        """
        if tuple(state["arms"]) != self.arms:
            raise CheckpointError(
                f"arms of the saved bandit are {state['arms']!r}, those of this one "
                f"{list(self.arms)!r}: build it with the saved ones"
            )
        arrays = {}
        for name in ("gram", "inverse", "response"):
            saved = np.array(state[name], dtype=np.float64, order="C")
            expected = getattr(self, f"_{name}").shape
            if saved.shape != expected:
                raise CheckpointError(
                    f"{name} of the saved bandit has shape {saved.shape}, this one needs "
                    f"{expected}: build it with the saved dimension"
                )
            if not np.isfinite(saved).all():
                raise CheckpointError(f"{name} of the saved bandit holds NaN or Inf: start anew")
            arrays[name] = saved
        since_tick = int(state["since_tick"])
        self._gram, self._inverse = arrays["gram"], arrays["inverse"]
        self._response, self._since_tick = arrays["response"], since_tick

    def _tick(self) -> None:
        weight = self.discount**self.period
        self._gram *= weight
        self._response *= weight
        self._inverse = _inverses(self._gram, self.ridge)
        self._since_tick = 0

    def _bounds(self, x: Array) -> tuple[Array, Array]:
        directions = self._inverse @ x
        mean = np.einsum("ij,ij->i", directions, self._response)
        # Where A is ill-conditioned, rounding may leave a vanishing variance below zero.
        width = self.exploration * np.sqrt(np.maximum(directions @ x, 0.0))
        return mean, width

    def _position(self, arm: str) -> int:
        if arm not in self._index:
            raise ValueError(f"arm must be one of {list(self.arms)!r}, got {arm!r}")
        return self._index[arm]

    def _checked(self, context: ArrayLike) -> Array | None:
        x = np.asarray(context, dtype=np.float64)
        if x.shape != (self.dimension,):
            raise ValueError(f"context must have shape ({self.dimension},), got {x.shape}")
        if not np.isfinite(x).all():
            return None
        return np.minimum(np.maximum(x, -CONTEXT_LIMIT), CONTEXT_LIMIT)


def _updates_per_tick(discount: float) -> int:
    """Most updates after which a weight is still ``LEAST_TICK_WEIGHT``, within limits."""
    if discount == 1.0:
        return MOST_UPDATES_PER_TICK
    updates = math.floor(math.log(LEAST_TICK_WEIGHT) / math.log(discount))
    return min(max(updates, 1), MOST_UPDATES_PER_TICK)


def _inverses(gram: Array, ridge: float) -> Array:
    """``(gram[i] + ridge I)^-1`` for each i, from Cholesky factors: symmetric and positive."""
    # One call for all arms: scipy's cho_factor takes one matrix, and a loop ten times as long.
    floor = np.maximum(ridge, ROUNDING * np.trace(gram, axis1=1, axis2=2))
    regularized = gram + floor[:, None, None] * np.eye(gram.shape[-1])
    roots = np.linalg.inv(np.linalg.cholesky(regularized))
    inverses: Array = roots.transpose(0, 2, 1) @ roots
    return inverses
