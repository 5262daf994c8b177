"""The search for a jump: points to probe, and which of them to take."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence

import numpy as np
from numpy.typing import NDArray

from hybridcore.extrapolation import FORECASTERS, average
from hybridcore.planning import MOST_REACH, Jump
from hybridcore.types import Action, Directive, Observation

AVERAGED_SNAPSHOTS = 2


def search(
    gram: NDArray[np.float64], arms: Sequence[str], reach: float, here: float
) -> Generator[Directive, Observation, tuple[Jump | None, float]]:
    """Probe each arm at `reach`, then the best one further and further while that helps.

    Parameters
    ----------
    gram : (groups, m, m) ndarray of float64
        Gram matrices of the bank.
    arms : sequence of str
        Extrapolators to try, by name.
    reach : float
        Distance in snapshot intervals.
    here : float
        Loss without a jump.

    Returns
    -------
    (Jump or None, float)
        The jump with the least loss, and that loss; None if no point is below `here`.
    """
    best, least = None, here
    for name in arms:
        jump = Jump(name, reach)
        loss = yield from _try(jump, gram)
        if loss < least:
            best, least = jump, loss
    # Only a forecast has a further: the others name one point at any reach.
    while best is not None and best.extrapolator in FORECASTERS:
        if best.reach >= MOST_REACH * reach:
            break
        further = Jump(best.extrapolator, 2.0 * best.reach)
        loss = yield from _try(further, gram)
        if not loss < least:
            break
        best, least = further, loss
    return best, least


def everywhere(jump: Jump, gram: NDArray[np.float64], share: float) -> NDArray[np.float64]:
    """Coefficients of the joint trajectory, for every layer group alike, shape (groups, m)."""
    return np.tile(jump.coefficients(gram.sum(axis=0), share), (len(gram), 1))


def probe_average(groups: int, behind: int = 0) -> Directive:
    """Return a probe at the mean of snapshots, where the noise of steps is less.

    The mean is of the newest ``AVERAGED_SNAPSHOTS`` but for the last `behind`.
    """
    mean = average(np.zeros((AVERAGED_SNAPSHOTS, AVERAGED_SNAPSHOTS)))
    row = np.concatenate((mean, np.zeros(behind)))
    return Directive(Action.PROBE, np.tile(row, (groups, 1)))


def usable(loss: float) -> bool:
    """Whether `loss` has a logarithm."""
    return 0.0 < loss < math.inf


def _try(jump: Jump, gram: NDArray[np.float64]) -> Generator[Directive, Observation, float]:
    loss = (yield Directive(Action.PROBE, everywhere(jump, gram, 1.0))).loss
    return loss if usable(loss) else math.inf
