"""Statistics of the gradients."""

from __future__ import annotations

import math

import torch


def gradient_norm(optimizer: torch.optim.Optimizer) -> float:
    """Euclidean norm of all gradients that `optimizer` will use, 0 where there are none.

    On the CPU one norm per tensor, added up here, takes half the time of
    ``torch.nn.utils.get_total_norm``, and this is most of what watching a small model costs. Where
    squares leave the range of float32, and in half precision or on other devices, where one
    transfer is better than many, the sum is taken in float64.
    """
    gradients = [
        p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
    ]
    if not all(g.is_cpu and g.element_size() >= 4 for g in gradients):
        return _in_float64(gradients)
    norm = math.hypot(*[n.item() for n in torch._foreach_norm(gradients)]) if gradients else 0.0
    return norm if 0.0 < norm < math.inf else _in_float64(gradients)


def _in_float64(gradients: list[torch.Tensor]) -> float:
    norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients]
    if not norms:
        return 0.0
    return float(torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms])))
