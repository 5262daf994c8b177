"""Noticing that a loss depends on weights that somebody else trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from hybridcore_torch.closures import Closure, Closures, parts


class Others:
    """Looks now and then through the graph of a loss for parameters that are not the trainer's own.

    Where these are written between two looks, as by the optimizer of the other network of a game,
    the way of the trainer's own weights so far does not tell where they should go: it turns as the
    others answer. Further on that way lies a lower loss of the batch, and a worse game.

    Attributes
    ----------
    found : set of int
        Identities of the parameters that were written between the last two looks.
    """

    def __init__(self) -> None:
        self.found: set[int] = set()
        self._steps, self._due = 0, 1
        # Versions of the others by identity, as the last look has found them.
        self._versions: dict[int, int] = {}

    def watched(self, closure: Closures, own: Sequence[torch.Tensor]) -> Closures:
        """Return `closure`, for the next step; where it is time for a look, it comes with one.

        That is in the first step, the second, the fourth and so on, as a graph can be large, or
        in the first one after it that calls the closure.
        """
        self._steps += 1
        if self._steps < self._due:
            return closure
        before, known = self._versions, {id(p) for p in own}
        present: dict[int, int] = {}

        def look(part: Closure) -> Closure:
            def watched() -> torch.Tensor:
                loss = part()
                for parameter in _parameters(loss):
                    self._versions, self._due = present, 2 * self._steps
                    one, version = id(parameter), parameter._version
                    if one not in known:
                        present[one] = version
                        self.found |= {one} if before.get(one, version) < version else set()
                return loss

            return watched

        first, *more = map(look, parts(closure))
        return [first, *more] if more else first


def _parameters(loss: object) -> Iterator[nn.Parameter]:
    """Parameters that `loss` depends on, by its graph, if it has one."""
    waiting, seen = [getattr(loss, "grad_fn", None)], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        # A function of the user's own may have anything of that name.
        if type(node).__name__ == "AccumulateGrad" and isinstance(node.variable, nn.Parameter):
            yield node.variable
        waiting += [before for before, _ in node.next_functions]
