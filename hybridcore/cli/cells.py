"""The cells of a sweep, and the file that keeps them, so that a sweep can be resumed."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import threading
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

from hybridcore import ConfigError, HybridTrainerConfig
from hybridcore.cli.common import UserError
from hybridcore.cli.own import Source
from hybridcore.cli.paired import Judge, Judged
from hybridcore.metrics import finite

# Sixty: what a run does first, how long it looks, and how far it jumps.
GRID: dict[str, tuple[Any, ...]] = {
    "warmup_steps": (50, 100, 200),
    "min_full_steps": (24, 36, 50, 100),
    "horizon": (15, 30, 50, 75, 150),
}
MOST_SETTINGS = 3

P = ParamSpec("P")
R = TypeVar("R")
_LOCK = threading.Lock()


def parse_grid(options: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """Read ``NAME=VALUE,VALUE,...`` of each option; the default grid where there are none.

    Raises
    ------
    UserError
        If one is of another form, or names a setting or value that does not exist.
    """
    if not options:
        return dict(GRID)
    known = [f.name for f in dataclasses.fields(HybridTrainerConfig)]
    grid: dict[str, tuple[Any, ...]] = {}
    for option in options:
        name, equals, values = option.partition("=")
        if not equals or not values:
            raise UserError(f"--set {option}: write NAME=VALUE,VALUE, as horizon=30,75")
        if name not in known:
            raise UserError(f"--set {option}: no setting {name!r}, known: {', '.join(known)}")
        if name in grid:
            raise UserError(f"--set {name} is given twice: put all of its values into one")
        chosen = tuple(_value(text) for text in values.split(","))
        if not all(isinstance(value, bool | int | float | str) for value in chosen):
            raise UserError(f"--set {option}: a value is a number, true, false or a word")
        if len(set(chosen)) < len(chosen):
            raise UserError(f"--set {option}: a value is given twice, take one out")
        grid[name] = chosen
    if len(grid) > MOST_SETTINGS:
        raise UserError(f"--set is given for {len(grid)} settings: sweep at most {MOST_SETTINGS}")
    return grid


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        # A word, as dynamics=mlp, or True in Python's spelling.
        return {"True": True, "False": False}.get(text, text)


def combinations(
    grid: Mapping[str, Sequence[Any]], base: HybridTrainerConfig
) -> list[dict[str, Any]]:
    """Return every combination of `grid`, all checked before any is run; :class:`UserError`."""
    cells = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    for settings in cells:
        try:
            dataclasses.replace(base, **settings)
        except ConfigError as error:
            raise UserError(f"--set: {error}") from error
    return cells


def _alone(cell: Callable[P, R]) -> Callable[P, R]:
    """Let one cell run at a time in a process: random states are the whole process's.

    A Dask worker may have several threads.
    """

    @functools.wraps(cell)
    def locked(*arguments: P.args, **named: P.kwargs) -> R:
        with _LOCK:
            return cell(*arguments, **named)

    return locked


@_alone
def plain_cell(source: Source, seed: int, steps: int, forward_cost: float) -> dict[str, Any]:
    """Run a seed plain, and return what its cells are held against."""
    judged = _run(Judge(source, seed, steps, forward_cost, hybrid=False), steps)
    target = judged.lowest()
    at = judged.first_at(target)
    cost = math.nan if at is None else judged.run.cost[at]
    return {"seed": seed, "target": target, "cost": cost, "total_cost": judged.run.cost[-1]}


@_alone
def hybrid_cell(
    source: Source,
    steps: int,
    forward_cost: float,
    plain: Mapping[str, Any],
    base: HybridTrainerConfig,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Run a seed with some settings, and return what the plain run's target cost."""
    config = dataclasses.replace(base, **settings)
    judge = Judge(source, plain["seed"], steps, forward_cost, hybrid=True, config=config)
    judged = _run(judge, steps)
    run = judged.run
    if judge.loop.scheduler is None:
        while run.cost[-1] < plain["total_cost"] and judged.first_at(plain["target"]) is None:
            for _ in range(20):
                judge.step()
    at = judged.first_at(plain["target"])
    cost = math.inf if at is None else run.cost[at]
    assert run.trainer is not None
    statistics = run.trainer.statistics()
    return {
        "settings": dict(settings),
        "seed": plain["seed"],
        "cost_to_target": cost,
        "cost_ratio": cost / plain["cost"],
        "lowest": judged.lowest(),
        "total_cost": run.cost[-1],
        "predicted_share": run.predicted / len(run.loss),
        "measured_speedup": statistics.measured_speedup,
        "rollbacks": statistics.rollbacks,
    }


