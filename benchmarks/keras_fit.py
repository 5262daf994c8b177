"""Plain ``fit`` and ``fit`` with the callback, over seeds, recorded as JSON.

    python benchmarks/keras_fit.py --seeds 5

trains two smooth tasks and a noisy one on TensorFlow. Smooth: cost at which the callback's run is
at the lowest loss of the best plain run of the grid. Noisy: held-out loss after as many batches.
Full steps are those that ``optimizer.iterations`` counts, and a probe costs what ``test_on_batch``
takes of ``train_on_batch``. Processor time is that of ``fit``, compilation in its first steps among
it. Writes benchmarks/results/keras.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops
from sklearn.datasets import load_digits, load_sample_image

from hybridcore.cli.common import environment
from hybridcore.cli.workloads import _fashion_split
from hybridcore_keras import HybridCallback

RESULTS = Path(__file__).parent / "results" / "keras.json"
BATCH = 64
CLASSES = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@dataclass(frozen=True)
class Task:
    """A model and its data; noisy where there is a held-out part."""

    title: str
    build: Callable[[], Any]
    data: Callable[[], tuple[Any, Any]]
    loss: Any
    rates: tuple[float, ...]
    steps: int
    held_out: Callable[[], tuple[Any, Any]] | None = None


def _sine(inputs: int, first: bool = False) -> Any:
    """Layer of a SIREN (Sitzmann et al. 2020, sections 3.1 and 3.2)."""
    bound = 1.0 / inputs if first else (6.0 / inputs) ** 0.5 / 30.0
    uniform = keras.initializers.RandomUniform
    return layers.Dense(
        64,
        activation=lambda x: ops.sin(30.0 * x),
        kernel_initializer=uniform(-bound, bound),
        bias_initializer=uniform(-(inputs**-0.5), inputs**-0.5),
    )


def _siren() -> Any:
    hidden = [_sine(2, first=True), _sine(64), _sine(64)]
    return keras.Sequential([keras.Input((2,)), *hidden, layers.Dense(1)])


def _photograph() -> tuple[Any, Any]:
    picture = load_sample_image("china.jpg").astype(np.float32).mean(axis=2) / 127.5 - 1.0
    height, width = picture.shape[0] // 8, picture.shape[1] // 8
    small = picture[: 8 * height, : 8 * width].reshape(height, 8, width, 8).mean(axis=(1, 3))
    rows, columns = (np.linspace(-1, 1, n, dtype=np.float32) for n in small.shape)
    points = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2)
    return points, small.reshape(-1, 1)


def _digits() -> tuple[Any, Any]:
    data = load_digits()
    return (data.data / 16.0).astype(np.float32), data.target.astype(np.int32)


def _fashion(name: str) -> tuple[Any, Any]:
    images, labels = _fashion_split(name)
    return images.numpy(), labels.numpy().astype(np.int32)


def _classifier(inputs: int, width: int, activation: str) -> Any:
    hidden = layers.Dense(width, activation=activation)
    return keras.Sequential([keras.Input((inputs,)), hidden, layers.Dense(10)])


TASKS = {
    "siren": Task("SIREN fits china.jpg", _siren, _photograph, "mse", (1e-3, 2e-3, 4e-3), 600),
    "digits": Task(
        "MLP, digits, full batch",
        lambda: _classifier(64, 32, "tanh"),
        _digits,
        CLASSES,
        (3e-3, 1e-2, 3e-2),
        600,
    ),
    "fashion": Task(
        "MLP, Fashion-MNIST, batches of 64",
        lambda: _classifier(784, 128, "relu"),
        lambda: _fashion("train"),
        CLASSES,
        (1e-3, 2e-3, 4e-3),
        2000,
        lambda: _fashion("t10k"),
    ),
}


class Losses(keras.callbacks.Callback):  # type: ignore[misc]
    """Loss of each step, and what had been paid for it by then; made where ``fit`` is called."""

    def __init__(self, hybrid: HybridCallback | None) -> None:
        super().__init__()
        self.hybrid = hybrid
        self.losses: list[float] = []
        self.probes: list[int] = []
        self.iterations: list[int] = []
        self.seconds: list[float] = []
        self._start = process_time()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Take the loss; an epoch is one step."""
        self.losses.append(float(logs["loss"]))
        self.probes.append(0 if self.hybrid is None else self.hybrid.engine.counters.probes)
        self.iterations.append(int(self.model.optimizer.iterations))
        self.seconds.append(process_time() - self._start)


def _model(task: Task, seed: int, rate: float) -> Any:
    keras.utils.set_random_seed(seed)
    model = task.build()
    noisy = task.held_out is not None
    schedule = keras.optimizers.schedules.PolynomialDecay(rate, task.steps, 0.0) if noisy else rate
    model.compile(keras.optimizers.Adam(schedule), task.loss)
    return model


