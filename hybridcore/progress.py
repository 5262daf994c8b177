"""A line in the terminal that follows a run."""

from __future__ import annotations

from time import monotonic
from typing import Any

from hybridcore.metrics import TrainingStatistics
from hybridcore.stream import Trainer
from hybridcore.types import StepResult

INTERVAL = 0.2


class ProgressLine:
    """Callback of a trainer that shows phase, loss, measured speed-up and the time left.

    It goes where the trainer is built:

        with ProgressLine(total=steps) as line:
            trainer = HybridTrainer(model, optimizer, callbacks=[line])
            ...

    It is drawn on standard error, five times a second; where that is no terminal, once at the end.

    Parameters
    ----------
    total : int, optional
        Steps of the whole run, at least 1, for the time left.
    console : rich.console.Console, optional
        Where it is drawn.

    Raises
    ------
    ImportError
        Without rich.
    ValueError
        If `total` is no positive integer.
    """

    def __init__(self, total: int | None = None, console: Any | None = None) -> None:
        if total is not None and total < 1:
            raise ValueError(f"total must be an integer of at least 1, or None, got {total!r}")
        try:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
            )
        except ImportError as error:
            raise ImportError('ProgressLine needs rich: pip install "hybridcore[cli]"') from error
        columns = [TextColumn("{task.fields[phase]:<7}"), BarColumn(bar_width=20)]
        columns += [MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}")]
        columns += [TextColumn("{task.fields[speedup]}"), TimeRemainingColumn()]
        self._progress = Progress(
            *columns, console=console or Console(stderr=True), auto_refresh=False
        )
        self._task = self._progress.add_task("", total=total, phase="", loss="", speedup="")
        self._trainer: Trainer | None = None
        self._last: StepResult | None = None
        self._drawn = -INTERVAL

    def begin(self, trainer: Trainer) -> None:
        """Take the trainer whose steps will follow; it calls this itself."""
        self._trainer = trainer
        self._progress.start()

    def __call__(self, result: StepResult) -> None:
        """Take a step."""
        self._last = result
        now = monotonic()
        if now - self._drawn >= INTERVAL:
            self._drawn = now
            self._draw()

    def close(self) -> None:
        """Draw the last state and leave it there."""
        self._draw()
        self._progress.stop()

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _draw(self) -> None:
        if self._trainer is None or self._last is None:
            return
        statistics = self._trainer.statistics()
        self._progress.update(
            self._task,
            completed=statistics.steps,
            phase=self._last.phase.name,
            loss=f"{self._last.loss:.4g}",
            speedup=f"speed-up {brief_speedup(statistics)}",
        )
        self._progress.refresh()


def brief_speedup(statistics: TrainingStatistics) -> str:
    """Measured speed-up in a few characters, as far as it is known."""
    if statistics.predicted_steps == statistics.secant_steps == statistics.outer_steps == 0:
        return "none yet"
    low, high = statistics.measured_speedup_interval
    if high == float("inf"):
        return f"at least {low:.2f}"
    return f"{statistics.measured_speedup:.2f} ({low:.2f} to {high:.2f})"
