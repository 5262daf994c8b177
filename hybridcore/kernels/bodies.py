"""Scalar formulas of the RSSM and of the features, written once; every device compiles them.

They are plain Python on scalars: ``njit`` compiles them for the CPU, ``cuda.jit(device=True)`` can
for a GPU, and uncompiled they run as they stand. So they call nothing but :mod:`math` and never one
another. Those of the RSSM have float32 constants: a Python float would turn all arithmetic to
float64, in which those of the features, at the end, are meant to be.

`tanh` and `exp_of_negative` are polynomials because the C library's functions do not vectorise
here. Both do the same operations for every argument, without a branch. NaN goes through all.
"""

from __future__ import annotations

import math

import numpy as np

HALF = np.float32(0.5)
ONE = np.float32(1.0)
TWO = np.float32(2.0)
ZERO = np.float32(0.0)
LOG_2 = np.float32(math.log(2.0))

# Share of the uniform distribution in every class probability ("unimix", DreamerV3, Hafner et al.
# 2023): no class becomes impossible, so the KL divergence and its gradient stay finite.
UNIFORM_SHARE = np.float32(0.01)
SOFTMAX_SHARE = np.float32(0.99)

# The raw log-scale of the loss head is bent to stay within this: scales of 1e-3 to 1e3 times the
# noise, and no float32 that overflows.
LOG_SCALE_LIMIT = np.float32(7.0)

# tanh(x) / x = P(x^2) / Q(x^2) on [0, TANH_LIMIT], a minimax fit of relative error 1.2e-8 before
# rounding. Beyond the limit 1 - tanh is below the rounding of float32.
TANH_LIMIT = np.float32(8.5)
P1 = np.float32(0.13413247)
P2 = np.float32(0.0035340267)
P3 = np.float32(2.1251042e-05)
P4 = np.float32(1.4269227e-08)
Q1 = np.float32(0.4674657)
Q2 = np.float32(0.02602275)
Q3 = np.float32(0.00033488646)
Q4 = np.float32(8.145123e-07)

# exp on [-1, 0], a minimax polynomial of relative error 2.4e-8 before rounding.
E1 = np.float32(0.9999979138374329)
E2 = np.float32(0.4999690055847168)
E3 = np.float32(0.16649028658866882)
E4 = np.float32(0.041176825761795044)
E5 = np.float32(0.007614023983478546)
E6 = np.float32(0.0008358458871953189)
N1, N2, N4, N8, N16, N32 = (np.float32(-x) for x in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0))
F1, F2, F4, F8, F16 = (np.float32(math.exp(-x)) for x in (1.0, 2.0, 4.0, 8.0, 16.0))

SHIFT_A, SHIFT_B, SHIFT_C = np.uint64(13), np.uint64(7), np.uint64(17)
SHIFT_TO_24_BITS = np.uint64(40)
TO_UNIT = np.float32(2.0**-24)


def tanh(x: np.float32) -> np.float32:
    """Hyperbolic tangent to an absolute error of 4e-7."""
    x = TANH_LIMIT if x > TANH_LIMIT else x
    x = -TANH_LIMIT if x < -TANH_LIMIT else x
    u = x * x
    numerator = ONE + u * (P1 + u * (P2 + u * (P3 + u * P4)))
    return x * numerator / (ONE + u * (Q1 + u * (Q2 + u * (Q3 + u * Q4))))


def sigmoid(tanh_of_half: np.float32) -> np.float32:
    """Logistic function of x, given ``tanh(x / 2)``."""
    return HALF + HALF * tanh_of_half


def exp_of_negative(x: np.float32) -> np.float32:
    """Exponential of x <= 0 to a relative error of 6e-7; below -32 that of -32."""
    x = N32 if x < N32 else x
    scale = ONE
    # x + 16 is exact, and so on down: what is left lies in [-1, 0].
    scale = F16 if x < N16 else scale
    x = x - N16 if x < N16 else x
    scale = scale * F8 if x < N8 else scale
    x = x - N8 if x < N8 else x
    scale = scale * F4 if x < N4 else scale
    x = x - N4 if x < N4 else x
    scale = scale * F2 if x < N2 else scale
    x = x - N2 if x < N2 else x
    scale = scale * F1 if x < N1 else scale
    x = x - N1 if x < N1 else x
    return scale * (ONE + x * (E1 + x * (E2 + x * (E3 + x * (E4 + x * (E5 + x * E6))))))


