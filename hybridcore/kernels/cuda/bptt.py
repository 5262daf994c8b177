"""Loss and gradient of the RSSM over windows of steps, on the GPU: a block for each member.

Equations and shapes as in ``cpu.bptt``. Windows and traces have the members,
and the windows of each, as leading axes. Within a block threads share columns or rows, and no two
of them ever add to one number, so that a gradient is the same in every run.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hybridcore.dynamics.rssm.params import FloatArray, Sizes
from hybridcore.kernels.cpu import bptt as cpu
from hybridcore.kernels.cpu import rssm as cpu_rssm
from hybridcore.kernels.cpu.bptt import Trace, Window
from hybridcore.kernels.cpu.rssm import LOG_SCALE_LIMIT, ONE, TWO, ZERO, Classes
from hybridcore.kernels.cuda import cuda, device, kernel
from hybridcore.kernels.cuda.rssm import (
    affine,
    affine_of_pair,
    delta_mapped,
    delta_raw,
    drawn,
    encoded,
    moved,
    softmax,
    split,
    sum_of_rows,
    tanh,
)

log_scale = device(cpu_rssm.log_scale)
mixed = device(cpu_rssm.mixed)
laplace_nll = device(cpu.laplace_nll)
laplace_mean_slope = device(cpu.laplace_mean_slope)
laplace_scale_slope = device(cpu.laplace_scale_slope)
softplus_slope = device(cpu.softplus_slope)
sigmoid_slope = device(cpu.sigmoid_slope)
tanh_slope = device(cpu.tanh_slope)
divergence = device(cpu.divergence)
through_softmax = device(cpu.through_softmax)
gru_backward = device(cpu.gru_backward)


def traces(sizes: Sizes, steps: int, members: int) -> Trace:
    """Allocate the work arrays of `members` blocks, on the host, for windows of `steps` steps."""
    fields = cpu.trace(sizes, steps)
    return Trace(*(np.zeros((members, *field.shape), field.dtype) for field in fields))


@device
def trace_of(tr: Trace, m: int) -> Trace:
    """Take views of the work arrays of one member; of its gradients, one row for all steps."""
    return Trace(
        tr.hidden[m],
        tr.classes[m],
        tr.recurrent[m],
        tr.gates[m],
        tr.encodings[m],
        tr.posteriors[m],
        tr.raw_deltas[m],
        tr.divergences[m],
        tr.d_recurrent[m, 0],
        tr.d_posteriors[m, 0],
        tr.d_encodings[m, 0],
        tr.d_gates[m],
        tr.d_hidden[m],
        tr.d_delta[m, 0],
    )


@device
def window_of(windows: Window, m: int, i: int) -> Window:
    """Take views of window `i` of one member."""
    return Window(
        windows.features[m, i],
        windows.changes[m, i],
        windows.change_weights[m, i],
        windows.deltas[m, i],
        windows.delta_weights[m, i],
        windows.uniforms[m, i],
    )


@device
def add_transposed(
    weight: FloatArray, d: FloatArray, first: int, x: FloatArray, lane: int, lanes: int
) -> None:
    """``x += weight[:, first:] @ d[first:]``, a row each thread."""
    for i in range(lane, x.shape[0], lanes):
        total = ZERO
        for j in range(first, d.shape[0]):
            total += weight[i, j] * d[j]
        x[i] += total


@device
def add_outer(x: FloatArray, d: FloatArray, grad: FloatArray, lane: int, lanes: int) -> None:
    """``grad[:, :n] += outer(x, d)`` for n columns of d."""
    for j in range(lane, d.shape[0], lanes):
        for i in range(x.shape[0]):
            grad[i, j] += x[i] * d[j]


@device
def add(d: FloatArray, grad: FloatArray, lane: int, lanes: int) -> None:
    """``grad[:n] += d`` for n numbers of d."""
    for j in range(lane, d.shape[0], lanes):
        grad[j] += d[j]


@device
def add_to_rows(
    classes: Classes, n_classes: int, d: FloatArray, grad: FloatArray, lane: int, lanes: int
) -> None:
    """``grad[:, :n] += outer(s, d)`` for one-hot vectors s and n columns of d."""
    for j in range(lane, d.shape[0], lanes):
        for c in range(classes.shape[0]):
            grad[c * n_classes + classes[c], j] += d[j]


@device
def loss_slopes(
    window: Window, t: int, tr: Trace, sizes: Sizes, head: int, lane: int, lanes: int
) -> None:
    """Gradients of step t in the outputs of the loss head and in the raw ones of the delta head."""
    if lane == 0:
        bend = tanh(tr.recurrent[t + 1, head + 1] / LOG_SCALE_LIMIT)
        error = window.changes[t] - tr.recurrent[t + 1, head]
        weight = window.change_weights[t]
        d_mean = weight * laplace_mean_slope(error, log_scale(bend))
        d_raw = weight * laplace_scale_slope(error, log_scale(bend)) * tanh_slope(bend)
        tr.d_recurrent[head] = d_mean
        tr.d_recurrent[head + 1] = d_raw
        tr.d_gates[3 * sizes.latent] = d_mean
        tr.d_gates[3 * sizes.latent + 1] = d_raw
    if window.delta_weights[t] > ZERO:
        for j in range(lane, sizes.outputs, lanes):
            raw = tr.raw_deltas[t, j]
            mapped = delta_mapped(raw, j)
            slope = sigmoid_slope(mapped) if j == 1 else softplus_slope(raw)
            miss = mapped - window.deltas[t, j]
            tr.d_delta[j] = TWO * window.delta_weights[t] * miss * slope


@device
def logit_slopes(
    tr: Trace,
    t: int,
    sizes: Sizes,
    dynamics: float,
    representation: float,
    free: float,
    lane: int,
    lanes: int,
) -> None:
    """Gradients of step t in the logits of prior and posterior, a categorical each thread."""
    n_k, n_p = sizes.classes, 3 * sizes.latent
    uniform = ONE / np.float32(n_k)
    for c in range(lane, sizes.categoricals, lanes):
        a, b = c * n_k, (c + 1) * n_k
        prior, posterior = tr.recurrent[t + 1, n_p + a : n_p + b], tr.posteriors[t, a:b]
        d_prior, d_posterior = tr.d_recurrent[n_p + a : n_p + b], tr.d_posteriors[a:b]
        for k in range(n_k):
            d_prior[k] = ZERO
        if tr.divergences[t] > free:
            for k in range(n_k):
                ratio = mixed(posterior[k], uniform) / mixed(prior[k], uniform)
                d_prior[k] = -np.float32(dynamics) * ratio
                d_posterior[k] += np.float32(representation) * np.float32(math.log(ratio))
        through_softmax(prior, n_k, d_prior)
        through_softmax(posterior, n_k, d_posterior)


@device
def gate_slopes(tr: Trace, t: int, g: Any, lane: int, lanes: int) -> None:
    """Gradients of step t in the gates' arguments and in the old hidden state, by columns."""
    n = tr.d_hidden.shape[0]
    for j in range(lane, n, lanes):
        d_gates = tr.d_gates[j : 3 * n : n]
        gru_backward(
            tr.gates[t, j : 3 * n : n],
            tr.recurrent[t, j : 3 * n : n],
            tr.hidden[t, j : j + 1],
            d_gates,
            tr.d_recurrent[j : 3 * n : n],
            tr.d_hidden[j : j + 1],
        )
        add(d_gates, g.stochastic_bias[j : 3 * n : n], 0, 1)


