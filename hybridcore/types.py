"""What crosses the boundary between the core and an adapter, and what a user gets back."""

import enum
from collections.abc import Generator
from itertools import zip_longest
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hybridcore.phases import Phase
from hybridcore.quasi_newton import Secants

NAN = float("nan")


class Action(enum.Enum):
    """What an adapter is told to do. FULL, GRADIENT and SKIP are the step, the others beside it."""

    FULL = "full"
    SKIP = "skip"
    PROBE = "probe"
    MOVE = "move"
    SAVE = "save"
    ROLLBACK = "rollback"
    GRADIENT = "gradient"
    BASE = "base"
    REACH = "reach"
    MARK = "mark"


STEPS = (Action.FULL, Action.GRADIENT, Action.SKIP)


class Directive(NamedTuple):
    """One order of the engine to an adapter, answered by one :class:`Observation`.

    Attributes
    ----------
    action : Action
        - ``FULL``: forward, backward, optimizer, schedule. Report loss, gradient norm, learning
          rate, seconds, and with `gram` the Gram matrices.
        - ``SKIP``: advance the schedule, nothing else. Report the learning rate before, if a result
          of the step shows it.
        - ``PROBE``: loss without gradients at `coefficients` of the bank (None: where the weights
          are), weights and buffers as before afterwards. Report loss and seconds.
        - ``MOVE``: put the weights at `coefficients` of the bank, for a jump or an outer step, or
          to take one back, at one of its snapshots.
        - ``SAVE``: keep what a rollback needs; the newest snapshot holds the weights.
        - ``ROLLBACK``: restore what ``SAVE`` kept, or with `at_start` what was there at the first
          secant pair.
        - ``GRADIENT``: forward, backward, schedule, but no optimizer. Report loss, objective,
          gradient norm, learning rate, seconds.
        - ``BASE``: make the weights and the gradient of the last pass the base; what is between it
          and the base before becomes the newest secant pair. Report the secants. The first of all
          keeps what a rollback to it needs, for as long as there are pairs.
        - ``MARK``: keep the weights for a probe, in the place of what ``SAVE`` kept of them.
        - ``REACH``: put the weights at the base plus the combination of secant pairs.
    coefficients : (groups, m) or (1, m) ndarray of float64 or None
        Affine coefficients over the newest m snapshots of the bank, oldest first; rows sum to 1.
        One row is for all groups. For ``REACH`` (2 k + 1,), of the displacements and scaled
        gradients of :class:`hybridcore.quasi_newton.Descent`.
    snapshot : bool
        For ``FULL`` and ``MOVE``: add the weights after it to the bank.
    fresh_bank : bool
        For ``FULL`` with `snapshot`: empty the bank first.
    gram : bool
        For ``FULL`` with `snapshot`: report the bank's Gram matrices.
    exact : bool
        For ``FULL`` with `snapshot`: lose nothing of it, whatever the kind of the bank, so that the
        way back to it, from a probe or an outer step, is exact.
    learning_rate_scale : float
        For ``FULL``: factor on every learning rate, for this step only.
    highest_rates : tuple of float
        For ``FULL``: learning rates of the parameter groups that a `learning_rate_scale` above 1
        does not go beyond, as a schedule may have risen; empty where there is no such limit.
    forgetting : float
        For ``FULL``: how many times as fast what is averaged over steps of what layers see, as by
        batch norm, has to forget, at least 1, as outer steps take the weights further.
    average : float
        For ``FULL`` and ``BASE``: weight in [0, 1] of the weights in their running average.
    pair : bool
        For ``FULL``: after the backward pass do what ``BASE`` does, but for the report.
    fresh_pairs : bool
        For ``FULL`` with `pair`: forget base and pairs first.
    own_batch : bool
        For ``PROBE``: on the batch of the step even where the user gave another, and report the
        objective too.
    at_mark : bool
        For ``PROBE``: at the weights that ``MARK`` or ``SAVE`` kept.
    at_start : bool
        For ``PROBE`` and ``ROLLBACK``: at those of the first secant pair. A probe reports NaN where
        they are not known.
    """

    action: Action
    coefficients: NDArray[np.float64] | None = None
    snapshot: bool = False
    fresh_bank: bool = False
    gram: bool = False
    exact: bool = False
    learning_rate_scale: float = 1.0
    highest_rates: tuple[float, ...] = ()
    forgetting: float = 1.0
    average: float = 0.0
    pair: bool = False
    fresh_pairs: bool = False
    own_batch: bool = False
    at_mark: bool = False
    at_start: bool = False

    def scale_at(self, learning_rates: tuple[float, ...]) -> float:
        """Factor on every learning rate, where those of the groups are `learning_rates`."""
        scale = self.learning_rate_scale
        if scale > 1.0 and self.highest_rates:
            # A group that was added since has been no higher than it is.
            for highest, rate in zip_longest(self.highest_rates, learning_rates, fillvalue=0.0):
                if rate > 0.0:
                    scale = min(scale, highest / rate)
            scale = max(1.0, scale)
        return scale


