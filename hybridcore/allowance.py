"""Steps of the loop that may be left out, as outer steps or the learning rate make up for them."""

from __future__ import annotations

import math

from hybridcore.types import Directive

# How they were chosen is in the log of the proving ground.
# Predicted steps that an outer step at full strength stands for.
STANDS_FOR = 2.0
# Predicted steps that as many full ones as lie between two of them pay for, at full trust.
PAID = 4.0
# Flights are further apart than they have to be by so much at most.
SPREAD = 0.25
# A learning rate that is higher by less has not risen: it was computed anew.
ROUNDING = 1e-6
# Neither its multiples by squares, modulo 1, nor their sums come back to a pattern.
GOLDEN = 0.6180339887498949


class Allowance:
    """Predicted steps beside outer momentum: what earns them, and when they are taken.

    Two things earn them. An outer step stands for `STANDS_FOR` steps of the loop, times its
    strength. And where the learning rate has fallen, in every parameter group, full steps are taken
    at a higher one, up to the highest that there was: ``n`` of them at ``1 + p / n`` times the rate
    are as long a path as ``n + p`` of the loop's own. Where outer steps raise the loss of a batch,
    so do long ones of the optimizer: ``p`` falls with the trust in the former, from `PAID` to none
    at 1/2. And no more is paid for than flights have place for.

    Each full step pays once it has been taken, by the factor that it was taken at. What was earned
    is taken in flights: after enough full steps their batches are left out, and the weights stay
    where they are. How many full steps are enough varies, or of a loader that never shuffles the
    batches left out might be the same in every epoch. They are not validated, since one batch would
    say nothing: what they are worth was measured beforehand, over whole runs (entries 66 and 71 of
    the log), and was more on most work.

    Parameters
    ----------
    interval : int
        Full steps ``n`` between two outer steps.
    full_steps : int
        Least full steps between two flights; up to a quarter more are taken.
    most : int
        Predicted steps of a flight, at most.
    accumulation_steps : int
        Steps that an update of the weights takes: what stands for one is worth as many.

    Attributes
    ----------
    ahead : int
        Predicted steps that are left of the flight under way.
    paid : float
        Predicted steps ``p`` that the coming `interval` full steps pay for by their rate.
    """

    def __init__(
        self, interval: int, full_steps: int, most: int, accumulation_steps: int = 1
    ) -> None:
        self._interval, self._apart, self._most = interval, full_steps, most
        self._stands_for = STANDS_FOR * accumulation_steps
        self._most_paid = PAID * accumulation_steps
        self.ahead = self._flights = 0
        # Learning rates of the groups: now, the highest, and what may be gone up to.
        self._rates: tuple[float, ...] = ()
        self._highest: tuple[float, ...] = ()
        self._limits: tuple[float, ...] = ()
        self.restart()

    def restart(self) -> None:
        """Forget what was earned."""
        self.paid = self._earned = self._unsettled = 0.0
        self._full_steps = 0

    def pause(self) -> None:
        """Let no full step pay until the next call of :meth:`earn`."""
        self.paid = 0.0

    def rises(self, rates: tuple[float, ...]) -> bool:
        """Whether one of the groups' `rates` is higher than in the full step before."""
        pairs = zip(rates, self._rates, strict=False)
        return any(rate > before * (1.0 + ROUNDING) for rate, before in pairs)

    def see(self, rates: tuple[float, ...], *, scale: float, counts: bool) -> None:
        """Take in a full step.

        Parameters
        ----------
        rates : tuple of float
            Learning rates of the groups.
        scale : float
            Factor on them that the step was taken at.
        counts : bool
            Whether they count for the highest.
        """
        self._full_steps += 1
        # Settled with the next call of `earn`, or it would matter when full steps are read.
        self._unsettled += max(0.0, scale - 1.0)
        self._rates = rates
        if len(rates) != len(self._highest):
            self._highest = (0.0,) * len(rates)
        if counts:
            self._highest = tuple(map(max, self._highest, rates))

    def earn(self, strength: float, trust: float) -> None:
        """Settle what was earned, and at which rate the coming `interval` full steps are taken.

        Parameters
        ----------
        strength : float
            Strength in [0, 1] of the outer step before them, 0 if there was none.
        trust : float
            What outer steps have turned out to be worth, in [0, 1].
        """
        earned = self._stands_for * strength
        pairs = zip(self._rates, self._highest, strict=True)
        # A group that is not trained has all room.
        share = max((rate / highest for rate, highest in pairs if highest > 0.0), default=1.0)
        room = self._interval * (1.0 / share - 1.0) if share > 0.0 else math.inf
        # The full step that follows a flight does not count for the next.
        places = self._interval * self._most / ((1.0 + SPREAD / 2.0) * self._apart + 1.0)
        self.paid = max(0.0, min(self._most_paid * (2.0 * trust - 1.0), room, places - earned))
        self._earned += earned + self._unsettled
        self._unsettled = 0.0
        self._limits = self._highest

    def full_step(self, directive: Directive) -> Directive:
        """Return a full step at the rate that pays, which is the same until more is earned."""
        if not self.paid:
            return directive
        scale = 1.0 + self.paid / self._interval
        return directive._replace(learning_rate_scale=scale, highest_rates=self._limits)

    @property
    def until_flight(self) -> int | None:
        """Full steps until a flight may begin; None if nothing is earned, or none is allowed."""
        if min(self._earned, self._most) < 1.0:
            return None
        spread = SPREAD * (self._flights**2 * GOLDEN % 1.0)
        return max(0, math.ceil((1.0 + spread) * self._apart) - self._full_steps)

    def begin(self) -> None:
        """Begin the flight that is due."""
        self.ahead = min(int(self._earned), self._most)
        self._earned = min(self._earned - self.ahead, float(self._most))
        self._flights += 1

    def settled(self) -> None:
        """Take note that a full step has followed the flight."""
        self._full_steps = 0

    def state_dict(self) -> dict[str, list[float]]:
        """Return the whole state as plain numbers."""
        return {
            "counts": [self.ahead, self._full_steps, self._flights],
            "earned": [self._earned, self.paid, self._unsettled],
            "rates": list(self._rates),
            "highest": list(self._highest),
            "limits": list(self._limits),
        }

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Take back what :meth:`state_dict` returned."""
        self.ahead, self._full_steps, self._flights = map(int, state["counts"])
        self._earned, self.paid, self._unsettled = map(float, state["earned"])
        self._rates, self._highest = tuple(state["rates"]), tuple(state["highest"])
        self._limits = tuple(state["limits"])
