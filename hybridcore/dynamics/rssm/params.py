"""Where the weights of one RSSM stand in a flat vector, and how they start."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

# Floats of a cache line, where every weight starts: vector loads that straddle two lines made
# products a third slower.
ALIGNMENT = 16
# Floats of a page of memory. A load waits for an earlier store at the same place of another page:
# the processor compares the low twelve bits of their addresses first.
PAGE = 1024
# Floats of a vector register: rows of this length need no remainder loop.
VECTOR = 8


class Sizes(NamedTuple):
    """Sizes of the model; a plain tuple of integers to the kernels.

    Attributes
    ----------
    features : int
        Length F of an observation.
    latent : int
        Length L of the encoding and of the hidden state of the GRU.
    categoricals, classes : int
        The stochastic state is that many one-hot vectors, of that many classes each: S numbers.
    outputs : int
        Outputs D of the delta head.
    """

    features: int = 64
    latent: int = 32
    categoricals: int = 4
    classes: int = 8
    outputs: int = 10


class Weights(NamedTuple):
    """Views of one member's flat vector. Matrices are (in, out): ``y = x @ weight + bias``.

    All that the hidden state is multiplied by in a rollout stands side by side in one matrix, and
    so does all that the stochastic state is multiplied by: a step is one product and one sum of
    rows. Columns of the GRU are its reset, update and candidate gates, in PyTorch's order; those
    of the loss head are the mean and the raw log-scale. Columns that pad are 0 and stay so.
    """

    encoder_weight: FloatArray  # (F, L)
    encoder_bias: FloatArray  # (L,)
    hidden_weight: FloatArray  # (L, H), columns: GRU 3 L, prior S, loss head 2, padding
    hidden_bias: FloatArray  # (H,), of the same columns
    stochastic_weight: FloatArray  # (S, I), columns: GRU 3 L, loss head 2, padding
    stochastic_bias: FloatArray  # (I,), of the GRU; 0 beyond: hidden_bias has the loss head's
    posterior_weight: FloatArray  # (2 L, S), rows: hidden, encoding
    posterior_bias: FloatArray  # (S,)
    delta_weight: FloatArray  # (L + S, D), rows: hidden, stochastic
    delta_bias: FloatArray  # (D,)


def split(flat: FloatArray, sizes: Sizes) -> Weights:
    """Take views of the weights in `flat`; plain Python that the kernels compile too.

    Parameters
    ----------
    flat : (P,) ndarray of float32
        Contiguous, of :func:`parameter_count` floats.
    sizes : Sizes
        Sizes of the model.
    """
    n_l, n_s = sizes.latent, sizes.categoricals * sizes.classes
    n_h = (3 * n_l + n_s + 2 + VECTOR - 1) // VECTOR * VECTOR
    n_i = (3 * n_l + 2 + VECTOR - 1) // VECTOR * VECTOR
    pad = ALIGNMENT - 1
    a = 0
    b = a + (sizes.features * n_l + pad) // ALIGNMENT * ALIGNMENT
    c = b + (n_l + pad) // ALIGNMENT * ALIGNMENT
    d = c + (n_l * n_h + pad) // ALIGNMENT * ALIGNMENT
    e = d + (n_h + pad) // ALIGNMENT * ALIGNMENT
    f = e + (n_s * n_i + pad) // ALIGNMENT * ALIGNMENT
    g = f + (n_i + pad) // ALIGNMENT * ALIGNMENT
    h = g + (2 * n_l * n_s + pad) // ALIGNMENT * ALIGNMENT
    i = h + (n_s + pad) // ALIGNMENT * ALIGNMENT
    j = i + ((n_l + n_s) * sizes.outputs + pad) // ALIGNMENT * ALIGNMENT
    return Weights(
        flat[a : a + sizes.features * n_l].reshape((sizes.features, n_l)),
        flat[b : b + n_l],
        flat[c : c + n_l * n_h].reshape((n_l, n_h)),
        flat[d : d + n_h],
        flat[e : e + n_s * n_i].reshape((n_s, n_i)),
        flat[f : f + n_i],
        flat[g : g + 2 * n_l * n_s].reshape((2 * n_l, n_s)),
        flat[h : h + n_s],
        flat[i : i + (n_l + n_s) * sizes.outputs].reshape((n_l + n_s, sizes.outputs)),
        flat[j : j + sizes.outputs],
    )


def parameter_count(sizes: Sizes) -> int:
    """Floats in the flat vector of one member, padding included, a multiple of `ALIGNMENT`."""
    n_l, n_s = sizes.latent, sizes.categoricals * sizes.classes
    n_h = -(-(3 * n_l + n_s + 2) // VECTOR) * VECTOR
    n_i = -(-(3 * n_l + 2) // VECTOR) * VECTOR
    lengths = (
        *(sizes.features * n_l, n_l, n_l * n_h, n_h, n_s * n_i, n_i, 2 * n_l * n_s, n_s),
        *((n_l + n_s) * sizes.outputs, sizes.outputs),
    )
    return sum(-(-length // ALIGNMENT) * ALIGNMENT for length in lengths)


def aligned_zeros(*shape: int) -> FloatArray:
    """Zeros of float32 that start on a cache line."""
    size = math.prod(shape)
    store = np.zeros(size + ALIGNMENT, np.float32)
    skip = -store.ctypes.data // store.itemsize % ALIGNMENT
    return store[skip : skip + size].reshape(shape)


def side_by_side(count: int, *shape: int) -> list[FloatArray]:
    """`count` arrays of zeros for one loop over all of them: each at its own place of a page."""
    size = math.prod(shape)
    apart = PAGE // count // ALIGNMENT * ALIGNMENT
    stride = -(-size // PAGE) * PAGE + apart
    store = aligned_zeros(count * stride)
    return [store[k * stride : k * stride + size].reshape(shape) for k in range(count)]


def initialize(flat: FloatArray, sizes: Sizes, rng: np.random.Generator) -> None:
    """Fill the flat vector of one member in place.

    Matrices are uniform within 1 / sqrt(inputs), biases 0. The delta head starts neutral for every
    state: magnitude 1, confidence 1/2, scales 1.
    """
    n_l, n_s = sizes.latent, sizes.categoricals * sizes.classes
    flat[:] = 0.0
    w = split(flat, sizes)
    loss = slice(3 * n_l + n_s, 3 * n_l + n_s + 2)
    for block, inputs in (
        (w.encoder_weight, sizes.features),
        (w.hidden_weight[:, : loss.start], n_l),
        (w.hidden_weight[:, loss], n_l + n_s),
        (w.stochastic_weight[:, : 3 * n_l], n_l),
        (w.stochastic_weight[:, 3 * n_l : 3 * n_l + 2], n_l + n_s),
        (w.posterior_weight, 2 * n_l),
    ):
        bound = 1.0 / math.sqrt(inputs)
        block[:] = rng.uniform(-bound, bound, block.shape)
    w.delta_bias[:] = math.log(math.e - 1.0)  # where softplus is 1
    w.delta_bias[1] = 0.0
