"""Errors of closures at weights that were only tried: what is their fault, and said once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch

from hybridcore import HybridCoreError
from hybridcore_torch.closures import Closures, Prober
from hybridcore_torch.memory import is_out_of_memory
from hybridcore_torch.ranks import Ranks

logger = logging.getLogger("hybridcore")

# What numbers that are out of range raise, torch's LinAlgError among them.
NUMERICAL = (ArithmeticError, ValueError, RuntimeError)


class Raised:
    """Tells which errors are of the point that was tried, so that training goes on without it.

    Parameters
    ----------
    prober : Prober
        Evaluates closures without a trace.
    ranks : Ranks
        Where there are several, nothing is judged: the others would go on with what they have.
    """

    def __init__(self, prober: Prober, ranks: Ranks) -> None:
        self._prober, self._ranks = prober, ranks
        self._told: set[str] = set()

    def by_the_probe(self, error: Exception) -> bool:
        """Whether the user's probe has raised a numerical `error`; training goes on without it."""
        if not self._is_numerical(error):
            return False
        self._tell("%s raised %s: %s, and has no number for its loss while it does", "probe", error)
        return True

    def only_there(
        self,
        error: Exception,
        batch: Closures,
        before: AbstractContextManager[None],
        parameters: Sequence[torch.Tensor] = (),
    ) -> bool:
        """Whether `batch` has raised `error` because of where the weights are.

        It has where it raises there again, and nothing at the weights from `before`: as a Cholesky
        decomposition, or a check of what a distribution is made of, far from where training has
        been. With `parameters` a backward pass is made too.
        """
        # Else it is another matter, that comes and goes.
        if not (self._is_numerical(error) and self._raises(batch, parameters)):
            return False
        with before:
            if self._raises(batch, parameters):
                return False
        self._tell(
            "%s raised %s: %s at a point that was tried, and nothing at the weights from before: "
            "the point is given up, as one where the loss is no number",
            "closure",
            error,
        )
        return True

    def _raises(self, batch: Closures, parameters: Sequence[torch.Tensor]) -> bool:
        try:
            if parameters:
                self._prober.gradients(batch, parameters)
            else:
                self._prober.loss(batch, "closure")
        except Exception:
            return True
        return False

    def _is_numerical(self, error: Exception) -> bool:
        """Whether `error` may be one of numbers, and not ours, of memory, or one of several."""
        ours = isinstance(error, HybridCoreError)
        return not (ours or self._ranks.several or is_out_of_memory(error))

    def _tell(self, message: str, name: str, error: Exception) -> None:
        level = logging.DEBUG if message in self._told else logging.WARNING
        logger.log(level, message, name, type(error).__name__, error)
        self._told.add(message)
