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
# Rows before those of which a direction is made: the gradient at the base and the newest change of
# it, which take turns, the base and the place of the next one, likewise, and the metric.
_FIRST = 5


def fits(state: dict[str, Any], parameters: Sequence[torch.Tensor], pairs: int) -> bool:
    """Whether `state` is that of a bank of so many pairs of `parameters`."""
    size = sum(p.numel() for p in parameters)
    return tuple(state["rows"].shape) == (_FIRST + 2 * pairs + 1, size)


def affordable(
    optimizer: torch.optim.Optimizer, parameters: Sequence[torch.Tensor], pairs: int, room: float
) -> int:
    """How many of `pairs` there is room for, in so many bytes.

    None where parameters are spread over devices or of several precisions, and where it is not
    known what the optimizer lowers.
    """
    if len({(p.device, p.dtype) for p in parameters}) != 1 or not is_known(optimizer):
        return 0
    size = max(4, parameters[0].element_size()) * max(1, sum(p.numel() for p in parameters))
    # One copy more for the strengths of a decay that is no part of the gradient.
    return max(0, min(pairs, (int(room // size) - _FIRST - 2) // 2))


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
    Memory is ``2 capacity + 6`` copies of the parameters in float32 at least, made at the first
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
            _FIRST + 2 * capacity + 1, size, dtype=kind, device=parameters[0].device
        )
        *first, self._metric = self._rows[:_FIRST].unbind()
        self._gradients, self._weights = first[:2], first[2:]
        # Displacements, changes in the metric, and the gradient in it.
        self._table = self._rows[_FIRST:]
        *vectors, self._steepest = self._table.unbind()
        self._products = self._table.new_empty(2, len(self._table))
        self._moved, self._changed = vectors[:capacity], vectors[capacity:]
        self._weight_views, self._gradient_views = (
            [self._split(row) for row in rows] for rows in (self._weights, self._gradients)
        )
        self.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        decay = [s.nbytes for s in self._decay.strengths if isinstance(s, torch.Tensor)]
        return self._rows.nbytes + sum(decay)

    def clear(self) -> None:
        """Forget the base, the pairs and the metric."""
        # Slots of the pairs, oldest first.
        self._order: list[int] = []
        # Which of the two places the base is in.
        self._turn = 0
        self._has_base = False
        self._squares = 0
        self._metric.zero_()
        self._is_metric = False
        # What is left in a slot counts zero times, and were it no number, would be no number then.
        self._table.zero_()
        # By slot, and last those with the gradient at the base.
        slots = self._capacity
        self._plain, self._scaled = np.zeros((slots, slots + 1)), np.zeros((slots + 1, slots + 1))
        self._decay = Decay(self._optimizer, self._parameters)

    def objective(self, loss: float) -> float:
        """`loss`, at the present weights, with what weight decay adds to it."""
        return loss + self._decay.penalty()

    @torch.no_grad()
    def take(self) -> None:
        """Make weights and gradients as they are the base, and keep the pair from the last one."""
        here, before = 1 - self._turn, self._turn
        torch._foreach_copy_(self._weight_views[here], self._parameters)
        views, gradient = self._gradient_views[here], self._gradients[here]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        torch._foreach_copy_(views, gradients)
        self._decay.add_gradient(views)
        if not self._is_metric:
            self._metric.addcmul_(gradient, gradient)
            self._squares += 1
        if self._has_base:
            slot = self._free_slot()
            torch.sub(self._weights[here], self._weights[before], out=self._moved[slot])
            change = torch.sub(gradient, self._gradients[before], out=self._gradients[before])
            self._order.append(slot)
            if self._is_metric:
                self._multiply(slot, here)
            else:
                self._changed[slot].copy_(change)
        # Last: where the step is abandoned the weights go back to the base before.
        self._turn, self._has_base = here, True

    @torch.no_grad()
    def products(self) -> Secants:
        """Inner products of the pairs, oldest first, and the gradient at the base."""
        if not self._is_metric:
            self._make_metric()
            for slot in self._order:
                self._gradients[1 - self._turn].copy_(self._changed[slot])
                self._multiply(slot, self._turn)
        places = np.array([*self._order, self._capacity])
        rows = places[:, None]
        return Secants(self._plain[rows[:-1], places], self._scaled[rows, places])

    @torch.no_grad()
    def reach(self, coefficients: NDArray[np.float64]) -> None:
        """Put the weights at the base plus `coefficients` (2 k + 1,) of the bank's vectors."""
        if not coefficients.any():
            self.back_to_base()
            return
        base = self._weights[self._turn]
        # By slot, and zero for those that hold nothing yet.
        shares, of_pairs, k = [0.0] * len(self._table), coefficients.tolist(), len(self._order)
        shares[-1] = of_pairs.pop()
        for slot, displacement, change in zip(self._order, of_pairs[:k], of_pairs[k:], strict=True):
            shares[slot], shares[self._capacity + slot] = displacement, change
        # The place of the next base is free until there is one.
        free = 1 - self._turn
        step = torch.mv(self._table.T, base.new_tensor(shares), out=self._weights[free])
        # Last, so that what is small beside the weights is added up first.
        step.add_(base)
        torch._foreach_copy_(self._parameters, self._weight_views[free])

    @torch.no_grad()
    def back_to_base(self) -> None:
        """Put the weights where the last pair ended."""
        torch._foreach_copy_(self._parameters, self._weight_views[self._turn])

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
        for view, p in zip(self._split(self._metric), self._parameters, strict=True):
            view.mul_(rates[id(p)])
        self._metric.div_(self._metric.mean())
        self._is_metric = True

    def _multiply(self, slot: int, turn: int) -> None:
        """Bring the products of the gradient, in place `turn`, and of the newest change up to date.

        That is the change of the pair in `slot`.
        """
        gradient, change = self._gradients[turn], self._gradients[1 - turn]
        torch.mul(gradient, self._metric, out=self._steepest)
        torch.mul(change, self._metric, out=self._changed[slot])
        # Row by row, as on a GPU TensorFloat-32 may be on for what is of more rows, and with `out`,
        # as autocast around the step would leave half precision of the rest.
        for row, out in zip((gradient, change), self._products, strict=True):
            torch.mv(self._table, row, out=out)
        with_gradient, with_change = self._products.cpu().numpy()
        k = self._capacity
        self._plain[:, k] = with_gradient[:k]
        self._scaled[:, k] = self._scaled[k] = with_gradient[k:]
        # Displacements and changes before them are in no direction.
        self._plain[slot, :k] = 0.0
        self._plain[:, slot] = with_change[:k]
        self._scaled[:k, slot] = self._scaled[slot, :k] = with_change[k:-1]

    def state_dict(self) -> dict[str, Any]:
        """Return pairs, base, metric and products, cloned."""
        return {
            "rows": self._rows.clone(),
            "order": list(self._order),
            "counts": [self._turn, self._has_base, self._squares, self._is_metric],
            "plain": torch.from_numpy(self._plain.copy()),
            "scaled": torch.from_numpy(self._scaled.copy()),
            "decay": [
                s.clone() if isinstance(s, torch.Tensor) else s for s in self._decay.strengths
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned for the same parameters."""
        self._rows.copy_(state["rows"])
        self._order = list(state["order"])
        self._turn, self._has_base, self._squares, self._is_metric = state["counts"]
        self._plain, self._scaled = (state[name].numpy().copy() for name in ("plain", "scaled"))
        device = self._rows.device
        self._decay.use(
            [s.to(device) if isinstance(s, torch.Tensor) else s for s in state["decay"]]
        )