def softplus(x: np.float32) -> np.float32:
    """``log(1 + exp(x))`` without overflow."""
    rest = np.float32(math.log1p(math.exp(-abs(x))))
    return rest + x if x > ZERO else rest


def softplus_slope(x: np.float32) -> np.float32:
    """Slope of softplus: the logistic function, without overflow."""
    e = np.float32(math.exp(-abs(x)))
    return ONE / (ONE + e) if x > ZERO else e / (ONE + e)


def gru_output(update: np.float32, candidate: np.float32, hidden: np.float32) -> np.float32:
    """Hidden value ``(1 - z) n + z h`` of a GRU (Cho et al. 2014, eq. 7, as in PyTorch)."""
    return candidate + update * (hidden - candidate)


def mixed(softmax: np.float32, uniform: np.float32) -> np.float32:
    """Class probability: softmax mixed with `uniform`, which is 1 / classes."""
    return SOFTMAX_SHARE * softmax + UNIFORM_SHARE * uniform


def log_scale(tanh_of_raw: np.float32) -> np.float32:
    """Log-scale of the loss head, given ``tanh(raw / LOG_SCALE_LIMIT)``."""
    return LOG_SCALE_LIMIT * tanh_of_raw


def laplace_nll(error: np.float32, log_b: np.float32) -> np.float32:
    """Negative log likelihood of an error under a Laplace distribution of scale exp(log_b)."""
    return np.float32(abs(error)) * np.float32(math.exp(-log_b)) + log_b + LOG_2


def laplace_variance(log_b: np.float32, decay: np.float32) -> np.float32:
    """Variance ``2 b^2`` of a Laplace distribution of scale b, given ``exp(-2 |log b|)``."""
    return TWO / decay if log_b > ZERO else TWO * decay


def laplace_mean_slope(error: np.float32, log_b: np.float32) -> np.float32:
    """Slope of :func:`laplace_nll` in the mean, where the error is the value less the mean."""
    inverse = np.float32(math.exp(-log_b))
    return -inverse if error > ZERO else (inverse if error < ZERO else ZERO)


def laplace_scale_slope(error: np.float32, log_b: np.float32) -> np.float32:
    """Slope of :func:`laplace_nll` in the log-scale."""
    return ONE - np.float32(abs(error)) * np.float32(math.exp(-log_b))


def tanh_slope(value: np.float32) -> np.float32:
    """Slope of tanh where it has `value`."""
    return ONE - value * value


def sigmoid_slope(value: np.float32) -> np.float32:
    """Slope of the logistic function where it has `value`."""
    return value * (ONE - value)


def mixed_slope(softmax: np.float32, gradient: np.float32, mean: np.float32) -> np.float32:
    """Gradient in a logit, given that in its :func:`mixed` probability.

    `mean` is the mean of the gradients of all classes, weighted by their softmax.
    """
    return SOFTMAX_SHARE * softmax * (gradient - mean)


def moving_mean(mean: np.float32, value: np.float32, share: np.float32) -> np.float32:
    """Mean after one more value that weighs `share`."""
    return mean + share * (value - mean)


def adam_change(
    first: np.float32, second: np.float32, rate: np.float32, scale: np.float32, epsilon: np.float32
) -> np.float32:
    """Change that Adam makes to a parameter (Kingma & Ba 2015, alg. 1).

    `rate` is the learning rate over the bias correction of the first moment, `scale` one over the
    root of that of the second.
    """
    return -rate * first / (np.float32(math.sqrt(second)) * scale + epsilon)


