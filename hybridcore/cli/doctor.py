"""``hybridcore doctor``: what is installed, what a model would take, and whether it all works."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table

from hybridcore.cli.common import (
    JsonFlag,
    QuietFlag,
    UserError,
    output_console,
    print_json,
    progress,
)
from hybridcore.cli.comparing import read_config

if TYPE_CHECKING:
    from hybridcore.cli.memory import Memory

FAILED = 1
UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
PACKAGES = (
    *("hybridcore", "numpy", "numba", "llvmlite", "torch", "keras", "tensorflow", "jax"),
    *("numba-cuda", "typer", "rich", "matplotlib", "joblib", "distributed", "tensorboard"),
)


def _count(text: str) -> float:
    """Read a number, which may end in K, M, B or T for a thousand, a million and so on."""
    unit = UNITS.get(text[-1:].upper(), 1.0)
    try:
        return float(text if unit == 1.0 else text[:-1]) * unit
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a number, such as 1.2e9 or 7B") from None


def doctor(
    model_params: Annotated[
        float | None,
        typer.Option(
            parser=_count, metavar="NUMBER", help="Trainable parameters of a model, as 1.2e9 or 7B."
        ),
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="Its optimizer in torch.optim.", show_default="adamw")
    ] = None,
    momentum: Annotated[float, typer.Option(min=0.0, help="Momentum of SGD or RMSprop.")] = 0.0,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Type of its parameters: float32, bfloat16, float16, float64.",
            show_default="float32",
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with settings.")] = None,
    self_test: Annotated[bool, typer.Option(help="Train small models for up to 10 s.")] = True,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Show versions, devices and threads, estimate memory, and test that training works.

    Exit code 1 says that the self-test failed.
    """
    from hybridcore import HybridTrainerConfig
    from hybridcore.cli.memory import DTYPES, WITH_MOMENTUM, estimate, optimizer_class

    described = {"--optimizer": optimizer, "--momentum": momentum, "--dtype": dtype}
    dtype, optimizer = dtype or "float32", optimizer or "adamw"
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is not one of {', '.join(DTYPES)}")
    optimizer_class(optimizer)
    if momentum and optimizer.lower() not in WITH_MOMENTUM:
        raise UserError(f"--momentum is for {' and '.join(WITH_MOMENTUM)}, not {optimizer}")
    if model_params is not None and not 1.0 <= model_params <= 1e15:
        raise UserError(f"--model-params {model_params:g} must be from 1 to 1e15")
    for option, value in described.items():
        if value and model_params is None:
            raise UserError(
                f"{option} {value} describes a model: give --model-params too, as 1.2e9"
            )
    settings = read_config(config) or HybridTrainerConfig()
    console = output_console(as_json=as_json, quiet=quiet)
    versions, devices, threads = _versions(), _devices(), _threads()
    _print(console, "Versions", [(k, v or "not installed") for k, v in versions.items()])
    _print(console, "Devices", [(d["name"], f"{_bytes(d['bytes'])}") for d in devices])
    _print(console, "Threads", [(k, str(v)) for k, v in threads.items()])
    figures: dict[str, Any] = {"versions": versions, "devices": devices, "threads": threads}
    if model_params is not None:
        kinds = {"as set": settings, "memory_saver()": HybridTrainerConfig.memory_saver()}
        memory: dict[str, Memory] = {
            name: estimate(round(model_params), optimizer, dtype, kind, momentum)
            for name, kind in kinds.items()
        }
        _print_memory(
            console, f"{model_params:g} parameters, {dtype}, {optimizer}", memory, devices
        )
        figures["memory"] = {
            name: dataclasses.asdict(m)
            | {"plain": m.plain, "total": m.total, "same_batch": m.same_batch}
            for name, m in memory.items()
        }
    failed = False
    if self_test:
        results = _run_self_test(console, quiet=quiet)
        figures["self_test"] = results
        failed = not all(result["passed"] for result in results)
    if as_json:
        print_json(figures)
    if failed:
        raise typer.Exit(FAILED)


