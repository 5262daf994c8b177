"""Quasi-Newton steps where every batch is the same: when they begin, and while they pay.

Each of them costs what a full step costs and is worth several where the loss is an exact function
of the weights. So a run first finds out whether it is: at weights at which one batch was evaluated,
the next one has to have the same loss, and one that comes much later. Then a few steps of the
user's optimizer show curvature and how fast it is, and quasi-Newton steps go on in blocks for as
long as a block is faster than the optimizer was. What a block is worth beyond its own steps is what
the next phase of predicted steps stands for.
"""

from __future__ import annotations

import enum
import math
import statistics
from collections import deque
from collections.abc import Generator
from typing import Any, TypeAlias

import numpy as np

from hybridcore.quasi_newton import Descent, direction, shorter, sufficient
from hybridcore.search import usable
from hybridcore.trial import OptimizerTrial
from hybridcore.types import NAN, Action, Directive, Observation

Step: TypeAlias = Generator[Directive, Observation, tuple[Observation, bool]]

# Two passes over one batch at the same weights agree to this, as a share of the loss, and to some
# rounding of what the loss was when the batch was first looked at: a compiler may not add up the
# same way in a probe.
SAME, ROUNDING = 1e-5, 2.0**-23
# Evaluations in a row without a lower loss, after which the direction is given up.
MOST_REJECTED = 8
# Fall of the log loss in a block below which it has made no progress, and hardly any.
LEAST_FALL, SMALL_FALL = 1e-3, 0.05
# Fewest pairs from which a direction is taken.
LEAST_PAIRS = 3
# Full steps until the next look, and how often they are doubled by looks in vain.
WAIT, MOST_PATIENCE = 50, 16
# Steps before the first look: with the default warm-up its proof is 97 steps later, a prime.
FIRST_LOOK = 3
# Share of the first loss of a run below which something was learned for another batch too.
CARRIED_OVER = 0.5
# Full steps after which a batch that was the same in two steps has to be so again.
PROOF = 97
# Evaluations in a row without a lower loss, after which that is asked too.
SUSPICIOUS = 2
# Share of the loss at which the user's probe is evaluated anew, and after how many quasi-Newton
# steps at the latest; and the rise of its loss above the lowest that ends them.
LOWERED, PROBED, RISE = 0.7, 10, 0.02
# Speed that the optimizer is taken to have after a trial in vain, as a share of the last block's or
# of what it had, whichever is less.
VAIN = 0.25
# Steps of the optimizer from which its speed is told: the medians of their first and last thirds
# are not moved by spikes.
WINDOW = 60


class Stage(enum.Enum):
    """What the next step is for."""

    REST = "rest"
    CHECK = "check"
    PROVE = "prove"
    GATHER = "gather"
    DESCEND = "descend"


