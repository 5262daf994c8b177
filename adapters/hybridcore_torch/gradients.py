"""Statistics of the gradients."""

from __future__ import annotations

import math

import torch


def gradient_norm(optimizer: torch.optim.Optimizer) -> float:
    """Euclidean norm of all gradients that `optimizer` will use, 0 where there are none.

    On the CPU a dot product per tensor takes half the time of ``torch.nn.utils.get_total_norm``,
    and this is most of what watching a small model costs. Where squares leave the range of
    float32, and in half precision or on other devices, where one transfer is better than many, the
    sum is taken in float64.
    """
    total = 0.0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is None:
                continue
            if not gradient.is_cpu or gradient.element_size() < 4:
                return _in_float64(optimizer)
            flat = gradient.reshape(-1)
            total += torch.dot(flat, flat).item()
    return math.sqrt(total) if 0.0 < total < math.inf else _in_float64(optimizer)


def _in_float64(optimizer: torch.optim.Optimizer) -> float:
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients if g is not None]
    if not norms:
        return 0.0
    return float(torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms])))
