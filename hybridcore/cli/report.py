"""``hybridcore report``: a picture and a page of a run that JsonLines recorded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from hybridcore.cli.common import (
    JsonFlag,
    QuietFlag,
    UserError,
    check_apart,
    check_output,
    check_picture,
    output_console,
    print_json,
)


def report(
    stream: Annotated[
        Path, typer.Argument(metavar="RUN.JSONL", help="Stream that JsonLines wrote.")
    ],
    html: Annotated[
        Path | None, typer.Option(help="Where the page goes.", show_default="RUN.html")
    ] = None,
    png: Annotated[
        Path | None, typer.Option(help="Where the picture goes.", show_default="RUN.png")
    ] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Draw a recorded run: loss by phase, confidence, speed-up, divergence, time.

    Record one with callbacks=[JsonLines("run.jsonl")]. A run that is still going on, or was
    killed, can be looked at too. The page is one file and makes no request.
    """
    from hybridcore import read_stream
    from hybridcore.cli.charts import draw_png
    from hybridcore.cli.page import render
    from hybridcore.cli.reading import calibration, jumps, phases, speedup_text

    run = read_stream(stream)
    if not run.steps:
        raise UserError(f"{stream} holds no step yet: wait until the run has written its first")
    page = stream.with_suffix(".html") if html is None else html
    picture = stream.with_suffix(".png") if png is None else png
    check_output(page, "--html")
    check_picture(picture, "--png")
    check_apart({"--html": page, "--png": picture}, {"the recording": stream})
    console = output_console(as_json=as_json, quiet=quiet)
    last = run.statistics[-1] if run.statistics else None
    speedup = speedup_text(last)
    title = f"{stream.name}: {len(run.steps)} steps, measured speed-up {speedup}"
    page.write_text(render(run, stream.name), encoding="utf-8")
    draw_png(run, title, picture)
    console.print(title, highlight=False)
    console.print(f"Page: {page}\nPicture: {picture}")
    if as_json:
        print_json(
            {
                "stream": str(stream),
                "complete": run.complete,
                "steps": len(run.steps),
                "measured_speedup": speedup,
                "statistics": last,
                "phases": [dataclasses.asdict(p) for p in phases(run)],
                "jumps": [dataclasses.asdict(j) for j in jumps(run)],
                "calibration": [dataclasses.asdict(b) for b in calibration(run)],
                "html": str(page),
                "png": str(picture),
            }
        )