class SecantDescent:
    """L-BFGS with a backtracking line search, one evaluation a step.

    The weights are at the best point whenever a step ends: a trial that does not lower the loss is
    taken back in the step that evaluates it. Nocedal & Wright 2006, algorithms 3.1 and 7.5.

    Parameters
    ----------
    pairs : int
        Pairs that the adapter can hold; below `LEAST_PAIRS` there are no such steps.
    block : int
        Steps of a block.
    averaging : bool
        Whether a running average of the weights is kept; it is at the base then.

    Attributes
    ----------
    stage : Stage
        What the next step is for.
    loss : float
        Loss at the base, which is where the weights are between two steps.
    speed : float
        Fall of the log loss by a step of the optimizer when it was last measured.
    accepted : bool
        Whether the newest trial became the base.
    measured : bool
        Whether the step that has just landed measured the speed on a path of the optimizer's own.
    repeats : bool
        Whether batches stay for several steps, but not for many, as far as is known: two in a row
        were the same, and one that came much later was another.
    converging : bool
        Whether neither the optimizer nor the curvature has found a lower loss of late.
    changed : bool
        Whether they have ended because the batch is another one.
    steady : bool
        Whether no other batch has come so far.
    """

    def __init__(self, pairs: int, block: int, averaging: bool = False) -> None:
        self.pairs = pairs
        self._base = Directive(Action.BASE, average=1.0 if averaging else 0.0)
        self.block = block
        self.stage = Stage.REST
        self.loss = NAN
        self.speed = 0.0
        self.accepted = False
        self.repeats = False
        self.converging = False
        self.measured = self.changed = False
        self.steady = True
        self._there = False
        # First loss of the run.
        self._first = NAN
        # Loss and norm of the gradient where the batch was first looked at.
        self._marked, self._scale, self._first_norm = NAN, 0.0, 0.0
        # Norm of the gradient at the base, as a share of that.
        self._steepness = 0.0
        # What losses are counted from.
        self._floor = 0.0
        self._objective = NAN
        # Lowest loss of the user's probe so far, where there is one.
        self._held, self._has_probe = NAN, False
        # Where it was evaluated last: number of the step, and loss of the batch.
        self._probed, self._loss_probed = 0, NAN
        self._descent: Descent | None = None
        self._length = 1.0
        # Loss that a probe found at the trial point.
        self._found = NAN
        self._rejected, self._there = 0, False
        self._began, self._steps = NAN, 0
        # Quasi-Newton steps on this batch.
        self._stayed = 0
        self._own_speed = math.inf
        self._trial = OptimizerTrial()
        # Not at the very first weights, which may give every batch the same loss.
        self._wait, self._patience = FIRST_LOOK, 1
        self._recent: deque[float] = deque(maxlen=WINDOW)

    def see(self, observation: Observation) -> None:
        """Take in the loss of a step of the optimizer."""
        if usable(observation.loss):
            if math.isnan(self._first):
                self._first = observation.loss
            self._recent.append(math.log(observation.loss))

    def raise_losses(self, by: float) -> None:
        """Take note that losses are higher `by` from now on, as they are counted otherwise.

        How fast the optimizer is has to be found out anew.
        """
        self._floor -= by
        for name in ("loss", "_first", "_marked", "_held", "_loss_probed", "_found"):
            setattr(self, name, getattr(self, name) + by)
        self._recent = deque((_raised(value, by) for value in self._recent), maxlen=WINDOW)
        self._began, self.speed = _raised(self._began, by), math.inf

    @property
    def active(self) -> bool:
        """Whether steps are taken here now."""
        return self.stage not in (Stage.REST, Stage.PROVE)

    @property
    def landing(self) -> bool:
        """Whether the next step evaluates where the optimizer, or a rollback, has led."""
        return self.stage is Stage.DESCEND and self._descent is None

    @property
    def holds_recovery(self) -> bool:
        """Whether a rollback may come."""
        return self._trial.active

    @property
    def holds_mark(self) -> bool:
        """Whether a probe at the mark may come."""
        return self.stage is not Stage.REST and math.isfinite(self._marked)

    def until_due(self, taken: int) -> int | None:
        """Full steps after number `taken` until the one that is taken here; None: never."""
        if self.pairs < LEAST_PAIRS:
            return None
        return 0 if self.active else max(0, self._wait - taken)

    def rest(self, taken: int) -> None:
        """Leave it to the optimizer; look again later, twice as late after each time in vain."""
        self.stage, self._descent, self._trial = Stage.REST, None, OptimizerTrial()
        self._held, self._has_probe = NAN, False
        self._rejected, self._there, self.changed = 0, False, False
        self._own_speed = math.inf
        self._wait = taken + WAIT * self._patience
        self._patience = min(2 * self._patience, MOST_PATIENCE)

    def went_back(self, loss: float, taken: int) -> None:
        """Take note that it goes on from where the descent began, at this `loss` of another batch.

        Where what was learned up to there holds for that batch too, batches are parts of one set
        of data, and none of them is to be followed far again.
        """
        if loss < CARRIED_OVER * self._first:
            self._patience = MOST_PATIENCE
            self.rest(taken)

    def pass_by(self, taken: int) -> None:
        """Take note that a phase of `taken` steps is over, and that the next one counts anew.

        The warm-up is proof enough, however long it was.
        """
        self._wait = 0 if self.stage is Stage.PROVE else max(0, self._wait - taken)

    @property
    def stuck(self) -> bool:
        """Whether the present direction leads no further, or there is none."""
        return self._rejected >= MOST_REJECTED

    @property
    def suspects(self) -> bool:
        """Whether rejected trials may be the fault of another batch."""
        return self.stage is Stage.DESCEND and self._rejected == SUSPICIOUS

    @property
    def block_over(self) -> bool:
        """Whether it is time to decide how to go on."""
        full = self._steps >= self.block and not self.landing
        return self.stage is Stage.DESCEND and (self.stuck or full)

    @property
    def probe_due(self) -> bool:
        """Whether it is time to evaluate the user's probe."""
        # Where the optimizer has led is judged first.
        landing = self.landing and not self.stuck
        if self.stage is not Stage.DESCEND or landing or not self._has_probe:
            return False
        lowered = self.loss < LOWERED * self._loss_probed
        return self.block_over or lowered or self._steps - self._probed >= PROBED

    def is_fine(self) -> Generator[Directive, Observation, bool]:
        """See whether the batch is still the same, and the loss of the user's probe no higher.

        The step that raised the probe's is taken back. A batch that stayed for a block of
        quasi-Newton steps may be followed by one that does, as in a curriculum.
        """
        if self.block_over or self.suspects:
            here = (yield Directive(Action.PROBE, own_batch=True)).loss
            if usable(here) and not self._same(here, self.loss):
                self._patience = 1 if self._stayed >= self.block else MOST_PATIENCE
                self.changed = True
                return False
        if not self.probe_due:
            return True
        held = (yield Directive(Action.PROBE)).loss
        self._probed, self._loss_probed = self._steps, self.loss
        # A probe that is no number is no reason to go on.
        if held <= self._held + RISE * abs(self._held):
            self._held = min(self._held, held)
            return True
        if self._descent is not None:
            # It is the newest step that has shown it: back by its displacement.
            back = np.zeros_like(self._descent.coefficients)
            back[len(back) // 2 - 1] = -1.0
            yield Directive(Action.REACH, back)
        self._patience = MOST_PATIENCE
        return False

    def _hold(self) -> Generator[Directive, Observation, bool]:
        """Evaluate the user's probe where the descent begins; False if it is no number."""
        here = (yield Directive(Action.PROBE, own_batch=True)).loss
        self._held = (yield Directive(Action.PROBE)).loss
        # Without a probe of the user that was the batch again.
        self._has_probe = self._held != here
        return not self._has_probe or math.isfinite(self._held)

    def finish_block(self) -> float:
        """Begin the next block; return what this one was worth beyond its own steps.

        In steps that the optimizer would have needed, infinite where it makes no progress.
        """
        fall = self._began - math.log(self.loss)
        self.converging = self.converging and fall < LEAST_FALL
        if fall >= SMALL_FALL:
            self._trial = OptimizerTrial()
        elif self.stuck:
            self._trial.count_stuck()
        self._own_speed = fall / max(self._steps, 1)
        surplus = -float(self._steps)
        if fall > 0.0:
            surplus += fall / self.speed if self.speed > 0.0 else math.inf
        if surplus > 0.0:
            self._patience = 1
        self._began, self._steps, self._probed = math.log(self.loss), 0, 0
        return surplus

    def compare(self, *, long: bool = False) -> None:
        """Let the optimizer show whether it is faster by now; what undoes that has been kept."""
        self._trial.begin(self.loss, self._own_speed, long=long)
        self._marked = NAN
        self._recent.clear()
        self.stage, self._descent, self._steps, self._rejected = Stage.GATHER, None, 0, 0

    def _same(self, loss: float, before: float) -> bool:
        """Whether two losses at the same weights are of the same batch."""
        return abs(loss - before) <= SAME * abs(before + self._floor) + ROUNDING * self._scale

    # -- the steps --------------------------------------------------------------------------

    def step(self) -> Step:
        """Directives of the next step; ends in what its pass showed, and if it is the last."""
        if self.stage is Stage.REST:
            return self._look()
        if self.stage in (Stage.CHECK, Stage.PROVE):
            return self._check()
        return self._gather() if self.stage is Stage.GATHER else self._descend()

    def _look(self) -> Step:
        """Take a full step, and mark where it began."""
        yield Directive(Action.MARK)
        observation = yield Directive(Action.FULL)
        if observation.applied:
            self._marked, self.stage = observation.loss, Stage.CHECK
            self._scale = abs(observation.loss + self._floor)
            self._first_norm = observation.gradient_norm
        return observation, False

    def unmark(self) -> None:
        """Look again: the mark has been overwritten."""
        if self.stage is Stage.PROVE:
            self.stage = Stage.REST

    def _check(self) -> Step:
        """See whether this batch has the same loss at the mark; take a full step.

        The next batch has to be the same, and one that comes much later: some loops take several
        steps on each batch.
        """
        probe = yield Directive(Action.PROBE, own_batch=True, at_mark=True)
        same = self._same(probe.loss, self._marked)
        observation = yield Directive(Action.FULL)
        if observation.applied and (self.stage is Stage.PROVE or not same):
            self.repeats = self.stage is Stage.PROVE and not same
        if not (same and observation.applied):
            return observation, True
        if self.stage is Stage.CHECK:
            self.stage, self._wait = Stage.PROVE, self._wait + PROOF
        else:
            self.stage, self._steps, self.loss = Stage.GATHER, 0, observation.loss
            self._stayed = 0
        return observation, False

    def _gather(self) -> Step:
        """Take a step of the optimizer, and keep its pair unless there may be any number."""
        first, pair, trial = self._steps == 0, not self._trial.endless, self._trial
        observation = yield Directive(Action.FULL, pair=pair, fresh_pairs=pair and first)
        if trial.active and not observation.applied:
            # That is the batch's fault at first, and then of where the trial has led.
            lost = trial.count_bad()
            if first and trial.bad >= MOST_REJECTED:
                self.loss, self.changed = NAN, True
                return observation, True
            if lost and not first:
                self.stage = Stage.DESCEND
            return observation, False
        changed = first and trial.active and not self._same(observation.loss, self.loss)
        if not first and trial.begins_a_spike(observation):
            # Or another batch has come, on which it may do well.
            probe = yield Directive(Action.PROBE, own_batch=True, at_mark=True)
            changed = not self._same(probe.loss, trial.loss)
        if changed or not (observation.applied and usable(observation.loss)):
            self.loss, self.changed = NAN, changed
            return observation, True
        self._steps += 1
        if trial.active:
            over = trial.see(observation, self._steps, self.pairs, self.block)
        else:
            over = self._steps >= self.pairs
        if over:
            self.stage = Stage.DESCEND
        return observation, False

    def _descend(self) -> Step:
        if self._descent is None:
            return (yield from self._land())
        descent, length = self._descent, self._length
        if not self._there:
            yield self.trial()
        observation = yield Directive(Action.GRADIENT)
        self._there = False
        self._steps += 1
        self._stayed += 1
        self.accepted = (
            observation.applied
            and usable(observation.loss)
            and sufficient(self._objective, observation.objective, length, descent.slope)
        )
        if self.accepted:
            yield from self._new_base(observation)
        else:
            yield from self.take_back(observation)
        return observation, False

    def _land(self) -> Step:
        """Evaluate where the optimizer has led, and make it the base unless it is worse."""
        changed = False
        if math.isfinite(self._marked):
            probe = yield Directive(Action.PROBE, own_batch=True, at_mark=True)
            changed, self._marked = not self._same(probe.loss, self._marked), NAN
        held = not math.isnan(self._held) or (yield from self._hold())
        observation = yield Directive(Action.GRADIENT)
        self.accepted, self.measured = True, False
        if self._trial.active and not observation.applied:
            if self._trial.count_bad():
                yield from self._undo_trial()
            return observation, False
        if not self._steps and math.isfinite(self.loss):
            # It is where it was evaluated before. A bad batch is no lower elsewhere.
            changed = changed or not self._same(observation.loss, self.loss)
        if changed or not (held and observation.applied and usable(observation.loss)):
            self.loss, self.changed = NAN, changed
            return observation, True
        if self._trial.active:
            before, endless = self._trial.loss, self._trial.endless or self._trial.long
            speed = (math.log(before) - math.log(observation.loss)) / self._steps
            if speed < 0.0 and endless:
                # Long enough for another batch to have come, on which it may have done well.
                probe = yield Directive(Action.PROBE, own_batch=True, at_mark=True)
                if not self._same(probe.loss, before):
                    self.loss, self.changed = NAN, True
                    return observation, True
            if speed < 0.0:
                yield from self._undo_trial()
                return observation, False
            self.speed, self.converging = speed, speed * self._steps < LEAST_FALL
            if self._steps > self.pairs and not endless:
                # What it took to get there counts once, and the steps ahead are of the later ones.
                self.speed = max(speed, self._trial.speed)
            if speed > self._own_speed:
                self.loss = observation.loss
                return observation, True
        elif self._steps:
            recent, third = list(self._recent), len(self._recent) // 3
            fall = statistics.median(recent[:third]) - statistics.median(recent[-third:])
            self.speed, self.measured = fall / (len(recent) - third), True
        yield from self._new_base(observation)
        if self._trial.active:
            # Not before: the step may be abandoned on the way to it.
            self._trial = OptimizerTrial()
        self._began, self._steps = math.log(self.loss), 0
        self._probed, self._loss_probed = 0, self.loss
        return observation, False

    def _undo_trial(self) -> Generator[Directive, Observation, None]:
        # The moments are put back too: they led astray.
        yield Directive(Action.ROLLBACK)
        self.loss, self.accepted, self._steps = self._trial.loss, False, 0
        self.speed, self.converging = VAIN * min(self.speed, self._own_speed), True
        self._trial.end_in_vain()

    def _new_base(self, observation: Observation) -> Generator[Directive, Observation, None]:
        secants = (yield self._base).secants
        self.loss, self._objective = observation.loss, observation.objective
        norm, first = observation.gradient_norm, self._first_norm
        self._steepness = norm / first if math.isfinite(norm) and first > 0.0 else 0.0
        self._descent = None if secants is None else direction(secants)
        self._length = 1.0
        self._rejected = 0 if self._descent is not None else MOST_REJECTED

    # -- leaps ------------------------------------------------------------------------------

    def trial(self) -> Directive:
        """Return the move to the point that is tried next."""
        assert self._descent is not None
        return Directive(Action.REACH, self._length * self._descent.coefficients)

    def take_back(self, seen: Observation) -> Generator[Directive, Observation, None]:
        """Go back to the base from a trial point that does not lower the loss; try nearer next."""
        descent = self._descent
        assert descent is not None
        yield Directive(Action.REACH, np.zeros_like(descent.coefficients))
        self._length = shorter(self._objective, seen.objective, self._length, descent.slope)
        self._rejected += 1

    @property
    def settled(self) -> bool:
        """Whether a run that nothing lowers any more has nothing left to lower.

        By the quadratic model, as the loss is mere rounding, or as the optimizer has had a long
        trial in vain. Where the model promises more than a line search finds, as in half precision,
        curvature leads no further, but the optimizer may. Where there is no model it takes the
        gradient, and the curvature of where the batch was first looked at.
        """
        if self._descent is not None:
            promised = -self._descent.slope
        else:
            promised = self._scale * self._steepness**2
        small = promised <= LEAST_FALL * self.loss or self.loss <= ROUNDING * self._scale
        return small or self._trial.long

    def stand(self) -> None:
        """Stay at the base: the next step evaluates it again."""
        self._descent, self.converging, self._rejected = None, False, 0

    @property
    def expected(self) -> float:
        """Loss at the trial point: that of a probe, or by the quadratic model, not below 0.

        That of the base where there is no such point.
        """
        if self._descent is None:
            return self.loss
        if self._there and math.isfinite(self._found):
            return self._found
        slope = self._length * (1.0 - 0.5 * self._length) * self._descent.slope
        return max(0.0, self.loss + slope)

    def lowers(self, probe: Observation) -> bool:
        """Whether a probe of that point found the loss low enough to stay there."""
        assert self._descent is not None
        self._there = usable(probe.loss) and sufficient(
            self._objective, probe.objective, self._length, self._descent.slope
        )
        self._found = probe.loss
        return self._there

    # -- state ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state, as numbers and arrays."""
        descent = self._descent
        return {
            "stage": self.stage.name,
            "descent": None if descent is None else descent._asdict(),
            "recent": list(self._recent),
            "numbers": {name: getattr(self, name) for name in _NUMBERS},
            "trial": self._trial.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        self.stage, self._descent = Stage[state["stage"]], None
        if state["descent"] is not None:
            coefficients = np.array(state["descent"]["coefficients"], dtype=np.float64)
            self._descent = Descent(coefficients, float(state["descent"]["slope"]))
        self._recent = deque(state["recent"], maxlen=WINDOW)
        # States from before there was a scale, or the user's probe was looked for, do without.
        later = {
            "changed": False,
            "steady": True,
            "_first": NAN,
            "_floor": 0.0,
            "_stayed": 0,
            "_scale": 0.0,
            "_first_norm": 0.0,
            "_steepness": 0.0,
            "_has_probe": False,
            "repeats": False,
            "_probed": 0,
            "_loss_probed": NAN,
            "_found": NAN,
        }
        numbers = later | state["numbers"]
        for name in _NUMBERS:
            setattr(self, name, type(getattr(self, name))(numbers[name]))
        # Of a trial those tell where it began, and the rest is found out anew.
        trial = state.get("trial", {"loss": float(numbers.get("_saved", NAN))})
        self._trial = OptimizerTrial(**trial)


def _raised(log_loss: float, by: float) -> float:
    return math.log(math.exp(log_loss) + by)


_NUMBERS = (
    "loss",
    "speed",
    "accepted",
    "repeats",
    "converging",
    "measured",
    "changed",
    "steady",
    "_there",
    "_first",
    "_marked",
    "_scale",
    "_first_norm",
    "_steepness",
    "_floor",
    "_objective",
    "_held",
    "_has_probe",
    "_probed",
    "_loss_probed",
    "_length",
    "_found",
    "_rejected",
    "_began",
    "_steps",
    "_stayed",
    "_own_speed",
    "_wait",
    "_patience",
)