def next_state(state: np.uint64) -> np.uint64:
    """Successor of a state, not 0, of the generator xorshift64 (Marsaglia 2003)."""
    state = state ^ (state << SHIFT_A)
    state = state ^ (state >> SHIFT_B)
    return state ^ (state << SHIFT_C)


def unit_uniform(state: np.uint64) -> np.float32:
    """Uniform number in [0, 1) from the 24 high bits of a generator state."""
    return np.float32(state >> SHIFT_TO_24_BITS) * TO_UNIT


# Formulas of the training state. They run in float64: an exponential average over many steps and a
# variance need its digits.

# Added to a variance before it divides or goes into a logarithm: a deviation of 1e-10 in a log loss
# is rounding.
LEAST_VARIANCE = 1e-20
# Variance of a feature below which it is taken for a constant: a float32 loss carries 1e-7.
LEAST_FEATURE_VARIANCE = 1e-14


def log_or(value: float, fallback: float) -> float:
    """``log(value)`` where that is finite, else `fallback`."""
    return math.log(value) if 0.0 < value < math.inf else fallback


def clipped(value: float, limit: float) -> float:
    """`value` within ``[-limit, limit]``."""
    value = limit if value > limit else value
    return -limit if value < -limit else value


def averaged_gaps(
    gap: float, gap_2: float, gap_3: float, move: float, share: float
) -> tuple[float, float, float]:
    """Gaps of a threefold exponential average after its series made a `move`.

    The newest value weighs `share`. The gaps are ``y - S1``, ``S1 - S2``, ``S2 - S3`` with S1 the
    average of y, S2 that of S1, S3 that of S2 (Brown 1963, ch. 9).
    """
    gap += move
    move = share * gap
    gap_2 += move
    move_2 = share * gap_2
    gap_3 += move_2
    return gap - move, gap_2 - move_2, gap_3 - share * gap_3


def signed_log(value: float) -> float:
    """``log(1 + |value|)`` with the sign of `value`."""
    return math.log(1.0 + value) if value > 0.0 else -math.log(1.0 - value)


def half_log(variance: float) -> float:
    """Logarithm of the standard deviation."""
    return 0.5 * math.log(variance + LEAST_VARIANCE)


def in_deviations(value: float, variance: float) -> float:
    """`value` in standard deviations."""
    return value / math.sqrt(variance + LEAST_VARIANCE)


def aligned(signal: float, variance: float) -> float:
    """Cosine between a signal and the same signal with noise of `variance` added."""
    return signal / math.sqrt(signal * signal + variance + LEAST_VARIANCE)


def per_variance(covariance: float, variance: float) -> float:
    """Correlation from a covariance and the variance of both sides."""
    return covariance / (variance + LEAST_VARIANCE)


def correlation(covariance: float, variance: float, other: float) -> float:
    """Correlation from a covariance and two variances."""
    return covariance / math.sqrt((variance + LEAST_VARIANCE) * (other + LEAST_VARIANCE))


def contrast(one: float, other: float) -> float:
    """``(one - other) / (one + other)`` of two variances, in [-1, 1]."""
    return (one - other) / (one + other + LEAST_VARIANCE)


def log_ratio(one: float, other: float) -> float:
    """Logarithm of the ratio of two variances."""
    return math.log((one + LEAST_VARIANCE) / (other + LEAST_VARIANCE))


def skewness(third_moment: float, variance: float) -> float:
    """Third moment in standard deviations."""
    variance += LEAST_VARIANCE
    return third_moment / (variance * math.sqrt(variance))


def moving_variance(variance: float, gap: float, share: float) -> float:
    """Variance after one more value, that weighs `share` and lies `gap` above the old mean.

    West (1979), eq. 2.4, for weights that sum to 1.
    """
    return (1.0 - share) * (variance + share * gap * gap)


def standardised(gap: float, variance: float, share: float, limit: float) -> float:
    """Distance of the newest value from the new mean in new standard deviations, clipped."""
    z = (1.0 - share) * gap / math.sqrt(variance + LEAST_FEATURE_VARIANCE)
    z = limit if z > limit else z
    return -limit if z < -limit else z