@kernel
def window_gradients(
    params: FloatArray,
    sizes: Sizes,
    windows: Window,
    hidden: FloatArray,
    classes: Classes,
    whole: Any,
    work: Trace,
    dynamics: float,
    representation: float,
    free: float,
    grads: FloatArray,
    losses: Any,
) -> None:
    """Losses of windows; their gradients are added up, a block each member.

    Parameters
    ----------
    params, grads : (M, P) ndarray of float32
        Weights and gradients.
    sizes : Sizes
        Sizes of the model.
    windows : Window
        Arrays with the leading axes (M, W): W windows for each member.
    hidden, classes : (M, W, L) ndarray of float32, (M, W, categoricals) ndarray of int64
        States before the windows.
    whole : (M, W) ndarray of bool
        Windows to use; the loss of the others is 0.
    work : Trace
        Work arrays from :func:`traces`. What the last window leaves stays in them.
    dynamics, representation, free : float
        As in ``cpu.bptt.window_gradient``.
    losses : (M, W) ndarray of float64
        Receive the losses.
    """
    m, lane, lanes = cuda.blockIdx.x, cuda.threadIdx.x, cuda.blockDim.x
    n_l, n_k, n_c = sizes.latent, sizes.classes, sizes.categoricals
    n_s, n_p = n_c * n_k, 3 * n_l
    head = n_p + n_s
    w, g, tr = split(params[m], sizes), split(grads[m], sizes), trace_of(work, m)
    for i in range(whole.shape[1]):
        if lane == 0:
            losses[m, i] = 0.0
        if not whole[m, i]:
            continue
        window = window_of(windows, m, i)
        steps = window.changes.shape[0]
        for j in range(lane, n_l, lanes):
            tr.hidden[0, j] = hidden[m, i, j]
            tr.d_hidden[j] = ZERO
        for c in range(lane, n_c, lanes):
            tr.classes[0, c] = classes[m, i, c]
        for j in range(lane, tr.d_recurrent.shape[0], lanes):
            tr.d_recurrent[j] = ZERO
        for j in range(lane, tr.d_gates.shape[0], lanes):
            tr.d_gates[j] = ZERO
        cuda.syncthreads()
        loss = 0.0

        affine(tr.hidden[0], w.hidden_weight, w.hidden_bias, tr.recurrent[0], lane, lanes)
        sum_of_rows(
            tr.classes[0], n_k, w.stochastic_weight, w.stochastic_bias, tr.gates[0], lane, lanes
        )
        cuda.syncthreads()
        for t in range(steps):
            state, recurrent, gates = tr.hidden[t + 1], tr.recurrent[t + 1], tr.gates[t + 1]
            drawn_classes, posterior = tr.classes[t + 1], tr.posteriors[t]
            for j in range(lane, n_l, lanes):
                state[j] = tr.hidden[t, j]
            moved(tr.gates[t], tr.recurrent[t], state, lane, lanes)
            encoded(window.features[t], w, tr.encodings[t], lane, lanes)
            cuda.syncthreads()
            affine(state, w.hidden_weight, w.hidden_bias, recurrent, lane, lanes)
            affine_of_pair(
                state,
                tr.encodings[t],
                w.posterior_weight,
                w.posterior_bias,
                posterior,
                lane,
                lanes,
            )
            cuda.syncthreads()
            drawn(posterior, n_k, window.uniforms[t], drawn_classes, lane, lanes)
            for c in range(lane, n_c, lanes):
                softmax(recurrent[n_p + c * n_k : n_p + (c + 1) * n_k], 1, n_k)
            cuda.syncthreads()
            sum_of_rows(
                drawn_classes, n_k, w.stochastic_weight, w.stochastic_bias, gates, lane, lanes
            )
            if window.delta_weights[t] > ZERO:
                delta_raw(state, drawn_classes, n_k, w, tr.raw_deltas[t], lane, lanes)
            cuda.syncthreads()
            if lane == 0:
                tr.divergences[t] = divergence(posterior, recurrent[n_p:head], n_k)
                recurrent[head] += gates[n_p]
                recurrent[head + 1] += gates[n_p + 1]
                error = window.changes[t] - recurrent[head]
                log_b = log_scale(tanh(recurrent[head + 1] / LOG_SCALE_LIMIT))
                loss += window.change_weights[t] * laplace_nll(error, log_b)
                loss += (dynamics + representation) * max(free, tr.divergences[t])
                if window.delta_weights[t] > ZERO:
                    for j in range(sizes.outputs):
                        miss = delta_mapped(tr.raw_deltas[t, j], j) - window.deltas[t, j]
                        loss += window.delta_weights[t] * miss * miss

        # No need to meet: of what the forward pass wrote last, a thread first reads its own.
        first = n_p
        for t in range(steps - 1, -1, -1):
            state, drawn_classes = tr.hidden[t + 1], tr.classes[t + 1]
            loss_slopes(window, t, tr, sizes, head, lane, lanes)
            for j in range(lane, n_s, lanes):
                tr.d_posteriors[j] = ZERO
            cuda.syncthreads()
            add_transposed(w.stochastic_weight, tr.d_gates, first, tr.d_posteriors, lane, lanes)
            add_to_rows(drawn_classes, n_k, tr.d_gates, g.stochastic_weight, lane, lanes)
            if window.delta_weights[t] > ZERO:
                add_transposed(w.delta_weight, tr.d_delta, 0, tr.d_hidden, lane, lanes)
                add_transposed(w.delta_weight[n_l:], tr.d_delta, 0, tr.d_posteriors, lane, lanes)
                add_outer(state, tr.d_delta, g.delta_weight, lane, lanes)
                add_to_rows(drawn_classes, n_k, tr.d_delta, g.delta_weight[n_l:], lane, lanes)
                add(tr.d_delta, g.delta_bias, lane, lanes)
            cuda.syncthreads()
            logit_slopes(tr, t, sizes, dynamics, representation, free, lane, lanes)
            for j in range(lane, n_l, lanes):
                tr.d_encodings[j] = ZERO
            cuda.syncthreads()
            d_posterior = tr.d_posteriors
            add_transposed(w.hidden_weight, tr.d_recurrent, first, tr.d_hidden, lane, lanes)
            add_transposed(w.posterior_weight, d_posterior, 0, tr.d_hidden, lane, lanes)
            add_transposed(w.posterior_weight[n_l:], d_posterior, 0, tr.d_encodings, lane, lanes)
            for j in range(lane, n_l, lanes):
                tr.d_encodings[j] *= tanh_slope(tr.encodings[t, j])
            add_outer(state, tr.d_recurrent, g.hidden_weight, lane, lanes)
            add(tr.d_recurrent, g.hidden_bias, lane, lanes)
            add_outer(state, d_posterior, g.posterior_weight, lane, lanes)
            add_outer(tr.encodings[t], d_posterior, g.posterior_weight[n_l:], lane, lanes)
            add(d_posterior, g.posterior_bias, lane, lanes)
            cuda.syncthreads()
            add_outer(window.features[t], tr.d_encodings, g.encoder_weight, lane, lanes)
            add(tr.d_encodings, g.encoder_bias, lane, lanes)
            gate_slopes(tr, t, g, lane, lanes)
            first = 0
        cuda.syncthreads()
        # Of the initial state, only the gates of the first step saw anything.
        add_outer(tr.hidden[0], tr.d_recurrent[:n_p], g.hidden_weight, lane, lanes)
        add(tr.d_recurrent[:n_p], g.hidden_bias, lane, lanes)
        add_to_rows(tr.classes[0], n_k, tr.d_gates[:n_p], g.stochastic_weight, lane, lanes)
        cuda.syncthreads()
        if lane == 0:
            losses[m, i] = loss
