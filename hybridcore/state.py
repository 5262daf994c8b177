"""What is known of a training run at each step: 64 features, at constant cost a step.

:data:`FEATURES` names them. 25 tell how the loss moves, 11 how the gradient norm does, 4 of the
steps made, 8 how far the run has come, and 16 how the weights move, two for each of 8 layer groups.
Every feature is a difference or a ratio: a constant factor on the losses, the gradients, the
learning rates or the weights changes nothing.

**Gram features and their substitutes.** The last 16 come from the Gram matrices of the snapshots
and keep their values until the next one. A run that has seen no Gram matrix yet, such as a recorded
one, carries in their place what loss and norms say of the same thing at eight time scales: how the
length of a step grows, and how much of the change of the norm is trend. With the first Gram matrix
the meaning changes for good, and the running mean and variance of these 16 start again. Models with
fewer groups than eight repeat them.

**Logarithms.** Losses and norms enter by their logarithms. One that is not positive counts as
unchanged. The engine counts negative losses from a floor below them.

**Normalisation.** Running means and variances make features of any run comparable, at a price: what
drifts smoothly for longer than they remember, as in late full-batch descent, comes out nearly
constant. How far the run has come is therefore told on a fixed scale.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hybridcore.kernels.cpu import features as kernel
from hybridcore.types import Observation

# Features are clipped at so many standard deviations.
LIMIT = 5.0
# Steps over which the running mean and variance of a feature forget.
MEMORY = 500.0


class Feature(NamedTuple):
    """One feature, before its normalisation.

    Attributes
    ----------
    name : str
        Unique name; a number in it is the time scale s in steps, or the number of a layer group.
    unit : str
        ``log`` (natural logarithm of a ratio), ``std`` (standard deviations), ``1`` (a share or a
        correlation).
    range : (float, float)
        Bounds of the value, whatever the numbers observed; real runs fill a small part of them.
    description : str
        What it measures.
    substitute : str
        What it measures before the first Gram matrix; empty if it needs none.
    """

    name: str
    unit: str
    range: tuple[float, float]
    description: str
    substitute: str = ""


def _features() -> tuple[Feature, ...]:
    unbounded = (-1500.0, 1500.0)
    # Moves are clipped, so an average over s of them stays within that times s.
    far = (-kernel.MOST_MOVE * 256.0, kernel.MOST_MOVE * 256.0)
    deviation, roughness = (-24.0, 8.0), (-51.0, 2.0)
    cosine = (-1.0, 1.0)
    found = [
        Feature(f"loss_trend_{s}", "log", far, f"change of the log loss over {s - 1} steps, by its"
                " slope: the log loss averaged once less averaged twice (Brown 1963)")
        for s in (2, 4, 8, 16, 32, 64, 128, 256)
    ]  # fmt: skip
    found += [
        Feature(f"loss_curvature_{s}", "log", far, "change of the loss trend at this scale over as"
                " many steps: the trend less its own average")
        for s in (8, 32, 128)
    ]  # fmt: skip
    found += [
        Feature(f"loss_deviation_{s}", "log", far, "log loss less its average")
        for s in (2, 16, 128)
    ]
    found += [
        Feature("loss_record", "log", unbounded, "log loss averaged over 8 steps, less the lowest"
                " one so far: a drawdown if positive, a new record if negative"),
    ]  # fmt: skip
    found += [
        Feature(f"loss_noise_{s}", "log", deviation, "logarithm of the standard deviation of the"
                " log loss about its trend")
        for s in (16, 128)
    ]  # fmt: skip
    found += [
        Feature("loss_noise_growth", "1", cosine, "variance of the log loss about its trend at"
                " scale 8 less that at 64, over their sum"),
    ]  # fmt: skip
    found += [
        Feature(f"loss_signal_{s}", "std", (-27.0, 27.0), "loss trend in standard deviations of"
                " the noise, as sign(x) log(1 + |x|)")
        for s in (16, 128)
    ]  # fmt: skip
    found += [
        Feature(f"loss_roughness_{s}", "log", roughness, "mean square of the second differences of"
                " the log loss over that of the first (von Neumann 1941): smooth descent low,"
                " noise log 3, an oscillation of period two log 4")
        for s in (16, 128)
    ]  # fmt: skip
    found += [
        Feature("loss_persistence_32", "1", (-1.1, 1.1), "lag-1 autocorrelation of the residuals of"
                " the log loss about its trend"),
        Feature("loss_skewness_64", "1", (-8.0, 8.0), "skewness of these residuals: positive where"
                " spikes go up"),
        Feature("loss_extreme_64", "std", (0.0, 4.2), "largest squared residual, fading with age,"
                " in variances, as log(1 + x)"),
    ]  # fmt: skip
    found += [
        Feature(f"norm_trend_{s}", "log", far, "as loss_trend, of the log gradient norm")
        for s in (4, 16, 64)
    ]
    found += [
        Feature("norm_curvature_32", "log", far, "as loss_curvature, of the log gradient norm"),
        Feature("norm_deviation_4", "log", far, "log gradient norm less its average"),
        Feature("norm_deviation_64", "log", far, "log gradient norm less its average"),
        Feature("norm_noise_32", "log", deviation, "as loss_noise, of the log gradient norm"),
        Feature("norm_roughness_32", "log", roughness, "as loss_roughness, of the log norm"),
        Feature("norm_persistence_32", "1", (-1.1, 1.1), "as loss_persistence, of the log norm"),
    ]
    found += [
        Feature(f"loss_norm_correlation_{s}", "1", cosine, "correlation of the residuals of log"
                " loss and log gradient norm")
        for s in (16, 128)
    ]  # fmt: skip
    found += [
        Feature("length_trend_8", "log", far, "trend of the learning rate times the gradient norm:"
                " the length of a plain gradient step"),
        Feature("length_trend_128", "log", far, "as length_trend_8"),
        Feature("efficiency_16", "1", (-90.0, 90.0), "fall of the log loss over that of"
                " first_order_gain, averaged, as sign(x) log(1 + |x|)"),
        Feature("efficiency_128", "1", (-90.0, 90.0), "as efficiency_16"),
        Feature("loss_level", "log", unbounded, "log loss less the first one"),
        Feature("norm_level", "log", unbounded, "log gradient norm less the first one"),
        Feature("length_level_16", "log", (-5000.0, 5000.0), "length of a plain gradient step,"
                " averaged, over that with the first norm and the highest learning rate so far"),
        Feature("first_order_gain", "log", (-6000.0, 6000.0), "learning rate times squared norm"
                " over loss, the relative decrease that a plain gradient step promises; over that"
                " of the first step, had it had the highest learning rate so far"),
        Feature("path_steps", "log", (-3000.0, 3000.0), "sum of the lengths of all plain gradient"
                " steps over the newest: the path made, in steps of the present length"),
        Feature("rate_steps", "log", (-3000.0, 3000.0), "sum of all learning rates over the newest:"
                " steps made, in steps at the present rate"),
        Feature("steps", "log", (0.0, 50.0), "full steps since the start"),
        Feature("recency", "1", (0.0, 1.0), "32 / (32 + full steps since the last restart)"),
    ]  # fmt: skip
    found += [
        Feature(f"displacement_growth_{g + 1}", "log", far,
                "newest displacement of the layer group over the root mean square of those of the"
                " bank",
                f"log length of a plain gradient step averaged over {2**g} steps less over"
                f" {2 ** (g + 1)} steps")
        for g in range(kernel.GROUPS)
    ]  # fmt: skip
    found += [
        Feature(f"displacement_cosine_{g + 1}", "1", cosine,
                "cosine between the last two displacements of the layer group",
                f"fall of the log gradient norm at scale {2 ** (g + 1)} over the root of its"
                " square plus the variance of the noise")
        for g in range(kernel.GROUPS)
    ]  # fmt: skip
    return tuple(found)


FEATURES: tuple[Feature, ...] = _features()


class TrainingState:
    """The features of a training run, updated step by step.

    A feature is normalised by its running mean and variance over about ``MEMORY`` steps, the newest
    value included (West 1979), and clipped at ``LIMIT`` standard deviations; it is 0 in the first
    eleven steps. Only the eight that tell how far the run has come have a fixed centre and width.
    The cost of a step does not depend on how many there were; nothing random is in it.
    """

    def __init__(self) -> None:
        self._state = np.zeros(kernel.STATE_SIZE)
        self._features = np.zeros(kernel.FEATURES, dtype=np.float32)
        self._view = self._features.view()
        self._view.flags.writeable = False

    def update(self, observation: Observation) -> None:
        """Take what a full step showed; a bad one, without a finite loss, is left out.

        Parameters
        ----------
        observation : Observation
            Of a ``FULL`` directive. ``ValueError`` if its Gram matrices are not (groups, m, m).
        """
        loss, gram = observation.loss, observation.gram
        if not (observation.applied and math.isfinite(loss)):
            return
        if gram is not None:
            gram = np.ascontiguousarray(gram, dtype=np.float64)
            if gram.ndim != 3 or gram.shape[1] != gram.shape[2]:
                raise ValueError(f"gram must have the shape (groups, m, m), got {gram.shape}")
            kernel.take_gram(gram, self._state)
        kernel.step(
            float(loss),
            float(observation.gradient_norm),
            float(observation.learning_rate),
            MEMORY,
            LIMIT,
            self._state,
            self._features,
        )

    def restart(self) -> None:
        """Tell that the weights were moved by other means than full steps.

        What the loss and the norm change by until the next step is kept out of all trends; levels,
        counts and the running means and variances stay.
        """
        self._state[kernel.RESTARTED] = 1.0
        self._state[kernel.SINCE_RESTART] = 0.0

    def features(self) -> NDArray[np.float32]:
        """Features after the last step, normalised.

        Returns
        -------
        (64,) ndarray of float32
            In ``[-LIMIT, LIMIT]``, always finite, in the order of :data:`FEATURES`; all 0 before
            the first step. A read-only view that the next update overwrites.
        """
        return self._view

    def values(self) -> NDArray[np.float64]:
        """Features after the last step in their units, a copy: (64,) ndarray of float64."""
        return self._state[kernel.VALUES : kernel.MEANS].copy()

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state: two arrays, copies."""
        return {"state": self._state.copy(), "features": self._features.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned; ``ValueError`` if it is of another size."""
        arrays: dict[str, NDArray[Any]] = {"state": self._state, "features": self._features}
        for name, own in arrays.items():
            shape = np.shape(state[name])
            if shape != own.shape:
                raise ValueError(
                    f"{name} has the shape {shape} instead of {own.shape}: "
                    "the checkpoint is of another version of hybridcore"
                )
        for name, own in arrays.items():
            own[:] = state[name]