def _smooth(task: Task, seed: int, rate: float, hybrid: HybridCallback | None) -> Losses:
    model, record = _model(task, seed, rate), Losses(hybrid)
    data = tf.data.Dataset.from_tensors(task.data()).repeat()
    callbacks = [record] if hybrid is None else [hybrid, record]
    model.fit(data, epochs=task.steps, steps_per_epoch=1, verbose=0, callbacks=callbacks)
    return record


def _probe_share(task: Task) -> float:
    """Cost of a forward pass, as a share of a full step."""
    model, (x, y) = _model(task, 0, task.rates[0]), task.data()
    if task.held_out is not None:
        x, y = x[:BATCH], y[:BATCH]
    seconds = []
    for call in (model.test_on_batch, model.train_on_batch):
        times = []
        for _ in range(60):
            start = perf_counter()
            call(x, y)
            times.append(perf_counter() - start)
        seconds.append(statistics.median(times[10:]))
    return seconds[0] / seconds[1]


def smooth(task: Task, seed: int, share: float) -> dict[str, Any]:
    """Cost to the lowest loss of the best plain run, each tuned over the same rates."""
    plain = (_smooth(task, seed, rate, None) for rate in task.rates)
    target, steps, seconds, total = min(
        (loss, step, run.seconds[step - 1], run.seconds[-1])
        for run in plain
        for step, loss in enumerate(run.losses, 1)
    )
    best: dict[str, Any] | None = None
    for rate in task.rates:
        hybrid = HybridCallback()
        record = _smooth(task, seed, rate, hybrid)
        reached = next((i for i, loss in enumerate(record.losses) if loss <= target), None)
        ratio = time_ratio = None
        if reached is not None:
            cost = record.iterations[reached] + share * record.probes[reached]
            ratio, time_ratio = cost / steps, record.seconds[reached] / seconds
        summary = hybrid.statistics()
        found = {
            "cost_ratio": ratio,
            "cpu_ratio": time_ratio,
            "total_cpu_ratio": record.seconds[-1] / total,
            "predicted_share": summary.predicted_steps / summary.steps,
            "iterations": record.iterations[-1],
            "full_steps": summary.full_steps,
            "final": record.losses[-1],
        }
        if best is None or (ratio or math.inf) < (best["cost_ratio"] or math.inf):
            best = found
    assert best is not None
    return {"target": target, **best}


def noisy(task: Task, seed: int) -> dict[str, Any]:
    """Held-out loss after as many batches, each tuned over the same rates."""
    assert task.held_out is not None
    x, y = task.data()
    held_out = task.held_out()
    finals: dict[str, list[float]] = {"plain": [], "hybrid": []}
    claims, seconds = [], {"plain": [], "hybrid": []}
    for rate in task.rates:
        for name, losses in finals.items():
            hybrid = HybridCallback() if name == "hybrid" else None
            model = _model(task, seed, rate)
            data = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x), seed).batch(BATCH)
            callbacks = [] if hybrid is None else [hybrid]
            start = process_time()
            model.fit(data.repeat(), steps_per_epoch=task.steps, verbose=0, callbacks=callbacks)
            seconds[name].append(process_time() - start)
            if hybrid is None:
                losses.append(float(model.evaluate(*held_out, verbose=0)))
            else:
                with hybrid.averaged():
                    losses.append(float(model.evaluate(*held_out, verbose=0)))
                claims.append((int(model.optimizer.iterations), hybrid.statistics().full_steps))
    best = {name: int(np.argmin(losses)) for name, losses in finals.items()}
    iterations, full_steps = claims[best["hybrid"]]
    return {
        "plain_final": finals["plain"][best["plain"]],
        "hybrid_final": finals["hybrid"][best["hybrid"]],
        "cpu_ratio": seconds["hybrid"][best["hybrid"]] / seconds["plain"][best["plain"]],
        "iterations": iterations,
        "full_steps": full_steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--task", choices=list(TASKS), nargs="+", default=list(TASKS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tasks = {}
    for name in arguments.task:
        task, runs = TASKS[name], []
        share = _probe_share(task)
        for seed in range(arguments.seeds):
            run = noisy(task, seed) if task.held_out else smooth(task, seed, share)
            runs.append(run)
            shown = ", ".join(f"{k} {v:.4g}" for k, v in run.items() if v is not None)
            print(f"{name}, seed {seed}: {shown}", flush=True)
        tasks[name] = {"title": task.title, "probe_share": share, "steps": task.steps, "runs": runs}
    document = environment() | {
        "command": f"python benchmarks/keras_fit.py {' '.join(sys.argv[1:])}".rstrip(),
        "keras": keras.__version__,
        "tensorflow": tf.__version__,
        "tasks": tasks,
    }
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
