"""The stream of a run: a file of JSON Lines, written while it goes on, and its reader.

The first line says what wrote it and with which settings. Each step is a line; after every
``BLOCK`` steps, or each second of slow ones, comes a line with the statistics so far. The last line
of a run that was closed is of statistics and says so. A run that was killed has a file that ends
anywhere, at most one block short.
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import logging
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

from hybridcore.config import HybridTrainerConfig
from hybridcore.errors import StreamError
from hybridcore.metrics import TrainingStatistics, finite
from hybridcore.phases import Phase
from hybridcore.types import StepResult

if TYPE_CHECKING:
    from hybridcore.engine import Engine

logger = logging.getLogger("hybridcore")

VERSION = 1
BLOCK = 100
SECONDS = 1.0


class Trainer(Protocol):
    """What a callback may ask of the trainer that it is given first."""

    config: HybridTrainerConfig
    engine: Engine

    def statistics(self) -> TrainingStatistics:
        """Return the summary of the run so far."""
        ...


class JsonLines:
    """Callback of a trainer that writes the run to a file, step by step.

    It goes where the trainer is built:

        with JsonLines("run.jsonl") as stream:
            trainer = HybridTrainer(model, optimizer, callbacks=[stream])
            ...

    The file is closed at the end of the block, or else with the program. If writing fails later on,
    because the disk is full for instance, training goes on and a warning is logged. In a group of
    processes, give it to one of them.

    Parameters
    ----------
    path : str or Path
        File to write. One that holds something is never overwritten, so that no recording is lost.
    append : bool
        Go on with the file of a run that is resumed instead; a cut last line is cut off.

    Raises
    ------
    StreamError
        If the file cannot be written, or holds something: without `append` anything, with it what
        is no stream.
    """

    def __init__(self, path: str | Path, *, append: bool = False) -> None:
        self.path = Path(path)
        self._trainer: Trainer | None = None
        self._engine: Engine | None = None
        self._pending: list[tuple[int, StepResult]] = []
        self._step: int | None = None
        self._written = 0.0
        self._file: Any = None
        try:
            if self.path.exists():
                if append:
                    _cut(self.path)
                elif self.path.is_file() and self.path.stat().st_size:
                    raise StreamError(
                        f"path {str(path)!r} holds something already: go on with a recording by "
                        "append=True, or delete it, or name another file"
                    )
            self._file = self.path.open("ab" if append else "wb", buffering=0)
        except OSError as error:
            raise StreamError(
                f"path {str(path)!r} cannot be written ({error.strerror}): name a file in a folder "
                "that exists"
            ) from error
        atexit.register(_close, weakref.ref(self))

    def begin(self, trainer: Trainer) -> None:
        """Take the trainer whose steps will follow; it calls this itself."""
        from hybridcore import __version__

        if self._pending:
            # Of the run before, where a stream records several.
            self._flush()
        self._trainer, self._engine, self._step = trainer, trainer.engine, None
        self._written = monotonic()
        head = {"hybridcore": __version__, "stream": VERSION, "config": trainer.config.to_dict()}
        self._write([json.dumps(head)])

    def __call__(self, result: StepResult) -> None:
        """Take a step."""
        if self._file is None:
            return
        if self._trainer is None:
            raise StreamError(
                "JsonLines was called without a trainer: pass it as callbacks=[stream]"
            )
        if self._trainer.engine is not self._engine:
            # It has been given another state, and goes on from there.
            self.begin(self._trainer)
        if self._step is None:
            self._step = self._trainer.statistics().steps - 1
        self._step += 1
        self._pending.append((self._step, result))
        if len(self._pending) >= BLOCK or monotonic() - self._written > SECONDS:
            self._flush()

    def close(self) -> None:
        """Write what is left, and the statistics as the last line. Later steps are left out."""
        if self._file is None:
            return
        if self._trainer is not None:
            self._flush(final=True)
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            self.close()

    def _flush(self, *, final: bool = False) -> None:
        assert self._trainer is not None
        statistics = self._trainer.statistics()
        lines = [_line(step, result) for step, result in self._pending]
        summary = {"statistics": statistics.to_dict(), "step": statistics.steps, "final": final}
        self._pending.clear()
        self._step = statistics.steps
        self._written = monotonic()
        self._write([*lines, json.dumps(summary)])

    def _write(self, lines: list[str]) -> None:
        if self._file is None:
            return
        try:
            left = "".join(line + "\n" for line in lines).encode()
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            logger.warning("%s: %s; the rest of the run is not recorded", self.path, error)
            self._file.close()
            self._file = None


def _close(reference: weakref.ref[JsonLines]) -> None:
    stream = reference()
    if stream is not None:
        stream.close()


def _line(step: int, result: StepResult) -> str:
    line = {"step": step} | result._asdict() | result.metrics | {"phase": result.phase.name}
    del line["metrics"]
    try:
        return json.dumps(line, allow_nan=False)
    except ValueError:
        return json.dumps(finite(line))


def _cut(path: Path) -> None:
    """Cut a last line off that was not written to its end."""
    content = path.read_bytes()
    if content:
        _parse(content.split(b"\n")[0].decode("utf-8", "replace"), path, 1)
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)


@dataclass(slots=True, repr=False)
class Stream:
    """What a file of :class:`JsonLines` holds.

    Attributes
    ----------
    config : dict
        Settings of the run.
    steps : list of dict
        The steps, oldest first: ``step`` and the fields of :class:`hybridcore.StepResult`, with
        the metrics among them. The phase is its name; what is not finite is None.
    statistics : list of dict
        Statistics from time to time, oldest first, each with the ``step`` after which it was taken.
    complete : bool
        Whether the run was closed; if not, it was killed or is still going on.
    """

    config: dict[str, Any]
    steps: list[dict[str, Any]] = field(default_factory=list)
    statistics: list[dict[str, Any]] = field(default_factory=list)
    complete: bool = False

    def __repr__(self) -> str:
        return f"Stream({len(self.steps)} steps, complete={self.complete})"

    def column(self, name: str) -> list[float]:
        """One field of all steps as numbers, NaN where there is none."""
        values = (step.get(name) for step in self.steps)
        return [float("nan") if value is None else float(value) for value in values]


def read_stream(path: str | Path) -> Stream:
    """Read what :class:`JsonLines` wrote; a last line that was cut is left out.

    Where a run went back to an earlier step, because it was resumed from there, the later account
    of a step counts.

    Raises
    ------
    StreamError
        If the file is missing, is no such stream, or is damaged before its last line.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise StreamError(
            f"{path} cannot be read ({error.strerror}): name a file that JsonLines wrote"
        ) from error
    if lines == [""]:
        raise StreamError(f"{path} is empty: no run has written to it yet")
    stream = Stream(_parse(lines[0], path, 1)["config"])
    for number, text in enumerate(lines[1:-1], start=2):
        line = _parse(text, path, number)
        if "stream" in line:
            stream.complete = False
            continue
        stream.complete = line.get("final") is True
        if "statistics" in line:
            entries, line = stream.statistics, {**line["statistics"], "step": line["step"]}
        else:
            entries = stream.steps
        while entries and entries[-1]["step"] >= line["step"]:
            entries.pop()
        entries.append(line)
    return stream


