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
from hybridcore.kernels.cpu import inlined, part, part_sums
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

laplace_nll = part(bodies.laplace_nll)
laplace_mean_slope = part(bodies.laplace_mean_slope)
laplace_scale_slope = part(bodies.laplace_scale_slope)
softplus_slope = part(bodies.softplus_slope)
sigmoid_slope = part(bodies.sigmoid_slope)
tanh_slope = part(bodies.tanh_slope)
mixed_slope = part(bodies.mixed_slope)


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
    # Gradients. Of d_recurrent, the gates of the last row and the rest of the first one stay 0: no
    # step follows the window, and of its initial state only the gates saw anything.
    d_recurrent: FloatArray  # (k + 1, H)
    d_posteriors: FloatArray  # (k, S), that in the stochastic state before it becomes the logits'
    d_encodings: FloatArray  # (k, L)
    d_gates: FloatArray  # (I,)
    d_hidden: FloatArray  # (L,)
    d_delta: FloatArray  # (1, D)


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
        d_recurrent=rows(steps + 1, n_h),
        d_posteriors=rows(steps, n_s),
        d_encodings=rows(steps, sizes.latent),
        d_gates=rows(n_i),
        d_hidden=rows(sizes.latent),
        d_delta=rows(1, sizes.outputs),
    )


@part
def clear(x: FloatArray) -> None:
    """``x[:] = 0`` without the checks of a slice assignment."""
    for j in range(x.shape[0]):
        x[j] = ZERO


@part_sums
def add_transposed(weight: FloatArray, d: FloatArray, x: FloatArray) -> None:
    """``x += weight @ d``, four rows at a time: the gradient in the input of a product."""
    rows, columns = weight.shape
    last = rows - 1
    for i in range(0, rows, 4):
        # Beyond the last row the last one again, and what comes of it is not used.
        i1, i2, i3 = min(i + 1, last), min(i + 2, last), min(i + 3, last)
        s0 = s1 = s2 = s3 = ZERO
        for j in range(columns):
            dj = d[j]
            s0 += weight[i, j] * dj
            s1 += weight[i1, j] * dj
            s2 += weight[i2, j] * dj
            s3 += weight[i3, j] * dj
        x[i] += s0
        if i < i1:
            x[i1] += s1
        if i1 < i2:
            x[i2] += s2
        if i2 < i3:
            x[i3] += s3


@part
def add_outers(x: FloatArray, d: FloatArray, grad: FloatArray) -> None:
    """``grad += x.T @ d``: the gradient in the weight of a product, of all steps.

    Four steps at a time: each pass over `grad` costs a load and a store.
    """
    steps, last = x.shape[0], x.shape[0] - 1
    for t in range(0, steps, 4):
        t1, t2, t3 = min(t + 1, last), min(t + 2, last), min(t + 3, last)
        for i in range(x.shape[1]):
            # Beyond the last step the last one again, times 0.
            x0 = x[t, i]
            x1 = x[t1, i] if t < t1 else ZERO
            x2 = x[t2, i] if t1 < t2 else ZERO
            x3 = x[t3, i] if t2 < t3 else ZERO
            for j in range(d.shape[1]):
                # From the left: four fused products.
                sum1 = grad[i, j] + x0 * d[t, j] + x1 * d[t1, j]
                grad[i, j] = sum1 + x2 * d[t2, j] + x3 * d[t3, j]


@part
def add_rows(d: FloatArray, grad: FloatArray) -> None:
    """``grad += d.sum(axis=0)``: the gradient in a bias, of all steps."""
    for t in range(d.shape[0]):
        for j in range(d.shape[1]):
            grad[j] += d[t, j]


@part
def add_to_rows(classes: Classes, n_classes: int, d: FloatArray, grad: FloatArray) -> None:
    """``grad += outer(s, d)`` for one-hot vectors s."""
    for c in range(classes.shape[0]):
        row = c * n_classes + classes[c]
        for j in range(d.shape[0]):
            grad[row, j] += d[j]


@part
def divergence(posterior: FloatArray, prior: FloatArray, n_classes: int) -> float:
    """KL divergence in nats of the posterior from the prior, summed over the categoricals."""
    uniform = ONE / np.float32(n_classes)
    total = 0.0
    for j in range(posterior.shape[0]):
        q = mixed(posterior[j], uniform)
        total += float(q * math.log(q / mixed(prior[j], uniform)))
    return total


@part
def through_softmax(probabilities: FloatArray, n_classes: int, d: FloatArray) -> None:
    """Turn the gradient in the mixed probabilities into that in the logits, in place."""
    for first in range(0, d.shape[0], n_classes):
        mean = ZERO
        for k in range(first, first + n_classes):
            mean += probabilities[k] * d[k]
        for k in range(first, first + n_classes):
            d[k] = mixed_slope(probabilities[k], d[k], mean)


@inlined
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


