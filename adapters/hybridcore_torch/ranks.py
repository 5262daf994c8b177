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
from torch import nn

from hybridcore import ProtocolError


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of `tensor` that is on this rank, in its own memory."""
    if hasattr(tensor, "to_local"):
        return tensor.detach().to_local()  # type: ignore[no-any-return, attr-defined]
    return tensor


def reshard(model: nn.Module) -> None:
    """Drop whole copies of sharded weights.

    A forward pass that no backward pass follows leaves them behind, and the next one would take
    them for the weights whatever has been written into the shards.
    """
    for module in model.modules():
        if hasattr(type(module), "reshard"):
            module.reshard()  # type: ignore[operator]


class Ranks:
    """Exchanges what the ranks saw.

    The group is that of the model's ``DistributedDataParallel``, or else all processes, which then
    have to train the same model.

    Parameters
    ----------
    model : Module
        What is trained.

    Attributes
    ----------
    several : bool
        Whether there are other ranks.
    turn : int
        Directives carried out so far, the same on all ranks.
    """

    def __init__(self, model: nn.Module) -> None:
        self.turn = 0
        self.several = False
        self._size = 1
        if not (dist.is_available() and dist.is_initialized()):
            return
        wrapped = (m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel))
        self._group = next((m.process_group for m in wrapped), dist.group.WORLD)
        self._size = dist.get_world_size(self._group)
        self.several = self._size > 1
        # Gloo exchanges what is on the CPU, and others what is where the model is.
        gloo = dist.get_backend(self._group) == "gloo"
        first = next(model.parameters(), None)
        self._device = torch.device("cpu") if gloo or first is None else first.device

    def share(self, tensor: torch.Tensor) -> float:
        """Return what the local part counts in a sum over all ranks, as some hold the same."""
        return self.parts(tensor) / self._size

    def parts(self, tensor: torch.Tensor) -> int:
        """Return over how many ranks `tensor` is spread."""
        parts = 1
        if hasattr(tensor, "placements"):
            mesh = tensor.device_mesh  # type: ignore[attr-defined]
            for dimension, placement in enumerate(tensor.placements):
                if not placement.is_replicate():
                    parts *= mesh.size(dimension)
        return parts

    def agree(self, loss: float, norm: float = 0.0) -> tuple[float, float]:
        """Return the mean loss, and the norm of which each rank holds a part.

        Raises
        ------
        ProtocolError
            If a rank is not at the same directive.
        """
        if not self.several:
            return loss, norm
        seen = self._gather([loss, norm * norm]).tolist()
        return sum(s[0] for s in seen) / len(seen), math.sqrt(sum(s[1] for s in seen))

    def add(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of `values`, float64 on the CPU, over all ranks."""
        if not self.several:
            return values
        return self._gather(values.flatten().tolist()).sum(dim=0).view(values.shape)

    def _gather(self, values: Sequence[float]) -> torch.Tensor:
        own = torch.tensor([float(self.turn), *values], dtype=torch.float64, device=self._device)
        rows = [torch.empty_like(own) for _ in range(self._size)]
        dist.all_gather(rows, own, self._group)
        table = torch.stack(rows).cpu()
        turns = table[:, 0].tolist()
        usual = max(set(turns), key=turns.count)
        astray = [rank for rank, turn in enumerate(turns) if turn != usual]
        if astray:
            raise ProtocolError(
                f"rank {astray[0]} is at directive {turns[astray[0]]:.0f} of hybridcore, others at "
                f"{usual:.0f}: call step() equally often on every rank, with the same settings, "
                "and let an error end all of them"
            )
        return table[:, 1:]
