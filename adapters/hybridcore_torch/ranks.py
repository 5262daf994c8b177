"""One rank among the processes that train the same model together.

Each rank sees a loss of its own, and where parameters are sharded a part of the weights. What the
engine is told has to be the same everywhere, so that every rank takes the same decision: losses are
averaged and inner products added up over the ranks before it sees them. Values are gathered and
then added in the order of the ranks, because a sum made on the way may differ in its last bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from hybridcore import ProtocolError


def several() -> bool:
    """Whether there are other ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of `tensor` that is on this rank, in its own memory."""
    if hasattr(tensor, "to_local"):
        return tensor.detach().to_local()  # type: ignore[no-any-return, attr-defined]
    return tensor


def share(tensor: torch.Tensor) -> float:
    """Return what the local part counts in a sum over all ranks, as some of them hold the same."""
    if not several():
        return 1.0
    parts = 1
    if hasattr(tensor, "placements"):
        mesh = tensor.device_mesh  # type: ignore[attr-defined]
        for dimension, placement in enumerate(tensor.placements):
            if placement.is_shard():
                parts *= mesh.size(dimension)
    return parts / dist.get_world_size()


class Ranks:
    """Exchanges what the ranks saw.

    Attributes
    ----------
    turn : int
        Directives carried out so far, the same on all ranks.
    """

    def __init__(self) -> None:
        self.turn = 0

    def agree(self, loss: float, norm: float = 0.0) -> tuple[float, float]:
        """Return the mean loss, and the norm of which each rank holds a part.

        Raises
        ------
        ProtocolError
            If a rank is not at the same directive.
        """
        if not several():
            return loss, norm
        seen = self._gather([loss, norm * norm]).tolist()
        return sum(s[0] for s in seen) / len(seen), math.sqrt(sum(s[1] for s in seen))

    def add(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of `values`, float64 on the CPU, over all ranks."""
        if not several():
            return values
        return self._gather(values.flatten().tolist()).sum(dim=0).view(values.shape)

    def _gather(self, values: Sequence[float]) -> torch.Tensor:
        own = torch.tensor([float(self.turn), *values], dtype=torch.float64, device=_device())
        rows = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, own)
        table = torch.stack(rows).cpu()
        turns = table[:, 0].tolist()
        usual = max(set(turns), key=turns.count)
        astray = [rank for rank, turn in enumerate(turns) if turn != usual]
        if astray:
            raise ProtocolError(
                f"rank {astray[0]} is at directive {turns[astray[0]]:.0f} of hybridcore, others at "
                f"{usual:.0f}: call step() equally often on every rank, with the same settings"
            )
        return table[:, 1:]


def _device() -> torch.device:
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