def _parse(text: str, path: Path, number: int) -> dict[str, Any]:
    """Return a line of which every field is of the kind that :class:`JsonLines` writes."""
    try:
        line = json.loads(text)
    # Not only the decoder's own: brackets may be nested too deeply.
    except (ValueError, RecursionError):
        line = None
    if number == 1 and not (isinstance(line, dict) and "stream" in line):
        raise StreamError(
            f"{path} is no stream of a run: its first line is not that of a file that "
            "JsonLines wrote"
        )
    if isinstance(line, dict) and line.get("stream", VERSION) != VERSION:
        raise StreamError(
            f"{path} has stream version {line['stream']!r}, this hybridcore reads {VERSION}: "
            "read it with the version that wrote it"
        )
    if not (isinstance(line, dict) and _is_whole(line)):
        raise _damaged(path, number)
    return line


def _is_whole(line: dict[str, Any]) -> bool:
    if "stream" in line:
        return _is_of(_is_setting)(line.get("config"))
    if "statistics" in line:
        summary = line["statistics"]
        return (
            _is_count(line.get("step"))
            and isinstance(line.get("final"), bool)
            and isinstance(summary, dict)
            and _fits(summary, _STATISTICS)
        )
    figures = (value for name, value in line.items() if name not in _STEP)
    return _fits(line, _STEP) and all(map(_is_figure, figures))


def _fits(line: Mapping[str, Any], kinds: Mapping[str, Callable[[Any], bool]]) -> bool:
    return all(name in line and is_kind(line[name]) for name, is_kind in kinds.items())


# -- kinds of fields ------------------------------------------------------------------------------


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_figure(value: Any) -> bool:
    return value is None or _is_number(value)


def _is_setting(value: Any) -> bool:
    return isinstance(value, bool | str) or _is_figure(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_of(is_kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(is_kind, value.values()))


def _is_interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_figure, value))


def _is_event(value: Any) -> bool:
    def is_kind(figure: Any) -> bool:
        listed = isinstance(figure, list) and all(map(_is_number, figure))
        return listed or _is_setting(figure)

    return (
        _is_of(is_kind)(value)
        and _is_text(value.get("event"))
        and isinstance(value.get("scales", []), list)
    )


_STEP: dict[str, Callable[[Any], bool]] = {
    "step": _is_count,
    "loss": _is_figure,
    "phase": lambda value: _is_text(value) and value in Phase.__members__,
    "was_predicted": lambda value: isinstance(value, bool),
    "prediction_error": _is_figure,
    "confidence": _is_figure,
    "gradient_norm": _is_figure,
    "step_time_ms": _is_figure,
    "events": lambda value: isinstance(value, list) and all(map(_is_event, value)),
}
_BY_TYPE: dict[Any, Callable[[Any], bool]] = {
    "int": _is_count,
    "float": _is_figure,
    "str": _is_text,
    "Interval": _is_interval,
    "dict[str, int]": _is_of(_is_count),
    "dict[str, float]": _is_of(_is_figure),
}
_STATISTICS = {f.name: _BY_TYPE[f.type] for f in dataclasses.fields(TrainingStatistics)}


def _damaged(path: Path, number: int) -> StreamError:
    return StreamError(
        f"{path} is damaged in line {number}: take the line out, or restore the file"
    )
