"""Writing and reading the trainer's state."""

from __future__ import annotations

import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hybridcore import CheckpointError

VERSION = 1


def write(state: dict[str, Any], path: str | Path) -> None:
    """Write `state` to `path` in one move: the file is whole, or as it was before."""
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read(path: str | Path) -> dict[str, Any]:
    """Read what :func:`write` wrote.

    Raises
    ------
    CheckpointError
        If the file is damaged or no checkpoint of hybridcore.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path} is damaged or no checkpoint: use an earlier one ({error})"
        ) from error
    check(state)
    return state  # type: ignore[no-any-return]


def check(state: object) -> None:
    """Raise :class:`CheckpointError` unless `state` is of this version."""
    if not isinstance(state, dict) or "hybridcore" not in state:
        raise CheckpointError("state is not one of a HybridTrainer: pass what state_dict() gave")
    if state["hybridcore"] != VERSION:
        raise CheckpointError(
            f"state has version {state['hybridcore']!r}, this hybridcore reads {VERSION}: load it "
            "with the version that wrote it"
        )


def to_tensors(value: Any) -> Any:
    """Copy nested containers with NumPy arrays turned to tensors, which are safe to load."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {key: to_tensors(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_tensors(item) for item in value]
    return value


def from_tensors(value: Any) -> Any:
    """Undo :func:`to_tensors`."""
    if isinstance(value, torch.Tensor):
        return value.numpy()
    if isinstance(value, dict):
        return {key: from_tensors(item) for key, item in value.items()}
    return value
