"""Command line of the proving ground."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.proving_ground.methods import METHODS
from benchmarks.proving_ground.picture import draw
from benchmarks.proving_ground.results import Ground, tables
from benchmarks.proving_ground.runs import QUICK, RESULTS, Plan, run
from benchmarks.proving_ground.workloads import GROUND


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proving_ground")
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="train what is not on record yet")
    what = runner.add_mutually_exclusive_group(required=True)
    what.add_argument("--all", action="store_true", help="every workload")
    what.add_argument("--quick", action="store_true", help="every workload at toy size")
    what.add_argument("--workload", nargs="+", choices=list(GROUND), metavar="NAME")
    runner.add_argument("--method", nargs="+", choices=list(METHODS), metavar="NAME")
    runner.add_argument("--seeds", type=int, default=Plan().seeds)
    runner.add_argument("--output", type=Path)
    for name, text in (("table", "print the tables"), ("plot", "draw the picture")):
        reader = commands.add_parser(name, help=text)
        reader.add_argument("--results", type=Path, default=RESULTS)
        if name == "plot":
            reader.add_argument("--output", type=Path, default=RESULTS.with_suffix(".png"))
    arguments = parser.parse_args()
    if arguments.command == "table":
        print(tables(Ground(arguments.results)))
    elif arguments.command == "plot":
        draw(Ground(arguments.results), arguments.output)
        print(f"written: {arguments.output}")
    else:
        try:
            _run(arguments)
        except KeyboardInterrupt:
            sys.exit("stopped; what is finished is on record, and the same command goes on from it")


def _run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    workloads = [GROUND[name] for name in arguments.workload or GROUND]
    methods = [METHODS[name] for name in arguments.method or METHODS]

    def say(line: str) -> None:
        print(line, flush=True)

    if not arguments.quick:
        run(workloads, methods, Plan(seeds=arguments.seeds), arguments.output or RESULTS, say)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.output or Path(temporary)
        run(workloads, methods, QUICK, folder, say)
        ground = Ground(folder)
        print(tables(ground))
        draw(ground, folder / "quick.png")


if __name__ == "__main__":
    main()
