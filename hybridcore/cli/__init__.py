"""The command line: the application layer above the core and the PyTorch adapter."""

from __future__ import annotations

import sys

try:
    import typer
except ImportError as error:
    sys.exit(f'hybridcore: {error.name} is missing; pip install "hybridcore[torch,cli]"')

from hybridcore.cli.demo import demo

app = typer.Typer(
    help="Train by real steps and predicted ones, and measure whether predicting pays.",
    no_args_is_help=True,
)
app.command()(demo)


@app.callback()
def main() -> None:
    """Train by real steps and predicted ones, and measure whether predicting pays."""
