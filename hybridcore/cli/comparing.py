"""``hybridcore compare``: a loop of the user's own, with and without hybridcore."""

from __future__ import annotations

import math
import statistics
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
    check_picture,
    columns_caption,
    environment,
    output_console,
    print_json,
    progress,
    ratio_text,
)

if TYPE_CHECKING:
    from hybridcore.cli.compare import Run
    from hybridcore.cli.paired import Pair

# Ratios between these are no difference: evaluations are that far apart.
SAME = (0.97, 1.03)
# Above this ratio of wall-clock, a run without gain did harm.
SLOWER = 1.05


def compare(
    target: LoopArgument,
    steps: StepsOption = None,
    seeds: Annotated[int, typer.Option(min=1, help="Pairs of runs, each of its own seed.")] = 3,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with settings of the hybrid runs.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each run.")] = 1,
    output: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path(
        "hybridcore-compare.png"
    ),
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Run a loop of your own plain and with hybridcore, and say whether it helped.

    build() returns model, optimizer, data and loss; loss(model, batch) returns a scalar tensor.
    Both runs start from the same weights and see the same batches. The target is the plain run's
    lowest loss; cost counts a full step as 1 and a forward pass at its measured share of one.
    """
    import torch

    from hybridcore.cli.own import Source
    from hybridcore.cli.paired import forward_cost_of, run_pair
    from hybridcore.cli.picture import draw_pairs

    source = Source.of(target)
    settings = read_config(config)
    check_picture(output)
    check_apart({"--output": output}, {"the loop": Path(target), "--config": config})
    count = source.steps if steps is None else steps
    torch.set_num_threads(threads)
    console = output_console(as_json=as_json, quiet=quiet)
    pairs: list[Pair] = []
    interrupted = False
    try:
        with progress(quiet=quiet) as shown:
            task = shown.add_task(f"{target}, measuring", total=seeds * count, state="")
            price = forward_cost_of(source, count)
            for seed in range(seeds):

                def watch(step: int, run: Run, seed: int = seed) -> None:
                    state = f"{run.phase[-1]:<7} loss {run.loss[-1]:.3g}"
                    shown.update(
                        task,
                        completed=seed * count + step,
                        description=f"{target}, seed {seed}",
                        state=state + (", on to the target" if step == count else ""),
                    )

                run_pair(source, seed, count, price, settings, watch, pairs)
            shown.update(task, completed=seeds * count, state="done")
    except KeyboardInterrupt:
        interrupted = True
        if not pairs:
            console.print("Interrupted before the first step.")
            raise typer.Exit(INTERRUPTED) from None
        console.print(
            f"Interrupted: what follows is of {len(pairs)} of {seeds} seeds, the last cut."
        )
    summaries = [pair.summary() for pair in pairs]
    for figures in summaries:
        if not math.isfinite(figures["target"]):
            raise UserError(
                f"{target}: the plain run's loss is not finite for seed {figures['seed']}: lower "
                "the learning rate or check the data"
            )
    judged_by = source.build(0, count).judged_by
    if interrupted:
        helped, text = False, "No verdict, as the runs were cut: let them come to their end."
    else:
        helped, text = verdict(summaries, judged_by, count < _beginning(settings))
    _print(console, target, count, summaries, judged_by)
    console.print(text)
    if as_json:
        head = {"target": target, "steps": count, "judged_by": judged_by, "forward_cost": price}
        print_json({**environment(), **head, "helped": helped, "verdict": text, "pairs": summaries})
    # Last: the figures are out, should it fail.
    draw_pairs(pairs, text, judged_by, output)
    console.print(f"Picture: {output}")
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def read_config(path: Path | None) -> Any:
    """Read settings from a TOML file; None where there is none."""
    from hybridcore import HybridTrainerConfig

    if path is None:
        return None
    try:
        return HybridTrainerConfig.from_toml(path)
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}, name a TOML file") from error


def _beginning(settings: Any) -> int:
    """Return the steps before which there is no jump."""
    from hybridcore import HybridTrainerConfig

    used = settings or HybridTrainerConfig()
    return int(used.warmup_steps + used.min_full_steps)


def verdict(
    summaries: list[dict[str, Any]], judged_by: str, too_short: bool = False
) -> tuple[bool, str]:
    """Whether hybridcore helped, and a sentence with the figures that say so.

    With `too_short` the runs ended before there could be a jump.
    """
    weighs = "its own work weighs on steps as short as these"
    if too_short:
        weighs = "such a run is too short for it, which only watches the first steps"
    ratios = [s["cost_ratio"] for s in summaries]
    cost, seconds = _middle(ratios), _middle([s["seconds_ratio"] for s in summaries])
    share = _middle([s["predicted_share"] for s in summaries])
    ends = f"{ratio_text(min(ratios))} to {ratio_text(max(ratios))}"
    spread = f" ({ends} over {len(ratios)} seeds)"
    spread = spread if len(ratios) > 1 and math.isfinite(max(ratios)) else ""
    equal = (
        f"at equal cost its lowest {judged_by} is "
        f"{_middle([s['hybrid_at_equal_cost'] for s in summaries]):.4g}, your loop's "
        f"{_middle([s['plain_at_equal_cost'] for s in summaries]):.4g}"
    )
    predicted = f"{share:.0%} of the steps were predicted"
    rises = _rise(summaries, judged_by)
    if not math.isfinite(cost):
        return False, (
            f"hybridcore did not help here: it did not reach your loop's lowest {judged_by} for "
            f"its cost; {equal}; {predicted}."
        )
    told = f"your loop's lowest {judged_by} at {ratio_text(cost)} of its cost{spread}"
    clock = f"{ratio_text(seconds)} of its wall-clock"
    if cost >= SAME[1]:
        return False, (
            f"hybridcore did not help here: it reached {told}, {clock}; {equal}; {predicted}."
            f"{rises}"
        )
    if cost > SAME[0] and seconds > SLOWER:
        return False, (
            f"hybridcore did not help here, and cost {seconds - 1.0:.0%} more wall-clock: it "
            f"reached {told}, {clock}; {weighs}; {predicted}."
        )
    if cost > SAME[0]:
        return False, (
            f"hybridcore did not help here, and did no harm: it reached {told}, {clock}; "
            f"{predicted}."
        )
    if max(ratios) >= 1.0:
        return False, (
            f"hybridcore may have helped, and not for every seed: it reached {told}, {clock}; "
            f"{predicted}. More --seeds would tell."
        )
    if seconds >= 1.0:
        return False, (
            f"hybridcore saved passes and no time here: it reached {told}, but {clock}; {weighs}; "
            f"{predicted}."
        )
    return True, (
        f"hybridcore helped: it reached {told}, {clock}; {equal}; {predicted}.{rises} A better "
        "learning rate or schedule may gain too: tune the plain loop before you compare."
    )


def _rise(summaries: list[dict[str, Any]], judged_by: str) -> str:
    """Return what to say of a hybrid run that ends worse than the plain one, empty where none."""
    plain, hybrid = (_middle([s[f"{run}_final"] for s in summaries]) for run in ("plain", "hybrid"))
    if not hybrid > plain + (SAME[1] - 1.0) * abs(plain):
        return ""
    return (
        f" At the end its {judged_by} is {hybrid:.4g} and your loop's {plain:.4g}: train for fewer "
        "steps, or judge jumps by held-out data with probe=."
    )


def _middle(values: list[float]) -> float:
    return float(statistics.median(values))


def _print(
    console: Console, target: str, steps: int, summaries: list[dict[str, Any]], judged_by: str
) -> None:
    seeds = len(summaries)
    table = Table(
        title=f"{target}: {steps} steps" + f", medians of {seeds} seeds" * (seeds > 1),
        caption=columns_caption(seeds),
    )
    for column in ("", "plain", "hybridcore", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    rows = [
        (f"cost to plain's lowest {judged_by}", "cost_to_target", ".0f"),
        ("seconds to it", "seconds_to_target", ".2f"),
        (f"lowest {judged_by} at equal cost", "at_equal_cost", ".4g"),
        (f"{judged_by} at the end", "final", ".4g"),
        ("total cost", "total_cost", ".0f"),
        ("total seconds", "total_seconds", ".2f"),
    ]
    for title, name, form in rows:
        plain = [s[f"plain_{name}"] for s in summaries]
        hybrid = [s[f"hybrid_{name}"] for s in summaries]
        # Of losses below zero there is none.
        positive = min(*plain, *hybrid) > 0.0
        ratio = (
            _middle([b / a for a, b in zip(plain, hybrid, strict=True)]) if positive else math.nan
        )
        shown = [
            _figure(_middle(plain), form),
            _figure(_middle(hybrid), form),
            _figure(ratio),
        ]
        table.add_row(title, *shown)
    console.print(table)


def _figure(value: float, form: str | None = None) -> str:
    if not math.isfinite(value):
        return "not reached" if math.isinf(value) else ""
    return ratio_text(value) if form is None else format(value, form)
