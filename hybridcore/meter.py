"""What predicting gained, measured while the run goes on.

Between two probes at averaged weights the log loss falls by some progress, at some cost. The
stretch from the start of a jump to the end of its settling steps is *predicting*, the stretch from
there to the next decision is *full steps only*. A jump stands for as many full steps as would have
made its progress at the slope of the full-step stretches next to it:

``speedup = (full steps outside of jumps + full steps that jumps stand for) / cost of the run``.

Just before a jump plain training is faster than it would have been by the jump's end, and just
after it slower than it would have been at its start: the mean of the two slopes gives the estimate,
the steeper one the lower end of the interval, and the other one, times `SETTLING`, the upper end.
What outer steps gain is not measured: the estimate leaves it out, and the upper end of the interval
is what they gain at most.

Quasi-Newton steps go on without full steps beside them, so that only the speed of the optimizer
before them is known, and that falls. If it stayed as it was they would stand for the fewest full
steps: the lower end. The estimate lets it fall with the root of the number of steps; towards its
minimum a loss can fall more slowly than by any such law, so the upper end is open.

Cost is in full steps, of the mean time that they took in the run, as whatever else the machine does
lengthens everything. A forward pass counts by its measured time, and so does what hybridcore itself
does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from statistics import median_low
from typing import Any, NamedTuple

import numpy as np

from hybridcore.outer import INTERVAL, MOST_WORTH

NOMINAL_PROBE_COST = 1.0 / 3.0
# What the slopes leave out: times are measured, settling at half the rate flatters a jump, and a
# shorter run may lead as far where the rate falls. Chosen on the runs of the proving ground
# (entries 30 and 72 of the log there).
MARGIN = 0.3
# How many times what the slopes say a jump is worth at most: what it has excited settles in the
# full steps behind it, which makes them steeper than those of a plain run (entry 85 there).
SETTLING = 2.0
# No quasi-Newton step stands for more full steps, however slow the optimizer seemed before it.
MOST_A_STEP = 5.0
# No jump stands for more full steps, however little the full steps beside it achieved.
MOST_STEPS = 600.0
# Times that a mean takes in at once, and what one of them counts for at most, in usual ones.
BLOCK, OUTLIER = 101, 3.0
# Times that are enough to tell what is usual now.
FEW = 5


class Interval(NamedTuple):
    """Lower and upper end of an interval meant to hold the truth in 9 of 10 runs."""

    low: float
    high: float


class Stretch(NamedTuple):
    """A finished stretch of the run.

    Attributes
    ----------
    progress : float
        Decrease of the log loss at averaged weights.
    full_steps : int
        Full steps that it took.
    predicting : bool
        Whether it was a jump with its settling steps.
    """

    progress: float
    full_steps: int
    predicting: bool


@dataclass(slots=True)
class SecantCredit:
    """How many full steps the quasi-Newton steps stand for.

    Attributes
    ----------
    taken : int
        Full steps that they took.
    earlier : list of float
        What they stood for before the speed was last measured: at least, and probably.
    steps : float
        Full steps that the run stood for when the speed was last measured.
    speed : float
        Fall of the log loss by a step of the optimizer then; 0 while it is not known.
    progress : float
        Fall of the log loss since.
    """

    taken: int = 0
    earlier: list[float] = field(default_factory=lambda: [0.0, 0.0])
    steps: float = 0.0
    speed: float = 0.0
    progress: float = 0.0

    def stands_for(self) -> tuple[float, float, float]:
        """Full steps that they stand for: at least, probably, at most."""
        if not self.taken:
            return 0.0, 0.0, 0.0
        low, middle = self.earlier
        if self.progress > 0.0 and self.speed > 0.0 and self.steps > 0.0:
            share = self.progress / (self.speed * self.steps)
            low += self.steps * share
            middle += self.steps * ((1.0 + 0.5 * share) ** 2 - 1.0)
        least, most = float(self.taken), MOST_A_STEP * self.taken
        # Not less than their number: where the optimizer is faster, it has them replaced.
        return min(max(low, least), 0.5 * most), min(max(middle, least), most), math.inf

    def measure(self, outside: int, speed: float) -> None:
        """Go on from a newly measured `speed`, after `outside` full steps of the optimizer."""
        self.earlier = list(self.stands_for()[:2])
        self.steps, self.speed, self.progress = outside + self.earlier[1], speed, 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state, as the arguments that make another."""
        state = {name: getattr(self, name) for name in self.__slots__}
        return state | {"earlier": list(self.earlier)}


