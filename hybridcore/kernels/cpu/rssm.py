"""Forward pass of the RSSM on the CPU: encoding, posterior step, prior rollouts, heads.

The equations are those of PlaNet (Hafner et al. 2019) with the categorical states of DreamerV2
(Hafner et al. 2021): ``h_t = GRU(s_{t-1}, h_{t-1})``, a prior over ``s_t`` from ``h_t``, and a
posterior from ``h_t`` and the encoded features. Products with a matrix go row by row,
``y += x[i] * w[i]``, which vectorises. A stochastic state is kept as the classes of its one-hot
vectors, so that products with it are sums of a few rows.

Everything is float32. L is the latent size, S = categoricals x classes, M the number of members.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybridcore.dynamics.rssm import params as layout
from hybridcore.dynamics.rssm.params import FloatArray, Sizes
from hybridcore.kernels import bodies
from hybridcore.kernels.cpu import jit, part

Classes = NDArray[np.int64]

split = part(layout.split)
tanh = jit(bodies.tanh)
sigmoid = part(bodies.sigmoid)
exp_of_negative = jit(bodies.exp_of_negative)
softplus = jit(bodies.softplus)
gru_output = part(bodies.gru_output)
mixed = part(bodies.mixed)
log_scale = part(bodies.log_scale)
laplace_variance = part(bodies.laplace_variance)
next_state = part(bodies.next_state)
unit_uniform = part(bodies.unit_uniform)

HALF, ONE, TWO, ZERO = bodies.HALF, bodies.ONE, bodies.TWO, bodies.ZERO
LOG_SCALE_LIMIT = bodies.LOG_SCALE_LIMIT


def work_size(sizes: Sizes) -> int:
    """Floats that :func:`observe_step` and :func:`rollout` need as `work`."""
    return 7 * sizes.latent + sizes.categoricals * sizes.classes + 4 + 2 * layout.VECTOR


@part
def add_product(x: FloatArray, weight: FloatArray, y: FloatArray) -> None:
    """``y += x @ weight``, four rows at a time: each pass over `y` costs a load and a store."""
    rows, columns = weight.shape
    whole = rows - rows % 4
    for i in range(0, whole, 4):
        x0, x1, x2, x3 = x[i], x[i + 1], x[i + 2], x[i + 3]
        for j in range(columns):
            y[j] += (x0 * weight[i, j] + x1 * weight[i + 1, j]) + (
                x2 * weight[i + 2, j] + x3 * weight[i + 3, j]
            )
    for i in range(whole, rows):
        x0 = x[i]
        for j in range(columns):
            y[j] += x0 * weight[i, j]


@part
def add_one_hots(classes: Classes, n_classes: int, weight: FloatArray, y: FloatArray) -> None:
    """``y += s @ weight`` for one-hot vectors s: the rows of their classes."""
    columns = y.shape[0]
    n = classes.shape[0]
    whole = n - n % 4
    for c in range(0, whole, 4):
        row = c * n_classes
        r0 = row + classes[c]
        r1 = row + n_classes + classes[c + 1]
        r2 = row + 2 * n_classes + classes[c + 2]
        r3 = row + 3 * n_classes + classes[c + 3]
        for j in range(columns):
            y[j] += (weight[r0, j] + weight[r1, j]) + (weight[r2, j] + weight[r3, j])
    for c in range(whole, n):
        row = c * n_classes + classes[c]
        for j in range(columns):
            y[j] += weight[row, j]


@part
def copy(source: FloatArray, target: FloatArray) -> None:
    """``target[:] = source`` without the checks of a slice assignment."""
    for j in range(target.shape[0]):
        target[j] = source[j]


@part
def encode_member(features: FloatArray, w: Any, encoding: FloatArray) -> None:
    """Encode: ``encoding = tanh(features @ encoder_weight + encoder_bias)``."""
    copy(w.encoder_bias, encoding)
    add_product(features, w.encoder_weight, encoding)
    for j in range(encoding.shape[0]):
        encoding[j] = tanh(encoding[j])


@jit
def from_hidden(hidden: FloatArray, w: Any, out: FloatArray) -> None:
    """``out = hidden @ hidden_weight + hidden_bias``: all that follows from the hidden state.

    Its columns: the recurrent share of the GRU's gates at the next step, the prior's logits at
    this one, the share of `hidden` in the loss head.
    """
    copy(w.hidden_bias, out)
    add_product(hidden, w.hidden_weight, out)


@jit
def from_classes(classes: Classes, n_classes: int, w: Any, out: FloatArray) -> None:
    """Sum of the rows of `stochastic_weight`: all that follows from the stochastic state.

    Its columns: the input share of the GRU's gates at the next step, the share of the state in
    the loss head.
    """
    copy(w.stochastic_bias, out)
    add_one_hots(classes, n_classes, w.stochastic_weight, out)


@jit
def gru(gates: FloatArray, recurrent: FloatArray, hidden: FloatArray) -> None:
    """Move `hidden` (L) one step on, by the equations of ``torch.nn.GRUCell``.

    The first 3 L of `gates` hold the input share of the gates' arguments and receive the reset,
    update and candidate gates; those of `recurrent` hold the recurrent share.
    """
    n = hidden.shape[0]
    for j in range(2 * n):
        gates[j] = sigmoid(tanh(HALF * (gates[j] + recurrent[j])))
    for j in range(n):
        candidate = tanh(gates[2 * n + j] + gates[j] * recurrent[2 * n + j])
        gates[2 * n + j] = candidate
        hidden[j] = gru_output(gates[n + j], candidate, hidden[j])


@jit
def softmax(logits: FloatArray, categoricals: int, n_classes: int) -> None:
    """Softmax within each categorical, in place."""
    end = categoricals * n_classes
    for first in range(0, end, n_classes):
        top = logits[first]
        for j in range(first + 1, first + n_classes):
            top = logits[j] if logits[j] > top else top
        for j in range(first, first + n_classes):
            logits[j] -= top
    for j in range(end):
        logits[j] = exp_of_negative(logits[j])
    for first in range(0, end, n_classes):
        total = ZERO
        for j in range(first, first + n_classes):
            total += logits[j]
        inverse = ONE / total
        for j in range(first, first + n_classes):
            logits[j] *= inverse


@jit
def sample(
    probabilities: FloatArray, n_classes: int, uniforms: FloatArray, classes: Classes
) -> None:
    """Draw one class of each categorical by inverse CDF of its softmax mixed with uniform."""
    uniform = ONE / np.float32(n_classes)
    for c in range(classes.shape[0]):
        cumulative = ZERO
        chosen = 0
        # The last class takes what is left, so rounding cannot lead beyond it.
        for k in range(n_classes - 1):
            cumulative += mixed(probabilities[c * n_classes + k], uniform)
            chosen += uniforms[c] >= cumulative
        classes[c] = chosen


@part
def accumulate(mean: FloatArray, variance: FloatArray) -> None:
    """Turn the loss head's outputs along a path into running sums of means and variances."""
    horizon = mean.shape[0]
    for t in range(horizon):
        log_b = log_scale(tanh(variance[t] / LOG_SCALE_LIMIT))
        variance[t] = laplace_variance(log_b, exp_of_negative(-TWO * abs(log_b)))
    for t in range(1, horizon):
        mean[t] += mean[t - 1]
        variance[t] += variance[t - 1]


