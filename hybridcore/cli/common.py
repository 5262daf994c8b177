"""What the commands share: their errors, their output, their progress."""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from typer.core import TyperGroup

from hybridcore.errors import HybridCoreError
from hybridcore.metrics import finite

INTERRUPTED = 130
# What matplotlib writes without further programs.
PICTURES = ("png", "svg", "pdf", "jpg", "jpeg", "webp", "tif", "tiff", "eps")

JsonFlag = Annotated[
    bool, typer.Option("--json", help="Print all figures as JSON, and the rest on standard error.")
]
QuietFlag = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print no progress and no text, only errors.")
]
LoopArgument = Annotated[
    str,
    typer.Argument(
        metavar="FILE_OR_MODULE",
        help="Python file or module that defines build(), or a built-in workload: siren, burgers, "
        "fashion, digits.",
    ),
]
StepsOption = Annotated[
    int | None,
    typer.Option(min=1, help="Steps of each run.", show_default="1000, or the workload's own"),
]


class UserError(HybridCoreError):
    """Something that the user can put right; the message says what and how, in one line."""


class Commands(TyperGroup):
    """Group of commands whose errors are one line on standard error, with exit code 2."""

    def main(self, args: Sequence[str] | None = None, *others: Any, **extra: Any) -> Any:
        """Run the command line; see :meth:`click.Command.main`."""
        standalone = extra.pop("standalone_mode", True)
        try:
            code = super().main(args, *others, **{**extra, "standalone_mode": False})
        except HybridCoreError as error:
            message = str(error)
        except ImportError as error:
            if not error.name or error.name.partition(".")[0] not in _OURS:
                raise
            message = f'{error.name} is missing: pip install "hybridcore[torch,cli]"'
        except OSError as error:
            where = "the output" if error.filename is None else error.filename
            message = f"{where}: {error.strerror or error}, name another file or make room"
        # Typer brings its own copy of click, which has no public name.
        except Exception as error:
            if not hasattr(error, "format_message"):
                raise
            message = error.format_message()
            if type(error).__name__ == "NoArgsIsHelpError":
                # With rich it has been printed by now, and the message is empty.
                sys.stdout.write(message)
                sys.exit(0)
            path = getattr(getattr(error, "ctx", None), "command_path", "hybridcore")
            message = f"{message.rstrip('.')}: see {path} --help"
        else:
            if standalone:
                sys.exit(code if isinstance(code, int) else 0)
            return code
        sys.stderr.write(f"hybridcore: {' '.join(message.split())}\n")
        sys.exit(2)


_OURS = {"torch", "sklearn", "matplotlib", "PIL", "joblib", "rich", "tensorboard"}


def output_console(*, as_json: bool, quiet: bool) -> Console:
    """Console for text: standard output, or standard error where JSON goes there."""
    # Names of files may look like markup.
    return Console(stderr=as_json, quiet=quiet, markup=False, emoji=False)


def print_json(figures: Any) -> None:
    """Print `figures` on standard output; what is not finite is null."""
    print(json.dumps(finite(figures), indent=1))


def check_output(path: Path, option: str = "--output") -> None:
    """Raise :class:`UserError` unless a file can be made at `path`."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserError(f"{option} {path}: the folder {folder} does not exist, make it first")
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder: name a file in it")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise UserError(f"{option} {path} cannot be written: name a file that you may write")


def check_picture(path: Path, option: str = "--output") -> None:
    """Raise :class:`UserError` unless a picture can be made at `path`."""
    check_output(path, option)
    if path.suffix[1:].lower() not in PICTURES:
        raise UserError(
            f"{option} {path}: no picture can be written with the suffix {path.suffix!r}, name one "
            f"of {', '.join(PICTURES)}"
        )


def check_apart(outputs: Mapping[str, Path], inputs: Mapping[str, Path | None]) -> None:
    """Raise :class:`UserError` where an output is the same file as an input or another output.

    Parameters
    ----------
    outputs, inputs : mapping of str to Path
        Files by the option or argument that names them; None is no file.
    """
    taken = {name: path for name, path in inputs.items() if path is not None}
    for option, path in outputs.items():
        for name, other in taken.items():
            if _same(path, other):
                raise UserError(
                    f"{option} {path} is the same file as {name}, which would be lost: name another"
                )
        taken[option] = path


def _same(one: Path, other: Path) -> bool:
    # Hard links have different names; what does not exist yet has nothing but its name.
    both = one.exists() and other.exists()
    return one.samefile(other) if both else one.resolve() == other.resolve()


def ratio_text(value: float) -> str:
    """Format a ratio with two decimals, or as many as show two digits of a small one."""
    return f"{value:.2g}" if 0.0 < value < 0.1 else f"{value:.2f}"


def columns_caption(seeds: int) -> str:
    """Return what has to be said below a table of plain and hybrid runs."""
    return "cost: of its passes, a full step as 1" + "; ratio: of each seed's own" * (seeds > 1)


@contextmanager
def progress(*, quiet: bool) -> Iterator[Progress]:
    """Show progress with the time left on standard error, where that is a terminal.

    Where it is to be quiet, the library's warnings are not printed either.
    """
    columns = [TextColumn("{task.description}", markup=False), BarColumn(bar_width=24)]
    columns += [TextColumn("{task.fields[state]}"), TimeElapsedColumn(), TextColumn("left")]
    console = Console(stderr=True)
    hidden = quiet or not console.is_terminal
    shown = Progress(*columns, TimeRemainingColumn(), console=console, disable=hidden)
    silent = logging.NullHandler()
    if quiet:
        logging.getLogger("hybridcore").addHandler(silent)
    try:
        with shown:
            yield shown
    finally:
        logging.getLogger("hybridcore").removeHandler(silent)


@contextmanager
def blamed(name: str, doing: str) -> Iterator[None]:
    """Turn an error of the user's code into one line that says where it was raised.

    What that code prints goes to standard error: standard output is for the figures.
    """
    try:
        with redirect_stdout(sys.stderr):
            yield
    except (UserError, HybridCoreError, KeyboardInterrupt):
        raise
    except ModuleNotFoundError as error:
        if error.name == name:
            raise
        raise UserError(f"{name}: module {error.name} is missing, install it") from error
    except SyntaxError as error:
        # Of a text with null bytes neither is known.
        where = f"{error.filename or name}:{error.lineno}" if error.lineno else name
        raise UserError(f"{where}: {error.msg}") from error
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if Path(frame.filename).name == Path(name).name]
        where = f"{name}:{own[-1].lineno}" if own else name
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise UserError(f"{where}: {doing} raised {what}") from error


def environment() -> dict[str, Any]:
    """Versions and threads that a recorded figure depends on."""
    import numpy as np
    import torch

    import hybridcore

    return {
        "hybridcore": hybridcore.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "threads": torch.get_num_threads(),
        "command": " ".join(["hybridcore", *sys.argv[1:]]),
    }
