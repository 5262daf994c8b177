"""One step of the expert mixture on the CPU; what the experts are stands in ``dynamics.mixture``.

The state is one float64 vector; log losses in it are less the first one, which keeps their digits.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from hybridcore.kernels.cpu import jit, part

FloatArray = NDArray[np.float64]

# Leads in steps at which the experts are compared; in between weights go over the log of the lead.
KNOTS = np.array([1, 2, 3, 5, 8, 15, 25, 45, 75])
PLACES = np.log(KNOTS)
LEADS = KNOTS.size
RING = 76  # more than the longest lead

LEVEL_GAIN = 0.03
DISCOUNTS = np.array([0.8, 0.95, 0.99])
LINES = DISCOUNTS.size
OFFSET_GAINS = np.array([0.1, 0.03, 0.01])
OFFSETS = OFFSET_GAINS.size
OFFSET_SHARES = np.array([0.3, 0.6, 1.0])
# A level, lines, shrunken lines, the law, and the law moved by shares of its recent misses.
LAW = 1 + 2 * LINES
EXPERTS = LAW + 1 + OFFSETS * OFFSET_SHARES.size

# Steps after a restart from which on experts are compared.
SETTLING = 10
ERROR_DISCOUNT = 0.97
# A squared error counts for at most so many times the mean one of the best expert.
MOST_ERROR = 9.0
LEAST_WEIGHT = 5.0  # from which on that is known
STEEPNESS = 20.0
# Weight of the law where errors are alike, others' being 1. Where batches are noisy they are, and
# what is fitted to the whole run has the least of that noise.
LAW_PRIOR = 30.0
# Below the rounding of float32 losses no expert is better than another.
LEAST_ERROR = 1e-14
# Passes of a mean over neighbouring leads, with the logarithms of the errors: a bell of about two
# leads' width. What is best at one lead is nearly so beside it, and errors are few.
SMOOTHINGS = 9

# Steps between two fits of the law, and iterations of each.
FIT_INTERVAL = 10
FIRST_FIT = 20
FIRST_ITERATIONS, ITERATIONS = 30, 3
LEAST_DECAY = 0.05
# The first 16 steps have bins of their own, then there are 8 an octave, up to 2^36 times as many.
SINGLE_BINS, BINS_PER_OCTAVE = 16, 8
BINS = SINGLE_BINS + 36 * BINS_PER_OCTAVE

(
    COUNT,
    SINCE_RESTART,
    ORIGIN,
    LEVEL,
    HAS_LAW,
    LOG_FLOOR,
    LOG_SCALE,
    DECAY,
    DAMPING,
    _END_OF_NUMBERS,
) = range(10)
# Per line: weight, t, t^2, y, y^2 and t y, with t = 0 for the newest step; as in LinearDynamics.
WEIGHT = _END_OF_NUMBERS
TIME = WEIGHT + LINES
TIME2 = TIME + LINES
VALUE = TIME2 + LINES
VALUE2 = VALUE + LINES
PRODUCT = VALUE2 + LINES
OFFSET = PRODUCT + LINES
ERROR = OFFSET + OFFSETS  # (leads, experts)
ERROR_WEIGHT = ERROR + LEADS * EXPERTS  # (leads,)
MISS = ERROR_WEIGHT + LEADS  # (leads,) of the mixture itself, absolute
BIN_COUNT = MISS + LEADS
BIN_X = BIN_COUNT + BINS
BIN_Y = BIN_X + BINS
STATE_SIZE = BIN_Y + BINS


@part
def law(s: FloatArray, log_step: float) -> float:
    """``log(a + b k^-c)`` at the logarithm of step k."""
    falling = s[LOG_SCALE] - s[DECAY] * log_step
    top: float = max(s[LOG_FLOOR], falling)
    return top + math.log1p(math.exp(-abs(s[LOG_FLOOR] - falling)))


@part
def start_law(s: FloatArray, bins: int) -> None:
    """Start from the straight line through log loss over log step."""
    n = x = y = xx = xy = 0.0
    for b in range(bins):
        count = s[BIN_COUNT + b]
        if count > 0.0:
            at, value = s[BIN_X + b] / count, s[BIN_Y + b] / count
            n += count
            x += count * at
            y += count * value
            xx += count * at * at
            xy += count * at * value
    slope = (xy - x * y / n) / (xx - x * x / n)
    s[LOG_FLOOR] = s[LEVEL] - 1.0
    s[LOG_SCALE] = (y - slope * x) / n
    s[DECAY] = max(-slope, LEAST_DECAY)
    s[DAMPING] = 1e-2


@part
def law_cost(s: FloatArray, bins: int) -> float:
    """Sum of squared errors of the law over the bins."""
    cost = 0.0
    for b in range(bins):
        count = s[BIN_COUNT + b]
        if count > 0.0:
            error = s[BIN_Y + b] / count - law(s, s[BIN_X + b] / count)
            cost += count * error * error
    return cost


@part
def fit_law(s: FloatArray, bins: int, iterations: int) -> None:
    """Fit the law to the bins by Levenberg-Marquardt steps (Marquardt 1963) from where it is."""
    cost = law_cost(s, bins)
    for _ in range(iterations):
        a00 = a01 = a02 = a11 = a12 = a22 = g0 = g1 = g2 = total = 0.0
        for b in range(bins):
            n = s[BIN_COUNT + b]
            if n > 0.0:
                x = s[BIN_X + b] / n
                value = law(s, x)
                error = s[BIN_Y + b] / n - value
                share = math.exp(s[LOG_SCALE] - s[DECAY] * x - value)
                j0, j1, j2 = 1.0 - share, share, -share * x
                total += n
                a00 += n * j0 * j0
                a01 += n * j0 * j1
                a02 += n * j0 * j2
                a11 += n * j1 * j1
                a12 += n * j1 * j2
                a22 += n * j2 * j2
                g0 += n * j0 * error
                g1 += n * j1 * error
                g2 += n * j2 * error
        least = 1e-9 * total
        # Elimination without pivots: the matrix is positive definite.
        d0 = a00 * (1.0 + s[DAMPING]) + least
        l1, l2 = a01 / d0, a02 / d0
        d1 = a11 * (1.0 + s[DAMPING]) + least - l1 * a01
        l21 = (a12 - l2 * a01) / d1
        d2 = a22 * (1.0 + s[DAMPING]) + least - l2 * a02 - l21 * (a12 - l2 * a01)
        g1 -= l1 * g0
        g2 -= l2 * g0 + l21 * g1
        m2 = g2 / d2
        m1 = g1 / d1 - l21 * m2
        m0 = g0 / d0 - l1 * m1 - l2 * m2
        s[LOG_FLOOR] += m0
        s[LOG_SCALE] += m1
        s[DECAY] += m2
        moved = law_cost(s, bins)
        if moved <= cost:
            cost = moved
            s[DAMPING] = max(s[DAMPING] / 5.0, 1e-6)
        else:
            # NaN too: the step is taken back.
            s[LOG_FLOOR] -= m0
            s[LOG_SCALE] -= m1
            s[DECAY] -= m2
            s[DAMPING] = min(s[DAMPING] * 5.0, 1e4)


@part
def move_law(s: FloatArray, change: float) -> None:
    """Move the law and all that it was fitted to, because the weights were moved."""
    s[LOG_FLOOR] += change
    s[LOG_SCALE] += change
    for b in range(BINS):
        s[BIN_Y + b] += change * s[BIN_COUNT + b]
    for k in range(OFFSETS):
        s[OFFSET + k] = 0.0


@part
def foretell(s: FloatArray, lead: float, out: FloatArray) -> None:
    """Write what each expert says of the log loss `lead` steps ahead, less the first one."""
    out[0] = s[LEVEL]
    for k in range(LINES):
        weight = s[WEIGHT + k]
        mean_t, mean_y = s[TIME + k] / weight, s[VALUE + k] / weight
        spread = s[TIME2 + k] - s[TIME + k] * mean_t
        slope = shrunken = 0.0
        if spread > 1e-12:
            covariance = s[PRODUCT + k] - s[TIME + k] * mean_y
            slope = covariance / spread
            residual = max(s[VALUE2 + k] - s[VALUE + k] * mean_y - slope * covariance, 0.0)
            effective = max(weight * (1.0 - 2.0 / max(s[SINCE_RESTART], 3.0)), 1e-9)
            # Less the share that its own uncertainty explains (James & Stein 1961).
            surely = 1.0 - residual / effective / spread / max(slope * slope, 1e-300)
            shrunken = slope * max(surely, 0.0)
        out[1 + k] = mean_y + slope * (lead - mean_t)
        out[1 + LINES + k] = mean_y + shrunken * (lead - mean_t)
    place = LAW
    plain = law(s, math.log(s[COUNT] + lead)) if s[HAS_LAW] > 0.0 else s[LEVEL]
    out[place] = plain
    for i in range(OFFSET_SHARES.size):
        for k in range(OFFSETS):
            place += 1
            out[place] = plain + OFFSET_SHARES[i] * s[OFFSET + k]


@part
def weigh(s: FloatArray, weights: FloatArray) -> None:
    """Write the weights (leads, experts) of the experts: steep in their errors, smooth in leads."""
    for j in range(LEADS):
        scale = 1.0 / max(s[ERROR_WEIGHT + j], 1e-9)
        lowest = math.inf
        for e in range(EXPERTS):
            weights[j, e] = math.log(scale * s[ERROR + j * EXPERTS + e] + LEAST_ERROR)
            lowest = min(lowest, weights[j, e])
        for e in range(EXPERTS):
            weights[j, e] -= lowest
    for _ in range(SMOOTHINGS):
        for e in range(EXPERTS):
            before = weights[0, e]
            for j in range(LEADS):
                now = weights[j, e]
                after = weights[min(j + 1, LEADS - 1), e]
                weights[j, e] = 0.25 * before + 0.5 * now + 0.25 * after
                before = now
    for j in range(LEADS):
        lowest = math.inf
        for e in range(EXPERTS):
            lowest = min(lowest, weights[j, e])
        total = 0.0
        for e in range(EXPERTS):
            weights[j, e] = math.exp(-STEEPNESS * (weights[j, e] - lowest))
            # Before there is one, and while it does not know where a restart has led, it has none.
            if e == LAW and s[HAS_LAW] > 0.0 and s[SINCE_RESTART] >= SETTLING:
                weights[j, e] *= LAW_PRIOR
            total += weights[j, e]
        for e in range(EXPERTS):
            weights[j, e] /= total


@part
def charge(s: FloatArray, y: float, ring: FloatArray) -> None:
    """Charge the experts and the mixture what they missed `y` by, at each lead."""
    for j in range(LEADS):
        made = s[SINCE_RESTART] - KNOTS[j]
        if made < SETTLING:
            continue
        row = ring[(int(s[COUNT]) - KNOTS[j]) % RING, j]
        most = math.inf
        weight = s[ERROR_WEIGHT + j]
        if weight > LEAST_WEIGHT:
            for e in range(EXPERTS):
                most = min(most, s[ERROR + j * EXPERTS + e])
            most = MOST_ERROR * max(most / weight, LEAST_ERROR)
        for e in range(EXPERTS):
            missed = row[e] - y
            place = ERROR + j * EXPERTS + e
            s[place] = ERROR_DISCOUNT * s[place] + min(missed * missed, most)
        s[MISS + j] = ERROR_DISCOUNT * s[MISS + j] + abs(row[EXPERTS] - y)
        s[ERROR_WEIGHT + j] = ERROR_DISCOUNT * weight + 1.0


@jit
def step(log_loss: float, s: FloatArray, ring: FloatArray, weights: FloatArray) -> None:
    """Take one log loss: charge, move the state on, and forecast at the knots.

    Parameters
    ----------
    log_loss : float
        Of the step, finite.
    s : (STATE_SIZE,) ndarray of float64
        The state.
    ring : (RING, leads, EXPERTS + 1) ndarray of float64
        What the experts, and last the mixture, said at recent steps.
    weights : (leads, EXPERTS) ndarray of float64
        Receives the experts' weights.
    """
    if s[COUNT] == 0.0:
        s[ORIGIN] = log_loss
    y = log_loss - s[ORIGIN]
    charge(s, y, ring)
    s[COUNT] += 1.0
    s[SINCE_RESTART] += 1.0
    least_gain = 1.0 / s[SINCE_RESTART]
    s[LEVEL] += max(LEVEL_GAIN, least_gain) * (y - s[LEVEL])
    for k in range(LINES):
        d = DISCOUNTS[k]
        s[TIME2 + k] = d * (s[TIME2 + k] - 2.0 * s[TIME + k] + s[WEIGHT + k])
        s[TIME + k] = d * (s[TIME + k] - s[WEIGHT + k])
        s[PRODUCT + k] = d * (s[PRODUCT + k] - s[VALUE + k])
        s[WEIGHT + k] = d * s[WEIGHT + k] + 1.0
        s[VALUE + k] = d * s[VALUE + k] + y
        s[VALUE2 + k] = d * s[VALUE2 + k] + y * y

    log_step = math.log(s[COUNT])
    place = int(s[COUNT]) - 1
    if place >= SINGLE_BINS:
        octave = (log_step - math.log(float(SINGLE_BINS))) / math.log(2.0)
        place = min(SINGLE_BINS + int(BINS_PER_OCTAVE * octave), BINS - 1)
    if s[SINCE_RESTART] > SETTLING or s[SINCE_RESTART] == s[COUNT]:
        s[BIN_COUNT + place] += 1.0
        s[BIN_X + place] += log_step
        s[BIN_Y + place] += y
    elif s[SINCE_RESTART] == SETTLING:
        move_law(s, s[LEVEL] - law(s, log_step))
    if s[COUNT] >= FIRST_FIT and int(s[COUNT]) % FIT_INTERVAL == 0:
        iterations = ITERATIONS
        if s[HAS_LAW] == 0.0:
            start_law(s, place + 1)
            iterations = FIRST_ITERATIONS
        was = law(s, log_step)
        fit_law(s, place + 1, iterations)
        for k in range(OFFSETS):
            s[OFFSET + k] += s[HAS_LAW] * (was - law(s, log_step))
        s[HAS_LAW] = 1.0
    if s[HAS_LAW] > 0.0:
        missed = y - law(s, log_step)
        for k in range(OFFSETS):
            s[OFFSET + k] += max(OFFSET_GAINS[k], least_gain) * (missed - s[OFFSET + k])

    weigh(s, weights)
    slot = (int(s[COUNT]) - 1) % RING
    for j in range(LEADS):
        row = ring[slot, j]
        foretell(s, float(KNOTS[j]), row)
        mixed = 0.0
        for e in range(EXPERTS):
            mixed += weights[j, e] * row[e]
        row[EXPERTS] = mixed


@jit
def forecast(lead: float, s: FloatArray, weights: FloatArray, experts: FloatArray) -> float:
    """Forecast of the mixture `lead` steps ahead; `experts` (EXPERTS,) is scratch."""
    foretell(s, lead, experts)
    at = math.log(max(lead, 1.0))
    j = 0
    while j < LEADS - 2 and PLACES[j + 1] < at:
        j += 1
    share = min((at - PLACES[j]) / (PLACES[j + 1] - PLACES[j]), 1.0)
    mixed = 0.0
    for e in range(EXPERTS):
        mixed += (weights[j, e] + share * (weights[j + 1, e] - weights[j, e])) * experts[e]
    origin: float = s[ORIGIN]
    return origin + mixed