@part
def delta_raw(
    hidden: FloatArray, classes: Classes, n_classes: int, w: Any, out: FloatArray
) -> None:
    """Raw outputs (D,) of the delta head."""
    n = hidden.shape[0]
    copy(w.delta_bias, out)
    add_product(hidden, w.delta_weight[:n], out)
    add_one_hots(classes, n_classes, w.delta_weight[n:], out)


@part
def delta_mapped(raw: np.float32, index: int) -> np.float32:
    """Output `index` of the delta head: the confidence, number 1, logistic; others softplus."""
    if index == 1:
        return sigmoid(tanh(HALF * raw))
    return softplus(raw)


@jit
def fill_uniforms(states: NDArray[np.uint64], out: FloatArray) -> None:
    """Fill row m of `out` (M, n) with uniforms in [0, 1) from generator m of `states` (M,)."""
    for m in range(out.shape[0]):
        state = states[m]
        for j in range(out.shape[1]):
            state = next_state(state)
            out[m, j] = unit_uniform(state)
        states[m] = state


@jit
def encode(features: FloatArray, params: FloatArray, sizes: Sizes, out: FloatArray) -> None:
    """Encode `features` (F,) by every member of `params` (M, P) into `out` (M, L)."""
    for m in range(params.shape[0]):
        encode_member(features, split(params[m], sizes), out[m])


