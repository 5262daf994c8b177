"""Checkpoints of a run that is saved again and again: the newest few are kept."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hybridcore.checkpoint import as_path, remove_leftovers
from hybridcore.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from hybridcore.engine import Engine

logger = logging.getLogger("hybridcore")

_SECOND = 10**9
_NAME = re.compile(r"step-(\d{9,})\.safetensors")
Content = TypeVar("Content")


class Rotation:
    """Writes a checkpoint every so many steps, and removes the oldest.

    Parameters
    ----------
    steps : int
        Steps between two checkpoints, at least 1.
    folder : str or Path
        Where to; it is made if it is not there.
    keep : int
        Newest checkpoints that are kept, at least 1. Only files that are named as they are, are
        removed, and none that is of a later step than where the run begins.

    Raises
    ------
    ConfigError
        If an argument is out of range or of the wrong type.
    OSError
        If the folder cannot be made.
    """

    def __init__(self, steps: int, folder: str | Path, keep: int) -> None:
        for name, value in (("steps", steps), ("keep", keep)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")
        self._steps, self._keep = steps, keep
        self._folder = as_path("folder", folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._foreign: set[str] = set()

    def begin(self, step: int) -> None:
        """Leave those alone that are of later steps than `step`, where the run is now.

        They are of another run, or of this one before it went back.
        """
        later = set()
        # If it is gone by now, the first checkpoint will say so.
        with contextlib.suppress(OSError):
            later = {p.name for p in checkpoints_in(self._folder) if number_of(p) > step}
        if later - self._foreign:
            logger.warning(
                "%s holds %d checkpoints of later steps than %d, which are another run's or from "
                "before this one went back: they stay, and load() takes the newest by time",
                self._folder,
                len(later),
                step,
            )
        self._foreign = later

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` steps."""
        return step % self._steps == 0

    def save(self, step: int, write: Callable[[Path], object]) -> None:
        """Have `write` write the checkpoint; if that fails, training goes on, with a log line."""
        path = self._folder / f"step-{step:09d}.safetensors"
        try:
            write(path)
            self._foreign.discard(path.name)
            newest, *others = checkpoints_in(self._folder)
            if newest != path:
                # The clock was set back since then.
                later = newest.stat().st_mtime_ns + _SECOND
                os.utime(path, ns=(later, later))
                others = [newest, *(other for other in others if other != path)]
            own = [other for other in others if other.name not in self._foreign]
            for old in own[self._keep - 1 :]:
                old.unlink(missing_ok=True)
        # What the state of a user's own objects can raise is anything.
        except Exception as error:
            kind = type(error).__name__
            logger.error("no checkpoint of step %d, training goes on: %s: %s", step, kind, error)


class Saver:
    """Saves a run as often as a :class:`Rotation` says, and before jumps if asked.

    Parameters
    ----------
    rotation : Rotation
        Says when and where.
    write : callable
        Writes the checkpoint of the run as it is to a path.
    are_finite : callable
        Whether the weights are.
    before_jumps : bool
        Save too where the next step may begin a jump.
    """

    def __init__(
        self,
        rotation: Rotation,
        write: Callable[[Path], object],
        are_finite: Callable[[], bool],
        before_jumps: bool = False,
    ) -> None:
        self._rotation, self._write, self._are_finite = rotation, write, are_finite
        self._before_jumps = before_jumps
        self._engine: Engine | None = None
        self._step = 0
        self.due = False

    def begin(self, engine: Engine) -> None:
        """Take over the number of steps, which are then counted here: it is put off there."""
        self._engine, self._step, self.due = engine, engine.counters.steps, False
        self._rotation.begin(self._step)

    def count(self, engine: Engine) -> None:
        """Count a step, after which a checkpoint may be due."""
        if engine is not self._engine:
            # Another state was loaded before the step.
            self.begin(engine)
        else:
            self._step += 1
        jump = self._before_jumps and engine.may_jump
        self.due = jump or self._rotation.due(self._step)

    def save(self, engine: Engine) -> None:
        """Save if that is due; if it fails, training goes on, with a log line."""
        if not self.due:
            return
        self.due, step = False, engine.counters.steps
        if self._are_finite():
            self._rotation.save(step, self._write)
        else:
            # It would take the place of one that a run can go on from.
            logger.error("weights are not finite, so there is no checkpoint of step %d", step)


def number_of(path: Path) -> int:
    """Return the step that a checkpoint of a :class:`Rotation` is of."""
    found = _NAME.fullmatch(path.name)
    assert found is not None
    return int(found[1])


def checkpoints_in(folder: str | Path) -> list[Path]:
    """Return the checkpoints in `folder` that a :class:`Rotation` wrote, newest first.

    By when they were written: a run that went back, or another one in the same folder, may have
    higher numbers. So a folder has to be copied with its times.
    """
    found = [path for path in Path(folder).iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)


def read_newest(path: str | Path, read: Callable[[Path], Content]) -> Content:
    """Read the checkpoint at `path`, or the newest readable one if it is a folder of them.

    Raises
    ------
    FileNotFoundError
        If there is none.
    CheckpointError
        If none can be read.
    """
    path = as_path("path", path)
    if not path.is_dir():
        return read(path)
    # A folder that cannot be written is no reason not to read it.
    with contextlib.suppress(OSError):
        remove_leftovers(path)
    found = checkpoints_in(path)
    if not found:
        raise FileNotFoundError(f"{path} holds no checkpoint named step-*.safetensors")
    for candidate in found:
        try:
            return read(candidate)
        except CheckpointError as error:
            logger.error("%s", error)
    raise CheckpointError(f"none of the {len(found)} checkpoints in {path} can be read")
