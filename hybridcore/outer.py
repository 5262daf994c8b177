"""Outer momentum: what real steps are worth where the path is too irregular for a jump."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybridcore.allowance import Allowance
from hybridcore.trial import LOST
from hybridcore.types import FULL_STEP, NAN, Action, Directive, Observation

# How they were chosen is in the log of the proving ground.
INTERVAL = 10
# How many times as far the outer point goes as the full steps between two of its steps.
REACH = 3.0
# Share of the average of outer points in the weights that are trained.
SHARE = 0.8
RATE = REACH * (1.0 - SHARE)
# Weight of the newest outer point in the average, until the average is of about the last half.
NEWEST = 0.2
# Share of the highest learning rate that they have had to which it has to fall for them to end.
ANNEALED = 0.15
# Trust before an outer step has been weighed, and the least, at which they go on being weighed.
TRUST, LEAST_TRUST = 0.5, 0.1
# Mean rise of the loss over them, in mean differences of the loss from batch to batch, that leaves
# no trust; where it does not rise there is full trust.
UNBEARABLE = 0.05
# Each of so many is weighed at first, and then one in `SELDOM`; the mean is of about as many.
WEIGHED, SELDOM = 10, 16
# Weight of what is newest in slow means, and how many mean differences it counts for at most.
SLOW, MOST = 0.02, 3.0
# How many times as much a fall may count for: losses fall steeply at first, and the mean with them.
MOST_FALL = 6.0
# Rise of the slow mean of losses above its lowest, in mean differences, from which on a loss that
# can be negative is not what training lowers.
RISEN = 1.0
# Losses in a row that are so many mean differences above their slow mean: other data have come.
SHIFTED, HIGH = 5, 3.0
# Displacements since then, or since the rate last rose, from which on the loss has a level.
LEVEL = 5
# Of a share of one batch in ten, as it is told by a momentum of 0.9.
ROUNDING = 1e-9
# Where fewer displacements lie ahead they are not worth beginning.
LEAST = 3
# The path is held against itself in the fifth of them, the tenth, the twentieth and every fortieth,
# as a Gram matrix can cost more than a step.
# Two displacements had a cosine of 0.76 to 0.97 on smooth work, and 0.1 to 0.73 on mini-batches.
CHECK = 5
STRAIGHT = 0.8
# What each full step between two of them is worth at most beyond itself, on a straight path.
MOST_WORTH = REACH - 1.0


def newest_weight(number: int) -> float:
    """Weight in (0, 1] of the outer point in the average, in outer step `number`, from 1."""
    return min(NEWEST, 2.0 / (number + 2.0))


def hastening(share: float, forgetting: float, batches: int = 1) -> float:
    """How many times as far an average over batches has to move, to forget so much faster.

    As if each batch had counted `forgetting` times as much, for 1 / `INTERVAL` at most: averages of
    fewer batches than lie between two outer steps have come along before the next one. After ``n``
    batches of a share ``p`` an average has kept ``(1 - p)^n`` of what it was.

    Parameters
    ----------
    share : float
        Weight in [0, 1] of the newest batch in the average.
    forgetting : float
        As in :class:`hybridcore.Directive`, at least 1; infinite for the most there is.
    batches : int
        How many batches came in since it was as it was before.

    Returns
    -------
    float
        At least 1, and 1 where it is to move as ever.
    """
    if not share or not batches or share * INTERVAL > 1.0 - ROUNDING:
        return 1.0
    faster = min(share * forgetting, 1.0 / INTERVAL)
    kept, kept_at_most = (1.0 - share) ** batches, (1.0 - faster) ** batches
    return (1.0 - kept_at_most) / (1.0 - kept)


class OuterMomentum:
    """Primal averaging over the displacements of `INTERVAL` updates each.

    This is the iteration of Schedule-Free (Defazio et al. 2024, equations 3 to 5) with the
    displacement ``d`` of ten full steps in the place of a gradient step: the outer point ``z`` goes
    further than they did, ``x`` is the average of where it was, and training goes on between them,
    at ``y``:

    ``z <- z + REACH * d,   x <- x + c * (z - x),   y <- (1 - SHARE) * z + SHARE * x``

    ``c`` is :func:`newest_weight`. It falls as the inverse of the number of outer steps, so that
    the average always is of the same part of the run, and what is noise in the displacements
    cancels the better the longer the run is; with a constant ``c`` this would be the outer step of
    DiLoCo and SNOO, Nesterov's momentum. With ``m = SHARE * (x after - x before)`` the same reads

    ``m <- (1 - c before) * c / (c before) * m + REACH * SHARE * c * d,   y <- y + RATE * d + m``

    So everything is an affine combination of the newest snapshots: the old ``m`` is the last outer
    step less ``RATE * d`` of then, which stands in the bank if the bank holds the points before and
    after each outer step, and no copy of its own is needed.

    A learning rate that falls does what the average is for, and a push that comes after it has
    fallen is noise that nothing averages away. So an outer step fades with the rate: at `strength`
    ``s``, ``d`` adds ``s`` times as much to ``m``, the old ``m`` is also multiplied by the share, 1
    at most, to which rate times strength have fallen since the last one, and

    ``y <- y + (1 - s + s * RATE) * d + m``

    Where a batch stays for several steps there are none: that is the controller's to know. While
    the rate rises, and for `interval` full steps after that, there are none, as they would
    take the weights further than the loop itself dares to yet; then they begin without momentum. So
    they do where `SHIFTED` losses in a row are high, as momentum is of data that come no more then.

    An outer step is taken at the end of the last of the ten full steps, or, where it is weighed, on
    the next batch. So the weights between two steps may be where one has led, with the running
    statistics of before it (entry 75 of the log has what that does to the held-out loss).

    How far a push may go shows on a batch, whose loss is evaluated before and after it. The mean
    rise ``r``, in mean differences of the loss from one full step to the next, leaves a `trust` by
    which the strength is multiplied. With ``v`` the mean square of the rise over the ``n`` outer
    steps that were weighed, of which about the last `WEIGHED` count, it is the posterior mean of
    ``1 - r / UNBEARABLE`` under a normal prior of mean `TRUST` and deviation 1,

    ``e = n / (n + v / UNBEARABLE^2),   (1 - e) * TRUST + e * (1 - r / UNBEARABLE)``

    within `LEAST_TRUST` and 1, with rises of at most one difference. So rises that are other ones
    each time say little. An outer step that leads to no number, on a batch that has one before it
    or on the first two batches after it, is taken back, as exactly as the snapshots are kept, and
    is the last one for the time being. Of a loss that has been negative there are none either while
    a mean of about the last 50 lies more than one difference above its lowest since the rate last
    rose: then it is not what training lowers, as that of a policy gradient.

    It stands for steps of the loop, and where the rate has fallen full steps may be taken at a
    higher one, which pays for more: these are predicted (:class:`hybridcore.allowance.Allowance`),
    those that the rate pays for also after it is annealed and outer steps have ended.

    - *Predicts* that what tens of steps have in common goes on.
    - *Pays* on mini-batches, most so at a constant rate and evaluated at the running average: a
      speed-up in cost over the tuned loop of 1.31 and 1.22 on two MLPs, 1.25 on a CNN and 1.19 on
      a small language model, and a loss, 0.89, on a recurrent network under a decay that ends at
      zero (5 seeds, by ``python -m benchmarks.proving_ground table``).
    - *Hurts* in the first fifth of a language model's training, where it is not taken (entry 31 of
      the log there), and on little data, which it overfits sooner. At rates well above the best one
      it still does, less since there is trust (entries 67 and 68) and, where the rate falls, a
      little more since it goes on until that is annealed (entry 70).
    - *Costs* twenty forward passes in the first ten outer steps and later two in 16 of them, and
      saves one pass in six at full strength, one in five where the rate falls; two snapshots more,
      and the processor time of a move every tenth step.
    - *Source*: Defazio et al. 2024, equations 3 to 5; Douillard et al. 2023, algorithm 1.

    Parameters
    ----------
    full_steps, most : int
        Of the allowance.
    accumulation_steps : int
        Full steps that an update of the weights takes, as gradients are summed over them.

    Attributes
    ----------
    interval : int
        Full steps of a displacement: `INTERVAL` updates.
    active : bool
        Whether outer steps are taken now.
    pending : bool
        Whether one is due. Between two steps, where it is to be weighed, or an error has kept it
        from being taken: the next step begins with it.
    straight : bool
        Whether the path was so smooth in between that jumps should have it.
    allowance : Allowance
        Steps that may be predicted.
    loss : float
        Mean loss of about the last `interval` full steps; NaN before the first.
    trust : float
        How far a push may go, in [0.1, 1], by what outer steps have done to the loss so far.
    strength : float
        In [0, 1]: `trust` at the highest learning rate that outer steps have had, 0 where it is
        annealed, where it has risen or other data have come in the last `interval` full steps, and
        where a negative loss rises.
    """

    def __init__(self, full_steps: int, most: int, accumulation_steps: int = 1) -> None:
        self.interval = INTERVAL * accumulation_steps
        self.active = False
        self.pending = False
        self.straight = False
        self.allowance = Allowance(self.interval, full_steps, most, accumulation_steps)
        self.loss = NAN
        self.strength = TRUST
        self._snapshots = 0
        self._highest = self._learning_rate = 0.0
        # Full steps since the rate last rose or other data came, up to LEVEL
        # displacements; high losses in a row.
        self._level, self._high = LEVEL * self.interval, 0
        # Strength at the last outer step, and that times the learning rate.
        self._last, self._pushed = 1.0, 0.0
        # Outer steps weighed, and since then; the mean and the mean square of the rise over them.
        self._weighed = self._since = 0
        self._rise = self._square = 0.0
        self.trust = TRUST
        # Loss of the newest full step, and its mean difference from one to the next.
        self._newest, self._difference = NAN, 0.0
        # Slow mean of the loss, and its lowest since it had no level: infinite until a loss was
        # negative.
        self._mean, self._lowest = NAN, math.inf
        # Bad batches since the newest outer step, -1 once there was a good one.
        self._doubt = -1
        # Loss of the batch before the newest outer step while that is being weighed.
        self._here = NAN

    def see(self, observation: Observation, directive: Directive = FULL_STEP) -> None:
        """Take in the loss and the learning rate of a full step, as `directive` asked for it."""
        loss, self._doubt = observation.loss, -1
        rates = (observation.learning_rate, *observation.other_rates)
        known = math.isfinite(self.loss)
        high = known and loss > self._mean + HIGH * self._difference
        self._high = self._high + 1 if high else 0
        # A loss that has been negative is held against its lowest below.
        shifted = self._high == SHIFTED and self._has_level and math.isinf(self._lowest)
        risen = known and self.allowance.rises(rates)
        self._level = 0 if risen or shifted else min(self._level + 1, LEVEL * self.interval)
        self._learning_rate = learning_rate = max(rates)
        if known:
            self._follow(loss)
        else:
            self.loss = self._newest = self._mean = loss
        if not self._has_level:
            self._mean = self.loss
        if math.isfinite(self._lowest):
            self._lowest = min(self._lowest, self._mean) if self._has_level else self._mean
        self.allowance.see(rates, scale=directive.scale_at(rates), counts=self.active)
        if self.active and learning_rate > self._highest:
            self._highest = learning_rate
        left = max(0.0, (self._share - ANNEALED) / (1.0 - ANNEALED))
        falls = self._mean - self._lowest <= RISEN * self._difference
        self.strength = self.trust * left if falls and self._level >= self.interval else 0.0

    def _follow(self, loss: float) -> None:
        """Take `loss` into the means, where there are some."""
        difference = abs(loss - self._newest)
        if self._difference > 0.0:
            # A spike would hide every rise for a while, and must not pass for one.
            most = MOST * self._difference
            self._difference += SLOW * (min(difference, most) - self._difference)
            self._mean += SLOW * min(max(loss - self._mean, -MOST_FALL * most), most)
        else:
            self._difference = difference
        self._newest = loss
        self.loss += (loss - self.loss) / self.interval

    def raise_losses(self, by: float) -> None:
        """Take note that losses are higher `by` from now on, as one was negative."""
        self.loss += by
        self._newest += by
        self._here += by
        self._mean += by
        self._lowest = min(self._lowest + by, self._mean)

    def weigh(self, after: float) -> None:
        """Learn from the loss of the batch after the newest outer step, which is in the balance."""
        before, self._here = self._here, NAN
        if not math.isfinite(after):
            self._doubt = LOST
            return
        # One batch can be anything.
        self._learn(min(1.0, max(-1.0, (after - before) / self._difference)))
        self.allowance.earn(self.strength, self.trust)

    def _learn(self, rise: float) -> None:
        self._weighed = min(self._weighed + 1, WEIGHED)
        self._rise += (rise - self._rise) / self._weighed
        self._square += (rise * rise - self._square) / self._weighed
        self._judge()

    def _judge(self) -> None:
        """Bring the trust up to date."""
        known = self._weighed * UNBEARABLE**2
        evidence = known / (known + self._square) if known else 0.0
        trust = (1.0 - evidence) * TRUST + evidence * (1.0 - self._rise / UNBEARABLE)
        self.trust = min(1.0, max(LEAST_TRUST, trust))

    @property
    def forgetting(self) -> float:
        """How many times as fast averages over steps of what layers see have to forget.

        At full strength an average of very many steps becomes one of about `INTERVAL`, which is
        more than the way of the weights alone asks for, and better (entry 85 of the log).
        """
        # The first snapshot begins a displacement, the second ends it, and the third is of a step.
        pushed = self.active and self._snapshots > 2
        return 1.0 + self._last * (INTERVAL - 1.0) if pushed else 1.0

    @property
    def annealed(self) -> bool:
        """Whether the learning rate is down to `ANNEALED` of the highest they have had."""
        return self._highest > 0.0 and self._learning_rate <= ANNEALED * self._highest

    def begin(self) -> None:
        """Begin without momentum, from the next snapshot on."""
        if not self.active:
            self.allowance.restart()
        self.allowance.pause()
        self.active, self.straight, self._snapshots = True, False, 0

    def stop(self) -> None:
        """Take no more outer steps."""
        self.active = self.pending = False
        self._doubt, self._here = -1, NAN
        self.allowance.restart()
        self.allowance.ahead = 0

    def is_due(self, taken: int) -> bool:
        """Whether the full step after number `taken` is one of those that may end in a snapshot."""
        return (taken + 1) % self.interval == 0

    def until_due(self, taken: int) -> int:
        """Full steps after number `taken` until one that begins or ends with work for this."""
        flight = self.allowance.until_flight if self.active else None
        until = (-taken - 1) % self.interval
        return until if flight is None else min(until, flight)

    @property
    def full_step(self) -> Directive:
        """Full step that is due: it ends in a snapshot, the first one of a bank of its own."""
        checks, left = divmod(self._snapshots + 1, 2 * CHECK)
        checked = left == 0 and (checks in (1, 2, 4) or (checks > 0 and checks % 8 == 0))
        first = self._snapshots == 0
        exact = checked or (self.to_be_weighed and not first)
        return Directive(Action.FULL, snapshot=True, fresh_bank=first, gram=checked, exact=exact)

    def take(self, gram: NDArray[np.float64] | None) -> bool:
        """Take note that it was carried out; True if that ends the outer steps.

        They start from the first snapshot, and end where the path is straight.

        Parameters
        ----------
        gram : (groups, m, m) ndarray of float64 or None
            Gram matrices of the bank, where they were asked for.
        """
        self._snapshots += 1
        ends_displacement = self._snapshots > 1
        self.pending = ends_displacement and self.strength > 0.0
        if gram is not None:
            # The newest four snapshots, oldest first, begin and end two displacements.
            moved = np.array([[-1.0, 1.0, 0.0, 0.0], [0.0, 0.0, -1.0, 1.0]])
            (older, between), (_, newer) = moved @ gram.sum(axis=0)[-4:, -4:] @ moved.T
            # Where the path stands still rounding can take them below zero.
            lengths = math.sqrt(max(older, 0.0) * max(newer, 0.0))
            self.straight = bool(between > STRAIGHT * lengths > 0.0)
        if self.straight:
            self.stop()
        elif ends_displacement and not self.pending:
            # A loss below zero has begun to rise in this very step.
            self.begin()
        return self.straight

    def step(self) -> Directive:
        """Return the outer step that is pending; :meth:`stepped` says that it has been taken."""
        number = self._snapshots // 2
        newest, before = newest_weight(number), newest_weight(number - 1)
        ahead = 1.0 + self.strength * (RATE + REACH * SHARE * newest - 1.0)
        # Oldest first: where the last outer step began to be prepared, before it, after it, now.
        coefficients = [0.0, 0.0, 1.0 - ahead, ahead]
        if self._snapshots >= len(coefficients):
            fallen = min(1.0, self._push / self._pushed) if self._pushed > 0.0 else 0.0
            kept = (1.0 - before) * newest / before * fallen
            rate = 1.0 + self._last * (RATE - 1.0)
            for index, share in enumerate((rate - 1.0, -rate, 1.0)):
                coefficients[index] += kept * share
        return Directive(Action.MOVE, np.array([coefficients[-self._snapshots :]]), snapshot=True)

    @property
    def to_be_weighed(self) -> bool:
        """Whether the next outer step should be weighed.

        Not while the loss is the same in every step, as there is nothing to hold a rise against.
        """
        due = self._weighed < WEIGHED or self._since >= SELDOM
        return due and self._difference > 0.0

    def stepped(self, before: float = NAN) -> None:
        """Take note that the outer step has been taken.

        It is to be weighed if the loss of the batch `before` it is a number.
        """
        self.pending = False
        self._last, self._pushed = self.strength, self._push
        self._snapshots += 1
        self._doubt = 0
        if math.isfinite(before):
            self._here, self._since = before, 1
        else:
            self._since += 1
            self.allowance.earn(self.strength, self.trust)

    @property
    def in_balance(self) -> bool:
        """Whether the newest outer step is being weighed."""
        return math.isfinite(self._here)

    def count_bad(self) -> None:
        """Take note of a bad batch."""
        if self._doubt >= 0:
            self._doubt += 1

    @property
    def dead_end(self) -> bool:
        """Whether the newest outer step led to no number, and has to be taken back."""
        return self._doubt >= LOST

    @property
    def unproven(self) -> bool:
        """Whether no good batch has followed the newest outer step yet."""
        return self._doubt >= 0

    @property
    def unfinished(self) -> bool:
        """Whether the next step begins with an outer step, or with what is left of one."""
        return self.pending or self.in_balance or self.dead_end

    def taken_back(self) -> None:
        """Take note that it has been, and take no more for now."""
        self._learn(1.0)
        self.stop()

    def coast(self) -> None:
        """Take no more outer steps, and predict only what the rate pays for."""
        if not self.active:
            return
        # There are no outer steps before they begin anew.
        self._last = 0.0
        if self._level < self.interval:
            # It rises.
            self.allowance.pause()
            return
        self.allowance.earn(0.0, self.trust)
        if not self.allowance.paid:
            self.stop()

    @property
    def _has_level(self) -> bool:
        return self._level == LEVEL * self.interval

    @property
    def _share(self) -> float:
        return self._learning_rate / self._highest if self._highest > 0.0 else 1.0

    @property
    def _push(self) -> float:
        # A rate of zero throughout says nothing.
        return self.strength * (self._learning_rate or 1.0)

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state as plain numbers."""
        return {
            "active": self.active,
            "pending": self.pending,
            "straight": self.straight,
            "snapshots": self._snapshots,
            "allowance": self.allowance.state_dict(),
            "loss": self.loss,
            "strength": [self.strength, self._last],
            "rates": [self._highest, self._learning_rate, self._pushed],
            "level": self._level,
            "high": self._high,
            "weighed": [self._weighed, self._since],
            "trust": [self._rise, self._square, self._newest, self._difference],
            "means": [self._mean, self._lowest],
            "doubt": [self._doubt, self._here],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        self.active, self.pending = bool(state["active"]), bool(state["pending"])
        self.straight, self._snapshots = bool(state["straight"]), int(state["snapshots"])
        strengths = np.atleast_1d(state.get("strength", TRUST)).tolist()
        self.strength, self._last = strengths[0], strengths[-1]
        rates = map(float, state.get("rates", (0.0, 0.0, 0.0)))
        self._highest, self._learning_rate, self._pushed = rates
        # States from before the rate paid for predicted steps hold nothing of that, and those from
        # before outer steps stood for any no loss either.
        *counts, earned, loss = state.get("ahead", (0, 0, 0, 0.0, NAN))
        before = {
            "counts": counts,
            "earned": [earned, 0.0, 0.0],
            "rates": [self._learning_rate],
            "highest": [self._highest],
            "limits": [],
        }
        self.allowance.load_state_dict(state.get("allowance", before))
        self.loss = float(state.get("loss", loss))
        if "trust" not in state:
            # What was kept by another reach is no momentum now, and had all trust.
            self._pushed, self.strength = 0.0, TRUST * self.strength
        self._weighed, self._since = map(int, state.get("weighed", (0, 0)))
        figures = map(float, state.get("trust", (0.0, 0.0, self.loss, 0.0)))
        self._rise, self._square, self._newest, self._difference = figures
        self._mean, self._lowest = map(float, state.get("means", (self.loss, math.inf)))
        self._judge()
        self._level, self._high = (
            int(state.get("level", LEVEL * self.interval)),
            int(state.get("high", 0)),
        )
        doubt, before = state.get("doubt", (-1, NAN))
        self._doubt, self._here = int(doubt), float(before)
