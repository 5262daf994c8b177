"""Which copies of the weights there is room for, and which to do without once memory has run out.

An adapter measures the model and makes the copies; what is kept is decided here.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from hybridcore.config import HybridTrainerConfig

logger = logging.getLogger(__name__)

Kind = Literal["exact", "bfloat16", "int8", "host"]
CODED = ("bfloat16", "int8")

# Snapshots without which nothing can be extrapolated.
FEWEST = 4
# Values that share a scale in 8 bits: 4 bytes for so many, which leaves a row at 0.254 of float32.
SCALED = 256


class Size(NamedTuple):
    """A model as far as its memory goes, on one rank.

    Attributes
    ----------
    parameters : float
        Trainable parameters.
    weights : float
        Bytes of them.
    state : float
        Bytes of the optimizer's state.
    on_gpu : bool
        Whether it is elsewhere than in the host's memory.
    """

    parameters: float
    weights: float
    state: float
    on_gpu: bool

    @property
    def average(self) -> float:
        """Bytes of their running average, in float32 at least."""
        return max(4.0 * self.parameters, self.weights)


@dataclass(frozen=True, slots=True)
class Plan:
    """Copies of the weights that there is room for.

    Attributes
    ----------
    kind : Kind
        How snapshots are kept; the optimizer's state goes with them during a jump, in bfloat16
        where snapshots are in fewer bits.
    snapshots : int
        How many; 0 or at least `FEWEST`.
    average : bool
        Whether there is a running average.
    pairs : float
        Bytes that secant pairs may take while there are any.
    in_turn : bool
        Whether the average gives way to the copy of the optimizer's state during a jump.
    """

    kind: Kind
    snapshots: int
    average: bool
    pairs: float
    in_turn: bool = False


def snapshots_bytes(kind: Kind, snapshots: int, size: Size) -> float:
    """Bytes of so many snapshots."""
    if kind == "host" and size.on_gpu:
        return size.weights
    if kind in CODED:
        each = 2.0 if kind == "bfloat16" else 1.0 + 4.0 / SCALED
        return size.weights + (snapshots - 1) * each * size.parameters
    return snapshots * size.weights


def recovery_bytes(kind: Kind, size: Size) -> float:
    """Bytes of the copy of the optimizer's state during a jump."""
    if kind == "host" and size.on_gpu:
        return 0.0
    # Of float32, the only one that is kept in fewer bits.
    return size.state / 2 if kind in CODED and size.weights == 4 * size.parameters else size.state


def beside_bytes(there: Plan, size: Size) -> float:
    """Bytes of average and copy of the optimizer's state at most, where there are snapshots."""
    average, recovery = there.average * size.average, recovery_bytes(there.kind, size)
    return max(average, recovery) if there.in_turn else average + recovery


def plan(config: HybridTrainerConfig, size: Size, *, host: bool = True) -> Plan:
    """Return the copies that fit into the settings' `memory`: all if they do, or else the best.

    Snapshots come before the average, more exact ones before more of them, and where the average
    has to give way in jumps there are fewer bits first.

    Parameters
    ----------
    config : HybridTrainerConfig
        Settings.
    size : Size
        The model.
    host : bool
        Whether the adapter can keep copies in the memory of a GPU's host.
    """
    limit = config.memory_limit(4.0 * size.parameters)
    kinds: Sequence[Kind] = ("exact", "int8")
    if size.on_gpu and host:
        kinds = (*kinds, "host")
    if config.snapshot_kind != "auto":
        kinds = (config.snapshot_kind,)
    counts = range(config.snapshots, FEWEST - 1, -1)
    # Where pairs began, and where a trial of the optimizer did.
    points = 2 * (size.weights + size.state)
    for average, in_turn in itertools.product(
        (True, False) if config.averaging else (False,), (False, True)
    ):
        pairs = limit - average * size.average - points
        for kind, count in itertools.product(kinds, counts):
            found = Plan(kind, count, average, pairs, in_turn)
            if snapshots_bytes(kind, count, size) + beside_bytes(found, size) <= limit:
                return found
    average = config.averaging and size.average <= limit
    return Plan(kinds[0], 0, average, limit - points - average * size.average)


class Room:
    """Copies of the weights that an adapter keeps: those of the plan, or fewer.

    What was given up once memory had run out stays so.

    Parameters
    ----------
    config : HybridTrainerConfig
        Settings.
    pairs : int
        Secant pairs that are wanted.
    host : bool
        As for :func:`plan`.

    Attributes
    ----------
    plan : Plan
        Of the present size.
    snapshots : int
        Snapshots that there is room for, 0 or at least `FEWEST`.
    pairs : int
        Secant pairs that are wanted, 0 once they were given up. How many of them fit into
        ``plan.pairs`` is the adapter's to say, who knows what one takes.
    """

    def __init__(self, config: HybridTrainerConfig, pairs: int, *, host: bool = True) -> None:
        self._config, self._host = config, host
        self.snapshots, self.pairs, self._average = config.snapshots, pairs, True
        # Most snapshots that memory has not run out with.
        self._most = config.snapshots
        self.plan = Plan("exact", config.snapshots, config.averaging, 0.0)

    @property
    def average(self) -> bool:
        """Whether there is room for the running average."""
        return self._average and self.plan.average

    def measure(self, size: Size) -> None:
        """Plan for a model of this size."""
        before = self.plan
        self.plan = plan(self._config, size, host=self._host)
        if before.snapshots and not self.plan.snapshots:
            logger.warning(
                "memory=%r has no room for %d snapshots of kind %r, so nothing is extrapolated: "
                "allow more%s",
                self._config.memory,
                FEWEST,
                self.plan.kind,
                "" if self._config.snapshot_kind == "auto" else ", or leave snapshot_kind='auto'",
            )
        if before.average and not self.plan.average:
            logger.warning(
                "memory=%r has no room for a running average beside %d snapshots of kind %r, so "
                "averaged() has nothing to evaluate: allow more, or set averaging=False",
                self._config.memory,
                self.plan.snapshots,
                self.plan.kind,
            )
        self.snapshots = min(self._most, self.plan.snapshots)

    @property
    def is_bare(self) -> bool:
        """Whether there is nothing left that could be given up."""
        return not (self.pairs or self.snapshots or self._average)

    def give_up(self, pairs: int) -> str:
        """Do with fewer copies, because memory has run out; return what there is from now on.

        Parameters
        ----------
        pairs : int
            Secant pairs that there was room for so far.
        """
        if pairs:
            self.pairs = 0
            return "no secant pairs"
        if self.snapshots:
            self.snapshots = self._most = self.snapshots - 1 if self.snapshots > FEWEST else 0
            return f"{self.snapshots} snapshots" if self.snapshots else "no snapshots and no jumps"
        self.pairs, self._average = 0, False
        return "no average"

    def predict_nothing(self) -> None:
        """Do without all copies that steps are predicted from."""
        self.pairs = self.snapshots = self._most = 0

    def state_dict(self) -> dict[str, Any]:
        """Return what is kept besides snapshots: 0 or False once it was given up."""
        return {"pairs": self.pairs, "average": self._average}

    def restored(self, state: Mapping[str, Any], snapshots: int) -> Room:
        """Return one of the same plan with what :meth:`state_dict` says, and so many snapshots."""
        room = copy.copy(self)
        room.pairs, room._average = int(state["pairs"]), bool(state["average"])
        # Fewer than there is room for are what was left when memory had run out.
        room._most = self._config.snapshots if snapshots >= self.plan.snapshots else snapshots
        room.snapshots = snapshots
        return room
