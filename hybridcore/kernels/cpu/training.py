"""Updates of the RSSM on the CPU: Adam, and windows drawn from a replay of recent steps."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hybridcore.dynamics.rssm.params import FloatArray, Sizes
from hybridcore.kernels import bodies
from hybridcore.kernels.cpu import inlined, jit, part, part_sums
from hybridcore.kernels.cpu.bptt import Trace, Window, window_gradient
from hybridcore.kernels.cpu.rssm import ZERO, Classes, copy, next_state, unit_uniform

moving_mean = part(bodies.moving_mean)
adam_change = part(bodies.adam_change)


class Objective(NamedTuple):
    """Weights of the loss (see ``bptt.window_gradient``) and settings of Adam.

    Attributes
    ----------
    dynamics, representation : float
        Weights of the KL terms of DreamerV3 (Hafner et al. 2023, eq. 5).
    free : float
        Nats of divergence that cost nothing.
    learning_rate, beta1, beta2, epsilon : float
        As in Kingma & Ba 2015, alg. 1.
    max_norm : float
        Norm at which a member's gradient is clipped.
    """

    dynamics: float = 0.5
    representation: float = 0.1
    free: float = 1.0
    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    max_norm: float = 1.0


class Replay(NamedTuple):
    """Ring of the last N steps; slot i holds the i-th step modulo N.

    Attributes
    ----------
    features : (N, F) ndarray of float32
        Observations.
    changes : (N,) ndarray of float32
        Change of the log loss from this step to the next.
    change_weights : (N,) ndarray of float32
        1 where that change is known, else 0.
    deltas, delta_weights : (N, D) and (N,) ndarray of float32
        Targets of the delta head; weight 0 where there is none.
    follows : (N,) ndarray of bool
        Whether a full step led from the step before to this one.
    hidden, classes : (M, N, L) ndarray of float32, (M, N, categoricals) ndarray of int64
        Every member's state after the step.
    """

    features: FloatArray
    changes: FloatArray
    change_weights: FloatArray
    deltas: FloatArray
    delta_weights: FloatArray
    follows: NDArray[np.bool_]
    hidden: FloatArray
    classes: Classes


def empty_replay(sizes: Sizes, members: int, capacity: int) -> Replay:
    """Allocate a ring of `capacity` steps."""
    return Replay(
        features=np.zeros((capacity, sizes.features), np.float32),
        changes=np.zeros(capacity, np.float32),
        change_weights=np.zeros(capacity, np.float32),
        deltas=np.zeros((capacity, sizes.outputs), np.float32),
        delta_weights=np.zeros(capacity, np.float32),
        follows=np.zeros(capacity, np.bool_),
        hidden=np.zeros((members, capacity, sizes.latent), np.float32),
        classes=np.zeros((members, capacity, sizes.categoricals), np.int64),
    )


def empty_window(sizes: Sizes, steps: int) -> Window:
    """Allocate a window of `steps` steps."""
    return Window(
        features=np.zeros((steps, sizes.features), np.float32),
        changes=np.zeros(steps, np.float32),
        change_weights=np.zeros(steps, np.float32),
        deltas=np.zeros((steps, sizes.outputs), np.float32),
        delta_weights=np.zeros(steps, np.float32),
        uniforms=np.zeros((steps, sizes.categoricals), np.float32),
    )


@part_sums
def squared_norm(grad: FloatArray) -> float:
    """Sum of squares, in float64."""
    total = 0.0
    for j in range(grad.shape[0]):
        total += np.float64(grad[j]) * np.float64(grad[j])
    return total


@inlined
def adam_update(
    params: FloatArray,
    grad: FloatArray,
    first: FloatArray,
    second: FloatArray,
    step: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    max_norm: float,
) -> float:
    """One step of Adam for one member, after its gradient was clipped to `max_norm`.

    Parameters
    ----------
    params, grad, first, second : (P,) ndarray of float32
        Weights, gradient (0 afterwards) and its two moments.
    step : int
        Number of this step, from 1.
    learning_rate, beta1, beta2, epsilon : float
        As in Kingma & Ba 2015, alg. 1.
    max_norm : float
        Norm above which the gradient is scaled down, as ``torch.nn.utils.clip_grad_norm_`` does.

    Returns
    -------
    float
        Norm of the gradient before clipping; if it is not finite, nothing but `grad` was changed.
    """
    norm = math.sqrt(squared_norm(grad))
    if not math.isfinite(norm):
        grad[:] = ZERO
        return norm
    clip = np.float32(min(1.0, max_norm / (norm + 1e-6)))
    rate = np.float32(learning_rate / (1.0 - beta1**step))
    scale = np.float32(1.0 / math.sqrt(1.0 - beta2**step))
    share1, share2, floor = np.float32(1.0 - beta1), np.float32(1.0 - beta2), np.float32(epsilon)
    for j in range(params.shape[0]):
        d = clip * grad[j]
        first[j] = moving_mean(first[j], d, share1)
        second[j] = moving_mean(second[j], d * d, share2)
        params[j] += adam_change(first[j], second[j], rate, scale, floor)
        grad[j] = ZERO
    return norm


@inlined
def load_window(
    replay: Replay,
    member: int,
    start: int,
    unit: np.float32,
    weight: np.float32,
    window: Window,
    tr: Trace,
) -> bool:
    """Copy the window that starts at step `start` out of the ring, and the state before it.

    Changes are divided by `unit` and all weights multiplied by `weight`. Returns False, and the
    window is not to be used, where something else than full steps led through it.
    """
    capacity, steps = replay.changes.shape[0], window.changes.shape[0]
    before = (start - 1) % capacity
    copy(replay.hidden[member, before], tr.hidden[0])
    for c in range(tr.classes.shape[1]):
        tr.classes[0, c] = replay.classes[member, before, c]
    whole = True
    for t in range(steps):
        slot = (start + t) % capacity
        whole = whole and replay.follows[slot]
        copy(replay.features[slot], window.features[t])
        copy(replay.deltas[slot], window.deltas[t])
        window.changes[t] = replay.changes[slot] / unit
        window.change_weights[t] = weight * replay.change_weights[slot]
        window.delta_weights[t] = weight * replay.delta_weights[slot]
    return whole


@jit
def update(
    params: FloatArray,
    grads: FloatArray,
    first: FloatArray,
    second: FloatArray,
    updates: NDArray[np.int64],
    generators: NDArray[np.uint64],
    sizes: Sizes,
    replay: Replay,
    observed: int,
    unit: float,
    windows: int,
    window: Window,
    tr: Trace,
    objective: Objective,
    losses: NDArray[np.float64],
) -> None:
    """Draw windows for each member, by its own generator, and make one step of Adam on their mean.

    Parameters
    ----------
    params, grads, first, second : (M, P) ndarray of float32
        Weights, gradients (0 before and after) and Adam's moments. Here the members take turns,
        and all use the first row of `grads`, which so stays in the cache.
    updates : (M,) ndarray of int64
        Updates made by each member, raised by one unless its gradient was not finite.
    generators : (M,) ndarray of uint64
        States of the generators.
    sizes : Sizes
        Sizes of the model.
    replay : Replay
        The recent steps.
    observed : int
        Steps ever stored in `replay`; the newest is number ``observed - 1``. More than k + 1.
    unit : float
        Noise of a change of the log loss: the unit of the targets.
    windows : int
        Windows drawn for each member, with replacement: each learns from its own bootstrap
        sample.
    window, tr : Window, Trace
        Work arrays for windows of k steps.
    objective : Objective
        Weights of the loss and settings of Adam.
    losses : (M,) ndarray of float64
        Receive the mean loss of a window; NaN where every window was torn.
    """
    steps = window.changes.shape[0]
    oldest = max(0, observed - replay.changes.shape[0])
    # The state before a window is needed too.
    choices = observed - steps - oldest
    share = np.float32(1.0 / windows)
    for m in range(params.shape[0]):
        state = generators[m]
        loss = 0.0
        used = 0
        for _ in range(windows):
            state = next_state(state)
            start = oldest + 1 + int(unit_uniform(state) * np.float32(choices))
            for t in range(steps):
                for c in range(sizes.categoricals):
                    state = next_state(state)
                    window.uniforms[t, c] = unit_uniform(state)
            if load_window(replay, m, start, np.float32(unit), share, window, tr):
                used += 1
                loss += window_gradient(
                    params[m],
                    sizes,
                    window,
                    tr,
                    objective.dynamics / windows,
                    objective.representation / windows,
                    objective.free,
                    grads[0],
                )
        generators[m] = state
        losses[m] = loss * windows / used if used > 0 else np.nan
        if used > 0:
            norm = adam_update(
                params[m],
                grads[0],
                first[m],
                second[m],
                updates[m] + 1,
                objective.learning_rate,
                objective.beta1,
                objective.beta2,
                objective.epsilon,
                objective.max_norm,
            )
            if math.isfinite(norm):
                updates[m] += 1
