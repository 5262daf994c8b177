"""What the copies of the weights take, which of them there is room for, and when memory is out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from hybridcore import HybridTrainerConfig
from hybridcore_torch import codes
from hybridcore_torch.ranks import Ranks

Kind = Literal["exact", "bfloat16", "int8", "host"]
CODED = ("bfloat16", "int8")

# Snapshots without which nothing can be extrapolated.
FEWEST = 4
# What torch's allocators say of it, each in words of its own.
_SHORT = ("out of memory", "allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory has run out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _SHORT)


class Size(NamedTuple):
    """A model as far as its memory goes, on one rank.

    Attributes
    ----------
    parameters : float
        Trainable parameters.
    weights : float
        Bytes of them.
    state : float
        Bytes of the optimizer's state.
    on_gpu : bool
        Whether it is elsewhere than in the host's memory.
    """

    parameters: float
    weights: float
    state: float
    on_gpu: bool

    @property
    def average(self) -> float:
        """Bytes of their running average, in float32 at least."""
        return max(4.0 * self.parameters, self.weights)


class Plan(NamedTuple):
    """Copies of the weights that there is room for.

    Attributes
    ----------
    kind : Kind
        How snapshots are kept; the optimizer's state goes with them during a jump, in bfloat16
        where snapshots are in fewer bits.
    snapshots : int
        How many; 0 or at least `FEWEST`.
    average : bool
        Whether there is a running average.
    pairs : float
        Bytes that secant pairs may take while there are any.
    """

    kind: Kind
    snapshots: int
    average: bool
    pairs: float


def snapshots_bytes(kind: Kind, snapshots: int, size: Size) -> float:
    """Bytes of so many snapshots."""
    if kind == "host" and size.on_gpu:
        return size.weights
    if kind in CODED:
        each = 2.0 if kind == "bfloat16" else 1.0 + 4.0 / codes.BLOCK
        return size.weights + (snapshots - 1) * each * size.parameters
    return snapshots * size.weights


def recovery_bytes(kind: Kind, size: Size) -> float:
    """Bytes of the copy of the optimizer's state during a jump."""
    if kind == "host" and size.on_gpu:
        return 0.0
    # Of float32, the only one that is kept in fewer bits.
    return size.state / 2 if kind in CODED and size.weights == 4 * size.parameters else size.state


def plan(config: HybridTrainerConfig, size: Size) -> Plan:
    """Return the copies that fit into the settings' `memory`: all if they do, or else the best.

    Snapshots come before the average, and more exact ones before more of them.
    """
    limit = config.memory_limit(4.0 * size.parameters)
    kinds: Sequence[Kind] = ("exact", "int8", "host") if size.on_gpu else ("exact", "int8")
    if config.snapshot_kind != "auto":
        kinds = (config.snapshot_kind,)
    counts = range(config.snapshots, FEWEST - 1, -1)
    for average in (True, False) if config.averaging else (False,):
        beside = size.average if average else 0.0
        pairs = limit - beside - size.weights - size.state
        for kind in kinds:
            held = recovery_bytes(kind, size) + beside
            for count in counts:
                if snapshots_bytes(kind, count, size) + held <= limit:
                    return Plan(kind, count, average, pairs)
    average = config.averaging and size.average <= limit
    return Plan(kinds[0], 0, average, limit - size.weights - size.state - average * size.average)


def size_of(
    parameters: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer, ranks: Ranks | None = None
) -> Size:
    """Size of `parameters` on each rank, with the state that `optimizer` has once it has stepped.

    The same on all ranks, also where shards are uneven.
    """
    parts = [1.0 if ranks is None else ranks.parts(p) for p in parameters]
    counts = [p.numel() / n for p, n in zip(parameters, parts, strict=True)]
    weights = [c * p.element_size() for c, p in zip(counts, parameters, strict=True)]
    on_gpu = any(p.device.type not in ("cpu", "meta") for p in parameters)
    copies = _state_copies(optimizer)
    return Size(sum(counts), sum(weights), copies * sum(weights), on_gpu)


def _state_copies(optimizer: torch.optim.Optimizer) -> float:
    """Return how many copies of the parameters the state takes; where not known, as Adam's.

    Not looked up in the state, or a run that is loaded would plan otherwise than one that goes on.
    """
    if isinstance(optimizer, torch.optim.SGD):
        return 1.0 if any(group["momentum"] for group in optimizer.param_groups) else 0.0
    return 3.0 if any(group.get("amsgrad") for group in optimizer.param_groups) else 2.0