@jit
def observe_step(
    params: FloatArray,
    sizes: Sizes,
    features: FloatArray,
    uniforms: FloatArray,
    hidden: FloatArray,
    classes: Classes,
    work: FloatArray,
) -> None:
    """Move every member one observed step on: `hidden` and `classes` are updated in place.

    Parameters
    ----------
    params : (M, P) ndarray of float32
        Weights of the members.
    sizes : Sizes
        Sizes of the model.
    features : (F,) ndarray of float32
        The observation.
    uniforms : (M, categoricals) ndarray of float32
        Numbers in [0, 1) that choose the classes of the posterior.
    hidden : (M, L) ndarray of float32
        Hidden states.
    classes : (M, categoricals) ndarray of int64
        Stochastic states.
    work : (work_size,) ndarray of float32
        Scratch.
    """
    n_l, n_s = sizes.latent, sizes.categoricals * sizes.classes
    for m in range(params.shape[0]):
        w = split(params[m], sizes)
        n_h, n_i = w.hidden_bias.shape[0], w.stochastic_bias.shape[0]
        recurrent = work[:n_h]
        gates = work[n_h : n_h + n_i]
        encoding = work[n_h + n_i : n_h + n_i + n_l]
        logits = recurrent[:n_s]
        encode_member(features, w, encoding)
        from_hidden(hidden[m], w, recurrent)
        from_classes(classes[m], sizes.classes, w, gates)
        gru(gates, recurrent, hidden[m])
        copy(w.posterior_bias, logits)
        add_product(hidden[m], w.posterior_weight[:n_l], logits)
        add_product(encoding, w.posterior_weight[n_l:], logits)
        softmax(logits, sizes.categoricals, sizes.classes)
        sample(logits, sizes.classes, uniforms[m], classes[m])


@jit
def rollout(
    params: FloatArray,
    sizes: Sizes,
    hidden: FloatArray,
    classes: Classes,
    uniforms: FloatArray,
    mean: FloatArray,
    variance: FloatArray,
    work: FloatArray,
    work_classes: Classes,
) -> None:
    """Sample paths of every member's prior and accumulate what the loss head says along them.

    Parameters
    ----------
    params : (M, P) ndarray of float32
        Weights of the members.
    sizes : Sizes
        Sizes of the model.
    hidden, classes : (M, L) ndarray of float32, (M, categoricals) ndarray of int64
        States to start from, left as they are.
    uniforms : (M, paths, horizon, categoricals) ndarray of float32
        Numbers in [0, 1) that choose the classes. Those of step t choose the state from which the
        change at step t + 2 is predicted, so the last ones are not used.
    mean, variance : (M, paths, horizon) ndarray of float32
        Receive the sums up to each step of the predicted changes and of their variances.
    work : (work_size,) ndarray of float32
        Scratch.
    work_classes : (categoricals,) ndarray of int64
        Scratch.
    """
    n_l, n_k = sizes.latent, sizes.classes
    n_s = sizes.categoricals * n_k
    paths, horizon = mean.shape[1:]
    for m in range(params.shape[0]):
        w = split(params[m], sizes)
        n_h, n_i = w.hidden_bias.shape[0], w.stochastic_bias.shape[0]
        recurrent = work[:n_h]
        gates = work[n_h : n_h + n_i]
        state = work[n_h + n_i : n_h + n_i + n_l]
        logits = recurrent[3 * n_l : 3 * n_l + n_s]
        for p in range(paths):
            copy(hidden[m], state)
            for c in range(sizes.categoricals):
                work_classes[c] = classes[m, c]
            for t in range(horizon):
                from_hidden(state, w, recurrent)
                if t > 0:
                    softmax(logits, sizes.categoricals, n_k)
                    sample(logits, n_k, uniforms[m, p, t - 1], work_classes)
                from_classes(work_classes, n_k, w, gates)
                mean[m, p, t] = recurrent[3 * n_l + n_s] + gates[3 * n_l]
                variance[m, p, t] = recurrent[3 * n_l + n_s + 1] + gates[3 * n_l + 1]
                gru(gates, recurrent, state)
            accumulate(mean[m, p], variance[m, p])


@jit
def delta_outputs(
    params: FloatArray, sizes: Sizes, hidden: FloatArray, classes: Classes, out: FloatArray
) -> None:
    """Write the mapped outputs of every member's delta head to `out` (M, D)."""
    for m in range(params.shape[0]):
        w = split(params[m], sizes)
        delta_raw(hidden[m], classes[m], sizes.classes, w, out[m])
        for j in range(sizes.outputs):
            out[m, j] = delta_mapped(out[m, j], j)
