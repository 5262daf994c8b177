"""When does the RSSM pay on a GPU? Times of its CPU and CUDA kernels, and how far they differ.

    python benchmarks/gpu/kernels.py                       on a machine with a GPU; minutes
    NUMBA_ENABLE_CUDASIM=1 python benchmarks/gpu/kernels.py --toy --output /tmp/kernels.json
                                                           in numba's simulator; proves the script

Times include the copies of what goes in and out of a call; the weights stay on the device. The
kernels of the CPU run on one thread. Each time is the median of several calls after a first one,
which compiles and is recorded apart. `crossover` is the smallest work, members x paths x horizon,
from which every measured rollout was faster on the GPU: the number for
``hybridcore.kernels.dispatch.CROSSOVER``. It is null when there is none, and in the simulator.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np

import hybridcore
from hybridcore.dynamics.rssm.params import Sizes, aligned_zeros, initialize, parameter_count
from hybridcore.kernels.cpu import bptt, rssm, training
from hybridcore.kernels.cuda import api, cuda

RESULTS = Path(__file__).resolve().parents[1] / "results" / "gpu-kernels.json"
TOY = Sizes(features=5, latent=4, categoricals=2, classes=3, outputs=4)
# (members, paths, horizon); 5 members are the default ensemble.
ROLLOUTS = [
    *((5, paths, horizon) for paths in (1, 4, 16, 64, 256) for horizon in (15, 75)),
    *((members, 32, 75) for members in (16, 64, 256)),
]
STEPS = [1, 5, 16, 64, 256]  # members
UPDATES = [(members, windows) for members in (5, 16, 64, 256) for windows in (1, 4)]
WINDOW_STEPS = 3
# Calls of each kernel take at most this long, in seconds, but for the last of them.
PATIENCE = 2.0
MOST_CALLS = 50


def seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def median_seconds(call: Callable[[], None]) -> float:
    times: list[float] = []
    while len(times) < 3 or (len(times) < MOST_CALLS and sum(times) < PATIENCE):
        times.append(seconds(call))
    return statistics.median(times)


def difference(mine: list[np.ndarray], other: list[np.ndarray]) -> float:
    """Largest difference, relative to the largest number where that exceeds 1."""
    worst = 0.0
    for a, b in zip(mine, other, strict=True):
        scale = max(1.0, float(np.abs(b).max()))
        worst = max(worst, float(np.abs(a.astype(float) - b.astype(float)).max()) / scale)
    return worst


def ensemble(sizes: Sizes, members: int) -> np.ndarray:
    rng = np.random.default_rng(members)
    params = aligned_zeros(members, parameter_count(sizes))
    for row in params:
        initialize(row, sizes, rng)
    return params


def states(sizes: Sizes, members: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    hidden = rng.uniform(-1, 1, (members, sizes.latent)).astype(np.float32)
    return hidden, rng.integers(0, sizes.classes, (members, sizes.categoricals))


def row(kernel: str, size: dict[str, int], cpu: Callable, gpu: Callable, outputs: tuple) -> dict:
    """Time both kernels and compare what their first calls wrote."""
    first_cpu, first_cuda = seconds(cpu), seconds(gpu)
    apart = difference(*(list(arrays) for arrays in outputs))
    on_cpu, on_cuda = median_seconds(cpu), median_seconds(gpu)
    shown = ", ".join(f"{name} {value}" for name, value in size.items())
    times = f"{1e6 * on_cpu:10.0f} us {1e6 * on_cuda:10.0f} us x{on_cpu / on_cuda:.2f}"
    print(f"{kernel:12s} {shown:36s} {times}  {apart:.1e}")
    return {
        "kernel": kernel,
        **size,
        "cpu_seconds": on_cpu,
        "cuda_seconds": on_cuda,
        "first_cpu_seconds": first_cpu,
        "first_cuda_seconds": first_cuda,
        "speedup": on_cpu / on_cuda,
        "max_difference": apart,
    }


def rollout(sizes: Sizes, members: int, paths: int, horizon: int) -> dict:
    params, start = ensemble(sizes, members), states(sizes, members)
    device = api.Ensemble(params, sizes)
    shape = (members, paths, horizon)
    uniforms = np.random.default_rng(0).random((*shape, sizes.categoricals), dtype=np.float32)
    mine, other = np.zeros((2, 2, *shape), np.float32)
    work, work_classes = aligned_zeros(rssm.work_size(sizes)), np.zeros_like(start[1][0])
    return row(
        "rollout",
        {"members": members, "paths": paths, "horizon": horizon},
        lambda: rssm.rollout(params, sizes, *start, uniforms, *other, work, work_classes),
        lambda: device.rollout(*start, uniforms, *mine),
        (mine, other),
    )


def observed_step(sizes: Sizes, members: int) -> dict:
    params = ensemble(sizes, members)
    device = api.Ensemble(params, sizes)
    rng = np.random.default_rng(2)
    features = rng.standard_normal(sizes.features).astype(np.float32)
    uniforms = rng.random((members, sizes.categoricals), dtype=np.float32)
    mine, other = states(sizes, members), states(sizes, members)
    work = aligned_zeros(rssm.work_size(sizes))
    return row(
        "observe_step",
        {"members": members},
        lambda: rssm.observe_step(params, sizes, features, uniforms, *other, work),
        lambda: device.observe_step(features, uniforms, *mine),
        (mine, other),
    )


def encoding(sizes: Sizes, members: int) -> dict:
    params = ensemble(sizes, members)
    device = api.Ensemble(params, sizes)
    features = np.random.default_rng(2).standard_normal(sizes.features).astype(np.float32)
    mine, other = np.zeros((2, members, sizes.latent), np.float32)
    return row(
        "encode",
        {"members": members},
        lambda: rssm.encode(features, params, sizes, other),
        lambda: device.encode(features, mine),
        ([mine], [other]),
    )


def update(sizes: Sizes, members: int, windows: int) -> dict:
    """One update from a replay: windows drawn, gradients, Adam."""
    rng = np.random.default_rng(3)
    replay = training.empty_replay(sizes, members, 64)
    replay.features[:] = rng.standard_normal(replay.features.shape)
    replay.changes[:] = rng.standard_normal(64)
    replay.change_weights[:] = 1.0
    replay.follows[:] = True
    params = ensemble(sizes, members)
    device = api.Ensemble(params, sizes)
    grads, first, second = (np.zeros_like(params) for _ in range(3))
    window, tr = training.empty_window(sizes, WINDOW_STEPS), bptt.trace(sizes, WINDOW_STEPS)
    objective = training.Objective()
    sides = [
        (
            np.zeros(members, np.int64),
            np.arange(1, members + 1).astype(np.uint64) * np.uint64(2**33 + 7),
            np.zeros(members),
        )
        for _ in range(2)
    ]
    (counts, generators, other), (device_counts, device_generators, mine) = sides
    drawn = (replay, 64, 1.0, windows)
    return row(
        "update",
        {"members": members, "windows": windows},
        lambda: training.update(
            *(params, grads, first, second, counts, generators, sizes),
            *(*drawn, window, tr, objective, other),
        ),
        lambda: device.update(
            device_counts, device_generators, *drawn, WINDOW_STEPS, objective, mine
        ),
        ([mine], [other]),
    )


def crossover(rows: list[dict]) -> int | None:
    """Smallest work from which every measured rollout was faster on the GPU."""
    measured = sorted(
        (r["members"] * r["paths"] * r["horizon"], r["speedup"] > 1.0)
        for r in rows
        if r["kernel"] == "rollout"
    )
    slower = [work for work, faster in measured if not faster]
    beyond = [work for work, _ in measured if not slower or work > max(slower)]
    return min(beyond) if beyond else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--toy", action="store_true", help="sizes that the simulator can run")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file to write")
    arguments = parser.parse_args()
    simulated = bool(numba.config.ENABLE_CUDASIM)
    if not cuda.is_available():
        parser.error("there is no CUDA GPU; with NUMBA_ENABLE_CUDASIM=1, --toy runs simulated")
    if simulated and not arguments.toy:
        parser.error("the simulator is too slow for these sizes: add --toy")
    if arguments.toy and arguments.output == RESULTS:
        parser.error("toy sizes are not to be recorded with the results: name another --output")
    sizes = TOY if arguments.toy else Sizes()
    rollouts, steps, updates = (
        ([(2, 2, 3), (2, 4, 3)], [1, 2], [(2, 1)]) if arguments.toy else (ROLLOUTS, STEPS, UPDATES)
    )
    rows = [
        *(encoding(sizes, members) for members in steps),
        *(observed_step(sizes, members) for members in steps),
        *(rollout(sizes, *size) for size in rollouts),
        *(update(sizes, *size) for size in updates),
    ]
    name = "simulator" if simulated else cuda.get_current_device().name
    result = {
        "hybridcore": hybridcore.__version__,
        "python": platform.python_version(),
        "numba": numba.__version__,
        "numpy": np.__version__,
        "cpu": platform.processor() or platform.machine(),
        "gpu": name.decode() if isinstance(name, bytes) else name,
        "sizes": sizes._asdict(),
        "crossover": None if arguments.toy else crossover(rows),
        "rows": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
