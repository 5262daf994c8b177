"""Updates of the RSSM on the GPU: windows drawn on the host, Adam on the device."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import float64
from numpy.typing import NDArray

from hybridcore.dynamics.rssm.params import FloatArray, Sizes
from hybridcore.kernels.cpu import training as cpu
from hybridcore.kernels.cpu.bptt import Window
from hybridcore.kernels.cpu.rssm import ZERO, Classes, fill_uniforms
from hybridcore.kernels.cpu.training import Replay
from hybridcore.kernels.cuda import cuda, device, kernel

squared_norm = device(cpu.squared_norm)
adam_update = device(cpu.adam_update)


def shared_bytes(threads: int) -> int:
    """Dynamic shared memory of a block of :func:`adam_updates`."""
    return 8 * threads


def draw_windows(
    generators: NDArray[np.uint64],
    sizes: Sizes,
    replay: Replay,
    observed: int,
    unit: float,
    windows: int,
    steps: int,
) -> tuple[Window, FloatArray, Classes, NDArray[np.bool_]]:
    """Draw windows for each member from its generator: those that ``cpu.training.update`` draws.

    Returns
    -------
    Window, ndarray, ndarray, ndarray
        The windows, the states before them and whether only full steps led through each, as
        ``cuda.bptt.window_gradients`` takes them.
    """
    members, capacity = len(generators), len(replay.changes)
    stream = np.zeros((members, windows * (1 + steps * sizes.categoricals)), np.float32)
    fill_uniforms(generators, stream)
    numbers = stream.reshape(members, windows, -1)
    oldest = max(0, observed - capacity)
    # The state before a window is needed too.
    choices = np.float32(observed - steps - oldest)
    starts = oldest + 1 + (numbers[..., 0] * choices).astype(np.int64)
    slots = (starts[..., None] + np.arange(steps)) % capacity
    before = (starts - 1) % capacity
    row = np.arange(members)[:, None]
    weight = np.float32(1.0 / windows)
    drawn = Window(
        features=replay.features[slots],
        changes=replay.changes[slots] / np.float32(unit),
        change_weights=weight * replay.change_weights[slots],
        deltas=replay.deltas[slots],
        delta_weights=weight * replay.delta_weights[slots],
        uniforms=numbers[..., 1:].reshape(members, windows, steps, sizes.categoricals),
    )
    whole = replay.follows[slots].all(axis=2)
    return drawn, replay.hidden[row, before], replay.classes[row, before], whole


@kernel
def adam_updates(
    params: FloatArray,
    grads: FloatArray,
    first: FloatArray,
    second: FloatArray,
    steps: Any,
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    max_norm: float,
    norms: Any,
) -> None:
    """One step of Adam for every member, a block each; see ``cpu.training.adam_update``.

    Parameters
    ----------
    params, grads, first, second : (M, P) ndarray of float32
        Weights, gradients (0 afterwards) and their two moments.
    steps : (M,) ndarray of int64
        Number of this step for each member, from 1; 0 leaves a member as it is.
    learning_rate, beta1, beta2, epsilon, max_norm : float
        As on the CPU.
    norms : (M,) ndarray of float64
        Receive the norms of the gradients before clipping.
    """
    m, lane, lanes = cuda.blockIdx.x, cuda.threadIdx.x, cuda.blockDim.x
    if steps[m] == 0:
        return
    partial = cuda.shared.array(0, float64)
    grad = grads[m, lane::lanes]
    partial[lane] = squared_norm(grad)
    cuda.syncthreads()
    total = 0.0
    for k in range(lanes):
        total += partial[k]
    norm = math.sqrt(total)
    if lane == 0:
        norms[m] = norm
    if not math.isfinite(norm):
        for j in range(grad.shape[0]):
            grad[j] = ZERO
        return
    # Clipped here by the norm of the whole, so that the CPU's function need not clip its part.
    clip = np.float32(min(1.0, max_norm / (norm + 1e-6)))
    for j in range(grad.shape[0]):
        grad[j] *= clip
    adam_update(
        params[m, lane::lanes],
        grad,
        first[m, lane::lanes],
        second[m, lane::lanes],
        steps[m],
        learning_rate,
        beta1,
        beta2,
        epsilon,
        math.inf,
    )
