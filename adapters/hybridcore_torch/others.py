"""Noticing that a loss depends on weights that somebody else trains."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from hybridcore_torch.closures import Closure, Closures, parts

# Most steps between two looks, and looks in which a parameter that was written has to be again.
SELDOM, CONFIRMED = 127, 4


class Others:
    """Looks now and then for parameters that a loss depends on and the trainer does not hold.

    Where these are written again and again, as by the optimizer of the other network of a game, the
    way of the trainer's own weights so far does not tell where they should go: it turns as the
    others answer. Further on that way lies a lower loss of the batch, and a worse game.

    A loss is taken to depend on what its graph leads to, and on what another trainer trains and is
    frozen meanwhile: as a critic in the step of the generator.

    Attributes
    ----------
    found : set of int
        Identities of the parameters that were written before two looks, one soon after the other.
    """

    def __init__(self) -> None:
        self.found: set[int] = set()
        self._steps, self._due = 0, 1
        # The others by identity, and their versions when they were looked at last.
        self._seen: dict[int, tuple[weakref.ref[nn.Parameter], int]] = {}
        # Those that were written before a look, and how many more looks have to confirm it.
        self._suspects: set[int] = set()
        self._left = 0

    def are_due(self) -> bool:
        """Count a step, and tell whether it is time for a look.

        That is after one step, two, four and so on up to `SELDOM`, as a graph can be large, in
        even and odd steps in turn, or in the first one after it that calls the closure.
        """
        self._steps += 1
        return self._steps >= self._due

    def watched(
        self, closure: Closures, own: Sequence[torch.Tensor], others: Sequence[nn.Parameter]
    ) -> Closures:
        """Return `closure` with a look at what its loss depends on.

        Parameters
        ----------
        closure : callable or sequence of callables
            The user's.
        own : sequence of Parameter
            What the trainer holds.
        others : sequence of Parameter
            What other trainers train.
        """
        looked_at = {id(p) for p in own}

        def look(part: Closure) -> Closure:
            def watched() -> torch.Tensor:
                loss = part()
                if getattr(loss, "grad_fn", None) is not None:
                    frozen = (p for p in others if not p.requires_grad)
                    self._look([*_parameters(loss), *frozen], looked_at)
                return loss

            return watched

        first, *more = map(look, parts(closure))
        return [first, *more] if more else first

    def _look(self, present: Sequence[nn.Parameter], looked_at: set[int]) -> None:
        for parameter in present:
            one, version = id(parameter), parameter._version
            if one in looked_at:
                continue
            looked_at.add(one)
            reference, before = self._seen.get(one, (None, version))
            self._seen[one] = weakref.ref(parameter), version
            if reference is None or reference() is not parameter or before == version:
                self._suspects.discard(one)
            elif one in self._suspects:
                self.found.add(one)
            else:
                self._suspects.add(one)
                self._left = CONFIRMED
        if self._left:
            self._left -= 1
            self._due = self._steps + 1
        else:
            self._suspects.clear()
            self._due = self._steps + (min(self._steps, SELDOM) | 1)


def _parameters(loss: torch.Tensor) -> Iterator[nn.Parameter]:
    """Parameters that `loss` depends on, by its graph."""
    waiting: list[Any] = [loss.grad_fn]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        # Nodes of users' own functions may have an attribute `variable` too.
        if type(node).__name__ == "AccumulateGrad" and isinstance(node.variable, nn.Parameter):
            yield node.variable
        waiting += [before for before, _ in node.next_functions]
