"""Does a run take the memory that ``hybridcore doctor`` says? Peaks of processes, and by component.

    python benchmarks/memory.py              minutes; writes benchmarks/results/memory.json
    python benchmarks/memory.py --toy        a small model, and nothing is written

Each row is a process of its own that trains so many parameters by AdamW on a smooth loss, along
which there are jumps; what it takes at its peak is held against the plain loop's. The resident set
is measured (on Linux) with every tensor in pages of its own, so that what a heap keeps to itself
plays no part, and from where torch has taken a step, as what libraries take does not grow with a
model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).resolve().parent / "results" / "memory.json"
PARAMETERS, TOY = 25_000_000, 400_000
WARM_UP, STEPS = 20, 90
SETTINGS = {
    "default": {},
    "memory_saver()": {"snapshots": 4, "memory": "1x"},
    'memory="100x"': {"memory": "100x"},
    'snapshot_kind="bfloat16", memory="5x"': {"snapshot_kind": "bfloat16", "memory": "5x"},
}


def train(parameters: int, settings: dict | None) -> dict:
    """Train so many parameters; with None by the plain loop. Return what it took."""
    import torch
    from torch import nn

    from hybridcore import HybridTrainerConfig
    from hybridcore_torch import HybridTrainer

    np.linalg.eigh(np.eye(300))
    torch.set_num_threads(1)
    p = nn.Parameter(torch.ones(1000))
    p.sum().backward()
    torch.optim.AdamW([p], 1e-3, foreach=False).step()
    before = high_water()
    parts = 16
    model = nn.ParameterList([torch.linspace(-1.0, 1.0, parameters // parts) for _ in range(parts)])
    rates = torch.linspace(0.1, 1.0, parameters // parts)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, foreach=False)
    common = {"warmup_steps": WARM_UP, "min_full_steps": 24, "horizon": 15, "secant_pairs": 0}
    config = HybridTrainerConfig(enabled=settings is not None, **common, **(settings or {}))
    trainer = HybridTrainer(model, optimizer, config)

    def part_of_loss(p: torch.Tensor):
        # In parts, as activations are beside the point.
        return lambda: (rates * p.square()).mean() + 1e-3

    for _ in range(STEPS):
        trainer.step([part_of_loss(p) for p in model])
    peak = high_water()
    summary = trainer.statistics()
    return {
        "peak_bytes": peak - before,
        "components": summary.memory,
        "predicted_steps": summary.predicted_steps,
        "snapshots": summary.snapshots,
    }


def high_water() -> int:
    """Bytes of the largest resident set so far."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])


def measure(parameters: int, settings: dict | None) -> dict:
    """Train in a process of its own."""
    fixed = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, "--one", json.dumps([parameters, settings])],
        env=os.environ | fixed,
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--toy", action="store_true", help="a small model")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        parameters, settings = json.loads(arguments.one)
        print(json.dumps(train(parameters, settings)))
        return
    from hybridcore import HybridTrainerConfig
    from hybridcore.cli.memory import estimate

    parameters = TOY if arguments.toy else PARAMETERS
    weights = 4 * parameters
    plain = measure(parameters, None)["peak_bytes"]
    rows = []
    for name, settings in SETTINGS.items():
        told = estimate(
            parameters, "adamw", "float32", HybridTrainerConfig(secant_pairs=0, **settings)
        )
        found = measure(parameters, settings)
        extra, expected = found["peak_bytes"] - plain, told.total - told.plain
        rows.append(
            {
                "settings": name,
                "estimate": dataclasses.asdict(told),
                "estimated_copies": expected / weights,
                "measured_copies": extra / weights,
                "measured_peak_by_estimated": (plain + extra) / (plain + expected),
            }
            | found
        )
        print(
            f"{name:40s} {told.kind:8s} estimated {expected / weights:5.2f} copies, measured "
            f"{extra / weights:5.2f}; {found['predicted_steps']} steps predicted"
        )
    if not arguments.toy:
        result = {"parameters": parameters, "plain_peak_bytes": plain, "rows": rows}
        RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