@dataclass(slots=True)
class MeanTime:
    """Mean of wall-clock times, of which none counts for more than `OUTLIER` times the usual one.

    A first step that compiles, or a machine that was asleep, says nothing of the others.

    Attributes
    ----------
    newest : list of float
        Seconds that have not been taken in yet, fewer than `BLOCK`.
    usual : float
        Median of those that were taken in last; 0 before there are any.
    total : float
        Sum of all that have been taken in.
    count : int
        Number of those.
    """

    newest: list[float] = field(default_factory=list)
    usual: float = 0.0
    total: float = 0.0
    count: int = 0

    def add(self, seconds: float) -> None:
        """Count one more, of so many `seconds`."""
        self.newest.append(seconds)
        if len(self.newest) == BLOCK:
            self.usual = median_low(self.newest)
            self.total, self.count = self._sums()
            self.newest.clear()

    @property
    def mean(self) -> float:
        """Mean in seconds; NaN before the first."""
        total, count = self._sums()
        return total / count if count else math.nan

    def _sums(self) -> tuple[float, int]:
        if not self.newest:
            return self.total, self.count
        # A few may all be outliers; more of them, and they are what is usual now.
        now = median_low(self.newest) if len(self.newest) >= FEW or not self.usual else 0.0
        # Of a clock too coarse for them most are zero.
        most = OUTLIER * max(self.usual, now) or math.inf
        total = self.total + sum(min(seconds, most) for seconds in self.newest)
        return total, self.count + len(self.newest)

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state, as the arguments that make another."""
        state = {name: getattr(self, name) for name in self.__slots__}
        return state | {"newest": list(self.newest)}


@dataclass(slots=True)
class Meter:
    """Times full steps and probes, and compares predicting with full-step stretches.

    Attributes
    ----------
    stretches : list of Stretch
        Finished stretches, oldest first.
    full_time, probe_time : MeanTime
        Wall-clock times of full steps and of probes.
    overhead_seconds : float
        Time that hybridcore itself took: snapshots, decisions, moves.
    mark : (log loss, full steps, probes)
        Where the present stretch began; NaN while there is no such point.
    outer_interval : int
        Full steps that an outer step follows.
    """

    stretches: list[Stretch] = field(default_factory=list)
    full_time: MeanTime = field(default_factory=MeanTime)
    probe_time: MeanTime = field(default_factory=MeanTime)
    overhead_seconds: float = 0.0
    mark: tuple[float, int, int] = (math.nan, 0, 0)
    secants: SecantCredit = field(default_factory=SecantCredit)
    outer_interval: int = INTERVAL

    def spent(self, full_steps: int, probes: int) -> tuple[int, int]:
        """Full steps and probes since the mark, from the run's totals."""
        return full_steps - self.mark[1], probes - self.mark[2]

    def close_stretch(
        self,
        log_loss: float,
        full_steps: int,
        probes: int,
        *,
        predicting: bool,
        progress: float | None = None,
    ) -> None:
        """Record the stretch since the mark, and begin the next one here.

        Parameters
        ----------
        log_loss : float
            Log loss at averaged weights, here; NaN if the next stretch cannot be measured.
        full_steps, probes : int
            Totals of the run.
        predicting : bool
            Whether the stretch was a jump with its settling steps.
        progress : float, optional
            Decrease of the log loss; by default from the mark to `log_loss`.
        """
        if progress is None:
            progress = self.mark[0] - log_loss
        taken = full_steps - self.mark[1]
        if math.isfinite(progress) and taken > 0:
            self.stretches.append(Stretch(progress, taken, predicting))
        self.mark = (log_loss, full_steps, probes)

    def close_block(self, log_loss: float, full_steps: int, probes: int) -> None:
        """Record the quasi-Newton steps since the mark, and begin the next stretch here."""
        self.secants.progress += max(0.0, self.mark[0] - log_loss)
        self.secants.taken += full_steps - self.mark[1]
        self.mark = (log_loss, full_steps, probes)

    def break_off(self, full_steps: int, probes: int) -> None:
        """Begin a stretch here that cannot be compared with what was before."""
        self.mark = (math.nan, full_steps, probes)
        self.secants.speed = 0.0

    @property
    def probe_cost(self) -> float:
        """Time of one forward pass in full steps, measured; a third before the first probe."""
        cost = self.probe_time.mean / max(self.full_time.mean, 1e-12)
        return cost if math.isfinite(cost) else NOMINAL_PROBE_COST

    @property
    def overhead(self) -> float:
        """Time that hybridcore itself took, in full steps."""
        mean = self.full_time.mean
        return 0.0 if math.isnan(mean) else self.overhead_seconds / max(mean, 1e-12)

    def cost(self, full_steps: float, probes: float) -> float:
        """Cost of `full_steps` and `probes` in full steps, without the overhead."""
        return full_steps + probes * self.probe_cost

    def speedup(
        self, full_steps: int, probes: int, outer_steps: int = 0, secant_steps: int = 0
    ) -> tuple[float, Interval]:
        """Measured speed-up of the run so far and its 90 % interval.

        Parameters
        ----------
        full_steps, probes, outer_steps, secant_steps : int
            Totals of the run, which also paid for stretches that are not finished.

        Returns
        -------
        (float, Interval)
            Full steps that the run stands for, by what it cost. Where nothing was predicted that is
            what its own work cost, a little below 1. The interval is open above while no jump has
            a full-step stretch beside it, and where there were quasi-Newton steps.
        """
        total = self.cost(full_steps, probes) + self.overhead
        if total <= 0.0:
            return 1.0, Interval(1.0, 1.0)
        outside = self.outside(full_steps)
        stands = np.array([self._stands_for(i) for i in range(len(self.stretches))]).reshape(-1, 3)
        low, middle, high = (
            outside + stands.sum(axis=0) + np.array(self.secants.stands_for())
        ) / total
        high += outer_steps * self.outer_interval * MOST_WORTH / total
        if secant_steps:
            high = math.inf
        return float(middle), Interval(float(low) * (1 - MARGIN), float(high) * (1 + MARGIN))

    def outside(self, full_steps: int) -> int:
        """How many of `full_steps` belong to no jump and are no quasi-Newton steps."""
        jumps = sum(s.full_steps for s in self.stretches if s.predicting)
        return full_steps - jumps - self.secants.taken

    def _stands_for(self, index: int) -> tuple[float, float, float]:
        """Full steps that a stretch stands for if it is a jump: at least, probably, at most."""
        jump = self.stretches[index]
        if not jump.predicting or jump.progress <= 0.0:
            return 0.0, 0.0, 0.0
        before = self._first_of_full_steps(range(index - 1, -1, -1))
        after = self._first_of_full_steps(range(index + 1, len(self.stretches)))
        if not before and not after:
            return 0.0, 0.0, math.inf
        worths = [_worth(jump.progress, beside) for beside in (before, after) if beside]
        middle = _worth(jump.progress, before + after)
        return min(*worths, middle), middle, SETTLING * max(*worths, middle)

    def _first_of_full_steps(self, indices: range) -> list[Stretch]:
        found = (self.stretches[i] for i in indices if not self.stretches[i].predicting)
        return list(islice(found, 1))

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state as lists and numbers."""
        return {
            "stretches": [list(s) for s in self.stretches],
            "full_time": self.full_time.state_dict(),
            "probe_time": self.probe_time.state_dict(),
            "overhead_seconds": self.overhead_seconds,
            "mark": list(self.mark),
            "secants": self.secants.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        self.stretches = [Stretch(float(p), int(n), bool(b)) for p, n, b in state["stretches"]]
        self.full_time, self.probe_time = _time_of(state, "full"), _time_of(state, "probe")
        self.overhead_seconds = float(state["overhead_seconds"])
        secants = state["secants"]
        self.secants = SecantCredit(**secants | {"earlier": list(secants["earlier"])})
        log_loss, full_steps, probes = state["mark"]
        self.mark = (float(log_loss), int(full_steps), int(probes))


def _time_of(state: dict[str, Any], name: str) -> MeanTime:
    """Take back the times of full steps or of probes, also as the newest 101 of them."""
    times = MeanTime()
    if f"{name}_seconds" in state:
        for seconds in state[f"{name}_seconds"]:
            times.add(float(seconds))
        return times
    found = state[f"{name}_time"]
    times.newest = [float(seconds) for seconds in found["newest"]]
    times.usual, times.total = float(found["usual"]), float(found["total"])
    times.count = int(found["count"])
    return times


def _worth(progress: float, beside: Sequence[Stretch]) -> float:
    """Full steps that would have made `progress` at the slope of the stretches `beside`."""
    made = sum(stretch.progress for stretch in beside)
    if made <= 0.0:
        return MOST_STEPS
    return min(progress * sum(s.full_steps for s in beside) / made, MOST_STEPS)