@inlined
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
    clear(tr.d_gates)
    clear(tr.d_hidden)
    for t in range(steps - 1, -1, -1):
        classes, d_recurrent = tr.classes[t + 1], tr.d_recurrent[t + 1]
        prior, posterior = tr.recurrent[t + 1, 3 * n_l : d_loss], tr.posteriors[t]
        d_prior, d_posterior = d_recurrent[3 * n_l : d_loss], tr.d_posteriors[t]

        bend = tanh(tr.recurrent[t + 1, d_loss + 1] / LOG_SCALE_LIMIT)
        error = window.changes[t] - tr.recurrent[t + 1, d_loss]
        weight = window.change_weights[t]
        d_mean = weight * laplace_mean_slope(error, log_scale(bend))
        d_raw = weight * laplace_scale_slope(error, log_scale(bend)) * tanh_slope(bend)
        d_recurrent[d_loss] = d_mean
        d_recurrent[d_loss + 1] = d_raw
        tr.d_gates[3 * n_l] = d_mean
        tr.d_gates[3 * n_l + 1] = d_raw

        clear(d_posterior)
        add_transposed(w.stochastic_weight, tr.d_gates, d_posterior)
        add_to_rows(classes, n_k, tr.d_gates, g.stochastic_weight)
        if window.delta_weights[t] > ZERO:
            for j in range(sizes.outputs):
                raw = tr.raw_deltas[t, j]
                mapped = delta_mapped(raw, j)
                slope = sigmoid_slope(mapped) if j == 1 else softplus_slope(raw)
                miss = mapped - window.deltas[t, j]
                tr.d_delta[0, j] = TWO * window.delta_weights[t] * miss * slope
            add_transposed(w.delta_weight[:n_l], tr.d_delta[0], tr.d_hidden)
            add_transposed(w.delta_weight[n_l:], tr.d_delta[0], d_posterior)
            add_outers(tr.hidden[t + 1 : t + 2], tr.d_delta, g.delta_weight[:n_l])
            add_to_rows(classes, n_k, tr.d_delta[0], g.delta_weight[n_l:])
            add_rows(tr.d_delta, g.delta_bias)

        clear(d_prior)
        loss += (dynamics + representation) * max(free, tr.divergences[t])
        if tr.divergences[t] > free:
            for j in range(n_s):
                ratio = mixed(posterior[j], uniform) / mixed(prior[j], uniform)
                d_prior[j] = -np.float32(dynamics) * ratio
                # Less 1, the same for every class: it falls out in the softmax.
                d_posterior[j] += np.float32(representation) * np.float32(math.log(ratio))
        through_softmax(prior, n_k, d_prior)
        through_softmax(posterior, n_k, d_posterior)

        add_transposed(w.hidden_weight, d_recurrent, tr.d_hidden)
        add_transposed(w.posterior_weight[:n_l], d_posterior, tr.d_hidden)
        d_encoding = tr.d_encodings[t]
        clear(d_encoding)
        add_transposed(w.posterior_weight[n_l:], d_posterior, d_encoding)
        for j in range(n_l):
            d_encoding[j] *= tanh_slope(tr.encodings[t, j])

        gru_backward(
            tr.gates[t],
            tr.recurrent[t],
            tr.hidden[t],
            tr.d_gates,
            tr.d_recurrent[t],
            tr.d_hidden,
        )
        for j in range(3 * n_l):
            g.stochastic_bias[j] += tr.d_gates[j]
    clear(tr.d_gates[3 * n_l :])
    add_to_rows(tr.classes[0], n_k, tr.d_gates, g.stochastic_weight)
    add_outers(tr.hidden, tr.d_recurrent, g.hidden_weight)
    add_rows(tr.d_recurrent, g.hidden_bias)
    add_outers(tr.hidden[1:], tr.d_posteriors, g.posterior_weight[:n_l])
    add_outers(tr.encodings, tr.d_posteriors, g.posterior_weight[n_l:])
    add_rows(tr.d_posteriors, g.posterior_bias)
    add_outers(window.features, tr.d_encodings, g.encoder_weight)
    add_rows(tr.d_encodings, g.encoder_bias)
    return loss


@inlined
def gru_backward(
    gates: FloatArray,
    recurrent: FloatArray,
    old: FloatArray,
    d_gates: FloatArray,
    d_recurrent: FloatArray,
    d_hidden: FloatArray,
) -> None:
    """Turn the gradient in the new hidden state into those in the gates' arguments and the old.

    The first 3 L of `d_gates` and `d_recurrent` receive the gradients in the two shares of the
    arguments; `d_hidden` that in the old hidden state, but for what its recurrent share still adds.
    """
    n = old.shape[0]
    for j in range(n):
        reset, update, candidate = gates[j], gates[n + j], gates[2 * n + j]
        d = d_hidden[j]
        d_candidate = d * (ONE - update) * tanh_slope(candidate)
        d_update = d * (old[j] - candidate) * sigmoid_slope(update)
        d_reset = d_candidate * recurrent[2 * n + j] * sigmoid_slope(reset)
        d_gates[j] = d_reset
        d_gates[n + j] = d_update
        d_gates[2 * n + j] = d_candidate
        d_recurrent[j] = d_reset
        d_recurrent[n + j] = d_update
        d_recurrent[2 * n + j] = d_candidate * reset
        d_hidden[j] = d * update
