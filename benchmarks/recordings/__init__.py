"""Recorded training runs: loss, gradient norm and learning rate of each step.

``benchmarks.record_runs`` writes them into this folder; a model of training dynamics is judged and
tested on them. Those in the folder ``fresh`` differ in their seeds, and nothing was chosen by them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

FOLDER = Path(__file__).parent
FRESH = FOLDER / "fresh"
INDEX = "index.json"
SERIES = ("loss", "gradient_norm", "learning_rate")


class Recording(NamedTuple):
    """One real training run.

    Attributes
    ----------
    name, workload : str
        Of the run, and of the model and data that it trained.
    settings : dict
        Optimizer, peak learning rate, schedule, batch size, steps and seed.
    loss : (steps,) ndarray of float32
        Training loss of each step's batch, before the step.
    gradient_norm : (steps,) ndarray of float32
        L2 norm of the gradient of all parameters.
    learning_rate : (steps,) ndarray of float32
        Rate that the step was made with.
    """

    name: str
    workload: str
    settings: dict[str, Any]
    loss: NDArray[np.float32]
    gradient_norm: NDArray[np.float32]
    learning_rate: NDArray[np.float32]


def index(folder: Path = FOLDER) -> dict[str, dict[str, Any]]:
    """Workload, settings and versions of every run recorded in `folder`, by its name."""
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run `python -m benchmarks.record_runs` first")
    entries: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return entries


def load(folder: Path = FOLDER) -> list[Recording]:
    """Return all runs recorded in `folder`, in the order of their names."""
    recordings = []
    for name, entry in sorted(index(folder).items()):
        with np.load(folder / f"{name}.npz", allow_pickle=False) as arrays:
            series = [arrays[key] for key in SERIES]
        recordings.append(Recording(name, entry["workload"], entry["settings"], *series))
    return recordings
