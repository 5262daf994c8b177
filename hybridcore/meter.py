"""What predicting gained, measured while the run goes on.

Between two probes at averaged weights the log loss falls by some progress, at some cost. The
stretch from the start of a jump to the end of its settling steps is *predicting*, the stretch from
there to the next decision is *full steps only*. A jump pays as far as the whole run makes more
progress per cost than its own full-step stretches do:

``speedup = (progress / cost of all stretches) / (progress / full steps of the full stretches)``,

where the decisions' probes are part of the cost of the run, but not of plain training.

Both halves come from the same stretch of training, so a loss that gets harder to lower, or a
decaying learning rate, falls on both. Cost is in full steps. A forward pass counts by its measured
time, and so does what hybridcore itself does.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

NOMINAL_PROBE_COST = 1.0 / 3.0
LEVEL = 0.90
_RESAMPLES = 400


class Interval(NamedTuple):
    """Lower and upper end of a 90 % interval."""

    low: float
    high: float


@dataclass(slots=True)
class Meter:
    """Times full steps and probes, and compares predicting with full-step stretches.

    Attributes
    ----------
    predicting, full : list of (progress, full steps, probes)
        Finished stretches: decrease of the log loss and what it took.
    full_seconds, probe_seconds : deque of float
        The newest wall-clock times; their medians give the cost of a probe.
    overhead_seconds : float
        Time that hybridcore itself took: snapshots, decisions, moves.
    mark : (log loss, full steps, probes)
        Where the present stretch began; NaN while there is no such point.
    """

    predicting: list[tuple[float, int, int]] = field(default_factory=list)
    full: list[tuple[float, int, int]] = field(default_factory=list)
    full_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=101))
    probe_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=101))
    overhead_seconds: float = 0.0
    mark: tuple[float, int, int] = (math.nan, 0, 0)

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
        stretch = (progress, *self.spent(full_steps, probes))
        if math.isfinite(progress) and stretch[1] > 0:
            (self.predicting if predicting else self.full).append(stretch)
        self.mark = (log_loss, full_steps, probes)

    @property
    def probe_cost(self) -> float:
        """Time of one forward pass in full steps, measured; a third before the first probe."""
        if not self.full_seconds or not self.probe_seconds:
            return NOMINAL_PROBE_COST
        return float(np.median(self.probe_seconds) / max(np.median(self.full_seconds), 1e-12))

    @property
    def overhead(self) -> float:
        """Time that hybridcore itself took, in full steps."""
        if not self.full_seconds:
            return 0.0
        return self.overhead_seconds / max(float(np.median(self.full_seconds)), 1e-12)

    def cost(self, full_steps: float, probes: float) -> float:
        """Cost of `full_steps` and `probes` in full steps, without the overhead."""
        return full_steps + probes * self.probe_cost

    def speedup(self, full_steps: int, probes: int) -> tuple[float, Interval]:
        """Measured speed-up of the run so far and its 90 % interval.

        Parameters
        ----------
        full_steps, probes : int
            Totals of the run, which also paid for stretches that are not finished.

        Returns
        -------
        (float, Interval)
            Progress per cost of the run over that of its full-step stretches. Where nothing was
            predicted it is what the run's own work cost, a little below 1. The interval comes from
            a bootstrap over stretches and is infinitely wide while there are fewer than two of each
            kind.
        """
        total = self.cost(full_steps, probes)
        burden = 1.0 if total <= 0.0 else total / (total + self.overhead)
        if not self.predicting:
            plain = full_steps / total if total > 0.0 else 1.0
            return plain * burden, Interval(plain * burden, plain * burden)
        if not self.full:
            return burden, Interval(0.0, math.inf)
        predicting, full = self._table(self.predicting), self._table(self.full)
        # Plain training, with which the run is compared, would not have probed.
        estimate = _ratio(predicting.sum(0), full.sum(0)) * burden
        if len(predicting) < 2 or len(full) < 2:
            return estimate, Interval(0.0, math.inf)
        # A generator of its own: asking for statistics must not change what the run does next.
        random = np.random.default_rng(0)
        ratios = [
            _ratio(
                predicting[random.integers(len(predicting), size=len(predicting))].sum(0),
                full[random.integers(len(full), size=len(full))].sum(0),
            )
            for _ in range(_RESAMPLES)
        ]
        # Order statistics: ratios may be infinite, and between those nothing can be interpolated.
        ratios.sort()
        tail = round(_RESAMPLES * (1.0 - LEVEL) / 2.0)
        low, high = ratios[tail] * burden, ratios[-1 - tail] * burden
        return estimate, Interval(min(low, estimate), max(high, estimate))

    def _table(self, stretches: list[tuple[float, int, int]]) -> NDArray[np.float64]:
        """Progress, full steps and cost of each stretch, shape (n, 3)."""
        return np.array([(p, steps, self.cost(steps, probes)) for p, steps, probes in stretches])

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state as lists and numbers."""
        return {
            "predicting": [list(s) for s in self.predicting],
            "full": [list(s) for s in self.full],
            "full_seconds": list(self.full_seconds),
            "probe_seconds": list(self.probe_seconds),
            "overhead_seconds": self.overhead_seconds,
            "mark": list(self.mark),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        self.predicting = [(float(p), int(s), int(n)) for p, s, n in state["predicting"]]
        self.full = [(float(p), int(s), int(n)) for p, s, n in state["full"]]
        self.full_seconds = deque(state["full_seconds"], maxlen=101)
        self.probe_seconds = deque(state["probe_seconds"], maxlen=101)
        self.overhead_seconds = float(state["overhead_seconds"])
        log_loss, full_steps, probes = state["mark"]
        self.mark = (float(log_loss), int(full_steps), int(probes))


def _ratio(predicting: NDArray[np.float64], full: NDArray[np.float64]) -> float:
    both = predicting + full
    plain = full[0] / full[1]
    # Full steps that lower nothing: any progress at all is without comparison.
    if plain <= 0.0:
        return math.inf if both[0] > 0.0 else 1.0
    return float(max(0.0, both[0] / both[2] / plain))
