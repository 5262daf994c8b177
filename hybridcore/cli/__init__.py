"""The command line: the application layer above the core and the PyTorch adapter."""

from __future__ import annotations

import sys
from typing import Annotated

try:
    import typer

    from hybridcore.cli.common import Commands
except ImportError as error:
    sys.stderr.write(f'hybridcore: {error.name} is missing: pip install "hybridcore[torch,cli]"\n')
    sys.exit(2)

from hybridcore import __version__
from hybridcore.cli.comparing import compare
from hybridcore.cli.demo import demo
from hybridcore.cli.doctor import doctor
from hybridcore.cli.report import report
from hybridcore.cli.sweep import sweep

app = typer.Typer(
    help="Train by real steps and predicted ones, and measure whether predicting pays.",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
for command in (demo, compare, sweep, report, doctor):
    app.command()(command)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"hybridcore {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Train by real steps and predicted ones, and measure whether predicting pays."""
