"""What the model takes, and when memory is out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hybridcore.memory import Size
from hybridcore_torch.ranks import Ranks

# What torch's allocators say of it, each in words of its own.
_SHORT = ("out of memory", "allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory has run out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _SHORT)


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
