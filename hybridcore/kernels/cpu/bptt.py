"""Loss and gradient of the RSSM over a window of steps, on the CPU.

Backpropagation is truncated to the window: its initial state is a constant (Williams & Peng 1990).
Within it the gradient runs through the hidden state and, straight through, through the sampled
classes: their one-hot vectors have the gradient of their probabilities (DreamerV2, Hafner et al.
2021, alg. 1). Shapes are named as in ``rssm``, with k for the steps of a window.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from hybridcore.dynamics.rssm import params as layout
from hybridcore.dynamics.rssm.params import FloatArray, Sizes
from hybridcore.kernels import bodies
from hybridcore.kernels.cpu import jit, jit_sums
from hybridcore.kernels.cpu.rssm import (
    LOG_SCALE_LIMIT,
    ONE,
    TWO,
    ZERO,
    Classes,
    add_product,
    copy,
    delta_mapped,
    delta_raw,
    encode_member,
    from_classes,
    from_hidden,
    gru,
    log_scale,
    mixed,
    sample,
    softmax,
    split,
    tanh,
)

laplace_nll = jit(bodies.laplace_nll)
laplace_mean_slope = jit(bodies.laplace_mean_slope)
laplace_scale_slope = jit(bodies.laplace_scale_slope)
softplus_slope = jit(bodies.softplus_slope)
sigmoid_slope = jit(bodies.sigmoid_slope)
tanh_slope = jit(bodies.tanh_slope)
mixed_slope = jit(bodies.mixed_slope)


class Window(NamedTuple):
    """Data of k consecutive steps.

    Attributes
    ----------
    features : (k, F) ndarray of float32
        Observations.
    changes, change_weights : (k,) ndarray of float32
        Change of the log loss at the step after each, in units of its noise, and its weight.
    deltas, delta_weights : (k, D) and (k,) ndarray of float32
        Targets of the delta head after its mapping, and their weights; 0 where there is none.
    uniforms : (k, categoricals) ndarray of float32
        Numbers in [0, 1) that choose the classes of the posterior.
    """

    features: FloatArray
    changes: FloatArray
    change_weights: FloatArray
    deltas: FloatArray
    delta_weights: FloatArray
    uniforms: FloatArray


class Trace(NamedTuple):
    """What the forward pass leaves for the backward pass, and its scratch; see :func:`trace`."""

    hidden: FloatArray  # (k + 1, L), the initial one first
    classes: Classes  # (k + 1, categoricals), the initial ones first
    recurrent: FloatArray  # (k + 1, H), what follows from each hidden; prior softmax in its place
    gates: FloatArray  # (k + 1, I), what follows from each of classes, then the gates
    encodings: FloatArray  # (k, L)
    posteriors: FloatArray  # (k, S), softmax
    raw_deltas: FloatArray  # (k, D)
    divergences: FloatArray  # (k,), nats
    d_recurrent: FloatArray  # (H,)
    d_gates: FloatArray  # (I,)
    d_hidden: FloatArray  # (L,)
    d_encoding: FloatArray  # (L,)
    d_stochastic: FloatArray  # (S,)
    d_prior: FloatArray  # (S,)
    d_delta: FloatArray  # (D,)


def trace(sizes: Sizes, steps: int) -> Trace:
    """Allocate the work arrays for windows of `steps` steps."""
    w = layout.split(np.zeros(layout.parameter_count(sizes), np.float32), sizes)
    n_h, n_i, n_s = len(w.hidden_bias), len(w.stochastic_bias), len(w.posterior_bias)
    rows = layout.aligned_zeros
    return Trace(
        hidden=rows(steps + 1, sizes.latent),
        classes=np.zeros((steps + 1, sizes.categoricals), np.int64),
        recurrent=rows(steps + 1, n_h),
        gates=rows(steps + 1, n_i),
        encodings=rows(steps, sizes.latent),
        posteriors=rows(steps, n_s),
        raw_deltas=rows(steps, sizes.outputs),
        divergences=rows(steps),
        d_recurrent=rows(n_h),
        d_gates=rows(n_i),
        d_hidden=rows(sizes.latent),
        d_encoding=rows(sizes.latent),
        d_stochastic=rows(n_s),
        d_prior=rows(n_s),
        d_delta=rows(sizes.outputs),
    )


@jit_sums
def add_transposed(weight: FloatArray, d: FloatArray, first: int, x: FloatArray) -> None:
    """``x += weight[:, first:] @ d[first:]``, by rows: the gradient in the input of a product."""
    # Slices, because an index that starts at `first` might be negative, and numba would check.
    tail = d[first:]
    for i in range(x.shape[0]):
        row = weight[i, first:]
        total = ZERO
        for j in range(tail.shape[0]):
            total += row[j] * tail[j]
        x[i] += total


@jit
def add_outer(x: FloatArray, d: FloatArray, grad: FloatArray) -> None:
    """``grad += outer(x, d)``: the gradient in the weight of a product."""
    for i in range(x.shape[0]):
        x0 = x[i]
        for j in range(d.shape[0]):
            grad[i, j] += x0 * d[j]


@jit
def add(d: FloatArray, grad: FloatArray) -> None:
    """``grad += d``."""
    for j in range(d.shape[0]):
        grad[j] += d[j]


@jit
def add_to_rows(
    classes: Classes, n_classes: int, d: FloatArray, first_row: int, grad: FloatArray
) -> None:
    """``grad[first_row:] += outer(s, d)`` for one-hot vectors s."""
    for c in range(classes.shape[0]):
        row = first_row + c * n_classes + classes[c]
        for j in range(d.shape[0]):
            grad[row, j] += d[j]


@jit
def divergence(posterior: FloatArray, prior: FloatArray, n_classes: int) -> float:
    """KL divergence in nats of the posterior from the prior, summed over the categoricals."""
    uniform = ONE / np.float32(n_classes)
    total = 0.0
    for j in range(posterior.shape[0]):
        q = mixed(posterior[j], uniform)
        total += float(q * math.log(q / mixed(prior[j], uniform)))
    return total


@jit
def through_softmax(probabilities: FloatArray, n_classes: int, d: FloatArray) -> None:
    """Turn the gradient in the mixed probabilities into that in the logits, in place."""
    for first in range(0, d.shape[0], n_classes):
        mean = ZERO
        for k in range(first, first + n_classes):
            mean += probabilities[k] * d[k]
        for k in range(first, first + n_classes):
            d[k] = mixed_slope(probabilities[k], d[k], mean)


@jit
def window_forward(w: Any, sizes: Sizes, window: Window, tr: Trace) -> float:
    """Run the model over the window from row 0 of ``tr.hidden`` and ``tr.classes``.

    Returns the loss without the weights of the KL terms: see :func:`window_gradient`.
    """
    n_l, n_k = sizes.latent, sizes.classes
    n_s = sizes.categoricals * n_k
    loss = 0.0
    from_hidden(tr.hidden[0], w, tr.recurrent[0])
    from_classes(tr.classes[0], n_k, w, tr.gates[0])
    for t in range(window.changes.shape[0]):
        hidden, recurrent = tr.hidden[t + 1], tr.recurrent[t + 1]
        prior, posterior = recurrent[3 * n_l : 3 * n_l + n_s], tr.posteriors[t]
        copy(tr.hidden[t], hidden)
        gru(tr.gates[t], tr.recurrent[t], hidden)
        from_hidden(hidden, w, recurrent)
        softmax(prior, sizes.categoricals, n_k)
        encode_member(window.features[t], w, tr.encodings[t])
        copy(w.posterior_bias, posterior)
        add_product(hidden, w.posterior_weight[:n_l], posterior)
        add_product(tr.encodings[t], w.posterior_weight[n_l:], posterior)
        softmax(posterior, sizes.categoricals, n_k)
        tr.divergences[t] = divergence(posterior, prior, n_k)
        sample(posterior, n_k, window.uniforms[t], tr.classes[t + 1])
        from_classes(tr.classes[t + 1], n_k, w, tr.gates[t + 1])
        # The sums of the two shares take the place of the first of them.
        recurrent[3 * n_l + n_s] += tr.gates[t + 1, 3 * n_l]
        recurrent[3 * n_l + n_s + 1] += tr.gates[t + 1, 3 * n_l + 1]
        error = window.changes[t] - recurrent[3 * n_l + n_s]
        log_b = log_scale(tanh(recurrent[3 * n_l + n_s + 1] / LOG_SCALE_LIMIT))
        loss += window.change_weights[t] * laplace_nll(error, log_b)
        if window.delta_weights[t] > ZERO:
            raw = tr.raw_deltas[t]
            delta_raw(hidden, tr.classes[t + 1], n_k, w, raw)
            for j in range(sizes.outputs):
                miss = delta_mapped(raw[j], j) - window.deltas[t, j]
                loss += window.delta_weights[t] * miss * miss
    return loss


@jit
def window_gradient(
    params: FloatArray,
    sizes: Sizes,
    window: Window,
    tr: Trace,
    dynamics: float,
    representation: float,
    free: float,
    grad: FloatArray,
) -> float:
    """Loss of a window for one member; its gradient is added to `grad`.

    The loss is the sum over the steps of the weighted negative log likelihood of the change, the
    weighted squared error of the delta head, and the balanced KL divergence of the posterior q
    from the prior p (DreamerV3, Hafner et al. 2023, eq. 5), with sg for "constant":
    ``dynamics * max(free, KL(sg(q), p)) + representation * max(free, KL(q, sg(p)))``.

    Parameters
    ----------
    params, grad : (P,) ndarray of float32
        Weights and gradient.
    sizes : Sizes
        Sizes of the model.
    window : Window
        The data of k steps.
    tr : Trace
        Work arrays for k steps; row 0 of its `hidden` and `classes` is the initial state.
    dynamics, representation : float
        Weights of the KL terms, at least 0.
    free : float
        Nats of divergence that cost nothing.

    Returns
    -------
    float
        The loss.
    """
    n_l, n_k = sizes.latent, sizes.classes
    n_s = sizes.categoricals * n_k
    w, g = split(params, sizes), split(grad, sizes)
    loss = window_forward(w, sizes, window, tr)
    steps = window.changes.shape[0]
    uniform = ONE / np.float32(n_k)
    d_loss = 3 * n_l + n_s
    # Without a step after the last, no gradient reaches the gates: only columns from 3 L on count.
    first = 3 * n_l
    tr.d_recurrent[:] = ZERO
    tr.d_gates[:] = ZERO
    tr.d_hidden[:] = ZERO
    for t in range(steps - 1, -1, -1):
        hidden, classes = tr.hidden[t + 1], tr.classes[t + 1]
        prior, posterior = tr.recurrent[t + 1, 3 * n_l : d_loss], tr.posteriors[t]

        bend = tanh(tr.recurrent[t + 1, d_loss + 1] / LOG_SCALE_LIMIT)
        error = window.changes[t] - tr.recurrent[t + 1, d_loss]
        weight = window.change_weights[t]
        d_mean = weight * laplace_mean_slope(error, log_scale(bend))
        d_raw = weight * laplace_scale_slope(error, log_scale(bend)) * tanh_slope(bend)
        tr.d_recurrent[d_loss] = d_mean
        tr.d_recurrent[d_loss + 1] = d_raw
        tr.d_gates[3 * n_l] = d_mean
        tr.d_gates[3 * n_l + 1] = d_raw

        tr.d_stochastic[:] = ZERO
        add_transposed(w.stochastic_weight, tr.d_gates, first, tr.d_stochastic)
        add_to_rows(classes, n_k, tr.d_gates, 0, g.stochastic_weight)
        if window.delta_weights[t] > ZERO:
            for j in range(sizes.outputs):
                raw = tr.raw_deltas[t, j]
                mapped = delta_mapped(raw, j)
                slope = sigmoid_slope(mapped) if j == 1 else softplus_slope(raw)
                miss = mapped - window.deltas[t, j]
                tr.d_delta[j] = TWO * window.delta_weights[t] * miss * slope
            add_transposed(w.delta_weight[:n_l], tr.d_delta, 0, tr.d_hidden)
            add_transposed(w.delta_weight[n_l:], tr.d_delta, 0, tr.d_stochastic)
            add_outer(hidden, tr.d_delta, g.delta_weight[:n_l])
            add_to_rows(classes, n_k, tr.d_delta, n_l, g.delta_weight)
            add(tr.d_delta, g.delta_bias)

        d_posterior, d_prior = tr.d_stochastic, tr.d_prior
        d_prior[:] = ZERO
        loss += (dynamics + representation) * max(free, tr.divergences[t])
        if tr.divergences[t] > free:
            for j in range(n_s):
                ratio = mixed(posterior[j], uniform) / mixed(prior[j], uniform)
                d_prior[j] = -np.float32(dynamics) * ratio
                # Less 1, the same for every class: it falls out in the softmax.
                d_posterior[j] += np.float32(representation) * np.float32(math.log(ratio))
        through_softmax(prior, n_k, d_prior)
        through_softmax(posterior, n_k, d_posterior)
        copy(d_prior, tr.d_recurrent[3 * n_l : d_loss])

        add_transposed(w.hidden_weight, tr.d_recurrent, first, tr.d_hidden)
        add_outer(hidden, tr.d_recurrent, g.hidden_weight)
        add(tr.d_recurrent, g.hidden_bias)
        add_transposed(w.posterior_weight[:n_l], d_posterior, 0, tr.d_hidden)
        add_outer(hidden, d_posterior, g.posterior_weight[:n_l])
        add_outer(tr.encodings[t], d_posterior, g.posterior_weight[n_l:])
        add(d_posterior, g.posterior_bias)

        tr.d_encoding[:] = ZERO
        add_transposed(w.posterior_weight[n_l:], d_posterior, 0, tr.d_encoding)
        for j in range(n_l):
            tr.d_encoding[j] *= tanh_slope(tr.encodings[t, j])
        add_outer(window.features[t], tr.d_encoding, g.encoder_weight)
        add(tr.d_encoding, g.encoder_bias)

        gru_backward(tr.gates[t], tr.recurrent[t], tr.hidden[t], tr)
        add(tr.d_gates[: 3 * n_l], g.stochastic_bias)
        first = 0
    # Of the initial state, only the gates of the first step saw anything.
    tr.d_recurrent[3 * n_l :] = ZERO
    tr.d_gates[3 * n_l :] = ZERO
    add_outer(tr.hidden[0], tr.d_recurrent, g.hidden_weight)
    add(tr.d_recurrent, g.hidden_bias)
    add_to_rows(tr.classes[0], n_k, tr.d_gates, 0, g.stochastic_weight)
    return loss


@jit
def gru_backward(gates: FloatArray, recurrent: FloatArray, old: FloatArray, tr: Trace) -> None:
    """Turn the gradient in the new hidden state into those in the gates' arguments and the old.

    The first 3 L of ``tr.d_gates`` and ``tr.d_recurrent`` receive the gradients in the two shares
    of the arguments; ``tr.d_hidden`` that in the old hidden state, but for what its recurrent
    share still adds.
    """
    n = old.shape[0]
    for j in range(n):
        reset, update, candidate = gates[j], gates[n + j], gates[2 * n + j]
        d = tr.d_hidden[j]
        d_candidate = d * (ONE - update) * tanh_slope(candidate)
        d_update = d * (old[j] - candidate) * sigmoid_slope(update)
        d_reset = d_candidate * recurrent[2 * n + j] * sigmoid_slope(reset)
        tr.d_gates[j] = d_reset
        tr.d_gates[n + j] = d_update
        tr.d_gates[2 * n + j] = d_candidate
        tr.d_recurrent[j] = d_reset
        tr.d_recurrent[n + j] = d_update
        tr.d_recurrent[2 * n + j] = d_candidate * reset
        tr.d_hidden[j] = d * update
