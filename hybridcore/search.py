"""The search for a jump: points to probe, and what their losses say."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hybridcore.bandit import NO_PREDICTION
from hybridcore.extrapolation import FORECASTERS, average
from hybridcore.planning import ARMS, MOST_REACH, Jump
from hybridcore.types import Action, Directive, Observation

AVERAGED_SNAPSHOTS = 2


class Trial(NamedTuple):
    """A jump that was probed: its arm of the bandit, and the loss there, infinite if unusable."""

    jump: Jump
    arm: str
    loss: float


def arm_names() -> tuple[str, ...]:
    """Arms of the bandit: each extrapolator at each multiple of the reach, and not to predict."""
    doublings = range(round(math.log2(MOST_REACH)) + 1)
    forecasts = [f"{name} x{2**k}" for name in FORECASTERS for k in doublings]
    points = [f"{name} x1" for name in ARMS if name not in FORECASTERS]
    return (*forecasts, *points, NO_PREDICTION)


def search(
    gram: NDArray[np.float64], arms: Sequence[str], reach: float, here: float
) -> Generator[Directive, Observation, list[Trial]]:
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
    list of Trial
        All that was probed, below `here` or not.
    """
    trials = []
    for name in arms:
        trials.append((yield from probe_jump(gram, Jump(name, reach), f"{name} x1")))
    best = min(trials, key=lambda trial: trial.loss, default=None)
    multiple = 2
    # Only a forecast has a further: the others name one point at any reach.
    while best is not None and best.loss < here and best.jump.extrapolator in FORECASTERS:
        if multiple > MOST_REACH:
            break
        name = best.jump.extrapolator
        jump = Jump(name, multiple * reach)
        further = yield from probe_jump(gram, jump, f"{name} x{multiple}")
        trials.append(further)
        if not further.loss < best.loss:
            break
        best, multiple = further, 2 * multiple
    return trials


def probe_jump(
    gram: NDArray[np.float64], jump: Jump, arm: str
) -> Generator[Directive, Observation, Trial]:
    """Probe the end of `jump`."""
    loss = (yield Directive(Action.PROBE, jump.coefficients(gram))).loss
    return Trial(jump, arm, loss if usable(loss) else math.inf)


def scaled(trial: Trial, scales: NDArray[np.float64]) -> Jump:
    """Return the jump of `trial` with a factor on each layer group's displacement."""
    return replace(trial.jump, scales=tuple(scales.tolist()))


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
