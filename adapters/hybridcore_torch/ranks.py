"""One rank among the processes that train the same model together.

Each rank sees a loss of its own, and where parameters are sharded a part of the weights. What the
engine is told has to be the same everywhere, so that every rank takes the same decision: losses are
averaged and inner products added up over the ranks before it sees them. Values are gathered and
then added in the order of the ranks, because a sum made on the way may differ in its last bit.
"""

from __future__ import annotations

import math
import pickle
from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from hybridcore import ConfigError, ProtocolError


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of `tensor` that is on this rank, in its own memory."""
    if hasattr(tensor, "to_local"):
        return tensor.detach().to_local()  # type: ignore[no-any-return, attr-defined]
    return tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters of `model` are spread over ranks, or may be."""
    return any(hasattr(p, "placements") for p in model.parameters())


def reshard(model: nn.Module) -> None:
    """Drop whole copies of sharded weights.

    A forward pass that no backward pass follows leaves them behind, and the next one would take
    them for the weights whatever has been written into the shards.
    """
    for module in model.modules():
        if hasattr(type(module), "reshard"):
            module.reshard()  # type: ignore[operator]


# What Gloo's threads may still hold of the last exchanges, by references that are not Python's.
_EXCHANGED: deque[list[torch.Tensor]] = deque(maxlen=64)


def _keep(tensors: Sequence[torch.Tensor]) -> None:
    """Keep what is exchanged until Gloo's threads have surely let go of it.

    They do so under a lock, and need the interpreter where no other reference than Python's is
    left. ``DistributedDataParallel`` ends its group without giving the interpreter away and waits
    for that lock: a loop that ended right behind an exchange could wait for ever
    (https://github.com/pytorch/pytorch/issues/56297). A view keeps its base by such a reference.
    """
    _EXCHANGED.append([tensor.view_as(tensor) for tensor in tensors])


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
        self._wrapped: nn.parallel.DistributedDataParallel | None = None
        if not (dist.is_available() and dist.is_initialized()):
            return
        wrapped = (m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel))
        self._wrapped = next(wrapped, None)
        self._group = dist.group.WORLD if self._wrapped is None else self._wrapped.process_group
        self._size = dist.get_world_size(self._group)
        self.several = self._size > 1
        # Gloo exchanges what is on the CPU, and others what is where the model is.
        self._gloo = dist.get_backend(self._group) == "gloo"
        first = next(model.parameters(), None)
        self._device = torch.device("cpu") if self._gloo or first is None else first.device

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

    def check_alike(self, arguments: Mapping[str, object]) -> None:
        """Compare what the trainer was built with on all ranks.

        Raises
        ------
        ConfigError
            On every rank, if any of it differs.
        """
        if not self.several:
            return
        text = np.frombuffer(pickle.dumps(dict(arguments)), np.uint8)
        sizes = [int(row) for row in self._exchange(torch.tensor([len(text)]))]
        padded = torch.zeros(max(sizes), dtype=torch.uint8, device="cpu")
        padded[: len(text)] = torch.from_numpy(text.copy())
        rows = self._exchange(padded)
        seen = [
            pickle.loads(row[:size].numpy().tobytes())
            for row, size in zip(rows, sizes, strict=True)
        ]
        for rank, other in enumerate(seen):
            for name, value in seen[0].items():
                if other.get(name) != value:
                    raise ConfigError(
                        f"{name} is {other.get(name)!r} on rank {rank} and {value!r} on rank 0: "
                        "build the trainer with the same settings on every rank"
                    )

    def check_even(self) -> None:
        """Raise :class:`ProtocolError` inside ``join()``: ranks that have ended do not answer."""
        join = getattr(self._wrapped, "_join_config", None)
        if join is not None and join.enable:
            raise ProtocolError(
                "step() inside join() of DistributedDataParallel: hybridcore exchanges the loss in "
                "each step, which a rank without data does not; give every rank equally many "
                "batches, as DistributedSampler does, or build the trainer with enabled=False"
            )

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
        own = torch.tensor([float(self.turn), *values], dtype=torch.float64)
        table = torch.stack(self._exchange(own))
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

    def _exchange(self, own: torch.Tensor) -> list[torch.Tensor]:
        """Return `own` of every rank, on the CPU and in the order of the ranks."""
        own = own.to(self._device)
        rows = [torch.empty_like(own) for _ in range(self._size)]
        if own.device.type == "cpu":
            _keep((own, *rows))
        dist.all_gather(rows, own, self._group)
        return [row.cpu() for row in rows]
