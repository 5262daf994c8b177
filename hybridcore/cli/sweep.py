"""``hybridcore sweep``: every combination of up to three settings on one loop."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hybridcore.cli.common import (
    INTERRUPTED,
    JsonFlag,
    LoopArgument,
    QuietFlag,
    StepsOption,
    UserError,
    check_apart,
    check_output,
    check_picture,
    environment,
    output_console,
    print_json,
    progress,
    ratio_text,
)
from hybridcore.cli.comparing import read_config

if TYPE_CHECKING:
    from hybridcore.cli.cells import Results

SHOWN = 10


def sweep(
    target: LoopArgument = "siren",
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE,...",
            help="Setting of HybridTrainerConfig and its values; up to three of these.",
            show_default="60 combinations of warmup_steps, min_full_steps and horizon",
        ),
    ] = None,
    steps: StepsOption = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each combination.")] = 1,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with the settings that are not swept.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Runs side by side; -1 for one on each core.")] = 1,
    dask: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Run on the Dask cluster of this scheduler instead."),
    ] = None,
    results: Annotated[
        Path, typer.Option(help="File that keeps the runs; a sweep goes on from it.")
    ] = Path("hybridcore-sweep.jsonl"),
    output: Annotated[Path, typer.Option(help="Where the heat map goes.")] = Path(
        "hybridcore-sweep.png"
    ),
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Try combinations of settings on a loop, and show what each costs to plain's lowest loss.

    Each run is kept in --results as soon as it is done: the same command goes on where it was
    stopped, with more seeds or values too.
    """
    from hybridcore import HybridTrainerConfig
    from hybridcore.cli.cells import begin_results, combinations, describe, open_results, parse_grid
    from hybridcore.cli.heatmap import draw_heatmap
    from hybridcore.cli.own import Source
    from hybridcore.cli.paired import forward_cost_of

    source = Source.of(target)
    grid = parse_grid(setting or [])
    base = read_config(config) or HybridTrainerConfig()
    cells = combinations(grid, base)
    check_picture(output)
    check_output(results, "--results")
    read = {"--results": results, "the loop": Path(target), "--config": config}
    check_apart({"--output": output}, read)
    if jobs == 0 or jobs < -1:
        raise UserError(f"--jobs {jobs} must be at least 1, or -1 for one on each core")
    count = source.steps if steps is None else steps
    console = output_console(as_json=as_json, quiet=quiet)
    described = describe(source, count, base)
    kept = open_results(results, described)
    interrupted = False
    try:
        with _backend(jobs, dask) as run:
            if kept is None:
                kept = begin_results(results, described, forward_cost_of(source, count))
            _fill(run, source, count, kept, cells, list(range(seeds)), base, quiet=quiet)
    except KeyboardInterrupt:
        interrupted = True
    if kept is None or not kept.cells:
        console.print("Interrupted before the first run was done.")
        raise typer.Exit(INTERRUPTED)
    summary = summarise(kept, cells)
    if interrupted:
        done = sum(row["seeds"] for row in summary)
        console.print(
            f"Interrupted: {done} of {len(cells) * seeds} runs are done and kept in {results}; the "
            "same command goes on from there."
        )
    _print(console, target, count, list(grid), summary, base.to_dict())
    if as_json:
        head = {"target": target, "steps": count, "grid": grid, "results": str(results)}
        print_json({**environment(), **head, "complete": not interrupted, "cells": summary})
    draw_heatmap(grid, summary, base.to_dict(), f"{target}, {count} steps", output)
    console.print(f"Heat map: {output}\nRuns: {results}")
    if interrupted:
        raise typer.Exit(INTERRUPTED)


Run = Callable[[Iterable[Any]], Iterable[Any]]


