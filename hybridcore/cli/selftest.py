"""The self-test of ``hybridcore doctor``: small real runs, each with something that can fail."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from hybridcore import HybridTrainerConfig, JsonLines, read_stream
from hybridcore_torch import HybridTrainer

BRISK = HybridTrainerConfig(
    warmup_steps=20, min_full_steps=24, horizon=30, correction_interval=10, secant_pairs=0
)
STEPS = 300


def run_check(name: str) -> dict[str, Any]:
    """Run one of :data:`CHECKS`; whatever it raises is its failure."""
    start = perf_counter()
    with _left_alone():
        try:
            passed, detail = True, CHECKS[name]()
        # Whatever is wrong with an installation: that is what is asked for.
        except Exception as error:
            passed, detail = False, f"{type(error).__name__}: {error}"
    return {
        "check": name,
        "passed": passed,
        "detail": detail,
        "seconds": perf_counter() - start,
    }


class CheckError(Exception):
    """A check did not find what it should."""


@contextmanager
def _left_alone() -> Iterator[None]:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)


def _problem() -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], torch.Tensor]]:
    digits = load_digits()
    x = torch.tensor(digits.data / 16.0, dtype=torch.float32)
    y = torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Linear(64, 10)
    return model, torch.optim.Adam(model.parameters(), 1e-2), lambda: F.cross_entropy(model(x), y)


def _plain(steps: int) -> tuple[nn.Module, float]:
    model, optimizer, closure = _problem()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = closure()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model, closure().item()


def _same(one: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


def _compiler() -> str:
    import numba as compiler

    numba: Any = compiler

    def total(values: np.ndarray) -> float:
        result = 0.0
        for index in numba.prange(len(values)):
            result += values[index]
        return result

    found = float(numba.njit(parallel=True)(total)(np.arange(1000.0)))
    if found != 499500.0:
        raise CheckError(f"a compiled sum of 499500 came to {found}: reinstall numba")
    if numba.config.DISABLE_JIT:
        return "NUMBA_DISABLE_JIT is set: nothing is compiled, and all is slow"
    return f"numba compiles, and runs parallel loops on {numba.threading_layer()}"


def _disabled() -> str:
    model, optimizer, closure = _problem()
    trainer = HybridTrainer(model, optimizer, HybridTrainerConfig(enabled=False))
    for _ in range(50):
        trainer.step(closure)
    if not _same(model, _plain(50)[0]):
        raise CheckError("enabled=False does not train as the plain loop does")
    return "enabled=False is the plain loop, bit for bit"


def _jumps() -> str:
    model, optimizer, closure = _problem()
    trainer = HybridTrainer(model, optimizer, BRISK)
    for _ in range(STEPS):
        trainer.step(closure)
    passes, loss = trainer.statistics().backward_passes, closure().item()
    plain = _plain(passes)[1]
    if not (passes < STEPS and loss < plain):
        raise CheckError(
            f"{passes} backward passes led to {loss:.4g}, as many of the plain loop to {plain:.4g}"
        )
    return f"{passes} backward passes lead to {loss:.4g}, as many of the plain loop to {plain:.4g}"


def _resume() -> str:
    model, optimizer, closure = _problem()
    trainer = HybridTrainer(model, optimizer, BRISK)
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(60):
            trainer.step(closure)
        trainer.save(Path(folder) / "state.pt")
        other, its_optimizer, its_closure = _problem()
        resumed = HybridTrainer.load(Path(folder) / "state.pt", other, its_optimizer)
    for _ in range(60):
        trainer.step(closure)
        resumed.step(its_closure)
    if not _same(model, other):
        raise CheckError("a resumed run differs from the one that went on")
    return "a saved and resumed run is the uninterrupted one, bit for bit"


def _stream() -> str:
    model, optimizer, closure = _problem()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.jsonl"
        with JsonLines(path) as stream:
            trainer = HybridTrainer(model, optimizer, BRISK, callbacks=[stream])
            losses = [trainer.step(closure).loss for _ in range(120)]
        read = read_stream(path)
    if read.column("loss") != losses or not read.complete:
        raise CheckError("a stream does not read back as it was written")
    return "a recorded run reads back as it was"


def _cuda() -> str:
    if not torch.cuda.is_available():
        return "no GPU here, nothing to test"
    model, _, _ = _problem()
    model = model.to("cuda")
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    x, y = torch.randn(256, 64, device="cuda"), torch.randint(0, 10, (256,), device="cuda")
    trainer = HybridTrainer(model, optimizer, BRISK)
    first = F.cross_entropy(model(x), y).item()
    for _ in range(STEPS):
        trainer.step(lambda: F.cross_entropy(model(x), y))
    last = F.cross_entropy(model(x), y).item()
    if not last < first:
        raise CheckError(f"training on the GPU led from {first:.4g} to {last:.4g}")
    predicted = trainer.statistics().predicted_steps
    return f"training on the GPU led from {first:.4g} to {last:.4g}, {predicted} steps predicted"


CHECKS: dict[str, Callable[[], str]] = {
    "plain loop": _disabled,
    "jumps": _jumps,
    "resume": _resume,
    "stream": _stream,
    "GPU": _cuda,
    "compiler": _compiler,
}
