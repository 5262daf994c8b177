"""Slow, obvious NumPy oracles. Nothing here imports the code under test.

The extrapolators work on the explicit snapshots, an (m, d) matrix with the oldest in row 0, and
return the predicted point (d,) itself: they share neither the Gram matrix nor the affine
coefficients with ``hybridcore.extrapolation``.
"""

from itertools import pairwise

import numpy as np


def average(snapshots, horizon):
    return sum(snapshots) / len(snapshots)


def linear(snapshots, horizon):
    first, last = snapshots[0], snapshots[-1]
    if len(snapshots) == 1:
        return last.copy()
    return last + horizon * (last - first) / (len(snapshots) - 1)


def nesterov(snapshots, horizon, momentum):
    buffer = np.zeros_like(snapshots[0])
    steady = 0.0  # what the buffer would hold of a velocity of 1
    for before, after in pairwise(snapshots):
        buffer = momentum * buffer + (after - before)
        steady = momentum * steady + 1.0
    if steady == 0.0:
        return snapshots[-1].copy()
    return snapshots[-1] + horizon * buffer / steady


def anderson(snapshots, horizon, regularization):
    moves = np.diff(snapshots, axis=0)
    if len(moves) < 2:
        return snapshots[-1].copy()
    n = len(moves)
    longest = max(np.linalg.norm(move) for move in moves)
    # c = 1/n + D z has sum 1 for every z, so the constrained problem becomes a plain one, solved
    # on the displacements themselves: their condition number is not squared.
    centre = np.full(n, 1.0 / n)
    directions = np.vstack([np.eye(n - 1), -np.ones(n - 1)])
    stacked = np.vstack([moves.T, np.sqrt(regularization) * longest * np.eye(n)])
    z = np.linalg.lstsq(stacked @ directions, -stacked @ centre, rcond=None)[0]
    return (centre + directions @ z) @ snapshots[1:]


def dmd(snapshots, horizon, tolerance):
    if horizon != int(horizon):
        raise ValueError("the oracle takes whole steps only")
    moves = np.diff(snapshots, axis=0).T
    if moves.shape[1] < 2:
        return linear(snapshots, horizon)
    before, after = moves[:, :-1], moves[:, 1:]
    left, sizes, right = np.linalg.svd(before, full_matrices=False)
    kept = sizes > np.sqrt(tolerance) * sizes[0]
    left, sizes, right = left[:, kept], sizes[kept], right[kept]
    operator = left.T @ after @ right.T @ np.diag(1.0 / sizes)
    values, vectors = np.linalg.eig(operator)
    values = np.array([value / abs(value) if abs(value) > 1.0 else value for value in values])
    operator = (vectors @ np.diag(values) @ np.linalg.inv(vectors)).real
    point = snapshots[-1].copy()
    velocity = left.T @ moves[:, -1]
    for _ in range(int(horizon)):
        velocity = operator @ velocity
        point = point + left @ velocity
    return point


def discounted_line(values, discount):
    """Level at the newest value, slope and residual deviation of a discounted least-squares line.

    The fit is by an explicit weighted design matrix, newest value at time 0.
    """
    y = np.asarray(values, dtype=float)
    n = len(y)
    t = np.arange(-n + 1.0, 1.0)
    root = np.sqrt(discount ** (-t))
    design = np.stack([np.ones(n), t], axis=1) * root[:, None]
    level, slope = np.linalg.lstsq(design, y * root, rcond=None)[0]
    residual = np.sum((root * (y - level - slope * t)) ** 2)
    effective = np.sum(root**2) * (1 - 2 / n)
    return level, slope, np.sqrt(residual / effective)


def discounted_forecast_std(values, discount, horizon):
    """Standard deviation of a new value `horizon` steps ahead about :func:`discounted_line`.

    The textbook prediction interval of weighted least squares: the noise of the new value, and the
    uncertainty of the line there from the explicit normal matrix.
    """
    n = len(values)
    t = np.arange(-n + 1.0, 1.0)
    design = np.stack([np.ones(n), t], axis=1)
    information = design.T @ np.diag(discount ** (-t)) @ design
    ahead = np.array([1.0, horizon])
    noise = discounted_line(values, discount)[2]
    return noise * np.sqrt(1.0 + ahead @ np.linalg.inv(information) @ ahead)


def gram_of(snapshots, origin=None):
    offset = snapshots - (snapshots[-1] if origin is None else origin)
    return offset @ offset.T


def lbfgs_direction(displacements, changes, gradient, metric):
    """Direction of L-BFGS by the two loops on the vectors (Nocedal & Wright 2006, algorithm 7.4).

    Pairs are rows, oldest first. The loops begin with ``gamma * diag(metric)``, gamma from the
    newest usable pair; None where there is no usable pair.
    """
    pairs = [
        (s, y)
        for s, y in zip(displacements, changes, strict=True)
        if s @ y > 1e-10 * (y @ (metric * y))
    ]
    if not pairs:
        return None
    q = gradient.copy()
    alphas = []
    for s, y in reversed(pairs):
        alpha = (s @ q) / (s @ y)
        q = q - alpha * y
        alphas.append(alpha)
    s, y = pairs[-1]
    r = (s @ y) / (y @ (metric * y)) * metric * q
    for (s, y), alpha in zip(pairs, reversed(alphas), strict=True):
        beta = (y @ r) / (s @ y)
        r = r + (alpha - beta) * s
    return -r


def gram(rows):
    """Inner products of `rows` about the last of them, in float64."""
    moved = np.asarray(rows, np.float64) - np.asarray(rows[-1], np.float64)
    return moved @ moved.T


def in_8_bits(values, block=256):
    """Whole numbers up to 127 for each value, and what one step stands for in its block."""
    blocks = np.zeros((-(-len(values) // block), block))
    blocks.flat[: len(values)] = values
    scales = np.abs(blocks).max(axis=1) / 127
    steps = np.divide(blocks, scales[:, None], where=scales[:, None] > 0, out=0 * blocks)
    return np.rint(steps).ravel(), scales
