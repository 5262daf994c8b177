"""Forward pass of the RSSM on the GPU; equations and shapes as in ``cpu.rssm``.

The helpers do not synchronise and know no thread but their own: a kernel calls them with its
`lane` and `lanes`, and lets all threads meet before a part that reads what others wrote.
"""

from __future__ import annotations

from typing import Any

from numba import float32, int32

from hybridcore.dynamics.rssm import params as layout
from hybridcore.dynamics.rssm.params import FloatArray, Sizes
from hybridcore.kernels.cpu import rssm as cpu
from hybridcore.kernels.cpu.rssm import Classes
from hybridcore.kernels.cuda import cuda, device, kernel

split = device(layout.split)
tanh = device(cpu.tanh)
gru = device(cpu.gru)
softmax = device(cpu.softmax)
sample = device(cpu.sample)
accumulate = device(cpu.accumulate)
delta_mapped = device(cpu.delta_mapped)

WARP = 32
MAX_THREADS = 256


def threads(sizes: Sizes) -> int:
    """Threads of a block: one for each column of the widest product, in whole warps."""
    columns = 3 * sizes.latent + sizes.categoricals * sizes.classes + 2 + layout.VECTOR
    return min(MAX_THREADS, -(-columns // WARP) * WARP)


def shared_bytes(sizes: Sizes) -> int:
    """Dynamic shared memory of a block of :func:`observe_step` and :func:`rollout`."""
    return 4 * (sizes.categoricals + cpu.work_size(sizes))


@device
def affine(
    x: FloatArray, weight: FloatArray, bias: FloatArray, y: FloatArray, lane: int, lanes: int
) -> None:
    """``y = x @ weight + bias``."""
    for j in range(lane, y.shape[0], lanes):
        total = bias[j]
        for i in range(x.shape[0]):
            total += x[i] * weight[i, j]
        y[j] = total


@device
def affine_of_pair(
    x: FloatArray,
    z: FloatArray,
    weight: FloatArray,
    bias: FloatArray,
    y: FloatArray,
    lane: int,
    lanes: int,
) -> None:
    """``y = concatenate(x, z) @ weight + bias``."""
    n = x.shape[0]
    for j in range(lane, y.shape[0], lanes):
        total = bias[j]
        for i in range(n):
            total += x[i] * weight[i, j]
        for i in range(z.shape[0]):
            total += z[i] * weight[n + i, j]
        y[j] = total


@device
def sum_of_rows(
    classes: Classes,
    n_classes: int,
    weight: FloatArray,
    bias: FloatArray,
    y: FloatArray,
    lane: int,
    lanes: int,
) -> None:
    """``y = s @ weight + bias`` for one-hot vectors s: the rows of their classes."""
    for j in range(lane, y.shape[0], lanes):
        total = bias[j]
        for c in range(classes.shape[0]):
            total += weight[c * n_classes + classes[c], j]
        y[j] = total


@device
def encoded(features: FloatArray, w: Any, encoding: FloatArray, lane: int, lanes: int) -> None:
    """Encode: ``encoding = tanh(features @ encoder_weight + encoder_bias)``."""
    affine(features, w.encoder_weight, w.encoder_bias, encoding, lane, lanes)
    for j in range(lane, encoding.shape[0], lanes):
        encoding[j] = tanh(encoding[j])


@device
def moved(
    gates: FloatArray, recurrent: FloatArray, hidden: FloatArray, lane: int, lanes: int
) -> None:
    """Move `hidden` one step on: the GRU of one column at a time, whose gates stand n apart."""
    n = hidden.shape[0]
    for j in range(lane, n, lanes):
        gru(gates[j : 3 * n : n], recurrent[j : 3 * n : n], hidden[j : j + 1])


@device
def drawn(
    logits: FloatArray,
    n_classes: int,
    uniforms: FloatArray,
    classes: Classes,
    lane: int,
    lanes: int,
) -> None:
    """Turn logits into softmax and draw the classes, a categorical for each thread."""
    for c in range(lane, classes.shape[0], lanes):
        group = logits[c * n_classes : (c + 1) * n_classes]
        softmax(group, 1, n_classes)
        sample(group, n_classes, uniforms[c : c + 1], classes[c : c + 1])


@device
def delta_raw(
    hidden: FloatArray,
    classes: Classes,
    n_classes: int,
    w: Any,
    out: FloatArray,
    lane: int,
    lanes: int,
) -> None:
    """Raw outputs (D,) of the delta head."""
    affine(hidden, w.delta_weight, w.delta_bias, out, lane, lanes)
    # Each thread goes on with the columns that it has just written.
    sum_of_rows(classes, n_classes, w.delta_weight[hidden.shape[0] :], out, out, lane, lanes)


@kernel
def encode(features: FloatArray, params: FloatArray, sizes: Sizes, out: FloatArray) -> None:
    """Encode `features` (F,) by every member, a block each, into `out` (M, L)."""
    m = cuda.blockIdx.x
    w = split(params[m], sizes)
    encoded(features, w, out[m], cuda.threadIdx.x, cuda.blockDim.x)


@kernel
def delta_outputs(
    params: FloatArray, sizes: Sizes, hidden: FloatArray, classes: Classes, out: FloatArray
) -> None:
    """Write the mapped outputs of every member's delta head, a block each, to `out` (M, D)."""
    m, lane, lanes = cuda.blockIdx.x, cuda.threadIdx.x, cuda.blockDim.x
    w = split(params[m], sizes)
    delta_raw(hidden[m], classes[m], sizes.classes, w, out[m], lane, lanes)
    for j in range(lane, sizes.outputs, lanes):
        out[m, j] = delta_mapped(out[m, j], j)


@kernel
def observe_step(
    params: FloatArray,
    sizes: Sizes,
    features: FloatArray,
    uniforms: FloatArray,
    hidden: FloatArray,
    classes: Classes,
) -> None:
    """Move every member, a block each, one observed step on; arguments as ``cpu.rssm`` has them."""
    m, lane, lanes = cuda.blockIdx.x, cuda.threadIdx.x, cuda.blockDim.x
    n_l, n_s = sizes.latent, sizes.categoricals * sizes.classes
    w = split(params[m], sizes)
    n_h, n_i = w.hidden_bias.shape[0], w.stochastic_bias.shape[0]
    work = cuda.shared.array(0, float32)
    recurrent = work[:n_h]
    gates = work[n_h : n_h + n_i]
    encoding = work[n_h + n_i : n_h + n_i + n_l]
    logits = recurrent[:n_s]
    encoded(features, w, encoding, lane, lanes)
    affine(hidden[m], w.hidden_weight, w.hidden_bias, recurrent, lane, lanes)
    sum_of_rows(
        classes[m], sizes.classes, w.stochastic_weight, w.stochastic_bias, gates, lane, lanes
    )
    cuda.syncthreads()
    moved(gates, recurrent, hidden[m], lane, lanes)
    cuda.syncthreads()
    affine_of_pair(hidden[m], encoding, w.posterior_weight, w.posterior_bias, logits, lane, lanes)
    cuda.syncthreads()
    drawn(logits, sizes.classes, uniforms[m], classes[m], lane, lanes)


@kernel
def rollout(
    params: FloatArray,
    sizes: Sizes,
    hidden: FloatArray,
    classes: Classes,
    uniforms: FloatArray,
    mean: FloatArray,
    variance: FloatArray,
) -> None:
    """Sample paths of every member's prior, a block for each path of each member.

    Arguments as ``cpu.rssm`` has them. The state of a path stays in shared memory.
    """
    lane, lanes = cuda.threadIdx.x, cuda.blockDim.x
    n_l, n_k, n_c = sizes.latent, sizes.classes, sizes.categoricals
    head = 3 * n_l + n_c * n_k
    paths, horizon = mean.shape[1], mean.shape[2]
    m, p = cuda.blockIdx.x // paths, cuda.blockIdx.x % paths
    w = split(params[m], sizes)
    n_h, n_i = w.hidden_bias.shape[0], w.stochastic_bias.shape[0]
    # Both views of dynamic shared memory start at its beginning.
    drawn_classes = cuda.shared.array(0, int32)[:n_c]
    work = cuda.shared.array(0, float32)[n_c:]
    recurrent = work[:n_h]
    gates = work[n_h : n_h + n_i]
    state = work[n_h + n_i : n_h + n_i + n_l]
    logits = recurrent[3 * n_l : head]
    for j in range(lane, n_l, lanes):
        state[j] = hidden[m, j]
    for c in range(lane, n_c, lanes):
        drawn_classes[c] = classes[m, c]
    for t in range(horizon):
        cuda.syncthreads()
        affine(state, w.hidden_weight, w.hidden_bias, recurrent, lane, lanes)
        if t > 0:
            cuda.syncthreads()
            drawn(logits, n_k, uniforms[m, p, t - 1], drawn_classes, lane, lanes)
        cuda.syncthreads()
        sum_of_rows(drawn_classes, n_k, w.stochastic_weight, w.stochastic_bias, gates, lane, lanes)
        cuda.syncthreads()
        if lane == 0:
            mean[m, p, t] = recurrent[head] + gates[3 * n_l]
            variance[m, p, t] = recurrent[head + 1] + gates[3 * n_l + 1]
        moved(gates, recurrent, state, lane, lanes)
    if lane == 0:
        accumulate(mean[m, p], variance[m, p])
