"""Statistics of the gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from hybridcore_torch.ranks import Ranks, local


def gradient_norm(parameters: Iterable[torch.Tensor], ranks: Ranks | None = None) -> float:
    """Euclidean norm of the gradients of all `parameters`, 0 where there are none.

    Of several ranks it is the part of this one: their squares add up to the whole.

    On the CPU one norm per tensor, added up here, takes half the time of
    ``torch.nn.utils.get_total_norm``, and this is most of what watching a small model costs. Where
    squares leave the range of float32, and in half precision or on other devices, where one
    transfer is better than many, the sum is taken in float64.
    """
    gradients = [g for p in parameters if (g := p.grad) is not None]
    if not gradients:
        return 0.0
    here = [local(g) for g in gradients]
    shares = [ranks.share(g) for g in gradients] if ranks is not None and ranks.several else None
    wide = are_wide(here)
    if wide and shares is None:
        return wide_norm(here)
    norm = _added(_quick(here), shares) if wide else math.nan
    return norm if 0.0 < norm < math.inf else _added(_precise(here).tolist(), shares)


def are_wide(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether :func:`wide_norm` takes such `tensors`: whole ones on the CPU, in 32 bits or more."""
    return all(t.is_cpu and t.element_size() >= 4 and not hasattr(t, "to_local") for t in tensors)


def wide_norm(gradients: list[torch.Tensor]) -> float:
    """Return :func:`gradient_norm` of `gradients` that :func:`are_wide`."""
    if not gradients:
        return 0.0
    norm = math.hypot(*_quick(gradients))
    return norm if 0.0 < norm < math.inf else math.hypot(*_precise(gradients).tolist())


def loss_and_norm(
    loss: torch.Tensor, parameters: Iterable[torch.Tensor], ranks: Ranks | None = None
) -> tuple[float, float]:
    """Value of `loss` and :func:`gradient_norm`, in one transfer from the device."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return loss.item(), 0.0
    shares = [ranks.share(g) for g in gradients] if ranks is not None and ranks.several else None
    norms = _precise([local(g) for g in gradients])
    value, *rest = torch.cat((local(loss).double().view(1).to(norms.device), norms)).tolist()
    return value, _added(rest, shares)


def _quick(gradients: list[torch.Tensor]) -> list[float]:
    return [n.item() for n in torch._foreach_norm(gradients)]


def _precise(gradients: list[torch.Tensor]) -> torch.Tensor:
    norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients]
    return torch.stack([n.to(norms[0].device) for n in norms])


def _added(norms: list[float], shares: list[float] | None) -> float:
    if shares is not None:
        norms = [norm * math.sqrt(share) for norm, share in zip(norms, shares, strict=True)]
    return math.hypot(*norms)
