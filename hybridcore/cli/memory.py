"""What a model of some size takes in memory with hybridcore; nothing of that size is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hybridcore import HybridTrainerConfig
from hybridcore.cli.common import UserError
from hybridcore.memory import Size, plan, recovery_bytes, snapshots_bytes
from hybridcore.secant import LEAST_PAIRS
from hybridcore_torch.memory import size_of
from hybridcore_torch.secants import affordable

# Where momentum is off unless asked for.
WITH_MOMENTUM = ("sgd", "rmsprop")
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
# Parameters of the small tensor on which an optimizer shows what it keeps.
_SIDE = 64


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes by what they are for; activations come on top of both.

    Attributes
    ----------
    weights, gradients, optimizer : int
        What the plain loop takes.
    kind : str
        How snapshots are kept, as the setting ``snapshot_kind``.
    snapshots : int
        The snapshots.
    average : int
        The running average of the weights.
    recovery : int
        Copy of the optimizer's state, while a jump may be rolled back.
    secants : int
        Secant pairs, where every batch is the same, with the weights that are kept beside them, and
        the weights and the optimizer's state from where they began.
    count, pairs : int
        How many snapshots and pairs there is room for.
    in_turn : bool
        Whether there is no average while there is a `recovery`.
    """

    weights: int
    gradients: int
    optimizer: int
    kind: str
    snapshots: int
    average: int
    recovery: int
    secants: int
    count: int
    pairs: int
    in_turn: bool

    @property
    def plain(self) -> int:
        """Bytes without hybridcore."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """Bytes at most, where batches differ."""
        both = self.average, self.recovery
        beside = max(both) if self.in_turn else sum(both)
        return self.plain + self.snapshots + beside

    @property
    def same_batch(self) -> int:
        """Bytes at most, where every batch is the same: pairs take the place of snapshots."""
        taken = self.plain + self.average + self.recovery + self.secants
        return max(self.total, taken)


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """Optimizer of torch by its name in any case, as ``adamw``; :class:`UserError` otherwise."""
    known = {
        key.lower(): value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type)
        and issubclass(value, torch.optim.Optimizer)
        and value not in (torch.optim.Optimizer, torch.optim.LBFGS, torch.optim.SparseAdam)
    }
    if name.lower() not in known:
        raise UserError(f"--optimizer {name} is not one of {', '.join(sorted(known))}")
    return known[name.lower()]


def estimate(
    parameters: int, optimizer: str, dtype: str, config: HybridTrainerConfig, momentum: float = 0.0
) -> Memory:
    """Estimate the memory of a run.

    Parameters
    ----------
    parameters : int
        Trainable parameters of the model, at least 1.
    optimizer : str
        Name in ``torch.optim``, in any case.
    dtype : str
        Type of the parameters, one of ``DTYPES``.
    config : HybridTrainerConfig
        Settings.
    momentum : float
        Of SGD and RMSprop, which keep a copy more with it.
    """
    kind, build = DTYPES[dtype], optimizer_class(optimizer)
    arguments = {"momentum": momentum} if momentum and optimizer.lower() in WITH_MOMENTUM else {}
    size = kind.itemsize
    kept = _kept_bytes(build, kind, arguments)
    weights = size * parameters
    # A matrix: Muon takes nothing else.
    held = nn.Parameter(torch.empty(1, parameters, dtype=kind, device="meta"))
    asked: Any = build
    made = asked([held], lr=1e-3, **arguments)
    there = plan(config, size_of([held], made))
    pairs = affordable(made, [held], config.secant_pairs, there.pairs)
    pairs = pairs if pairs >= LEAST_PAIRS else 0
    group = made.param_groups[0]
    # Decay that is no part of the gradient has a strength of its own for each parameter.
    decays = group.get("decoupled_weight_decay", isinstance(made, torch.optim.AdamW))
    strengths = weights if decays and group.get("weight_decay") else 0
    taken = Size(parameters, weights, kept * parameters, on_gpu=False)
    recovery = round(recovery_bytes(there.kind, taken))
    secants = (2 * pairs + 6) * max(4, size) * parameters + strengths + 2 * weights + recovery
    count = there.snapshots
    return Memory(
        weights=weights,
        gradients=weights,
        optimizer=round(taken.state),
        kind=there.kind,
        snapshots=round(snapshots_bytes(there.kind, count, taken)) if count else 0,
        average=round(taken.average) if there.average else 0,
        recovery=recovery if count or pairs else 0,
        secants=secants if pairs else 0,
        count=count,
        pairs=pairs,
        in_turn=there.in_turn,
    )


def _kept_bytes(build: Any, kind: torch.dtype, arguments: dict[str, float]) -> float:
    """Bytes of state for each parameter, as seen after a step with a small one."""
    small = nn.Parameter(torch.zeros(_SIDE, _SIDE, dtype=kind))
    optimizer = build([small], lr=1e-3, **arguments)
    small.grad = torch.ones_like(small)
    optimizer.step()
    tensors = [v for v in optimizer.state[small].values() if isinstance(v, torch.Tensor)]
    return sum(v.numel() * v.element_size() for v in tensors if v.numel() > 1) / small.numel()
