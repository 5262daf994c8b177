"""Gram matrix of snapshots in, affine coefficients out.

Every method predicts ``theta_hat = sum_i c[i] * theta[i]`` with ``sum(c) == 1`` from the last
``m`` snapshots of the parameters, oldest first and equally spaced in steps. All that a method may
know of the snapshots is their Gram matrix ``G[i, j] = <theta[i], theta[j]>``: so a billion
parameters reach it as a few dozen numbers, and no method can depend on the orientation of
parameter space. The methods only use differences of snapshots, so ``G`` may be taken about any
origin; about one of the snapshots it keeps the digits that differences of long vectors lose.

``horizon`` is measured in snapshot intervals: with snapshots 10 steps apart, 75 steps are 7.5.

| name | predicts | source |
|---|---|---|
| `average` | the annealed weights | Polyak & Juditsky 1992; SWA, Izmailov et al. 2018 |
| `linear` | the window's mean velocity, kept up | Introspection, Sinha et al. 2017 |
| `nesterov` | momentum over displacements, kept up | Lookahead, Zhang et al. 2019; DiLoCo |
| `anderson` | the fixed point | Anderson 1965; Scieur et al. 2016, alg. 1 |
| `dmd` | slow Koopman modes, advanced | Schmid 2010; Dogra & Redman 2020 |

Each function ends with its card. What they have in common: a Gram matrix of the snapshots once a
decision and one probe each; they pay where the path is smooth, which the bank's own back-test says
before any probe (`hybridcore.planning.path_confidence`), and are not tried elsewhere. *Alone* is
the cost to plain's lowest loss, as a share of plain's, on the SIREN and on the PINN, where no other
is tried: medians of 5 seeds, ``benchmarks/results/arms.json``. All together come to 0.59 / 0.71.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array: TypeAlias = NDArray[np.float64]
Extrapolator: TypeAlias = Callable[[ArrayLike, float], Array]

MOMENTUM = 0.5
# Above the rounding of a Gram matrix of float32 parameters.
REGULARIZATION = 1e-8
RANK_TOLERANCE = 1e-8


def average(gram: ArrayLike, horizon: float = 0.0) -> Array:
    """Mean of the snapshots, the same for every horizon.

    - *Predicts* where the weights would be if the rate were annealed here.
    - *Pays* as a judge: a jump is kept if the mean of two snapshots after it is better than the
      mean of two before it, which no single step's noise decides.
    - *Hurts* as a jump: it leads back, so it is not among the arms (entry 4 of the proving
      ground's log: 1.64x with it, 1.75x without).
    - *Costs* two probes a jump.
    - *Source*: Polyak & Juditsky 1992; Izmailov et al. 2018, equation 1.

    Parameters
    ----------
    gram : (m, m) array_like of float
        Gram matrix of the snapshots, oldest first.
    horizon : float
        Snapshot intervals to predict; checked, but an average does not depend on it.

    Returns
    -------
    (m,) ndarray of float64
        Affine coefficients, all ``1 / m``.

    Raises
    ------
    ValueError
        If `gram` is not a finite square matrix or `horizon` is negative or not finite.
    """
    m = len(_checked(gram, horizon))
    return np.full(m, 1.0 / m)


def linear(gram: ArrayLike, horizon: float) -> Array:
    """Last snapshot plus `horizon` times the window's mean displacement.

    ``theta_hat = theta[-1] + horizon * (theta[-1] - theta[0]) / (m - 1)``. Parameters, return value
    and errors are those of :func:`average`.

    - *Predicts* that the velocity of the whole window is kept up.
    - *Pays* where the path is straight over several windows.
    - *Hurts* where it bends or slows down: the oldest displacement counts as much as the newest.
    - *Alone*: 0.63 / 0.78.
    - *Source*: Sinha et al. 2017 (Introspection), without the network.
    """
    m = len(_checked(gram, horizon))
    if m == 1:
        return np.ones(1)
    return _from_displacements(np.full(m - 1, horizon / (m - 1)))


def nesterov(gram: ArrayLike, horizon: float, momentum: float = MOMENTUM) -> Array:
    """Last snapshot plus `horizon` times the exponentially weighted mean displacement.

    With displacements ``u[k] = theta[k + 1] - theta[k]`` and the outer momentum buffer
    ``v[k] = momentum * v[k - 1] + u[k]`` of Lookahead and DiLoCo,
    ``theta_hat = theta[-1] + horizon * v[-1] / sum_k(momentum ** k)``: a steady velocity is
    continued exactly, an unsteady one by its recent part. Parameters, return value and errors are
    those of :func:`average`; `momentum` lies in [0, 1).

    - *Predicts* that the recent velocity is kept up.
    - *Pays* on paths that bend slowly. It was the best arm by itself, and no worse than all of
      them together.
    - *Hurts* where the newest displacement is the odd one, after a spike.
    - *Alone*: 0.58 / 0.68.
    - *Source*: Zhang et al. 2019, algorithm 1; Douillard et al. 2023, algorithm 1.
    """
    m = len(_checked(gram, horizon))
    if not 0.0 <= momentum < 1.0:
        raise ValueError(f"momentum must lie in [0, 1), got {momentum!r}")
    if m == 1:
        return np.ones(1)
    weights = momentum ** np.arange(m - 2, -1, -1.0)
    return _from_displacements(horizon * weights / weights.sum())


def anderson(
    gram: ArrayLike, horizon: float = 0.0, regularization: float = REGULARIZATION
) -> Array:
    """Point of the snapshots' affine hull whose predicted displacement is smallest.

    Regularised nonlinear acceleration: ``c`` minimises ``|U c|^2 + regularization |U|^2 |c|^2``
    with ``sum(c) == 1``, where ``U`` holds the displacements that followed the snapshots and
    ``|U|`` is the longest of them. For a linear iteration with fewer active modes than
    displacements that point is the fixed point, so the result does not depend on `horizon`.
    Parameters, return value and errors are those of :func:`average`; `regularization` is positive
    and finite, and raised to the rounding of the Gram matrix where it is smaller.

    - *Predicts* where the path ends, not when.
    - *Pays* in a bowl with fewer slow directions than there are snapshots.
    - *Hurts* where there are more: the regularised point is then a short way off. It has no
      horizon, so that a probe cannot find a better reach.
    - *Alone*: 0.67 / 0.86.
    - *Source*: Anderson 1965; Scieur, d'Aspremont & Bach 2016, algorithm 1.
    """
    gram = _checked(gram, horizon)
    if not (np.isfinite(regularization) and regularization > 0.0):
        raise ValueError(f"regularization must be positive and finite, got {regularization!r}")
    m = len(gram)
    moved, rounding = _displacement_gram(gram)
    if m < 3 or rounding >= 1.0:
        return _from_displacements(np.zeros(m - 1))
    energies, vectors = np.linalg.eigh(moved)
    # A direction without energy is where the fixed point lies: it must be kept. Rounding can make
    # its energy negative; clipped, every term of the sum below is positive and none cancels.
    regularized = np.maximum(energies, 0.0) + max(regularization, rounding)
    solution = vectors @ (vectors.sum(axis=0) / regularized)
    # The displacement that followed snapshot i leads to snapshot i + 1: mixing the newer points
    # costs nothing and is one step further on.
    return np.concatenate(([0.0], solution / solution.sum()))


def dmd(gram: ArrayLike, horizon: float, tolerance: float = RANK_TOLERANCE) -> Array:
    """Dynamic modes of the displacements advanced by `horizon`, none of them growing.

    ``u[k + 1] = A u[k]`` is fitted in the span of the displacements but the last (directions whose
    energy is below `tolerance` of the largest, or below the rounding of the Gram matrix, are
    dropped), eigenvalues outside the unit circle are put on it, and
    ``theta_hat = theta[-1] + sum_{k=1..horizon} A^k u[-1]``. Parameters, return value and errors
    are those of :func:`average`; `tolerance` lies in [0, 1).

    - *Predicts* directions that slow down each at a speed of its own.
    - *Pays* where fast directions have nearly settled and slow ones have not.
    - *Hurts* where four displacements are too few to tell a mode from noise: on the PINN its
      seeds lie between 0.69 and 1.07.
    - *Alone*: 0.60 / 0.87.
    - *Source*: Schmid 2010, section 2; Dogra & Redman 2020.
    """
    gram = _checked(gram, horizon)
    if not 0.0 <= tolerance < 1.0:
        raise ValueError(f"tolerance must lie in [0, 1), got {tolerance!r}")
    m = len(gram)
    if m < 3:
        return linear(gram, horizon)
    moved, rounding = _displacement_gram(gram)
    if rounding >= 1.0:
        return _from_displacements(np.zeros(m - 1))
    energies, vectors = np.linalg.eigh(moved[:-1, :-1])
    kept = energies > max(tolerance * energies[-1], rounding)
    if not kept.any():
        return _from_displacements(np.zeros(m - 1))
    whiten = vectors[:, kept] / np.sqrt(energies[kept])
    advance = whiten.T @ moved[:-1, 1:] @ whiten
    start = whiten.T @ moved[:-1, -1]
    eigenvalues, modes = np.linalg.eig(advance)
    size = np.abs(eigenvalues)
    eigenvalues = np.where(size > 1.0, eigenvalues / np.maximum(size, 1.0), eigenvalues)
    amplitudes = np.linalg.lstsq(modes, start.astype(complex), rcond=None)[0]
    future = (modes @ (_geometric_sum(eigenvalues, horizon) * amplitudes)).real
    weights = np.concatenate((whiten @ future, [0.0]))
    return _from_displacements(weights)


EXTRAPOLATORS: dict[str, Extrapolator] = {
    "average": average,
    "linear": linear,
    "nesterov": nesterov,
    "anderson": anderson,
    "dmd": dmd,
}
# Those that say where the weights will be at a given time; the others name one point.
FORECASTERS = ("linear", "nesterov", "dmd")


def _checked(gram: ArrayLike, horizon: float) -> Array:
    matrix = np.asarray(gram, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) == 0:
        raise ValueError(f"gram must be a square matrix of snapshots, got shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise ValueError("gram must be finite: drop snapshots that hold NaN or Inf first")
    if not (np.isfinite(horizon) and horizon >= 0.0):
        raise ValueError(f"horizon must be finite and not negative, got {horizon!r}")
    return matrix


def _displacement_gram(gram: Array) -> tuple[Array, float]:
    """Gram matrix of the displacements, the longest of length 1, and the rounding it carries.

    Differences of `gram` keep its absolute error: one of ``eps * max |gram|``. Rounding of 1 or
    more says that nothing is known of the displacements, or that there are none.
    """
    eps = float(np.finfo(np.float64).eps)
    peak = np.abs(gram).max()
    if len(gram) < 2 or not peak > 0.0:
        return np.zeros((len(gram) - 1,) * 2), 1.0
    gram = gram / peak
    half = gram[1:] - gram[:-1]
    moved = half[:, 1:] - half[:, :-1]
    moved = (moved + moved.T) / 2.0
    scale = float(np.diag(moved).max())
    if not scale > eps:
        return np.zeros_like(moved), 1.0
    return moved / scale, eps / scale


def _from_displacements(weights: Array) -> Array:
    """Coefficients of ``theta[-1] + sum_k weights[k] * (theta[k + 1] - theta[k])``."""
    coefficients = np.zeros(len(weights) + 1)
    coefficients[-1] = 1.0
    coefficients[1:] += weights
    coefficients[:-1] -= weights
    return coefficients


def _geometric_sum(ratio: NDArray[np.complex128], count: float) -> NDArray[np.complex128]:
    """``sum_{k=1..count} ratio ** k``, continued to fractional `count`."""
    gap = 1.0 - ratio
    # A ratio of 0 contributes nothing and one of 1 contributes `count`; neither may reach the
    # logarithm or the division. expm1 keeps the digits of ratios close to 1.
    with np.errstate(over="ignore", under="ignore"):
        exponent = count * np.log(np.where(ratio == 0.0, 1.0, ratio).astype(complex))
        total = -ratio * np.expm1(exponent) / np.where(gap == 0.0, 1.0, gap)
    return np.where(gap == 0.0, count, total)
