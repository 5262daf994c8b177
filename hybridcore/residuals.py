"""What jumps missed, layer group by layer group, and the past jumps that were most like this one.

A jump predicts a displacement of the weights; full steps from the same start show another. Both
combine snapshots, ``d = sum_i a[i] * theta[i]`` with ``sum(a) == 0``, so every inner product of
displacements is one of coefficients, ``<d, e> = a G b``, and the core never sees a parameter.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

CAPACITY = 256
# A feature that varies by less than this part of its size is compared as if it varied by so much:
# rounding must not look like a difference.
LEAST_VARIATION = 1e-3
RANK_TOLERANCE = 1e-12
# Larger numbers are cut to this, so that sums of their squares stay finite.
LARGEST = 1e100


def group_scales(gram: ArrayLike, predicted: ArrayLike, actual: ArrayLike) -> Array:
    """Factor by which each group's displacement missed, and the angle by which it did.

    Parameters
    ----------
    gram : (groups, m, m) array_like of float
        Gram matrices of the snapshots, oldest first, about any origin. An asymmetric one counts as
        its symmetric part.
    predicted, actual : (groups, m) array_like of float
        Coefficients of the two displacements. The newest snapshot's follows from the others, since
        a row sums to 0, and is not read.

    Returns
    -------
    (groups, 2) ndarray of float64
        The least-squares factor ``<actual, predicted> / <predicted, predicted>``, and the cosine
        of the two in [-1, 1]. A prediction that is not finite, or no longer than the rounding of
        its Gram matrix, tells nothing: factor 1, cosine 0. A group that was predicted to move and
        did not has factor 0 and cosine 0.

    Raises
    ------
    ValueError
        If the shapes do not fit together.
    """
    gram = np.asarray(gram, dtype=np.float64)
    if gram.ndim != 3 or gram.shape[1] != gram.shape[2] or gram.shape[1] == 0:
        raise ValueError(f"gram must have shape (groups, m, m), got {gram.shape}")
    rows = np.asarray(predicted, dtype=np.float64), np.asarray(actual, dtype=np.float64)
    _check_shape("predicted", rows[0], gram.shape[:2])
    _check_shape("actual", rows[1], gram.shape[:2])
    scales = np.tile([1.0, 0.0], (len(gram), 1))
    for group, parts in enumerate(zip(gram, rows[0][:, :-1], rows[1][:, :-1], strict=True)):
        if all(np.isfinite(part).all() for part in parts):
            scales[group] = _scale(*parts)
    return scales


def _scale(gram: Array, predicted: Array, actual: Array) -> tuple[float, float]:
    """Factor and cosine of one group, from coefficients of all snapshots but the newest."""
    peaks = [float(np.abs(x).max(initial=0.0)) for x in (gram, predicted, actual)]
    if not (peaks[0] > 0.0 and peaks[1] > 0.0):
        return 1.0, 0.0
    # About the newest snapshot, which takes its coefficient out of every product.
    gram = gram / peaks[0]
    gram = gram[:-1, :-1] - gram[-1:, :-1] - gram[:-1, -1:] + gram[-1, -1]
    p = predicted / peaks[1]
    a = actual / peaks[2] if peaks[2] > 0.0 else actual
    # Each entry carries the rounding of the four entries of size 1 that it came from.
    eps = 4.0 * float(np.finfo(np.float64).eps)
    length2 = float(p @ gram @ p)
    if not length2 > eps * np.abs(p).sum() ** 2:
        return 1.0, 0.0
    actual2 = float(a @ gram @ a)
    if not actual2 > eps * np.abs(a).sum() ** 2:
        return 0.0, 0.0
    product = float(p @ (gram + gram.T) @ a) / 2.0
    cosine = product / math.sqrt(length2) / math.sqrt(actual2)
    factor = product / length2 * min(peaks[2] / peaks[1], LARGEST)
    return _cut(factor, LARGEST), _cut(cosine, 1.0)


class ResidualStore:
    """Ring buffer of contexts and what was missed in each, searched by standardised distance.

    Parameters
    ----------
    capacity : int
        Pairs kept, at least 1 (else ``ValueError``); the oldest gives way.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = _positive("capacity", capacity)
        self._added = 0
        # Shapes are those of the first pair.
        self._contexts: Array | None = None
        self._residuals: Array | None = None

    def __len__(self) -> int:
        return min(self._added, self._capacity)

    @property
    def contexts(self) -> Array:
        """Contexts by slot, shape (len, d), read-only; (0, 0) before the first."""
        return _view(self._contexts, len(self))

    @property
    def residuals(self) -> Array:
        """Residuals by slot, shape (len, *residual), read-only; (0, 0) before the first."""
        return _view(self._residuals, len(self))

    def add(self, context: ArrayLike, residual: ArrayLike) -> bool:
        """Keep a context (d,) and its residual; False, and nothing kept, if they are not finite.

        A residual may have any shape, that of :func:`group_scales` for example. The first pair sets
        the shapes, ``ValueError`` where a later one differs.
        """
        x, r = np.asarray(context, dtype=np.float64), np.asarray(residual, dtype=np.float64)
        if x.ndim != 1:
            raise ValueError(f"context must be a vector of features, got shape {x.shape}")
        if self._added:
            _check_shape("context", x, self.contexts.shape[1:])
            _check_shape("residual", r, self.residuals.shape[1:])
        if not (np.isfinite(x).all() and np.isfinite(r).all()):
            return False
        if self._contexts is None or self._residuals is None:
            self._contexts = np.zeros((self._capacity, *x.shape))
            self._residuals = np.zeros((self._capacity, *r.shape))
        slot = self._added % self._capacity
        self._contexts[slot] = np.clip(x, -LARGEST, LARGEST)
        self._residuals[slot] = np.clip(r, -LARGEST, LARGEST)
        self._added += 1
        return True

    def nearest(self, context: ArrayLike, k: int) -> tuple[NDArray[np.intp], Array, Array]:
        """Return the `k` pairs, or all if there are fewer, whose contexts are most like this one.

        The distance is Euclidean after every feature has been divided by its standard deviation
        over the contexts in the buffer. Of equal distances the lower slot comes first.

        A `context` (d,) that is not finite is like nothing: no pairs. ``ValueError`` where it has
        another shape than those kept, or `k` is not a positive integer.

        Returns
        -------
        (n,) ndarray of int, (n,) ndarray of float64, (n, *residual) ndarray of float64
            Slots in :attr:`contexts`, nearest first; their distances; their residuals.
        """
        k = _positive("k", k)
        x = np.asarray(context, dtype=np.float64)
        kept = self.contexts
        if len(kept):
            _check_shape("context", x, kept.shape[1:])
        if not len(kept) or not np.isfinite(x).all():
            nothing = np.zeros(0, dtype=np.intp)
            return nothing, np.zeros(0), self.residuals[nothing]
        size = np.abs(kept).max(axis=0)
        spread = np.maximum(kept.std(axis=0), LEAST_VARIATION * size)
        # A feature that has always been 0 has no scale of its own.
        spread[spread < 1.0 / LARGEST] = 1.0
        offset = (kept - np.clip(x, -LARGEST, LARGEST)) / spread
        # Beyond this, far is far; squares must stay finite.
        np.clip(offset, -LARGEST, LARGEST, out=offset)
        distances = np.sqrt(np.einsum("nd,nd->n", offset, offset))
        indices = np.argsort(distances, kind="stable")[:k]
        return indices, distances[indices], self.residuals[indices]

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state as numbers and copies of the arrays."""
        return {
            "added": self._added,
            "contexts": self.contexts.copy(),
            "residuals": self.residuals.copy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` of a store of the same capacity returned."""
        added, count = int(state["added"]), len(state["contexts"])
        if count != min(added, self._capacity):
            raise ValueError(
                f"contexts holds {count} of {added} pairs, unlike a store of capacity "
                f"{self._capacity}: load it into one of the capacity that it came from"
            )
        buffers = []
        for name in ("contexts", "residuals"):
            rows = np.asarray(state[name], dtype=np.float64)
            buffers.append(np.zeros((self._capacity, *rows.shape[1:])))
            buffers[-1][:count] = rows
        self._added = added
        self._contexts, self._residuals = buffers if count else (None, None)


