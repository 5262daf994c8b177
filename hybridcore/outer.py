"""Outer momentum: what real steps are worth where the path is too irregular for a jump."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybridcore.types import Action, Directive

# How they were chosen is in the log of the proving ground. A higher rate wins more under a schedule
# that decays, and under one that does not it leaves more noise in the weights than it found.
INTERVAL = 10
MOMENTUM = 0.8
RATE = 0.4
# Where fewer full steps lie ahead they are not worth beginning.
LEAST = 3 * INTERVAL
# The path is held against itself in the fifth of them, the tenth, the twentieth and so on, as a
# Gram matrix can cost more than a step.
# Two displacements had a cosine of 0.76 to 0.97 on smooth work, and 0.1 to 0.73 on mini-batches.
CHECK = 5
STRAIGHT = 0.8
# Full steps that one is worth at most, where the path is straight.
MOST_WORTH = RATE / (1.0 - MOMENTUM) - 1.0


class OuterMomentum:
    """Nesterov's momentum over the displacements of `INTERVAL` full steps each.

    This is the outer step of DiLoCo (Douillard et al. 2023, algorithm 1) and SNOO (2025) for one
    worker. With ``d`` the displacement of the full steps since the last outer step, and ``s`` the
    point where that one ended,

    ``m <- MOMENTUM * m + RATE * MOMENTUM * d,   s <- s + RATE * d + m``

    so that a steady displacement is continued ``RATE / (1 - MOMENTUM)`` times as far, while what
    is noise in it is averaged down. Where the learning rate falls, ``m`` falls with it.

    Everything is an affine combination of the newest snapshots: ``m`` is the last outer step less
    ``RATE * d``, so it stands in the bank if the bank holds the points before and after each outer
    step, and no copy of its own is needed.

    - *Predicts* that what ten steps have in common goes on.
    - *Pays* on mini-batches under a rate that decays: a speed-up of 1.12 in cost over the tuned
      loop over the noisy half of the proving ground; an MLP on Fashion-MNIST ends at a held-out
      loss of 0.3630 instead of 0.3751 (``benchmarks/results/cost-to-target-fashion.json``).
    - *Hurts* in the first fifth of a language model's training, where it is not taken (entry 31 of
      the log in ``benchmarks/proving_ground``), on little data, which it overfits sooner, and on
      the GRU of the ground, whose loss is flat: 0.94.
    - *Costs* no pass, two snapshots more, and processor time: 1.19 of plain's on the MLP.
    - *Source*: Douillard et al. 2023, algorithm 1; Zhang et al. 2019.

    Attributes
    ----------
    active : bool
        Whether outer steps are taken now.
    pending : bool
        Whether the next step begins with one.
    straight : bool
        Whether the path was so smooth in between that jumps should have it.
    """

    def __init__(self) -> None:
        self.active = False
        self.pending = False
        self.straight = False
        self._snapshots = 0
        self._learning_rate = 0.0

    def begin(self) -> None:
        """Begin without momentum, from the next snapshot on."""
        self.active, self.straight, self._snapshots = True, False, 0

    def stop(self) -> None:
        """Take no more outer steps."""
        self.active = self.pending = False

    def until_due(self, taken: int) -> int:
        """Full steps after number `taken` until one that begins or ends with work for this."""
        return 0 if self.pending else (-taken - 1) % INTERVAL

    @property
    def full_step(self) -> Directive:
        """Full step that is due: it ends in a snapshot, the first one of a bank of its own."""
        checks, left = divmod(self._snapshots + 1, 2 * CHECK)
        checked = checks > 0 and left == 0 and checks & (checks - 1) == 0
        return Directive(Action.FULL, snapshot=True, fresh_bank=self._snapshots == 0, gram=checked)

    def take(self, gram: NDArray[np.float64] | None) -> bool:
        """Take note that it was carried out; True if that ends the outer steps.

        They start from the first snapshot, and end where the path is straight.

        Parameters
        ----------
        gram : (groups, m, m) ndarray of float64 or None
            Gram matrices of the bank, where they were asked for.
        """
        self._snapshots += 1
        self.pending = self._snapshots > 1
        if gram is not None:
            # The newest four snapshots, oldest first, begin and end two displacements.
            moved = np.array([[-1.0, 1.0, 0.0, 0.0], [0.0, 0.0, -1.0, 1.0]])
            (older, between), (_, newer) = moved @ gram.sum(axis=0)[-4:, -4:] @ moved.T
            self.straight = bool(between > STRAIGHT * np.sqrt(older * newer))
        if self.straight:
            self.stop()
        return self.straight

    def step(self, learning_rate: float) -> Directive:
        """Return the outer step that is pending; :meth:`stepped` says that it has been taken.

        Parameters
        ----------
        learning_rate : float
            Learning rate of the last full step.
        """
        ahead = RATE * (1.0 + MOMENTUM)
        # Oldest first: where the last outer step began to be prepared, before it, after it, now.
        coefficients = np.array([0.0, 0.0, 1.0 - ahead, ahead])
        if self._snapshots >= len(coefficients):
            fallen = learning_rate / self._learning_rate if self._learning_rate > 0.0 else 1.0
            kept = MOMENTUM * min(1.0, fallen)
            coefficients[:3] += kept * np.array([RATE - 1.0, -RATE, 1.0])
        return Directive(Action.MOVE, coefficients[None, -self._snapshots :], snapshot=True)

    def stepped(self, learning_rate: float) -> None:
        """Take note that the outer step of this `learning_rate` has been taken."""
        self.pending, self._learning_rate = False, learning_rate
        self._snapshots += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state as plain numbers."""
        return {
            "active": self.active,
            "pending": self.pending,
            "straight": self.straight,
            "snapshots": self._snapshots,
            "learning_rate": self._learning_rate,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        self.active, self.pending = bool(state["active"]), bool(state["pending"])
        self.straight, self._snapshots = bool(state["straight"]), int(state["snapshots"])
        self._learning_rate = float(state["learning_rate"])
