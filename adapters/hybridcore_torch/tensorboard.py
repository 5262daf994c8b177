"""A run in TensorBoard: scalars of the steps and of the statistics, the phases as text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridcore import Phase, StepResult, StreamError

if TYPE_CHECKING:
    from hybridcore.stream import Trainer

STATISTICS = ("measured_speedup", "cost", "backward_reduction", "overhead_seconds")
INTERVAL = 100


class TensorBoard:
    """Callback of a trainer that writes the run for TensorBoard.

    Loss (of real and of predicted steps apart), gradient norm, learning rate, confidence,
    prediction error and time are scalars of each step, what the statistics say of each hundredth.
    Phases and events are text, where they change.

    Parameters
    ----------
    where : str, Path or SummaryWriter
        Folder for the files, or a writer that is there already; that one is not closed.
    every : int
        Steps between two points of the steps' scalars; what a jump compares is always written.

    Raises
    ------
    ImportError
        Without TensorBoard.
    StreamError
        If `where` is a file.
    """

    def __init__(self, where: str | Path | Any, *, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"every must be an integer of at least 1, got {every!r}")
        self._own = isinstance(where, str | Path)
        self.writer: Any
        if isinstance(where, str | Path):
            if Path(where).is_file():
                raise StreamError(
                    f"where {str(where)!r} is a file: name a folder for the files of TensorBoard"
                )
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(
                    'TensorBoard needs its package: pip install "hybridcore[tensorboard]"'
                ) from error
            self.writer = SummaryWriter(str(where))
        else:
            self.writer = where
        self._every = every
        self._trainer: Trainer | None = None
        self._step = 0
        self._phase: Phase | None = None

    def begin(self, trainer: Trainer) -> None:
        """Take the trainer whose steps will follow; it calls this itself."""
        self._trainer = trainer

    def __call__(self, result: StepResult) -> None:
        """Take a step."""
        if self._step == 0 and self._trainer is not None:
            self._step = self._trainer.statistics().steps - 1
        self._step += 1
        if self._step % self._every == 0:
            self._scalar("loss/" + ("predicted" if result.was_predicted else "real"), result.loss)
            self._scalar("step/confidence", result.confidence)
            self._scalar("step/milliseconds", result.step_time_ms)
            self._scalar("step/gradient_norm", result.gradient_norm)
            for name, value in result.metrics.items():
                self._scalar(f"step/{name}", value)
        self._scalar("step/prediction_error", result.prediction_error)
        if result.phase is not self._phase:
            self._phase = result.phase
            self._text("phase", result.phase.name)
        for event in result.events:
            figures = [f"{key} {value}" for key, value in event.items() if key != "event"]
            self._text("events", ", ".join([event["event"], *figures]))
        if self._step % INTERVAL == 0:
            self._statistics()

    def close(self) -> None:
        """Write the last statistics, and all that waits."""
        self._statistics()
        self.writer.flush()
        if self._own:
            self.writer.close()

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _statistics(self) -> None:
        if self._trainer is None:
            return
        statistics = self._trainer.statistics()
        for name in STATISTICS:
            self._scalar(f"run/{name}", getattr(statistics, name))
        low, high = statistics.measured_speedup_interval
        self._scalar("run/measured_speedup_low", low)
        if high < float("inf"):
            self._scalar("run/measured_speedup_high", high)
        for signal, severity in statistics.divergence_signals.items():
            self._scalar(f"divergence/{signal.replace(' ', '_')}", severity)

    def _scalar(self, name: str, value: float | None) -> None:
        if value is not None:
            self.writer.add_scalar(name, value, self._step)

    def _text(self, name: str, value: str) -> None:
        self.writer.add_text(name, value, self._step)
