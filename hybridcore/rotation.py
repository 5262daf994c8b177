"""Checkpoints of a run that is saved again and again: the newest few are kept."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from hybridcore.errors import CheckpointError, ConfigError

logger = logging.getLogger("hybridcore")

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
        removed.

    Raises
    ------
    ConfigError
        If an argument is out of range.
    OSError
        If the folder cannot be made.
    """

    def __init__(self, steps: int, folder: str | Path, keep: int) -> None:
        for name, value in (("steps", steps), ("keep", keep)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")
        self._steps, self._keep = steps, keep
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` steps."""
        return step % self._steps == 0

    def save(self, step: int, write: Callable[[Path], object]) -> None:
        """Have `write` write the checkpoint; if that fails, training goes on, with a log line."""
        path = self._folder / f"step-{step:09d}.safetensors"
        try:
            write(path)
            for old in checkpoints_in(self._folder)[self._keep :]:
                old.unlink(missing_ok=True)
        # Frameworks call memory that has run out a RuntimeError.
        except (OSError, MemoryError, RuntimeError, CheckpointError) as error:
            logger.error("no checkpoint of step %d, training goes on: %s", step, error)


def checkpoints_in(folder: str | Path) -> list[Path]:
    """Return the checkpoints in `folder` that a :class:`Rotation` wrote, newest first.

    By when they were written: a run that went back, or another one in the same folder, may have
    higher numbers.
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
    path = Path(path)
    if not path.is_dir():
        return read(path)
    found = checkpoints_in(path)
    if not found:
        raise FileNotFoundError(f"{path} holds no checkpoint named step-*.safetensors")
    for candidate in found:
        try:
            return read(candidate)
        except CheckpointError as error:
            logger.error("%s", error)
    raise CheckpointError(f"none of the {len(found)} checkpoints in {path} can be read")
