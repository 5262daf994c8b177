"""Whether hybridcore leaves training alone where it has little to give: rates, schedules, noise.

    python -m benchmarks.harm

trains small models in loops as people write them, at the best learning rate of plain training and
at higher ones, with and without hybridcore: from the same weights, on the same batches, for the
same number of steps. Recorded in benchmarks/results/harm.json: what they end at, and what it costs.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import process_time

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, lr_scheduler

from benchmarks.proving_ground.workloads import (
    GROUND,
    as_a_whole,
    batches,
    byte_text,
    in_parts,
)
from hybridcore.cli.common import environment
from hybridcore.cli.compare import Meter, measured_forward_cost
from hybridcore.cli.workloads import Task, digits
from hybridcore.metrics import finite
from hybridcore_torch import HybridTrainer

RESULTS = Path(__file__).parent / "results" / "harm.json"
Scheduler = lr_scheduler.LRScheduler | None


def embedding(seed: int) -> Task:
    """Next byte of source code from the eight before, batches of 64."""
    text = byte_text()[:300_000].clamp(max=127)
    windows = text.unfold(0, 9, 3)
    windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(7))]
    x, y = windows[:, :-1], windows[:, -1]
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Embedding(128, 24), nn.Flatten(), nn.Linear(192, 128), nn.ReLU(), nn.Linear(128, 128)
    )
    train, test = (x[2000:], y[2000:]), (x[:2000], y[:2000])
    return in_parts(model, train, test, F.cross_entropy, batches(seed, len(x) - 2000, 64))


def convolutional(seed: int) -> Task:
    """Digits by a CNN with batch normalization, which every pass in training mode sees."""
    train, test = digits()
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *(nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(12, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.Flatten()),
        nn.Linear(384, 10),
    )
    task = in_parts(model, train, test, F.cross_entropy, batches(seed, len(train[0]), 64))

    def held_out() -> float:
        model.eval()
        loss = task.held_out()
        model.train()
        return loss

    return Task(model, task.closure, held_out)


def random_labels(seed: int) -> Task:
    """Labels that are drawn anew for every batch: there is nothing to learn but their mean."""
    (x, _), (unseen, _) = digits()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    rows = batches(seed, len(x), 32)

    def closure(step: int) -> Callable[[], torch.Tensor]:
        chosen = rows(step)
        # Another stream than that of the rows, or a row would tell its label.
        generator = torch.Generator().manual_seed(7_000_003 * (seed + 1) + step)
        labels = torch.randint(10, (len(chosen),), generator=generator)
        return lambda: F.cross_entropy(model(x[chosen]), labels)

    def held_out() -> float:
        with torch.no_grad():
            return float(-F.log_softmax(model(unseen), dim=1).mean())

    return Task(model, closure, held_out)


def likelihood(seed: int) -> Task:
    """Gaussian likelihood, with a variance for each point: a loss that becomes negative."""
    generator = torch.Generator().manual_seed(8)
    x = 4.0 * torch.rand(4000, 1, generator=generator) - 2.0
    noise = (0.02 + 0.05 * x.abs()) * torch.randn(4000, 1, generator=generator)
    y = torch.sin(2.0 * x) + noise
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 2))
    )

    def loss(found: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.gaussian_nll_loss(found[:, :1], y, found[:, 1:].exp())

    train, test = (x[:3000], y[:3000]), (x[3000:], y[3000:])
    return in_parts(model, train, test, loss, batches(seed, 3000, 32))


def policy_gradient(seed: int) -> Task:
    """A contextual bandit by REINFORCE: the loss is a surrogate that rises as the policy improves.

    What it ends at is the expected reward, with its sign turned.
    """
    rewards = torch.randn(6, 5, generator=torch.Generator().manual_seed(2))
    unseen = torch.randn(2000, 6, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 5))

    def closure(step: int) -> Callable[[], torch.Tensor]:
        generator = torch.Generator().manual_seed(7_000_003 * (seed + 1) + step)
        context = torch.randn(64, 6, generator=generator)
        noise = 0.5 * torch.randn(64, 1, generator=generator)

        def surrogate() -> torch.Tensor:
            logits = F.log_softmax(model(context), dim=1)
            action = torch.multinomial(logits.detach().exp(), 1)
            reward = (context @ rewards).gather(1, action) + noise
            return -(logits.gather(1, action) * (reward - reward.mean())).mean()

        return surrogate

    def held_out() -> float:
        with torch.no_grad():
            shares = F.softmax(model(unseen), dim=1)
            return -float((shares * (unseen @ rewards)).sum(dim=1).mean())

    return Task(model, closure, held_out)


def whole_batch(seed: int) -> Task:
    """All digits in every batch: at a rate of 1 to 2 gradient descent is at the edge of stability.

    The largest eigenvalue of the Hessian is then about two over the rate.
    """
    (x, y), _ = digits()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    return as_a_whole(model, lambda: F.cross_entropy(model(x), y))


def constant(optimizer: Optimizer, rate: float, steps: int) -> Scheduler:
    return None


def one_cycle(optimizer: Optimizer, rate: float, steps: int) -> Scheduler:
    return lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps + 1)


def cosine(optimizer: Optimizer, rate: float, steps: int) -> Scheduler:
    return lr_scheduler.CosineAnnealingLR(optimizer, steps)


def warm_up(optimizer: Optimizer, rate: float, steps: int) -> Scheduler:
    return lr_scheduler.LinearLR(optimizer, 0.01, total_iters=steps // 10)


def in_steps(optimizer: Optimizer, rate: float, steps: int) -> Scheduler:
    return lr_scheduler.StepLR(optimizer, steps // 3, 0.3)


def late_decay(optimizer: Optimizer, rate: float, steps: int) -> Scheduler:
    return lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (steps - step) / (0.3 * steps)))


def adam(model: nn.Module, rate: float) -> Optimizer:
    return Adam(model.parameters(), rate)


def adamw(model: nn.Module, rate: float) -> Optimizer:
    return AdamW(model.parameters(), rate, weight_decay=0.05)


def momentum(model: nn.Module, rate: float) -> Optimizer:
    return SGD(model.parameters(), rate, momentum=0.9)


def descent(model: nn.Module, rate: float) -> Optimizer:
    return SGD(model.parameters(), rate)


@dataclass(frozen=True, slots=True)
class Loop:
    """A training loop as somebody wrote it, at the rates that are tried, the best one first."""

    title: str
    build: Callable[[int], Task]
    optimizer: Callable[[nn.Module, float], Optimizer]
    scheduler: Callable[[Optimizer, float, int], Scheduler]
    rates: tuple[float, ...]
    steps: int


LOOPS = (
    Loop("Embedding, AdamW, one cycle", embedding, adamw, one_cycle, (0.02, 0.04), 1500),
    Loop("Embedding, AdamW, cosine", embedding, adamw, cosine, (0.006, 0.02), 1500),
    Loop("Embedding, AdamW, warm-up", embedding, adamw, warm_up, (0.006, 0.02), 1500),
    Loop("Embedding, SGD, one cycle", embedding, momentum, one_cycle, (0.3, 0.6), 1500),
    Loop("Embedding, AdamW, late decay", embedding, adamw, late_decay, (0.006, 0.02), 1500),
    Loop("Embedding, SGD, late decay", embedding, momentum, late_decay, (0.1, 0.3), 1500),
    Loop("Embedding, Adam, constant", embedding, adam, constant, (0.003, 0.01), 1500),
    Loop("Embedding, SGD, constant", embedding, momentum, constant, (0.06, 0.2), 1500),
    Loop("CNN, digits, SGD in steps", convolutional, momentum, in_steps, (0.04, 0.16), 800),
    Loop("GPT, its first 300 steps", GROUND["gpt"].build, adamw, constant, (0.003, 0.006), 300),
    Loop("MLP, random labels, Adam", random_labels, adam, constant, (0.001, 0.01), 800),
    Loop("MLP, Gaussian likelihood, Adam", likelihood, adam, constant, (0.003, 0.01), 1500),
    Loop("MLP, policy gradient, Adam", policy_gradient, adam, constant, (0.01, 0.03), 400),
    Loop("MLP, whole batch, SGD", whole_batch, descent, constant, (1.0, 2.0), 800),
)


def train(loop: Loop, rate: float, seed: int, *, hybrid: bool) -> dict[str, float]:
    """Train once: what it ends at, its passes, and its processor time in seconds."""
    task = loop.build(seed)
    optimizer = loop.optimizer(task.model, rate)
    scheduler = loop.scheduler(optimizer, rate, loop.steps)
    trainer = HybridTrainer(task.model, optimizer, scheduler=scheduler) if hybrid else None
    meter = Meter()
    began = process_time()
    for step in range(loop.steps):
        closure = meter.watch(task.closure(step))
        if trainer is not None:
            trainer.step(closure)
            continue
        optimizer.zero_grad()
        closure().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    if trainer is not None:
        trainer.finish(closure)
    seconds = process_time() - began
    return {
        "loss": task.held_out(),
        "backward": meter.backward,
        "forward_alone": meter.forward - meter.backward,
        "cpu_seconds": seconds,
    }


def ratio(runs: dict[str, list[dict[str, float]]], figure: str) -> float:
    """Median over the seeds of what hybridcore took of a `figure`, over what plain did."""
    pairs = zip(runs["hybrid"], runs["plain"], strict=True)
    return statistics.median(hybrid[figure] / plain[figure] for hybrid, plain in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="at least 2")
    parser.add_argument("--loops", nargs="*", help="titles begin so; not recorded without --output")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error(f"--seeds {arguments.seeds}: of less than 2 there is no spread")
    torch.set_num_threads(1)
    results = []
    for loop in LOOPS:
        if arguments.loops and not loop.title.startswith(tuple(arguments.loops)):
            continue
        task = loop.build(0)
        price = measured_forward_cost(task, loop.optimizer(task.model, loop.rates[0]))
        for rate in loop.rates:
            runs: dict[str, list[dict[str, float]]] = {"plain": [], "hybrid": []}
            # In turn, so that a load that comes and goes is on both.
            for seed in range(arguments.seeds):
                for name in runs:
                    run = train(loop, rate, seed, hybrid=name == "hybrid")
                    run["cost"] = run["backward"] + price * run["forward_alone"]
                    runs[name].append(run)
            results.append({"title": loop.title, "rate": rate, "steps": loop.steps, **runs})
            plain, hybrid = (statistics.fmean(run["loss"] for run in runs[name]) for name in runs)
            print(
                f"{loop.title:28} {rate:<6g} plain {plain:.4f}, hybridcore {hybrid:.4f}, "
                f"cost {ratio(runs, 'cost'):.2f}, "
                f"processor time {ratio(runs, 'cpu_seconds'):.2f}",
                flush=True,
            )
    some = f" --loops {shlex.join(arguments.loops)}" if arguments.loops else ""
    document = environment() | {
        "command": f"python -m benchmarks.harm --seeds {arguments.seeds}{some}",
        "results": results,
    }
    output = arguments.output or (None if arguments.loops else RESULTS)
    if output is not None:
        output.write_text(json.dumps(finite(document), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