def _run(judge: Judge, steps: int) -> Judged:
    # Cells run side by side, and more threads would measure the scheduler.
    torch.set_num_threads(1)
    for _ in range(steps):
        judged = judge.step()
    return judged


@dataclass(slots=True)
class Results:
    """File of a sweep: a line that says what was swept, then one for each run that is done.

    Attributes
    ----------
    path : Path
        The file.
    head : dict
        What was swept, and the measured cost of a forward pass.
    plain : dict of int to dict
        Plain runs by seed.
    cells : list of dict
        Hybrid runs.
    """

    path: Path
    head: dict[str, Any]
    plain: dict[int, dict[str, Any]] = field(default_factory=dict)
    cells: list[dict[str, Any]] = field(default_factory=list)

    def cell(self, settings: Mapping[str, Any], seed: int) -> dict[str, Any] | None:
        """Return the run with these settings and seed, if it is there."""
        same = (c for c in self.cells if c["settings"] == settings and c["seed"] == seed)
        return next(same, None)

    def add(self, kind: str, line: dict[str, Any]) -> None:
        """Keep a run that is done, at once."""
        self._take(kind, line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({kind: finite(line)}) + "\n")

    def _take(self, kind: str, line: dict[str, Any]) -> None:
        if kind == "plain":
            self.plain[line["seed"]] = line
        else:
            self.cells.append(line)


def describe(source: Source, steps: int, base: HybridTrainerConfig) -> dict[str, Any]:
    """Say what runs of a sweep have in common; others do not belong into the same file."""
    text = None if source.text is None else hashlib.sha256(source.text.encode()).hexdigest()
    return {
        "sweep": 1,
        "name": Path(source.name).name,
        "sha256": text,
        "steps": steps,
        "base": base.to_dict(),
    }


def open_results(path: Path, described: dict[str, Any]) -> Results | None:
    """Read the file of a sweep that was begun; None where there is none.

    A last line that was cut is cut off.

    Raises
    ------
    UserError
        If the file is of something else.
    """
    if not path.exists() or path.stat().st_size == 0:
        return None
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    try:
        lines = [json.loads(line) for line in content[:whole].decode().splitlines()]
        head = lines[0]
        known = isinstance(head, dict) and "sweep" in head and all(map(_is_run, lines[1:]))
        known = known and isinstance(head.get("forward_cost"), int | float)
    # Brackets may be nested too deeply.
    except (ValueError, IndexError, RecursionError):
        known = False
    if not known:
        raise UserError(f"--results {path} is no file of a sweep, or damaged: name another one")
    for name, value in described.items():
        if head.get(name) != value:
            raise UserError(
                f"--results {path} holds a sweep with another {_WORDS.get(name, name)}: name "
                "another file, or remove it to begin anew"
            )
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
    results = Results(path, head)
    for line in lines[1:]:
        for kind, entry in line.items():
            results._take(kind, {**entry, **_missed(entry)})
    return results


_WORDS = {"sha256": "content of the file", "name": "target", "base": "--config"}


# What is computed with.
_FIGURES = {
    "plain": ("seed", "target", "cost", "total_cost"),
    "cell": ("seed", "cost_ratio", "predicted_share", "lowest"),
}
# What JSON cannot hold: a target that was not reached costs infinity.
_MISSED = {"cost_to_target": math.inf, "cost_ratio": math.inf, "lowest": math.nan}


def _missed(entry: dict[str, Any]) -> dict[str, float]:
    """Return the figures of a run that are null in the file."""
    return {name: value for name, value in _MISSED.items() if entry.get(name, 0.0) is None}


def _is_run(line: Any) -> bool:
    if not (isinstance(line, dict) and len(line) == 1):
        return False
    ((kind, entry),) = line.items()
    if kind not in _FIGURES or not isinstance(entry, dict):
        return False
    if kind == "cell" and not isinstance(entry.get("settings"), dict):
        return False
    figures = {**entry, **_missed(entry)}
    return all(isinstance(figures.get(name), int | float) for name in _FIGURES[kind])


def begin_results(path: Path, described: dict[str, Any], forward_cost: float) -> Results:
    """Begin the file of a sweep."""
    head = {**described, "forward_cost": forward_cost}
    path.write_text(json.dumps(head) + "\n", encoding="utf-8")
    return Results(path, head)