def _versions() -> dict[str, str | None]:
    from hybridcore import __version__

    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    # What runs counts, not what is recorded of an editable install.
    found["hybridcore"] = __version__
    found["tensorflow"] = found["tensorflow"] or _version_of("tensorflow-cpu")
    return found


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    found = [{"name": f"CPU, {cores} cores", "kind": "cpu", "bytes": ram}]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            seen = torch.cuda.get_device_properties(index)
            found.append({"name": seen.name, "kind": "cuda", "bytes": seen.total_memory})
    if torch.backends.mps.is_available():
        found.append({"name": "Apple GPU, shares the CPU's memory", "kind": "mps", "bytes": ram})
    return found


def _threads() -> dict[str, Any]:
    import numba as compiler
    import torch
    from numba import cuda as its_cuda

    # Neither has types for all of what it offers.
    numba, cuda = cast("Any", compiler), cast("Any", its_cuda)
    return {
        "torch": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "not set"),
        "numba": numba.get_num_threads(),
        "numba threading layer": _threading_layer(),
        "numba compiles": not numba.config.DISABLE_JIT,
        "numba CUDA": "simulated" if numba.config.ENABLE_CUDASIM else cuda.is_available(),
    }


def _threading_layer() -> str:
    """Name the layer that numba's parallel loops would get, and what else there is."""
    from importlib import import_module

    import numba as compiler

    numba: Any = compiler
    there = []
    for module, name in (("tbbpool", "tbb"), ("omppool", "omp"), ("workqueue", "workqueue")):
        try:
            import_module(f"numba.np.ufunc.{module}")
        except ImportError:
            continue
        there.append(name)
    asked = numba.config.THREADING_LAYER
    chosen = asked if asked in there else (there or ["none"])[0]
    return f"{chosen} (of {', '.join(there)})"


def _run_self_test(console: Console, *, quiet: bool) -> list[dict[str, Any]]:
    from hybridcore.cli.selftest import CHECKS, run_check

    results = []
    with progress(quiet=quiet) as shown:
        task = shown.add_task("self-test", total=len(CHECKS), state="")
        for name in CHECKS:
            shown.update(task, state=name)
            results.append(run_check(name))
            shown.advance(task)
    rows = [
        (
            r["check"],
            f"{'passed' if r['passed'] else 'FAILED'}, {r['seconds']:.1f} s: {r['detail']}",
        )
        for r in results
    ]
    _print(console, "Self-test", rows)
    return results


def _print(console: Console, title: str, rows: list[tuple[str, str]]) -> None:
    table = Table(title=title, show_header=False, title_justify="left", min_width=40)
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)


def _print_memory(
    console: Console, title: str, memory: dict[str, Memory], devices: list[dict[str, Any]]
) -> None:
    table = Table(title=f"Memory: {title}; activations come on top", title_justify="left")
    table.add_column("")
    for name in memory:
        table.add_column(name, justify="right")
    rows = [
        ("weights", "weights"),
        ("gradients", "gradients"),
        ("optimizer's state", "optimizer"),
        ("the plain loop", "plain"),
        ("snapshots", "snapshots"),
        ("average", "average"),
        ("optimizer's state, kept during a jump", "recovery"),
        ("with hybridcore", "total"),
        ("secant pairs, where every batch is the same", "secants"),
        ("with hybridcore, where every batch is the same", "same_batch"),
    ]
    for label, name in rows:
        style = "bold" if name in ("plain", "total", "same_batch") else None
        table.add_row(label, *(_bytes(getattr(m, name)) for m in memory.values()), style=style)
    table.add_row(
        "kept", *(f"{m.count} snapshots, {m.kind}; {m.pairs} pairs" for m in memory.values())
    )
    table.add_row("average during a jump", *("no" if m.in_turn else "yes" for m in memory.values()))
    for device in devices:
        fits = ("fits" if m.same_batch <= device["bytes"] else "too much" for m in memory.values())
        table.add_row(f"on {device['name']}, {_bytes(device['bytes'])}", *fits)
    console.print(table)


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024.0:
            return f"{count:.4g} {unit}"
        count /= 1024.0
    return f"{count:.4g} TiB"
