"""One step of the training state on the CPU: averages at eight time scales, then 64 features.

What a feature means stands in :mod:`hybridcore.state`; the constants below say where it lies.

**The averages.** All statistics are exponential averages at the scales s = 2, 4, ... 256, weights
``(1 - 1/s)^age`` over their sum, so that they hold from the first step on. The log loss, the log
gradient norm and the log learning rate are averaged once, twice and three times (Brown 1963, ch.
9), kept as the gaps ``y - S1``, ``S1 - S2``, ``S2 - S3``: a gap moves by differences of y alone,
which keeps its digits however far y is from 0, and a jump of y by other means is just left out.
``S1 - S2`` is the slope times s - 1, ``S1 + (S1 - S2) s / (s - 1)`` the forecast for the next step,
and what y differs from it is the *residual* at that scale.

**The state** is one float64 vector: rows of eight (one number a scale), single numbers, and of
each feature the raw value, its mean and its variance.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybridcore.kernels import bodies
from hybridcore.kernels.cpu import jit, part

FloatArray = NDArray[np.float64]

SCALES = 8
FEATURES = 64
GROUPS = 8
DECAY = 1.0 - 0.5 ** np.arange(1.0, SCALES + 1.0)
REACH = 1.0 / DECAY

# Index of a scale in a row.
S2, S4, S8, S16, S32, S64, S128, S256 = range(SCALES)

# Rows of the state. A series has its gaps, the variance, newest value and lag-1 covariance of its
# residuals, and the mean squares of its differences and of the differences of those.
(
    WEIGHT,
    LOSS_GAP,
    LOSS_GAP_2,
    LOSS_GAP_3,
    LOSS_VARIANCE,
    LOSS_RESIDUAL,
    LOSS_COVARIANCE,
    LOSS_SQUARES,
    LOSS_TURNS,
    NORM_GAP,
    NORM_GAP_2,
    NORM_GAP_3,
    NORM_VARIANCE,
    NORM_RESIDUAL,
    NORM_COVARIANCE,
    NORM_SQUARES,
    NORM_TURNS,
    CUBES,
    CROSS,
    RATE_GAP,
    RATE_GAP_2,
    GAIN,
    _END_OF_ROWS,
) = range(0, 23 * SCALES, SCALES)

# Single numbers: newest logarithms and the first ones, their last differences, sums, counts, flags.
(
    LOSS,
    NORM,
    RATE,
    FIRST_LOSS,
    FIRST_NORM,
    FIRST_RATE,
    HIGHEST_RATE,
    SEEN_LOSS,
    SEEN_NORM,
    SEEN_RATE,
    LOSS_MOVE,
    NORM_MOVE,
    BEST,
    EXTREME,
    RATE_SUM,
    PATH,
    COUNT,
    SINCE_RESTART,
    RESTARTED,
    HAS_GRAM,
    TAIL_COUNT,
    VALUES,
) = range(_END_OF_ROWS, _END_OF_ROWS + 22)
MEANS = VALUES + FEATURES
VARIANCES = MEANS + FEATURES
STATE_SIZE = VARIANCES + FEATURES

# Features, relative to VALUES; where several scales follow one another, the first of them.
LOSS_TREND = 0
LOSS_CURVATURE = 8
LOSS_DEVIATION = 11
LOSS_RECORD = 14
LOSS_NOISE = 15
LOSS_NOISE_GROWTH = 17
LOSS_SIGNAL = 18
LOSS_ROUGHNESS = 20
LOSS_PERSISTENCE = 22
LOSS_SKEWNESS = 23
LOSS_EXTREME = 24
NORM_TREND = 25
NORM_CURVATURE = 28
NORM_DEVIATION = 29
NORM_NOISE = 31
NORM_ROUGHNESS = 32
NORM_PERSISTENCE = 33
CORRELATION = 34
LENGTH_TREND = 36
EFFICIENCY = 38
LOSS_LEVEL = 40
NORM_LEVEL = 41
LENGTH_LEVEL = 42
FIRST_ORDER = 43
PATH_STEPS = 44
RATE_STEPS = 45
STEPS = 46
RECENCY = 47
GROWTH = 48
COSINE = 56

# How far the run has come, scaled alike in all runs: normalised by its own past, log(steps) would
# tend to 1 and a power law of the loss to -1, constants both.
FIXED = LOSS_LEVEL
CENTRES = np.array([-2.0, -1.0, -1.0, -2.0, 6.0, 6.0, 6.0, 0.5])
WIDTHS = np.array([2.0, 2.0, 2.0, 3.0, 2.0, 2.0, 2.0, 0.25])
TAIL = GROWTH

# The first steps only fill the averages: their values would stand out for hundreds of steps.
SETTLING = 10.0
# A move of a log loss or log norm is clipped here: one wild batch must not fill every average.
MOST_MOVE = 8.0
# Exponents are clipped here: what they feed stays far inside the range of float64.
MOST_EXPONENT = 80.0
# Added to every move, turn and residual: averages of a series that stands still do not decay to
# denormal numbers, which take a hundred times as long.
LEAST_MOVE = 1e-30
# Steps after which half the recency of a restart is gone.
RECENCY_STEPS = 32.0
# A displacement is compared with its own earlier ones within this factor, as a logarithm.
MOST_GROWTH = 5.0
# Inner products from here on are not believed; below, no sum or product of them overflows.
MOST_PRODUCT = 1e150

# One formula for the float32 of the networks and the float64 here.
moving_mean: Any = part(bodies.moving_mean)
log_or = part(bodies.log_or)
clipped = part(bodies.clipped)
averaged_gaps = part(bodies.averaged_gaps)
signed_log = part(bodies.signed_log)
half_log = part(bodies.half_log)
in_deviations = part(bodies.in_deviations)
aligned = part(bodies.aligned)
per_variance = part(bodies.per_variance)
correlation = part(bodies.correlation)
contrast = part(bodies.contrast)
log_ratio = part(bodies.log_ratio)
skewness = part(bodies.skewness)
moving_variance = part(bodies.moving_variance)
standardised = part(bodies.standardised)


@part
def average(
    s: FloatArray,
    loss_move: float,
    norm_move: float,
    rate_move: float,
    gain: float,
) -> None:
    """Move all rows of the state on by one step."""
    # A turn is the change of a move.
    loss_turn = loss_move - s[LOSS_MOVE] + LEAST_MOVE
    norm_turn = norm_move - s[NORM_MOVE] + LEAST_MOVE
    s[LOSS_MOVE], s[NORM_MOVE] = loss_move, norm_move
    for k in range(SCALES):
        weight = 1.0 + DECAY[k] * s[WEIGHT + k]
        s[WEIGHT + k] = weight
        share = 1.0 / weight

        # A residual is the move less what the averages of the step before foretold.
        residual = s[LOSS_GAP + k] + loss_move - REACH[k] * s[LOSS_GAP_2 + k] + LEAST_MOVE
        s[LOSS_GAP + k], s[LOSS_GAP_2 + k], s[LOSS_GAP_3 + k] = averaged_gaps(
            s[LOSS_GAP + k], s[LOSS_GAP_2 + k], s[LOSS_GAP_3 + k], loss_move, share
        )
        square = residual * residual
        product = residual * s[LOSS_RESIDUAL + k]
        s[LOSS_RESIDUAL + k] = residual
        s[LOSS_VARIANCE + k] = moving_mean(s[LOSS_VARIANCE + k], square, share)
        s[LOSS_COVARIANCE + k] = moving_mean(s[LOSS_COVARIANCE + k], product, share)
        s[CUBES + k] = moving_mean(s[CUBES + k], square * residual, share)
        s[LOSS_SQUARES + k] = moving_mean(s[LOSS_SQUARES + k], loss_move * loss_move, share)
        s[LOSS_TURNS + k] = moving_mean(s[LOSS_TURNS + k], loss_turn * loss_turn, share)

        other = s[NORM_GAP + k] + norm_move - REACH[k] * s[NORM_GAP_2 + k] + LEAST_MOVE
        s[NORM_GAP + k], s[NORM_GAP_2 + k], s[NORM_GAP_3 + k] = averaged_gaps(
            s[NORM_GAP + k], s[NORM_GAP_2 + k], s[NORM_GAP_3 + k], norm_move, share
        )
        product = other * s[NORM_RESIDUAL + k]
        s[NORM_RESIDUAL + k] = other
        s[NORM_VARIANCE + k] = moving_mean(s[NORM_VARIANCE + k], other * other, share)
        s[NORM_COVARIANCE + k] = moving_mean(s[NORM_COVARIANCE + k], product, share)
        s[NORM_SQUARES + k] = moving_mean(s[NORM_SQUARES + k], norm_move * norm_move, share)
        s[NORM_TURNS + k] = moving_mean(s[NORM_TURNS + k], norm_turn * norm_turn, share)

        s[CROSS + k] = moving_mean(s[CROSS + k], residual * other, share)
        s[RATE_GAP + k], s[RATE_GAP_2 + k], _ = averaged_gaps(
            s[RATE_GAP + k], s[RATE_GAP_2 + k], 0.0, rate_move, share
        )
        s[GAIN + k] = moving_mean(s[GAIN + k], gain, share)


@part
def write_values(s: FloatArray, first_order: float, length: float) -> None:
    """Write the features that follow from the state, before normalisation, into it.

    `first_order` and `length` are logarithms, relative to the first step: the relative decrease of
    the loss that plain gradient descent promises, and the length of its step.
    """
    v = VALUES
    for k in range(SCALES):
        s[v + LOSS_TREND + k] = s[LOSS_GAP_2 + k]
    for i in range(3):
        k = S8 + 2 * i
        s[v + LOSS_CURVATURE + i] = s[LOSS_GAP_2 + k] - s[LOSS_GAP_3 + k]
        k = S2 + 3 * i
        s[v + LOSS_DEVIATION + i] = s[LOSS_GAP + k]
        k = S4 + 2 * i
        s[v + NORM_TREND + i] = s[NORM_GAP_2 + k]
    smooth = s[LOSS] - s[LOSS_GAP + S8]
    s[v + LOSS_RECORD] = smooth - s[BEST]
    s[BEST] = smooth if smooth < s[BEST] else s[BEST]
    for i in range(2):
        k = S16 + 3 * i
        variance = s[LOSS_VARIANCE + k]
        s[v + LOSS_NOISE + i] = half_log(variance)
        s[v + LOSS_SIGNAL + i] = signed_log(in_deviations(s[LOSS_GAP_2 + k], variance))
        s[v + LOSS_ROUGHNESS + i] = log_ratio(s[LOSS_TURNS + k], s[LOSS_SQUARES + k])
        s[v + CORRELATION + i] = correlation(s[CROSS + k], variance, s[NORM_VARIANCE + k])
        s[v + EFFICIENCY + i] = signed_log(-s[LOSS_GAP_2 + k] / s[GAIN + k])
    s[v + LOSS_NOISE_GROWTH] = contrast(s[LOSS_VARIANCE + S8], s[LOSS_VARIANCE + S64])
    s[v + LOSS_PERSISTENCE] = per_variance(s[LOSS_COVARIANCE + S32], s[LOSS_VARIANCE + S32])
    s[v + LOSS_SKEWNESS] = skewness(s[CUBES + S64], s[LOSS_VARIANCE + S64])
    s[v + LOSS_EXTREME] = signed_log(s[EXTREME])

    s[v + NORM_CURVATURE] = s[NORM_GAP_2 + S32] - s[NORM_GAP_3 + S32]
    s[v + NORM_DEVIATION] = s[NORM_GAP + S4]
    s[v + NORM_DEVIATION + 1] = s[NORM_GAP + S64]
    s[v + NORM_NOISE] = half_log(s[NORM_VARIANCE + S32])
    s[v + NORM_ROUGHNESS] = log_ratio(s[NORM_TURNS + S32], s[NORM_SQUARES + S32])
    s[v + NORM_PERSISTENCE] = per_variance(s[NORM_COVARIANCE + S32], s[NORM_VARIANCE + S32])

    s[v + LENGTH_TREND] = s[NORM_GAP_2 + S8] + s[RATE_GAP_2 + S8]
    s[v + LENGTH_TREND + 1] = s[NORM_GAP_2 + S128] + s[RATE_GAP_2 + S128]

    s[v + LOSS_LEVEL] = s[LOSS] - s[FIRST_LOSS]
    s[v + NORM_LEVEL] = s[NORM] - s[FIRST_NORM]
    # The first rate of a warm-up may be next to nothing: levels compare with the highest.
    peak = s[HIGHEST_RATE] - s[FIRST_RATE]
    s[v + LENGTH_LEVEL] = length - s[NORM_GAP + S16] - s[RATE_GAP + S16] - peak
    s[v + FIRST_ORDER] = first_order - peak
    s[v + PATH_STEPS] = math.log(s[PATH]) - length
    s[v + RATE_STEPS] = math.log(s[RATE_SUM]) - s[RATE] + s[FIRST_RATE]
    s[v + STEPS] = math.log(s[COUNT])
    s[v + RECENCY] = RECENCY_STEPS / (RECENCY_STEPS + s[SINCE_RESTART])

    if s[HAS_GRAM] == 0.0:
        shorter = 0.0
        for k in range(GROUPS):
            gap = s[NORM_GAP + k] + s[RATE_GAP + k]
            s[v + GROWTH + k] = gap - shorter
            shorter = gap
            s[v + COSINE + k] = aligned(-s[NORM_GAP_2 + k], s[NORM_VARIANCE + k])


@part
def normalise(
    s: FloatArray, start: int, stop: int, count: float, memory: float, limit: float, out: Any
) -> None:
    """Standardise the features `start` to `stop` by running means and variances, then clip.

    After `count` steps the newest value weighs one over the steps since the state had settled, but
    at least 1 / `memory`; before that all features are 0.
    """
    known = count - SETTLING
    known = known if known > 1.0 else 1.0
    share = 1.0 / (known if known < memory else memory)
    for i in range(start, stop):
        gap = s[VALUES + i] - s[MEANS + i]
        variance = moving_variance(s[VARIANCES + i], gap, share)
        s[MEANS + i] += share * gap
        s[VARIANCES + i] = variance
        out[i] = standardised(gap, variance, share, limit)


@jit
def step(
    loss: float,
    gradient_norm: float,
    learning_rate: float,
    memory: float,
    limit: float,
    s: FloatArray,
    out: Any,
) -> None:
    """Take one full step: move the state `s` on, in place, and write the features into `out`.

    A loss, norm or rate that is not positive and finite counts as unchanged.
    """
    log_loss = log_or(loss, s[LOSS])
    log_norm = log_or(gradient_norm, s[NORM])
    log_rate = log_or(learning_rate, s[RATE])
    if s[SEEN_LOSS] == 0.0 and 0.0 < loss < math.inf:
        s[SEEN_LOSS] = 1.0
        s[FIRST_LOSS] = s[LOSS] = s[BEST] = log_loss
    if s[SEEN_NORM] == 0.0 and 0.0 < gradient_norm < math.inf:
        s[SEEN_NORM] = 1.0
        s[FIRST_NORM] = s[NORM] = log_norm
    if s[SEEN_RATE] == 0.0 and 0.0 < learning_rate < math.inf:
        s[SEEN_RATE] = 1.0
        s[FIRST_RATE] = s[HIGHEST_RATE] = s[RATE] = log_rate

    loss_move = norm_move = LEAST_MOVE
    if s[RESTARTED] == 0.0:
        loss_move += clipped(log_loss - s[LOSS], MOST_MOVE)
        norm_move += clipped(log_norm - s[NORM], MOST_MOVE)
    rate_move = LEAST_MOVE + clipped(log_rate - s[RATE], MOST_MOVE)
    s[LOSS], s[NORM], s[RATE] = log_loss, log_norm, log_rate
    s[HIGHEST_RATE] = log_rate if log_rate > s[HIGHEST_RATE] else s[HIGHEST_RATE]
    s[RESTARTED] = 0.0
    s[COUNT] += 1.0
    s[SINCE_RESTART] += 1.0

    rate = log_rate - s[FIRST_RATE]
    length = rate + log_norm - s[FIRST_NORM]
    first_order = length + log_norm - s[FIRST_NORM] - log_loss + s[FIRST_LOSS]
    s[RATE_SUM] += math.exp(clipped(rate, MOST_EXPONENT))
    s[PATH] += math.exp(clipped(length, MOST_EXPONENT))
    gain = math.exp(clipped(first_order, MOST_EXPONENT))

    average(s, loss_move, norm_move, rate_move, gain)
    residual = s[LOSS_RESIDUAL + S64]
    square = per_variance(residual * residual, s[LOSS_VARIANCE + S64])
    faded = DECAY[S64] * s[EXTREME]
    s[EXTREME] = square if square > faded else faded

    write_values(s, first_order, length)
    s[TAIL_COUNT] += 1.0
    for i in range(TAIL - FIXED):
        out[FIXED + i] = clipped((s[VALUES + FIXED + i] - CENTRES[i]) / WIDTHS[i], limit)
    # One call, because numba compiles a function once more for other literal arguments.
    for start, stop, count in ((0, FIXED, COUNT), (TAIL, FEATURES, TAIL_COUNT)):
        normalise(s, start, stop, s[count], memory, limit, out)


@jit
def take_gram(gram: Any, s: FloatArray) -> None:
    """Read growth and cosine of the displacements of each group, from at least three snapshots.

    A group that stood still, or whose numbers are no inner products, keeps what it had. With other
    than eight groups, feature j belongs to group ``j * groups // 8``.
    """
    groups, m = gram.shape[0], gram.shape[1]
    if m < 3 or groups == 0:
        return
    if s[HAS_GRAM] == 0.0:
        # From here on the features mean something else: their mean and variance start again.
        s[HAS_GRAM] = 1.0
        s[TAIL_COUNT] = SETTLING
        for j in range(2 * GROUPS):
            s[VALUES + TAIL + j] = 0.0
    for j in range(GROUPS):
        b = gram[j * groups // GROUPS]
        largest = 0.0
        for i in range(m):
            for k in range(m):
                size = abs(b[i, k])
                # NaN counts as too large.
                largest = size if size > largest else largest
                largest = largest if size < MOST_PRODUCT else MOST_PRODUCT
        if largest == MOST_PRODUCT:
            continue
        squares = newest = before = 0.0
        for i in range(m - 1):
            before = newest
            newest = b[i + 1, i + 1] - b[i + 1, i] - b[i, i + 1] + b[i, i]
            squares += newest / (m - 1)
        product = b[m - 1, m - 2] - b[m - 1, m - 3] - b[m - 2, m - 2] + b[m - 2, m - 3]
        if newest > 0.0 and squares > 0.0:
            growth = 0.5 * (math.log(newest) - math.log(squares))
            s[VALUES + GROWTH + j] = clipped(growth, MOST_GROWTH)
            if before > 0.0:
                cosine = product / (math.sqrt(newest) * math.sqrt(before))
                s[VALUES + COSINE + j] = clipped(cosine, 1.0)
