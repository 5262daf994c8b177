"""``hybridcore demo``: real models on real data, with and without hybridcore, side by side."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from hybridcore.cli.common import (
    INTERRUPTED,
    JsonFlag,
    QuietFlag,
    UserError,
    check_picture,
    columns_caption,
    environment,
    output_console,
    print_json,
    progress,
    ratio_text,
)

if TYPE_CHECKING:
    from hybridcore.cli.compare import Run, Watch
    from hybridcore.cli.workloads import Workload

QUICK_SHARE = 0.3


def demo(
    output: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path(
        "hybridcore-demo.png"
    ),
    only: Annotated[str | None, typer.Option(help="Run this workload alone.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Repeat with this many seeds.")] = 1,
    quick: Annotated[bool, typer.Option(help="Short runs, to see that all works.")] = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Train real models on real data, plain and with hybridcore, and compare the cost."""
    import torch

    from hybridcore.cli.compare import compare
    from hybridcore.cli.own import Source
    from hybridcore.cli.picture import draw
    from hybridcore.cli.workloads import WORKLOADS, classifier_at_hand

    if only is not None and only not in WORKLOADS:
        raise UserError(f"--only {only} is not one of {', '.join(WORKLOADS)}")
    if only is not None:
        Source.of(only)
    check_picture(output)
    # Side by side on a busy machine, more threads measure the scheduler.
    torch.set_num_threads(1)
    names = ["siren", classifier_at_hand()] if only is None else [only]
    workloads = [WORKLOADS[name] for name in names]
    if quick:
        workloads = [_shortened(workload) for workload in workloads]
    console = output_console(as_json=as_json, quiet=quiet)
    if only is None and names[1] == "digits":
        console.print("Fashion-MNIST (Debian: dataset-fashion-mnist) is not here: using digits.")
    comparisons, interrupted = [], False
    try:
        with progress(quiet=quiet) as shown:
            for workload in workloads:
                for seed in range(seeds):
                    with _watching(shown, workload, seed) as watch:
                        comparisons.append(compare(workload, seed, watch=watch))
    except KeyboardInterrupt:
        interrupted = True
        console.print(f"Interrupted after {len(comparisons)} finished comparisons.")
        if not comparisons:
            raise typer.Exit(INTERRUPTED) from None
    summaries = [comparison.summary() for comparison in comparisons]
    for workload in workloads:
        finished = [s for s in summaries if s["workload"] == workload.name]
        if finished:
            _print(console, workload, finished)
    if as_json:
        print_json({**environment(), "comparisons": summaries})
    draw([c for c in comparisons if c.seed == 0], output)
    console.print(f"Picture: {output}")
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def _shortened(workload: Workload) -> Workload:
    return dataclasses.replace(
        workload,
        steps=round(QUICK_SHARE * workload.steps),
        learning_rates=workload.learning_rates[1:2],
    )


@contextmanager
def _watching(shown: Progress, workload: Workload, seed: int) -> Iterator[Watch]:
    rates = list(workload.learning_rates)
    total = len(rates) * workload.steps
    task = shown.add_task(f"{workload.name}, seed {seed}", total=total, state="")

    def watch(rate: float, step: int, run: Run) -> None:
        done = rates.index(rate) * workload.steps + step
        state = f"rate {rate:g}  {run.phase[-1]:<7} loss {run.loss[-1]:.3g}"
        if step == workload.steps:
            done, state = total, f"{state}, on to the target"
        shown.update(task, completed=done, state=state)

    yield watch
    shown.update(task, completed=total, state="done")


def _print(console: Console, workload: Workload, summaries: list[dict[str, Any]]) -> None:
    rates = ", ".join(f"{rate:g}" for rate in workload.learning_rates)
    table = Table(
        title=f"{workload.title}: best of learning rates {rates}, {workload.schedule} schedule, "
        f"{workload.steps} steps" + f", medians of {len(summaries)} seeds" * (len(summaries) > 1),
        caption=columns_caption(len(summaries)),
    )
    for column in ("", "plain", "hybridcore", "ratio"):
        table.add_column(column, justify="left" if not column else "right")

    def row(title: str, plain: str, hybrid: str, form: str) -> None:
        a = statistics.median(s[plain] for s in summaries)
        b = statistics.median(s[hybrid] for s in summaries)
        ratio = statistics.median(s[hybrid] / s[plain] for s in summaries)
        table.add_row(title, format(a, form), format(b, form), ratio_text(ratio))

    if workload.noisy:
        row("held-out loss at the end", "plain_final", "hybrid_final", ".4f")
    else:
        row("cost to plain's lowest loss", "plain_cost_to_target", "hybrid_cost_to_target", ".0f")
        row("seconds to it", "plain_seconds_to_target", "hybrid_seconds_to_target", ".1f")
    row("total cost", "plain_total_cost", "hybrid_total_cost", ".0f")
    row("total seconds", "plain_total_seconds", "hybrid_total_seconds", ".1f")
    console.print(table)
    console.print(_verdict(workload, summaries))


def _verdict(workload: Workload, summaries: list[dict[str, Any]]) -> str:
    def median(name: str) -> float:
        return float(statistics.median(s[name] for s in summaries))

    share = median("predicted_share")
    if workload.noisy:
        cost = statistics.median(s["hybrid_total_cost"] / s["plain_total_cost"] for s in summaries)
        kept = "stayed out of the way" if share < 0.01 else f"predicted {share:.0%} of the steps"
        return (
            f"hybridcore {kept}: loss {median('hybrid_final'):.4f} against "
            f"{median('plain_final'):.4f}, at {cost:.3f} of the cost.\n"
        )
    ratio = median("cost_ratio")
    less = median("train_less_final")
    reached = (
        f"reached plain's lowest loss at {ratio_text(ratio)} of its cost"
        if math.isfinite(ratio)
        else "did not reach plain's lowest loss"
    )
    return (
        f"hybridcore predicted {share:.0%} of the steps and {reached}; at the same learning rate "
        f"{median('same_rate_cost_ratio'):.2f}. Plain training cut off at hybridcore's total cost "
        f"ends at {less:.3g}, hybridcore at {median('hybrid_final'):.3g}.\n"
    )
