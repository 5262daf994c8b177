"""How much the present weights count in the running average of weights."""

from __future__ import annotations

# Full steps from one averaging to the next: neighbours are too alike to be worth the reading.
INTERVAL = 10
# The average is of about the last 1 / (DECAY + 1) of the run.
DECAY = 16


class Averaging:
    """Polynomial-decay averaging (Shamir & Zhang 2013, section 4), which needs no run length.

    The average follows the newest ``1 / (DECAY + 1)`` of the run, however long that is by now: the
    noise of single steps cancels, as it would under a decayed learning rate, and the beginning is
    forgotten. After a jump it starts over, uniformly, until it holds as much again.

    - *Predicts* the weights that a decayed rate would lead to.
    - *Pays* on mini-batches at a constant rate: plain's final held-out loss at 0.40 to 0.51 of its
      cost on an MLP, 0.58 to 0.68 on a CNN, 0.80 on a small language model (entry 15 of the log in
      ``benchmarks/proving_ground``).
    - *Hurts* nothing but the memory. Under a schedule that decays, and on smooth work, it lags
      behind or gains nothing: an exponential average comes to 1.00 and 1.01 there.
    - *Costs* one copy of the weights, read and written every tenth full step.
    - *Source*: Shamir & Zhang 2013, section 4.

    Attributes
    ----------
    count : int
        Averagings so far.
    since : int
        Averagings since the start or the last :meth:`restart`.
    """

    def __init__(self) -> None:
        self.count = 0
        self.since = 0

    def weight(self, taken: int) -> float:
        """Weight in [0, 1] of the weights after full step number `taken` of the phase; 0: none.

        A new average begins with the next step, whatever its number.
        """
        if self.since and taken % INTERVAL:
            return 0.0
        polynomial = (DECAY + 1) / (self.count + 1 + DECAY)
        return max(polynomial, 1.0 / (self.since + 1))

    def add(self) -> None:
        """Count an averaging that was done."""
        self.count += 1
        self.since += 1

    def restart(self) -> None:
        """Begin a new average: the weights are elsewhere now."""
        self.since = 0

    def until_due(self, taken: int) -> int:
        """Full steps after number `taken` of the phase until the one that ends in an averaging."""
        return (-taken - 1) % INTERVAL if self.since else 0

    def state_dict(self) -> dict[str, int]:
        """Return the counts."""
        return {"count": self.count, "since": self.since}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take back what :meth:`state_dict` returned."""
        self.count, self.since = int(state["count"]), int(state["since"])
