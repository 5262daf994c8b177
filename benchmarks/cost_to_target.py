"""Cost to the best plain run's lowest loss, over seeds, recorded as JSON.

    python benchmarks/cost_to_target.py siren --seeds 5

trains the workload plain and with hybridcore over its learning-rate grid, step by step in turn,
and writes benchmarks/results/cost-to-target-siren.json. With `--share 0.85` the hybrid run, and its
schedule, takes that share of the plain run's steps: where a falling schedule ends the loss, equal
processor time is the fair comparison, not equal steps. `--first-seed 5` takes seeds by which
nothing was chosen.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

from hybridcore.cli.common import environment
from hybridcore.cli.compare import compare
from hybridcore.cli.workloads import WORKLOADS
from hybridcore.metrics import finite

RESULTS = Path(__file__).parent / "results"
FIGURES = (
    "cost_ratio",
    "same_rate_cost_ratio",
    "seconds_ratio",
    "predicted_share",
    "plain_final",
    "hybrid_final",
    "total_cost_ratio",
    "self_measured_cost_ratio",
    "cpu_ratio",
    "measured_speedup",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("workload", choices=sorted(WORKLOADS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument(
        "--share", type=float, default=1.0, help="of plain's steps that the hybrid run takes"
    )
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = []
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        summary = compare(WORKLOADS[arguments.workload], seed, share=arguments.share).summary()
        plain = summary["plain_total_cost"]
        summary["total_cost_ratio"] = summary["hybrid_total_cost"] / plain
        summary["self_measured_cost_ratio"] = summary["self_measured_cost"] / plain
        summary["cpu_ratio"] = summary["hybrid_cpu_seconds"] / summary["plain_cpu_seconds"]
        runs.append(summary)
        shown = ", ".join(f"{k} {summary[k]:.4g}" for k in FIGURES if k in summary)
        print(f"seed {seed}: {shown}", flush=True)
    quartiles = {}
    for name in FIGURES:
        values = [run[name] for run in runs if name in run]
        if len(values) > 1:
            quartiles[name] = statistics.quantiles(values, n=4, method="inclusive")
            print(f"{name}: quartiles " + ", ".join(f"{v:.4g}" for v in quartiles[name]))
    document = environment() | {
        "command": f"python benchmarks/cost_to_target.py {' '.join(sys.argv[1:])}",
        "quartiles": quartiles,
        "comparisons": runs,
    }
    less = "" if arguments.share == 1.0 else f"-{arguments.share:g}"
    fresh = "-fresh" if arguments.first_seed else ""
    path = arguments.output or RESULTS / f"cost-to-target-{arguments.workload}{less}{fresh}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(finite(document), indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
