"""Which device the kernels of the RSSM run on.

Both take the same arrays: ``kernels.cpu`` and ``kernels.cuda.api`` stand for one another.
"""

from __future__ import annotations

import importlib
import math
from typing import Any, Literal

Device = Literal["cpu", "cuda"]

# Work, in steps of the prior that are sampled at once (members x paths x horizon), from which a
# rollout on the GPU is the faster one, copies included. Not yet measured on a GPU, so it is beyond
# every size; `python benchmarks/gpu/kernels.py` measures it and records `crossover`.
CROSSOVER = math.inf


def resolve(device: Literal["auto", "cpu", "cuda"], work: int = 0) -> Device:
    """Choose the device of the kernels.

    Parameters
    ----------
    device : {"auto", "cpu", "cuda"}
        What the user asked for. "auto" takes the GPU only where a recorded measurement says that
        it pays. There is none yet: "auto" is the CPU at every size.
    work : int
        Steps of the prior sampled at once, at least 0: members x paths x horizon.

    Returns
    -------
    {"cpu", "cuda"}
        The device to use.

    Raises
    ------
    ValueError
        If `device` is none of the three, or `work` is negative.
    RuntimeError
        If `device` is "cuda" and there is no GPU that numba can use.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be 'auto', 'cpu' or 'cuda', but is {device!r}")
    if work < 0:
        raise ValueError(f"work must be at least 0, but is {work}: members x paths x horizon")
    if device == "cuda":
        if not gpu_available():
            raise RuntimeError(
                "device='cuda', but numba finds no CUDA GPU: install the driver and numba-cuda "
                "(pip install 'hybridcore[cuda]'), or use device='auto'"
            )
        return "cuda"
    if device == "auto" and work >= CROSSOVER and gpu_available():
        return "cuda"
    return "cpu"


def kernels(device: Device) -> Any:
    """Return the module with the kernels of a device; it is imported when first asked for."""
    return importlib.import_module(f"hybridcore.kernels.{device}.api")


def gpu_available() -> bool:
    """Whether numba finds a GPU, or stands in for one in its simulator; imports ``numba.cuda``."""
    try:
        cuda = importlib.import_module("numba.cuda")
    except ImportError:
        return False
    return bool(cuda.is_available())
