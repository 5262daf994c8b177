"""What an optimizer lowers: the loss, and what its weight decay adds to that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import optimizer as of_all

# Optimizers whose weight decay is added to the gradient unless a group says that it is decoupled.
_COUPLED = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
)

# Packages whose optimizers do nothing in a step but lower the loss.
_PACKAGES = ("torch", "schedulefree")


def is_known(optimizer: torch.optim.Optimizer) -> bool:
    """Whether what `optimizer` lowers can be told: the loss, and the decay of which is known.

    A step of the user's own, or a hook at it, may do anything beside: keep weights in bounds or at
    zero, or add noise, of which nothing is left where the loss alone decides.
    """
    optimizer = bare(optimizer)
    hooks = [of_all._global_optimizer_pre_hooks, of_all._global_optimizer_post_hooks]
    hooks += [getattr(optimizer, f"_optimizer_step_{when}_hooks", {}) for when in ("pre", "post")]
    if any(hooks) or _package(optimizer.step) not in _PACKAGES:
        return False
    groups = optimizer.param_groups
    if any(group.get("maximize") for group in groups):
        return False
    if isinstance(optimizer, torch.optim.ASGD | torch.optim.Rprop):
        # Their steps depend on more than gradient and rate.
        return False
    known = isinstance(optimizer, (*_COUPLED, torch.optim.AdamW))
    return known or not any(group.get("weight_decay") for group in groups)


def bare(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return what Accelerate has prepared as it was, and any other optimizer as it is."""
    if _package(optimizer.step) != "accelerate":
        return optimizer
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def _package(function: object) -> str:
    return str(getattr(function, "__module__", None)).partition(".")[0]


class Decay:
    """A quadratic penalty ``sum_i w_i theta_i^2 / 2`` that stands for weight decay.

    Where decay is added to the gradient, ``w`` is its strength. AdamW adds it to the step instead,
    so that it rests where ``g / sqrt(v) = -decay * theta`` (Loshchilov & Hutter 2019, algorithm 2):
    there ``w`` is the strength times ``sqrt(v)``, as it is when this is built.

    Built after a backward pass, as parameters without a gradient do not decay.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        For which :func:`is_known` holds.
    parameters : sequence of Parameter
        Those that move.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[torch.Tensor]
    ) -> None:
        self._parameters = list(parameters)
        found = {
            id(p): _strength(optimizer, group, p)
            for group in optimizer.param_groups
            for p in group["params"]
        }
        self.use([found[id(p)] for p in parameters])

    @property
    def strengths(self) -> list[torch.Tensor | float]:
        """How strongly each parameter decays."""
        return self._strengths

    def use(self, strengths: Sequence[torch.Tensor | float]) -> None:
        """Take `strengths`, one for each parameter."""
        self._strengths = list(strengths)
        self._decaying = [
            (i, p, s)
            for i, (p, s) in enumerate(zip(self._parameters, self._strengths, strict=True))
            if isinstance(s, torch.Tensor) or s != 0.0
        ]

    def penalty(self) -> float:
        """Penalty at the present weights."""
        if not self._decaying:
            return 0.0
        with torch.no_grad():
            return sum(0.5 * float((s * p.double().square()).sum()) for _, p, s in self._decaying)

    def add_gradient(self, gradients: Sequence[torch.Tensor]) -> None:
        """Add the gradient of the penalty to `gradients`, in place."""
        for i, p, strength in self._decaying:
            gradients[i].add_(strength * p)


def _strength(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: torch.Tensor
) -> torch.Tensor | float:
    decay = float(group.get("weight_decay") or 0.0)
    # What has no gradient is not trained, and does not decay either.
    if parameter.grad is None or decay == 0.0 or float(group["lr"]) == 0.0:
        return 0.0
    if not group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW)):
        return decay
    state = optimizer.state.get(parameter, {})
    if "exp_avg_sq" not in state:
        return 0.0
    square = state.get("max_exp_avg_sq", state["exp_avg_sq"])
    correction = 1.0 - float(group["betas"][1]) ** float(state["step"])
    root: torch.Tensor = (square / max(correction, 1e-12)).sqrt()
    return root.add_(float(group["eps"])).mul_(decay)