class LowRank:
    """Compress a stream of matrices to rank r by one power iteration each, errors fed back.

    PowerSGD (Vogels et al. 2019, algorithm 1) for one worker: what a compression loses is added to
    the next matrix, and the iteration starts from the directions found last.

    Parameters
    ----------
    rank : int
        Largest rank of a compressed matrix, at least 1 (else ``ValueError``).

    Attributes
    ----------
    error : ndarray of float64
        What is still owed, of the matrices' shape; (0, 0) before the first.
    """

    def __init__(self, rank: int = 2) -> None:
        self._rank = _positive("rank", rank)
        self._draws = 0
        self._start = np.zeros((0, 0))
        self.error = np.zeros((0, 0))

    def compress(self, matrix: ArrayLike) -> tuple[Array, Array]:
        """Compress ``matrix + error``.

        In `matrix` (n, m) numbers that are not finite count as 0. ``ValueError`` where it is empty
        or of another shape than those before.

        Returns
        -------
        (n, r) ndarray of float64, (m, r) ndarray of float64
            P with orthonormal columns and its best partner Q: the compressed matrix is ``P @ Q.T``.
            r is the rank, or the matrices' smaller side if that is less.
        """
        given = np.asarray(matrix, dtype=np.float64)
        if given.ndim != 2 or given.size == 0:
            raise ValueError(f"matrix must have rows and columns, got shape {given.shape}")
        if self.error.size == 0:
            self.error = np.zeros(given.shape)
            self._start = self._random((given.shape[1], min(self._rank, *given.shape)))
        _check_shape("matrix", given, self.error.shape)
        owed = np.where(np.isfinite(given), np.clip(given, -LARGEST, LARGEST), 0.0) + self.error
        left = np.linalg.qr(owed @ self._start)[0]
        right = owed.T @ left
        self.error = np.clip(owed - left @ right.T, -LARGEST, LARGEST)
        self._start = self._next_start(right)
        return left, right

    @staticmethod
    def decompress(left: Array, right: Array) -> Array:
        """Return the matrix (n, m) that P and Q stand for."""
        return left @ right.T

    def _next_start(self, right: Array) -> Array:
        """Orthonormal basis of the directions found; random ones where there were too few."""
        # Otherwise a matrix of lower rank would leave the iteration blind to what comes later.
        basis, sizes, _ = np.linalg.svd(right, full_matrices=False)
        missing = sizes <= RANK_TOLERANCE * sizes[0]
        if missing.any():
            basis[:, missing] = self._random((len(right), int(missing.sum())))
        return np.asarray(basis)

    def _random(self, shape: tuple[int, int]) -> Array:
        self._draws += 1
        return np.random.default_rng(self._draws).standard_normal(shape)

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state as numbers and copies of the arrays."""
        return {
            "draws": self._draws,
            "start": self._start.copy(),
            "error": self.error.copy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        start, error = (np.array(state[name], dtype=np.float64) for name in ("start", "error"))
        self._draws, self._start, self.error = int(state["draws"]), start, error


def _positive(name: str, value: int) -> int:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return int(value)


def _check_shape(name: str, array: Array, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape} to fit the others, got {array.shape}")


def _cut(value: float, most: float) -> float:
    return min(max(value, -most), most)


def _view(buffer: Array | None, count: int) -> Array:
    view = np.zeros((0, 0)) if buffer is None else buffer[:count]
    view.flags.writeable = False
    return view
