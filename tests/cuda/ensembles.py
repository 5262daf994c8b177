"""Random ensembles, and how closely a GPU must agree with the CPU and with the oracle."""

import naive_rssm as naive
import numpy as np

from hybridcore.dynamics.rssm.params import (
    Sizes,
    aligned_zeros,
    initialize,
    parameter_count,
    split,
)

SMALL = Sizes(features=5, latent=4, categoricals=2, classes=3, outputs=4)
# Odd sizes, fewer columns than threads, and more categoricals than anything else.
ODD = Sizes(features=3, latent=2, categoricals=5, classes=2, outputs=3)
# One class: every draw is certain, and the divergence is 0.
SINGLE = Sizes(features=1, latent=1, categoricals=1, classes=1, outputs=2)
SIZES = {"small": SMALL, "odd": ODD, "single": SINGLE}

# Largest errors, relative and absolute, by the type of what is compared. float32 is that of the
# kernels; sums in another order differ by some rounding errors. Losses are summed in float64 from
# float32 terms. Drawn classes are the same.
TOLERANCES = {"float32": (2e-5, 1e-5), "float64": (5e-6, 1e-6), "int64": (0.0, 0.0)}

# A uniform number closer than this to an edge of the CDF could fall either way in float32.
MARGIN = 1e-5


def agree(got, expected):
    rtol, atol = TOLERANCES[str(got.dtype)]
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol)


def agree_as_gradient(got, expected, sizes):
    """Agreement of a gradient, each part by its own largest number."""
    rtol, _ = TOLERANCES[str(got.dtype)]
    for mine, other in zip(split(got, sizes), split(expected, sizes), strict=True):
        assert np.abs(mine - other).max() <= rtol * np.abs(other).max()


def ensemble(sizes, members=2, seed=0):
    """Random weights, every one of them different from 0."""
    rng = np.random.default_rng(seed)
    params = aligned_zeros(members, parameter_count(sizes))
    for row in params:
        initialize(row, sizes, rng)
        w = split(row, sizes)
        for view in (w.encoder_bias, w.hidden_bias, w.posterior_bias, w.delta_weight, w.delta_bias):
            view[:] = 0.6 * rng.standard_normal(view.shape)
        w.stochastic_bias[: 3 * sizes.latent] = rng.standard_normal(3 * sizes.latent)
        w.posterior_weight[:] *= 3.0  # so that the divergences stand out
    return params


def states(sizes, members=2, seed=1):
    rng = np.random.default_rng(seed)
    hidden = rng.uniform(-1, 1, (members, sizes.latent)).astype(np.float32)
    classes = rng.integers(0, sizes.classes, (members, sizes.categoricals))
    return hidden, classes


def named(params, sizes):
    return [naive.parts(split(row, sizes), sizes) for row in params]
