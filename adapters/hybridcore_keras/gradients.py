"""The gradient norm, inside Keras's own compiled step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from keras import ops

_LEAST, _MOST = 1e-30, 1e38


def gradient_norm(gradients: Sequence[Any], sum_of_squares: Callable[[Any], Any]) -> Any:
    """Euclidean norm of all `gradients`, a float32 scalar tensor.

    Parameters
    ----------
    gradients : sequence of tensor or None
        Gradients of the trainable variables.
    sum_of_squares : callable
        The backend's fastest way to sum the squares of a float32 tensor.

    Notes
    -----
    Squares are summed in float32. Only where the sum leaves its range are the gradients scaled by
    their largest element first, so that no finite gradient is taken for a bad one. Of a sparse
    gradient, rows that stand for one index count separately.
    """
    values = [_dense(g) for g in gradients if g is not None]
    if not values:
        return ops.zeros((), "float32")
    total = sum(sum_of_squares(value) for value in values)
    return ops.cond(
        ops.logical_and(total > _LEAST, total < _MOST),
        lambda: ops.sqrt(total),
        lambda: _scaled(values, sum_of_squares),
    )


def _dense(gradient: Any) -> Any:
    # TensorFlow's IndexedSlices, the gradient of an embedding, hold the rows that are not zero.
    sparse = hasattr(gradient, "dense_shape")
    return ops.cast(gradient.values if sparse else gradient, "float32")


def _scaled(values: Sequence[Any], sum_of_squares: Callable[[Any], Any]) -> Any:
    largest = ops.max(ops.stack([ops.max(ops.abs(value)) for value in values]))
    divisor = ops.where(largest > 0.0, largest, ops.ones_like(largest))
    total = sum(sum_of_squares(value / divisor) for value in values)
    return divisor * ops.sqrt(total)
