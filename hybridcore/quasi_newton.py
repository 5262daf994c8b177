"""Quasi-Newton directions from inner products alone.

L-BFGS (Nocedal 1980; Nocedal & Wright 2006, algorithm 7.4) never needs the vectors themselves: each
step of its two loops is an inner product or a multiple of a vector added to another. So the
direction is a combination of the secant pairs and the gradient, and its coefficients follow from
their inner products (Chen, Wang & Zhou 2014, "Large-scale L-BFGS using MapReduce"). An adapter
reports a matrix of a few hundred numbers and gets back a few dozen, whatever the size of the model.

The metric in which a step is short is diagonal, the inverse root of the gradients' second moment as
in Adam: it takes the place of the identity from which L-BFGS starts.

- *Predicts* the minimum of the loss from the curvature along the last twenty displacements. It is
  a step of the loss itself: one pass forward and backward, but no step of the optimizer.
- *Pays* where every batch is the same: plain's lowest loss at 0.15 of its cost on the SIREN and
  0.28 on the PINN (``benchmarks/results/cost-to-target-siren.json``, ``...-burgers.json``). Jumps
  alone come to 0.59 and 0.71, at the best of lower rates (``benchmarks/results/arms.json``).
- *Hurts* on tiny models, where the work beside the pass takes longer than the pass, and at the
  rounding of float32, where curvature says nothing: under a falling rate most of it is left to the
  optimizer there, and at a constant one the weights stay where they are.
- *Costs* up to 46 copies of the weights for twenty pairs, less where there is no room.
- *Source*: Nocedal 1980; Nocedal & Wright 2006, algorithms 3.1, 7.4 and 7.5; Chen, Wang & Zhou
  2014. When such steps are taken, and when they end, is the business of `hybridcore.secant`.
"""

import math
from collections.abc import Sequence
from operator import mul
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# A pair says nothing of a minimum whose displacement is so short for its change of the gradient, as
# a share of what that of the median pair is.
LEAST_LENGTH = 1e-10
# Nocedal & Wright 2006, equation 3.4 and its usual constant.
SUFFICIENT = 1e-4
# Least and greatest share of a step that was too long at which the next one is tried.
SHRINK = (0.1, 0.5)


class Secants(NamedTuple):
    """Inner products of the pairs ``(s_i, y_i)``, oldest first, and the gradient ``g``.

    ``s_i`` is a displacement of the weights, ``y_i`` the change of the gradient over it, and ``D``
    the diagonal metric.

    Attributes
    ----------
    plain : (k, k + 1) ndarray of float64
        ``s_i . y_j``, of which those with ``j`` before ``i`` are not used, and in the last column
        ``s_i . g``.
    scaled : (k + 1, k + 1) ndarray of float64
        ``y_i . D y_j``, in the last row and column with ``g`` in the place of ``y``.
    """

    plain: NDArray[np.float64]
    scaled: NDArray[np.float64]


class Descent(NamedTuple):
    """A direction of descent.

    Attributes
    ----------
    coefficients : (2 k + 1,) ndarray of float64
        Of ``s_1 ... s_k, D y_1 ... D y_k, D g``.
    slope : float
        Derivative of the loss along it, negative.
    """

    coefficients: NDArray[np.float64]
    slope: float


def direction(secants: Secants) -> Descent | None:
    """Direction of L-BFGS, None where the products show no descent.

    Parameters
    ----------
    secants : Secants
        Products of k pairs, k at least 0. Pairs without positive curvature are left out.
    """
    plain, scaled = secants
    # Lists, as between two passes Python's own loops are twice as fast on so few numbers: each of
    # NumPy's functions has to come from memory again.
    rows, own = plain.tolist(), scaled.diagonal().tolist()
    # All others of `scaled` are in what is found, if it is of use.
    if not math.isfinite(sum(map(sum, rows)) + sum(own)):
        return None
    columns, k = list(zip(*rows, strict=True)), len(rows)
    lengths = [rows[i][i] / own[i] if own[i] > 0.0 else 0.0 for i in range(k)]
    positive = sorted(length for length in lengths if length > 0.0)
    if not positive:
        return None
    least = LEAST_LENGTH * positive[len(positive) // 2]
    usable = [i for i in range(k) if lengths[i] > least]
    if not usable:
        return None
    # Each of the two loops solves a triangular system (Byrd, Nocedal & Schnabel 1994, section 2):
    # what has not been found yet is 0 in it.
    shares = [0.0] * k
    for i in reversed(usable):
        shares[i] = -(rows[i][k] + _dot(rows[i], shares)) / rows[i][i]
    newest = usable[-1]
    steepest = -rows[newest][newest] / own[newest]
    gradient = [steepest * share for share in shares] + [steepest]
    with np.errstate(all="ignore"):
        turned = (scaled @ gradient).tolist()
    steps = [0.0] * k
    for i in usable:
        along = shares[i] * rows[i][i] - turned[i] - _dot(columns[i], steps)
        steps[i] = along / rows[i][i]
    slope = _dot(columns[k], steps) + turned[k]
    if not (slope < 0.0 and math.isfinite(sum(steps) + sum(gradient))):
        return None
    return Descent(np.array(steps + gradient), slope)


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    """Inner product, to the end of the shorter one."""
    total: float = sum(map(mul, left, right))
    return total


def sufficient(before: float, after: float, length: float, slope: float) -> bool:
    """Whether a step of `length` along a direction of `slope` lowered the loss enough."""
    return after <= before + SUFFICIENT * length * slope


def shorter(before: float, after: float, length: float, slope: float) -> float:
    """Length to try after one that was too long: the minimum of the parabola through what is known.

    Nocedal & Wright 2006, equation 3.58, kept within `SHRINK` of `length`.
    """
    least, most = (share * length for share in SHRINK)
    excess = after - before - slope * length
    if not np.isfinite(excess) or excess <= 0.0:
        return least
    return float(np.clip(-slope * length * length / (2.0 * excess), least, most))
