"""The search for a jump: points to probe, and what their losses say."""

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
# A reach that differs by less, as a share, is not worth a probe.
LEAST_CHANGE = 0.1


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
    """Probe each arm at `reach`, then the best one further while that helps, then in between.

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
    # Only a forecast has a further: the others name one point at any reach, and so do all at none.
    if best is None or not best.loss < here or best.jump.extrapolator not in FORECASTERS:
        return trials
    if reach <= 0.0:
        return trials
    name, nearer, multiple = best.jump.extrapolator, (0.0, here), 2
    while multiple <= MOST_REACH:
        jump = Jump(name, multiple * reach)
        further = yield from probe_jump(gram, jump, f"{name} x{multiple}")
        trials.append(further)
        if not further.loss < best.loss:
            between = _vertex(nearer, (best.jump.reach, best.loss), (jump.reach, further.loss))
            if abs(between - best.jump.reach) > LEAST_CHANGE * best.jump.reach:
                trials.append((yield from probe_jump(gram, Jump(name, between), best.arm)))
            break
        nearer, best, multiple = (best.jump.reach, best.loss), further, 2 * multiple
    return trials


def _vertex(
    nearer: tuple[float, float], best: tuple[float, float], further: tuple[float, float]
) -> float:
    """Reach at the vertex of the parabola through three points (reach, log loss).

    The loss at `best` is the least of the three. Brent 1973, chapter 5.
    """
    if not math.isfinite(further[1]):
        return best[0]
    (a, b, c), (low, middle, high) = zip(nearer, best, further, strict=True)
    left, right = math.log(low / middle), math.log(high / middle)
    # Slopes of the two chords; both point up, away from the middle.
    left, right = left / (b - a), right / (c - b)
    if left + right <= 0.0:
        return b
    return b + 0.5 * ((c - b) * left - (b - a) * right) / (left + right)


def probe_jump(
    gram: NDArray[np.float64], jump: Jump, arm: str
) -> Generator[Directive, Observation, Trial]:
    """Probe the end of `jump`."""
    loss = (yield Directive(Action.PROBE, jump.coefficients(gram))).loss
    return Trial(jump, arm, loss if usable(loss) else math.inf)


def scaled(trial: Trial, scales: NDArray[np.float64]) -> Jump:
    """Return the jump of `trial` with a factor on each layer group's displacement."""
    return replace(trial.jump, scales=tuple(scales.tolist()))


def beside_mark() -> Generator[Directive, Observation, tuple[float, float]]:
    """Probe what ``SAVE`` or ``MARK`` kept, and the weights as they are; return both losses."""
    before = (yield Directive(Action.PROBE, at_mark=True)).loss
    return before, (yield Directive(Action.PROBE)).loss


def probe_average(behind: int = 0) -> Directive:
    """Return a probe at the mean of snapshots, where the noise of steps is less.

    The mean is of the newest ``AVERAGED_SNAPSHOTS`` but for the last `behind`.
    """
    mean = average(np.zeros((AVERAGED_SNAPSHOTS, AVERAGED_SNAPSHOTS)))
    row = np.concatenate((mean, np.zeros(behind)))
    return Directive(Action.PROBE, row[None])


def usable(loss: float) -> bool:
    """Whether `loss` has a logarithm."""
    return 0.0 < loss < math.inf
