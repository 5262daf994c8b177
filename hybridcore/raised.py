"""Errors of the user's code at weights that were only tried: what is their fault, and said once."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hybridcore.errors import HybridCoreError

logger = logging.getLogger("hybridcore")

# Characters of an error that is told; TensorFlow's is a page.
_LONGEST = 400
# Of the newest two snapshots, which an outer step lies between.
_BEFORE_THE_MOVE = np.array([[1.0, 0.0]])


class Raised:
    """Tells which errors are of the point that was tried, so that training goes on without it.

    Parameters
    ----------
    name : str
        What the user knows as that which raises.
    is_other : callable
        ``is_other(error)`` tells what is never the fault of weights, as that memory is out.
    """

    def __init__(self, name: str, is_other: Callable[[Exception], bool]) -> None:
        self._name, self._is_other = name, is_other
        self._told: set[str] = set()

    def by_the_probe(self, error: Exception) -> bool:
        """Whether the user's probe has raised `error` for itself; training goes on without it."""
        if not self._may_be_of_weights(error):
            return False
        self._tell("%s raised %s, and has no number for its loss while it does", "probe", error)
        return True

    def only_there(
        self,
        error: Exception,
        evaluate: Callable[[], object],
        before: AbstractContextManager[None],
    ) -> bool:
        """Whether `evaluate` has raised `error` because of where the weights are.

        It has where it raises there again, and nothing at the weights from `before`: as a Cholesky
        decomposition, or a check of what a distribution is made of, far from where training has
        been.

        Parameters
        ----------
        error : Exception
            What was raised.
        evaluate : callable
            Does again, at the present weights, what raised it, and leaves no trace.
        before : context manager
            Has the weights as they were before the point that was tried.
        """
        # Else it is another matter, that comes and goes.
        if not (self._may_be_of_weights(error) and _raises(evaluate)):
            return False
        with before:
            if _raises(evaluate):
                return False
        self._tell(
            "%s raised %s at a point that was tried, and nothing at the weights from before: "
            "the point is given up, as one where the loss is no number",
            self._name,
            error,
        )
        return True

    def _may_be_of_weights(self, error: Exception) -> bool:
        return not (isinstance(error, HybridCoreError) or self._is_other(error))

    def _tell(self, message: str, name: str, error: Exception) -> None:
        level = logging.DEBUG if message in self._told else logging.WARNING
        logger.log(level, message, name, brief(error))
        self._told.add(message)


def brief(error: Exception) -> str:
    """Return kind and text of `error`, the text cut where it is long."""
    text = str(error)
    shown = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
    return f"{type(error).__name__}: {shown}"


class Bank(Protocol):
    """Snapshots, as far as weights can be put aside and back by them."""

    def set_aside(self) -> None:
        """Remember the weights for :meth:`put_back`."""
        ...

    def put_back(self) -> None:
        """Undo what was done to the weights since :meth:`set_aside`."""
        ...

    def restore(self) -> None:
        """Put the weights back to the recovery point."""
        ...

    def move(self, coefficients: NDArray[np.float64]) -> None:
        """Put the weights at `coefficients` (groups or 1, n) of the newest n snapshots."""
        ...


@contextlib.contextmanager
def before_the_point(
    bank: Bank | None, to_base: Callable[[], None] | None, *, moved: bool, recovers: bool
) -> Iterator[None]:
    """Have the weights as they were before the point that was tried, for the block.

    A point that weights were set aside for is left for them, and so is one of a line search.

    Parameters
    ----------
    bank : Bank or None
        The snapshots; None where there are none, as on a line search.
    to_base : callable or None
        Goes back from a point of a line search; None where the weights are at none.
    moved : bool
        Whether the weights have been set aside for the point.
    recovers : bool
        Whether they were at the recovery point before; else an outer step has led away.
    """
    if to_base is not None and not moved:
        to_base()
        yield
        return
    assert bank is not None
    if moved:
        bank.put_back()
        yield
    else:
        bank.set_aside()
        try:
            if recovers:
                bank.restore()
            else:
                bank.move(_BEFORE_THE_MOVE)
            yield
        finally:
            bank.put_back()


def _raises(evaluate: Callable[[], object]) -> bool:
    try:
        evaluate()
    except Exception:
        return True
    return False
