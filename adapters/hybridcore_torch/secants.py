"""Secant pairs on the parameters' own device, and the algebra that needs the tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hybridcore import Secants
from hybridcore_torch.decay import Decay, is_known

# Of the root mean square of a coordinate's gradients, relative to their mean over all coordinates.
_FLOOR = 0.01
# Rows before the pairs: base, next, and their gradients, and the metric.
_FIRST = 5


def fits(state: dict[str, Any], parameters: Sequence[torch.Tensor], pairs: int) -> bool:
    """Whether `state` is that of a bank of so many pairs of `parameters`."""
    size = sum(p.numel() for p in parameters)
    return tuple(state["rows"].shape) == (_FIRST + 2 * pairs, size)


def affordable(
    optimizer: torch.optim.Optimizer, parameters: Sequence[torch.Tensor], pairs: int, room: float
) -> int:
    """How many of `pairs` there is room for, in so many bytes.

    None where parameters are spread over devices or of several precisions, and where it is not
    known what the optimizer's weight decay adds to the loss.
    """
    if len({(p.device, p.dtype) for p in parameters}) != 1 or not is_known(optimizer):
        return 0
    size = max(4, parameters[0].element_size()) * max(1, sum(p.numel() for p in parameters))
    # One copy more for the strengths of a decay that is no part of the gradient.
    return max(0, min(pairs, (int(room // size) - _FIRST - 1) // 2))


class SecantBank:
    """The newest `capacity` pairs of a displacement and the change of the gradient over it.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Whose parameters move, each in proportion to its learning rate, and whose weight decay is
        part of the objective.
    parameters : sequence of Parameter
        What moves, all on one device.
    capacity : int
        Pairs that are kept; an older one makes room for a newer one.

    Notes
    -----
    Memory is ``2 capacity + 5`` copies of the parameters in float32 at least, made at the first
    pair, and one more where weight decay is decoupled. The metric is the inverse root of the mean
    square of the gradients that the pairs saw when their products were first asked for, as in Adam,
    and stays until the bank is emptied.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[torch.nn.Parameter],
        capacity: int,
    ) -> None:
        self._optimizer = optimizer
        self._parameters: list[torch.Tensor] = list(parameters)
        self._capacity = capacity
        size = sum(p.numel() for p in parameters)
        kind = torch.float64 if parameters[0].dtype is torch.float64 else torch.float32
        self._rows = torch.zeros(
            _FIRST + 2 * capacity, size, dtype=kind, device=parameters[0].device
        )
        self._views = [self._split(row) for row in self._rows[:_FIRST]]
        self._moved = self._rows[_FIRST : _FIRST + capacity]
        self._changed = self._rows[_FIRST + capacity :]
        self.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        decay = [s.nbytes for s in self._decay.strengths if isinstance(s, torch.Tensor)]
        return self._rows.nbytes + sum(decay)

    def clear(self) -> None:
        """Forget the base, the pairs and the metric."""
        self._order: list[int] = []
        # Rows of the base and its gradient, and where the next ones go.
        self._base, self._next = (0, 1), (2, 3)
        self._has_base = False
        self._squares = 0
        self._metric = self._rows[4].zero_()
        self._is_metric = False
        self._plain = np.zeros((self._capacity, self._capacity))
        self._scaled = np.zeros((self._capacity, self._capacity))
        self._decay = Decay(self._optimizer, self._parameters)

    def objective(self, loss: float) -> float:
        """`loss`, at the present weights, with what weight decay adds to it."""
        return loss + self._decay.penalty()

    @torch.no_grad()
    def take(self) -> None:
        """Make weights and gradients as they are the base, and keep the pair from the last one."""
        weights, gradient = self._next
        torch._foreach_copy_(self._views[weights], self._parameters)
        views = self._views[gradient]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        torch._foreach_copy_(views, gradients)
        self._decay.add_gradient(views)
        if self._has_base:
            old_weights, old_gradient = self._base
            slot = self._free_slot()
            torch.sub(self._rows[weights], self._rows[old_weights], out=self._moved[slot])
            torch.sub(self._rows[gradient], self._rows[old_gradient], out=self._changed[slot])
            self._order.append(slot)
            if self._is_metric:
                self._multiply(slot)
        if not self._is_metric:
            self._metric.addcmul_(self._rows[gradient], self._rows[gradient])
            self._squares += 1
        self._base, self._next, self._has_base = self._next, self._base, True

    @torch.no_grad()
    def products(self) -> Secants:
        """Inner products of the pairs, oldest first, and the gradient at the base."""
        if not self._is_metric:
            self._make_metric()
            for slot in self._order:
                self._multiply(slot)
        gradient = self._rows[self._base[1]]
        scaled = gradient * self._metric
        found = (self._moved @ gradient, self._changed @ scaled, torch.dot(gradient, scaled)[None])
        with_moved, with_changed, own = self._read(found)
        k, order = len(self._order), np.array(self._order, dtype=np.intp)
        secants = Secants(np.zeros((k, k + 1)), np.zeros((k + 1, k + 1)))
        secants.plain[:, :k] = self._plain[np.ix_(order, order)]
        secants.plain[:, k] = with_moved[order]
        secants.scaled[:k, :k] = self._scaled[np.ix_(order, order)]
        secants.scaled[:k, k] = secants.scaled[k, :k] = with_changed[order]
        secants.scaled[k, k] = own[0]
        return secants

    @torch.no_grad()
    def reach(self, coefficients: NDArray[np.float64]) -> None:
        """Put the weights at the base plus `coefficients` (2 k + 1,) of the bank's vectors."""
        base, gradient = (self._rows[row] for row in self._base)
        k = len(self._order)
        if coefficients.any():
            # By slot, and zero for those that hold nothing yet.
            slots = np.zeros((2, self._capacity))
            slots[0, self._order], slots[1, self._order] = coefficients[:k], coefficients[k:-1]
            of_moved, of_changed = torch.from_numpy(slots).to(base)
            # The place of the next base is free until there is one.
            row = self._next[0]
            step = torch.mv(self._changed.T, of_changed, out=self._rows[row])
            step.add_(gradient, alpha=float(coefficients[-1])).mul_(self._metric)
            step.addmv_(self._moved.T, of_moved).add_(base)
            torch._foreach_copy_(self._parameters, self._views[row])
        else:
            self.back_to_base()

    @torch.no_grad()
    def back_to_base(self) -> None:
        """Put the weights where the last pair ended."""
        torch._foreach_copy_(self._parameters, self._views[self._base[0]])

    def _split(self, row: torch.Tensor) -> list[torch.Tensor]:
        parts = torch.split(row, [p.numel() for p in self._parameters])
        return [part.view(p.shape) for part, p in zip(parts, self._parameters, strict=True)]

    def _free_slot(self) -> int:
        return self._order.pop(0) if len(self._order) == self._capacity else len(self._order)

    def _make_metric(self) -> None:
        root = self._metric.div_(self._squares).sqrt_()
        root.add_(_FLOOR * root.mean() + torch.finfo(root.dtype).tiny)
        self._metric.reciprocal_()
        # What the user trains more slowly, or not at all, moves less here too.
        rates = {id(p): float(g["lr"]) for g in self._optimizer.param_groups for p in g["params"]}
        for view, p in zip(self._views[4], self._parameters, strict=True):
            view.mul_(rates[id(p)])
        self._metric.div_(self._metric.mean())
        self._is_metric = True

    def _multiply(self, slot: int) -> None:
        """Bring the products of the pair in `slot` with all others up to date."""
        moved, changed = self._moved[slot], self._changed[slot]
        scaled = changed * self._metric
        found = (self._moved @ changed, self._changed @ moved, self._changed @ scaled)
        self._plain[:, slot], self._plain[slot], products = self._read(found)
        self._scaled[:, slot] = self._scaled[slot] = products

    def _read(self, products: tuple[torch.Tensor, ...]) -> tuple[NDArray[np.float64], ...]:
        """Bring three vectors of products here in one transfer, the first two one for each slot."""
        values = torch.cat(products).double().cpu().numpy()
        k = self._capacity
        return values[:k], values[k : 2 * k], values[2 * k :]

    def state_dict(self) -> dict[str, Any]:
        """Return pairs, base, metric and products, cloned."""
        return {
            "rows": self._rows.clone(),
            "order": list(self._order),
            "base": [list(self._base), list(self._next)],
            "counts": [self._has_base, self._squares, self._is_metric],
            "products": torch.from_numpy(np.stack((self._plain, self._scaled))),
            "decay": [
                s.clone() if isinstance(s, torch.Tensor) else s for s in self._decay.strengths
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned for the same parameters."""
        self._rows.copy_(state["rows"])
        self._order = list(state["order"])
        base, following = state["base"]
        self._base, self._next = (base[0], base[1]), (following[0], following[1])
        self._has_base, self._squares, self._is_metric = state["counts"]
        self._plain, self._scaled = (products.copy() for products in state["products"].numpy())
        device = self._rows.device
        self._decay.strengths = [
            s.to(device) if isinstance(s, torch.Tensor) else s for s in state["decay"]
        ]
