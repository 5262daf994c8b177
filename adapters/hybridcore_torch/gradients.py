"""Statistics of the gradients."""

from __future__ import annotations

import math

import torch

from hybridcore_torch.ranks import local, several, share


def gradient_norm(optimizer: torch.optim.Optimizer) -> float:
    """Euclidean norm of all gradients that `optimizer` will use, 0 where there are none.

    Of several ranks it is the part of this one: their squares add up to the whole.

    On the CPU one norm per tensor, added up here, takes half the time of
    ``torch.nn.utils.get_total_norm``, and this is most of what watching a small model costs. Where
    squares leave the range of float32, and in half precision or on other devices, where one
    transfer is better than many, the sum is taken in float64.
    """
    parts = [
        p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
    ]
    gradients = [local(g) for g in parts]
    if not gradients:
        return 0.0
    norm = math.nan
    if all(g.is_cpu and g.element_size() >= 4 for g in gradients):
        norms = [n.item() for n in torch._foreach_norm(gradients)]
        norm = _added(norms, parts)
    if 0.0 < norm < math.inf:
        return norm
    wide = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients]
    return _added(torch.stack([n.to(wide[0].device) for n in wide]).tolist(), parts)


def _added(norms: list[float], gradients: list[torch.Tensor]) -> float:
    if several():
        norms = [n * math.sqrt(share(g)) for n, g in zip(norms, gradients, strict=True)]
    return math.hypot(*norms)
