"""The user's optimizer on trial, where quasi-Newton steps lead no further: how long it has."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

from hybridcore.types import NAN, Observation

# Rise of the loss at which a trial is over before its time.
SPIKE = 10.0
# Trials in vain at a falling rate after which the next one has no end but a loss that is so much
# lower, a spike, or a rate that has not fallen for a block: in the rounding of the loss curvature
# says nothing, and the optimizer gets lower as its rate falls, but not within a few steps. A block
# of quasi-Newton steps that gets stuck after the first says so too.
MOST_VAIN, MUCH_LOWER = 2, 0.5
# Bad batches in a row that are the fault of where the optimizer has led.
LOST = 2
# Steps by which it is told how fast the loss falls now: the medians of their halves are not moved
# by spikes.
NEWEST = 14
# Blocks of steps that a long trial has at most.
LONG = 8


@dataclass(slots=True)
class OptimizerTrial:
    """A trial of the optimizer, and what those before it came to.

    Attributes
    ----------
    loss : float
        Loss where it began; NaN while there is none.
    vain : int
        Trials in vain, one after the other, in which the learning rate fell, and blocks after them
        that got stuck.
    bad : int
        Bad batches in it, one after the other.
    fallen : int
        Number of the step, from 0, at which it fell last.
    first_rate, last_rate : float
        Learning rate of the first step and of the newest.
    pace : float
        Fall of the log loss by a step of the block before it; infinite where that is not known.
    newest : list of float
        Log losses of the newest steps, at most `NEWEST`.
    waited : bool
        Whether this one, or one before it in vain, had more steps than is usual.
    long : bool
        Whether this one, or the one before it in vain, has time to come back from anywhere.
    """

    loss: float = NAN
    vain: int = 0
    bad: int = 0
    fallen: int = 0
    first_rate: float = 0.0
    last_rate: float = 0.0
    pace: float = math.inf
    newest: list[float] = field(default_factory=list)
    waited: bool = False
    long: bool = False

    @property
    def active(self) -> bool:
        """Whether there is one."""
        return math.isfinite(self.loss)

    @property
    def endless(self) -> bool:
        """Whether it may take any number of steps."""
        return self.vain >= MOST_VAIN

    @property
    def speed(self) -> float:
        """Fall of the log loss by a step, of late; 0 before there are two."""
        count, half = len(self.newest), len(self.newest) // 2
        return (self._level(half) - self._level(-half)) / (count - half) if half else 0.0

    def _level(self, newest: int) -> float:
        return statistics.median(self.newest[:newest] if newest > 0 else self.newest[newest:])

    def begin(self, loss: float, pace: float, *, long: bool = False) -> None:
        """Begin one at weights that have this `loss`, where the block before it was so fast.

        A `long` one goes on, wherever it leads, until it is ahead.
        """
        self.loss, self.bad, self.pace, self.newest, self.long = loss, 0, pace, [], long

    def count_bad(self) -> bool:
        """Take note of a bad batch; return whether that is not the batch's fault any more."""
        self.bad += 1
        return self.bad >= LOST

    def begins_a_spike(self, observation: Observation) -> bool:
        """Whether a trial that goes on through spikes is at the beginning of one."""
        before = math.exp(self.newest[-1]) if self.newest else 0.0
        most = SPIKE * self.loss
        return self.long and not self.endless and before <= most < observation.loss

    def see(self, observation: Observation, steps: int, most: int, block: int) -> bool:
        """Take in a step; return whether it is the last one.

        Parameters
        ----------
        observation : Observation
            What the step showed.
        steps, most, block : int
            Number of the step, from 1, the most that a usual trial has unless it catches up, and
            for how long the learning rate of an endless one may stay as it is.
        """
        rate, self.bad = observation.learning_rate, 0
        if steps == 1:
            self.first_rate = rate
        if steps == 1 or rate < self.last_rate:
            self.fallen = steps - 1
        self.last_rate = rate
        if observation.loss > SPIKE * self.loss and (self.endless or not self.long):
            return True
        self.newest = [*self.newest[1 - NEWEST :], math.log(observation.loss)]
        if self.long and not self.endless:
            ahead = self._level(-(len(self.newest) // 2)) < math.log(self.loss)
            return (steps >= most and ahead) or steps >= LONG * block
        if not self.endless:
            if steps < most:
                return False
            if (steps == most and self.waited) or not self._catches_up(steps):
                return True
            self.waited = True
            return False
        return observation.loss < MUCH_LOWER * self.loss or steps - self.fallen > block

    def _catches_up(self, steps: int) -> bool:
        """Whether it is slower than the block was on the whole, and faster now.

        From where quasi-Newton steps have led the optimizer often takes the loss up at first. It
        has to be back, by how fast it is now, within as many steps as it has had.
        """
        speed = self.speed
        fall = math.log(self.loss) - self._level(-(len(self.newest) // 2))
        return speed > self.pace and -speed <= fall / steps <= self.pace

    def count_stuck(self) -> None:
        """Take note of a block that got stuck: after one in vain that counts as another."""
        if self.vain:
            self.vain += 1

    def end_in_vain(self) -> None:
        """Take note that it was taken back: at the same rate another would come to the same."""
        self.vain = self.vain + 1 if self.last_rate < self.first_rate else 0
        self.loss = NAN

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state, as the arguments that make another."""
        return {name: getattr(self, name) for name in self.__slots__}