FULL_STEP = Directive(Action.FULL)
SKIP = Directive(Action.SKIP)


class Observation(NamedTuple):
    """What an adapter saw while it carried out a :class:`Directive`.

    Attributes
    ----------
    loss : float
        Loss, NaN where the directive computes none or the batch was bad.
    gradient_norm : float
        Euclidean norm of all gradients before clipping, NaN where there is none.
    learning_rate : float
        Learning rate of the first parameter group, without `learning_rate_scale`.
    seconds : float
        Wall-clock time of the work.
    gram : (groups, m, m) ndarray of float64 or None
        Inner products of the bank's snapshots about the newest one, where asked for.
    applied : bool
        For ``FULL``: the optimizer stepped. False if loss or gradients were not finite; then
        nothing else was done either, no snapshot among it. For ``GRADIENT``: they were finite.
    objective : float
        Loss with what the optimizer's weight decay adds to it.
    secants : Secants or None
        For ``BASE``: inner products of the pairs and the gradient.
    overflow : bool
        It was not applied because gradients overflowed under a loss scale, which is lower now: a
        batch lost, but no sign of divergence.
    other_rates : tuple of float
        Learning rates of the other parameter groups.
    backward : bool
        For ``FULL`` and ``GRADIENT``: a backward pass was run, which some adapters leave out where
        the loss is not finite.
    """

    loss: float = NAN
    gradient_norm: float = NAN
    learning_rate: float = NAN
    seconds: float = 0.0
    gram: NDArray[np.float64] | None = None
    applied: bool = True
    objective: float = NAN
    secants: Secants | None = None
    overflow: bool = False
    other_rates: tuple[float, ...] = ()
    backward: bool = True


Turn: TypeAlias = Generator[Directive, Observation, None]


class StepResult(NamedTuple):
    """What one call of ``step`` did.

    Attributes
    ----------
    loss : float
        Loss of the batch, which is what it was where the batch was bad; in a predicted step the
        forecast, or the probe's loss where there was one.
    phase : Phase
        Phase in which the step was taken.
    was_predicted : bool
        True if no backward pass was run.
    prediction_error : float or None
        ``|forecast - loss| / loss`` where the step could compare them, else None. Where losses are
        negative both are counted from a floor below them.
    confidence : float
        Confidence in [0, 1] that a jump started now would land where it is forecast.
    gradient_norm : float or None
        Norm of all gradients before clipping; None in a predicted step.
    step_time_ms : float
        Wall-clock milliseconds of the whole call.
    metrics : dict of str to float
        Further figures of this step, for example ``learning_rate``.
    events : tuple of dict
        What happened, oldest first: ``event`` names it (``jump``, ``jump kept``, ``jump rolled
        back``, ``leap``, ``divergence level``, ...), the other keys are its figures.
    """

    loss: float
    phase: Phase
    was_predicted: bool
    prediction_error: float | None
    confidence: float
    gradient_norm: float | None
    step_time_ms: float
    metrics: dict[str, float]
    events: tuple[dict[str, Any], ...] = ()