@contextlib.contextmanager
def _backend(jobs: int, dask: str | None) -> Iterator[Run]:
    """Give what runs joblib's delayed calls and yields what they return, as it comes."""
    import joblib

    if dask is None:
        yield joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")
        return
    try:
        from distributed import Client
        from distributed.comm import parse_address
    except ImportError as error:
        raise UserError("--dask needs Dask: pip install distributed") from error
    try:
        # A client that was never whole complains when it goes.
        parse_address(dask, strict=True)
        client = Client(dask, timeout=5, set_as_default=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--dask {dask}: no scheduler answers there, start one with `dask scheduler`"
        ) from error
    with client, joblib.parallel_config("dask", client=client):
        yield joblib.Parallel(return_as="generator_unordered")


def _fill(
    run: Run,
    source: Any,
    steps: int,
    kept: Results,
    cells: list[dict[str, Any]],
    seeds: list[int],
    base: Any,
    *,
    quiet: bool,
) -> None:
    """Run what is missing."""
    from joblib import delayed

    from hybridcore.cli.cells import hybrid_cell, plain_cell

    price = kept.head["forward_cost"]
    plain = [seed for seed in seeds if seed not in kept.plain]
    missing = [(c, seed) for seed in seeds for c in cells if kept.cell(c, seed) is None]
    with progress(quiet=quiet) as shown:
        total = len(cells) * len(seeds)
        task = shown.add_task(
            source.name, total=total, completed=total - len(missing), state="plain runs"
        )
        for line in run(delayed(plain_cell)(source, seed, steps, price) for seed in plain):
            if not math.isfinite(line["target"]):
                raise UserError(
                    f"{source.name}: the plain run's loss is not finite for seed {line['seed']}: "
                    "lower the learning rate"
                )
            kept.add("plain", line)
        calls = (
            delayed(hybrid_cell)(source, steps, price, kept.plain[seed], base, settings)
            for settings, seed in missing
        )
        for line in run(calls):
            kept.add("cell", line)
            best = min(cell["cost_ratio"] for cell in kept.cells)
            shown.update(task, advance=1, state=f"best ratio so far {_ratio(best)}")


def summarise(kept: Results, cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over seeds of the combinations that have been run, the cheapest first."""
    rows = []
    for settings in cells:
        runs = [cell for cell in kept.cells if cell["settings"] == settings]
        if runs:
            names = ("cost_ratio", "predicted_share", "lowest")
            middle = {name: statistics.median(run[name] for run in runs) for name in names}
            ratios = [run["cost_ratio"] for run in runs]
            spread = {"least_ratio": min(ratios), "most_ratio": max(ratios)}
            rows.append({"settings": settings, "seeds": len(runs), **middle, **spread})
    return sorted(rows, key=lambda row: row["cost_ratio"])


def _print(
    console: Console,
    target: str,
    steps: int,
    names: list[str],
    summary: list[dict[str, Any]],
    defaults: dict[str, Any],
) -> None:
    title = f"{target}, {steps} steps: cost to plain's lowest loss, as a share of plain's"
    table = Table(title=title)
    for name in (*names, "cost", "over seeds", "predicted", ""):
        table.add_column(name, justify="right")

    def is_default(row: dict[str, Any]) -> bool:
        return all(defaults[name] == value for name, value in row["settings"].items())

    shown = summary[:SHOWN]
    shown += [row for row in summary[SHOWN:] if is_default(row)]
    for row in shown:
        low, high = row["least_ratio"], row["most_ratio"]
        spread = f"{_ratio(low)} to {_ratio(high)}" if row["seeds"] > 1 else ""
        is_best = row["cost_ratio"] == summary[0]["cost_ratio"] < math.inf
        style = "bold" if is_best else None
        values = [str(value) for value in row["settings"].values()]
        share = f"{row['predicted_share']:.0%}"
        mark = "default" if is_default(row) else ""
        table.add_row(*values, _ratio(row["cost_ratio"]), spread, share, mark, style=style)
    console.print(table)
    told = f"{len(shown)} of {len(summary)} combinations, bold: the best"
    console.print(told + "." if any(map(is_default, shown)) else f"{told}; without the default.")


def _ratio(value: float) -> str:
    return ratio_text(value) if math.isfinite(value) else "not reached"
