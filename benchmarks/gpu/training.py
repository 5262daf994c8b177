"""What hybridcore costs and gains on one GPU: overhead of a step, memory, cost to target.

    python benchmarks/gpu/training.py overhead        plain and watched steps, 1M to 1.1B parameters
    python benchmarks/gpu/training.py memory          peaks with each kind of snapshot
    python benchmarks/gpu/training.py cost            a model of GPT-2 small's shape on text
    python benchmarks/gpu/training.py overhead --toy --device cpu --output /tmp/overhead.json

Each takes minutes on one GPU and writes ``benchmarks/results/gpu-<part>.json``; ``--toy`` proves
the script on sizes for a CPU. Models are byte-level transformers in bfloat16 autocast, by AdamW, on
the source files of Python's standard library, which are there with Python. GPT-2 small's layers
without its vocabulary are 85M parameters.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import hybridcore
from hybridcore import HybridTrainerConfig
from hybridcore_torch import HybridTrainer

RESULTS = Path(__file__).resolve().parents[1] / "results"
KINDS = ("exact", "bfloat16", "int8", "host")


@dataclass(frozen=True)
class Shape:
    """Size of a model and of its batches."""

    layers: int
    width: int
    heads: int
    context: int
    batch: int


SHAPES = {
    "1M": Shape(5, 128, 4, 256, 32),
    "124M": Shape(17, 768, 12, 512, 8),
    "1.1B": Shape(22, 2048, 16, 512, 2),
}
GPT2_SMALL = Shape(12, 768, 12, 512, 8)
TOY = Shape(2, 32, 2, 16, 4)


class GPT(nn.Module):
    """Transformer of GPT-2's shape over bytes: (n, context) integers to (n, context, 256)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, shape.width)
        self.places = nn.Embedding(shape.context, shape.width)
        layer = nn.TransformerEncoderLayer(
            *(shape.width, shape.heads, 4 * shape.width, 0.0),
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.layers = nn.TransformerEncoder(layer, shape.layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, 256, bias=False)
        mask = nn.Transformer.generate_square_subsequent_mask(shape.context)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = self.places(torch.arange(x.shape[1], device=x.device))
        hidden = self.layers(self.tokens(x) + places, mask=self.mask, is_causal=True)
        return self.head(self.norm(hidden))


def text(device: str) -> torch.Tensor:
    """Bytes of the standard library's own modules."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    data = b"".join(file.read_bytes() for file in files)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long().to(device)


class Run:
    """A model, its optimizer, and batches that are the same for all runs of a seed."""

    def __init__(self, shape: Shape, device: str, rate: float = 3e-4, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.shape, self.device = shape, device
        self.model = GPT(shape).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), rate, fused=device == "cuda")
        self.text = text(device)
        self.windows = torch.arange(shape.context + 1, device=device)
        self.generator = torch.Generator().manual_seed(seed)
        self.cut = 9 * len(self.text) // 10
        unseen = torch.randint(
            self.cut,
            len(self.text) - shape.context - 1,
            (8 * shape.batch,),
            generator=self.generator,
        )
        self.unseen = self.batch(unseen).split(shape.batch)

    def batch(self, starts: torch.Tensor) -> torch.Tensor:
        return self.text[starts.to(self.device)[:, None] + self.windows]

    def loss_of(self, batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device, dtype=torch.bfloat16):
            logits = self.model(batch[:, :-1])
        return F.cross_entropy(logits.float().reshape(-1, 256), batch[:, 1:].reshape(-1))

    def next(self) -> torch.Tensor:
        last = self.cut - self.shape.context - 1
        return self.batch(torch.randint(last, (self.shape.batch,), generator=self.generator))

    def held_out(self) -> float:
        with torch.no_grad():
            return float(torch.stack([self.loss_of(batch) for batch in self.unseen]).mean())

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


def seconds(device: str, call: Any) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def overhead(device: str, shapes: dict[str, Shape], steps: int) -> list[dict]:
    """Median seconds of a plain and of a watched step, one after the other, and of all of them."""
    rows = []
    for name, shape in shapes.items():
        run = Run(shape, device)
        # On the same model in turn: two of the largest would not fit beside each other.
        plain = HybridTrainer(run.model, run.optimizer, HybridTrainerConfig(enabled=False))
        ours = HybridTrainer(run.model, run.optimizer, HybridTrainerConfig(warmup_steps=20))
        times: dict[str, list[float]] = {"plain": [], "hybrid": []}
        for _ in range(steps):
            for kind, trainer in (("plain", plain), ("hybrid", ours)):
                batch = run.next()
                closure = lambda batch=batch, run=run: run.loss_of(batch)  # noqa: E731
                times[kind].append(seconds(device, lambda t=trainer, c=closure: t.step(c)))
        late = {kind: values[len(values) // 4 :] for kind, values in times.items()}
        rows.append(
            {
                "model": name,
                "parameters": run.parameters,
                "median_seconds": {k: statistics.median(v) for k, v in late.items()},
                "mean_seconds": {k: statistics.fmean(v) for k, v in late.items()},
            }
        )
        rows[-1]["ratio"] = (
            rows[-1]["median_seconds"]["hybrid"] / rows[-1]["median_seconds"]["plain"]
        )
        print(f"{name:>6}: x{rows[-1]['ratio']:.3f} of {rows[-1]['median_seconds']['plain']:.4f} s")
        del run, plain, ours
    return rows


def memory(device: str, shape: Shape, steps: int) -> list[dict]:
    """Peak of the allocator with each kind of snapshot, beside the plain loop's."""
    rows: list[dict] = []
    for kind in (None, *KINDS):
        run = Run(shape, device)
        config = HybridTrainerConfig(
            enabled=kind is not None,
            **{"warmup_steps": 10, "min_full_steps": 12, "memory": "100x", "snapshots": 4},
            **({} if kind is None else {"snapshot_kind": kind}),
        )
        trainer = HybridTrainer(run.model, run.optimizer, config)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(steps):
            batch = run.next()
            trainer.step(lambda batch=batch, run=run: run.loss_of(batch))
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
        rows.append(
            {
                "kind": kind or "plain",
                "parameters": run.parameters,
                "peak_bytes": peak,
                "components": trainer.statistics().memory,
            }
        )
        print(rows[-1])
        del run, trainer
    return rows


def cost(device: str, shape: Shape, steps: int) -> list[dict]:
    """Held-out loss after each tenth of the run, plain and hybrid, each rate of a small grid."""
    rows = []
    for rate in (1.5e-4, 3e-4, 6e-4) if steps > 50 else (3e-4,):
        for enabled in (False, True):
            run = Run(shape, device, rate)
            schedule = torch.optim.lr_scheduler.LinearLR(run.optimizer, 1.0, 0.0, steps)
            config = HybridTrainerConfig(enabled=enabled)
            trainer = HybridTrainer(
                run.model, run.optimizer, config, scheduler=schedule, max_grad_norm=1.0
            )
            curve, start = [], time.perf_counter()
            for step in range(steps):
                batch = run.next()
                trainer.step(lambda batch=batch, run=run: run.loss_of(batch))
                if (step + 1) % (steps // 10) == 0:
                    curve.append([step + 1, time.perf_counter() - start, run.held_out()])
            rows.append({"rate": rate, "hybrid": enabled, "curve": curve})
            rows[-1]["statistics"] = trainer.statistics().to_dict()
            print(f"rate {rate:g}, {'hybrid' if enabled else 'plain'}: {curve[-1][2]:.4f}")
            del run, trainer
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=("overhead", "memory", "cost"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--toy", action="store_true", help="sizes that a CPU can run")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    device, toy = arguments.device, arguments.toy
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU: --toy --device cpu proves the script")
    if (toy or device == "cpu") and arguments.output is None:
        parser.error("what is not of a GPU is not to be recorded with the results: name --output")
    shapes = {"toy": TOY} if toy else SHAPES
    middle = TOY if toy else SHAPES["124M"]
    rows = {
        "overhead": lambda: overhead(device, shapes, 40 if toy else 120),
        "memory": lambda: memory(device, middle, 40 if toy else 80),
        "cost": lambda: cost(device, TOY if toy else GPT2_SMALL, 40 if toy else 1000),
    }[arguments.part]()
    result = {
        "hybridcore": hybridcore.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "rows": rows,
    }
    output = arguments.output or RESULTS / f"gpu-{arguments.part}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
