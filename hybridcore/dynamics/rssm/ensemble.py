"""Several recurrent state-space models that learn one stream of steps, each in its own way."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hybridcore.dynamics.rssm import params as layout
from hybridcore.dynamics.rssm.params import FloatArray, Sizes
from hybridcore.kernels.cpu import bptt, rssm, training
from hybridcore.kernels.dispatch import kernels, resolve

CAPACITY = 256
UPDATE_INTERVAL = 4
WINDOWS = 1
PATHS = 4
USUAL_HORIZON = 75
UNIT_RATE = 0.02
LEAST_UNIT = 1e-9
# A change beyond so many units is cut: one wild batch must not teach everything anew.
MOST_CHANGE = 20.0
MOST_FEATURE = 10.0
MOST_DELTA = 4.0


class Rollout(NamedTuple):
    """Forecast of the sum of the changes up to each step ahead, arrays of shape (horizon,).

    Attributes
    ----------
    mean : ndarray of float64
        Mean over members and sample paths.
    aleatoric : ndarray of float64
        Variance within members: of the loss head, and of the paths about their member's mean.
    epistemic : ndarray of float64
        Variance of the members' means.
    """

    mean: NDArray[np.float64]
    aleatoric: NDArray[np.float64]
    epistemic: NDArray[np.float64]


class RSSMEnsemble:
    """RSSMs (Hafner et al. 2019; categorical as in DreamerV2 and V3) trained online by BPTT.

    Members start from their own weights and draw their own windows from a replay of recent steps
    (Lakshminarayanan et al. 2017), so that where the data leave them free they disagree.

    Parameters
    ----------
    seed : int
        Of weights, windows and sample paths, at least 0.
    members : int
        Models, at least 1.
    steps : int
        Depth of truncated backpropagation, at least 1.
    sizes : Sizes
        Of each model.
    device : {"auto", "cpu", "cuda"}
        Where the kernels run; see :func:`hybridcore.kernels.dispatch.resolve`.

    Raises
    ------
    ValueError
        If a number is out of range.
    RuntimeError
        If `device` is "cuda" and there is no GPU.
    """

    def __init__(
        self,
        seed: int = 0,
        members: int = 5,
        steps: int = 3,
        sizes: Sizes | None = None,
        device: Literal["auto", "cpu", "cuda"] = "auto",
    ) -> None:
        for name, value, least in (("seed", seed, 0), ("members", members, 1), ("steps", steps, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        self._kernels = kernels(resolve(device, members * PATHS * USUAL_HORIZON))
        self._sizes = sizes = Sizes() if sizes is None else sizes
        # Weights, gradients and Adam's two moments.
        self._params, self._gradients, self._first, self._second = layout.side_by_side(
            4, members, layout.parameter_count(sizes)
        )
        for member, row in enumerate(self._params):
            layout.initialize(row, sizes, np.random.default_rng([seed, member]))
        self._updates = np.zeros(members, np.int64)
        states = np.random.SeedSequence(seed).generate_state(members, np.uint64)
        # The generator's state must not be 0.
        self._generators = states | np.uint64(1)
        self._replay = training.empty_replay(sizes, members, CAPACITY)
        self._hidden = layout.aligned_zeros(members, sizes.latent)
        self._classes = np.zeros((members, sizes.categoricals), np.int64)
        self._observed = 0
        self._unit = math.nan
        # Work arrays and what was forecast last; nothing of it is state.
        self._window = training.empty_window(sizes, steps)
        self._trace = bptt.trace(sizes, steps)
        self._losses = np.zeros(members)
        self._uniforms = np.zeros((members, sizes.categoricals), np.float32)
        self._work = layout.aligned_zeros(rssm.work_size(sizes))
        self._work_classes = np.zeros(sizes.categoricals, np.int64)
        self._cached: Rollout | None = None

    @property
    def unit(self) -> float:
        """Running mean of the size of a change; NaN before the first."""
        return self._unit

    @property
    def updates(self) -> int:
        """Updates that the member made that made fewest."""
        return int(self._updates.min())

    def observe(self, features: ArrayLike, change: float) -> None:
        """Take one step.

        Parameters
        ----------
        features : (F,) array_like of float
            Observation of the step; what is not finite counts as 0.
        change : float
            Change from the step before to this one of what is forecast. NaN says that no full step
            led here: what comes is learned apart from what was.
        """
        slot = self._observed % CAPACITY
        replay = self._replay
        known = math.isfinite(change) and self._observed > 0
        if known:
            self._feed_unit(abs(change))
            before = (self._observed - 1) % CAPACITY
            most = MOST_CHANGE * self._unit
            replay.changes[before] = min(max(change, -most), most)
            replay.change_weights[before] = 1.0
        x = np.asarray(features, dtype=np.float32)
        np.clip(x, -MOST_FEATURE, MOST_FEATURE, out=replay.features[slot])
        replay.features[slot][~np.isfinite(x)] = 0.0
        replay.change_weights[slot] = replay.delta_weights[slot] = 0.0
        replay.follows[slot] = known
        if not known:
            self._hidden[:] = 0.0
            self._classes[:] = 0
        rssm.fill_uniforms(self._generators, self._uniforms)
        self._kernels.observe_step(
            self._params,
            self._sizes,
            replay.features[slot],
            self._uniforms,
            self._hidden,
            self._classes,
            self._work,
        )
        replay.hidden[:, slot], replay.classes[:, slot] = self._hidden, self._classes
        self._observed += 1
        self._cached = None
        # A window needs its steps, the state before them, and the change after the last.
        if self._observed % UPDATE_INTERVAL == 0 and self._observed > len(self._window.changes) + 2:
            self._learn()

    def teach_delta(self, target: ArrayLike) -> None:
        """Set the target (D,) of the delta head at the newest step; ignored if not finite."""
        row = np.asarray(target, dtype=np.float64)
        if self._observed and np.isfinite(row).all():
            slot = (self._observed - 1) % CAPACITY
            self._replay.deltas[slot] = np.clip(row, 0.0, MOST_DELTA)
            self._replay.delta_weights[slot] = 1.0

    def delta(self) -> NDArray[np.float64]:
        """Mean outputs (D,) of the members' delta heads for the present state.

        Global magnitude (1 is neutral), confidence in the direction in [0, 1], and a scale for
        each of the 8 layer groups (1 is neutral).
        """
        out = np.zeros((len(self._params), self._sizes.outputs), np.float32)
        self._kernels.delta_outputs(self._params, self._sizes, self._hidden, self._classes, out)
        mean: NDArray[np.float64] = out.mean(axis=0, dtype=np.float64)
        return mean

    def forecast(self, horizon: int) -> Rollout:
        """Roll the members' priors out; kept until the next step.

        Parameters
        ----------
        horizon : int
            Steps ahead, at least 1. A shorter forecast is the beginning of a longer one.
        """
        if self._cached is None or len(self._cached.mean) < horizon:
            self._cached = self._roll_out(horizon)
        return Rollout(*(values[:horizon] for values in self._cached))

    def restart(self) -> None:
        """Forget the present state; what was learned stays."""
        self._hidden[:] = 0.0
        self._classes[:] = 0
        self._cached = None

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state as numbers and copies of arrays."""
        return {
            "observed": self._observed,
            "unit": self._unit,
            **{name: array.copy() for name, array in self._arrays().items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned, for the same sizes and members.

        Raises
        ------
        ValueError
            If an array has another shape; nothing is changed then.
        """
        # Lists of large integers would become floats without the type.
        arrays = {k: np.asarray(state[k], dtype=own.dtype) for k, own in self._arrays().items()}
        for name, array in self._arrays().items():
            if arrays[name].shape != array.shape:
                raise ValueError(
                    f"{name} must have shape {array.shape}, got {arrays[name].shape}: the state is "
                    "that of an ensemble of another size"
                )
        for name, array in self._arrays().items():
            array[...] = arrays[name]
        self._observed, self._unit = int(state["observed"]), float(state["unit"])
        self._cached = None

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {
            "params": self._params,
            "first": self._first,
            "second": self._second,
            "updates": self._updates,
            "generators": self._generators,
            "hidden": self._hidden,
            "classes": self._classes,
            **{f"replay_{name}": array for name, array in self._replay._asdict().items()},
        }

    def _feed_unit(self, size: float) -> None:
        if math.isnan(self._unit):
            self._unit = size
        size = min(size, MOST_CHANGE * max(self._unit, LEAST_UNIT))
        # A plain mean at first, so that one step is not taken for the noise.
        rate = max(UNIT_RATE, 1.0 / (self._observed + 1.0))
        self._unit = max(LEAST_UNIT, self._unit + rate * (size - self._unit))

    def _learn(self) -> None:
        # The newest step's change is not known yet: windows end before it.
        self._kernels.update(
            self._params,
            self._gradients,
            self._first,
            self._second,
            self._updates,
            self._generators,
            self._sizes,
            self._replay,
            self._observed - 1,
            max(self._unit, LEAST_UNIT) if math.isfinite(self._unit) else 1.0,
            WINDOWS,
            self._window,
            self._trace,
            training.Objective(),
            self._losses,
        )

    def _roll_out(self, horizon: int) -> Rollout:
        members, categoricals = self._classes.shape
        shape = (members, horizon, PATHS, categoricals)
        uniforms: FloatArray = np.empty(shape, np.float32)
        # Copies: to ask must not change what comes. Step by step, so that any horizon begins alike.
        rssm.fill_uniforms(self._generators.copy(), uniforms.reshape(members, -1))
        mean = np.empty((members, PATHS, horizon), np.float32)
        variance = np.empty_like(mean)
        self._kernels.rollout(
            self._params,
            self._sizes,
            self._hidden,
            self._classes,
            np.ascontiguousarray(uniforms.transpose(0, 2, 1, 3)),
            mean,
            variance,
            self._work,
            self._work_classes,
        )
        unit = self._unit if math.isfinite(self._unit) else 1.0
        paths = unit * mean.astype(np.float64)
        of_member = paths.mean(axis=1)
        within = unit**2 * variance.mean(axis=(0, 1), dtype=np.float64)
        return Rollout(
            of_member.mean(axis=0),
            within + paths.var(axis=1).mean(axis=0),
            of_member.var(axis=0),
        )
