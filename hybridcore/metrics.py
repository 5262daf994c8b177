"""Counters of a run and the summary that users read."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from hybridcore.meter import Interval, Meter
from hybridcore.phases import Phase, PhaseController


@dataclass(slots=True)
class Counters:
    """Running totals; `phase_steps` and `phase_seconds` are by the name of the phase."""

    steps: int = 0
    full_steps: int = 0
    predicted_steps: int = 0
    backward_passes: int = 0
    outer_steps: int = 0
    secant_steps: int = 0
    probes: int = 0
    rollbacks: int = 0
    divergences: int = 0
    phase_steps: dict[str, int] = field(default_factory=lambda: {p.name: 0 for p in Phase})
    phase_seconds: dict[str, float] = field(default_factory=lambda: {p.name: 0.0 for p in Phase})

    def state_dict(self) -> dict[str, Any]:
        """Return the totals as plain numbers and dictionaries."""
        state = {name: getattr(self, name) for name in self.__slots__}
        return state | {name: dict(state[name]) for name in ("phase_steps", "phase_seconds")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        for name in self.__slots__:
            value = state[name]
            setattr(self, name, dict(value) if isinstance(value, dict) else value)


@dataclass(frozen=True, slots=True)
class TrainingStatistics:
    """Summary of a run so far.

    Attributes
    ----------
    steps : int
        Steps of the user's loop, ``full_steps + predicted_steps``.
    full_steps : int
        Steps with forward and backward pass, bad batches among them.
    predicted_steps : int
        Steps without a backward pass.
    backward_passes : int
        Backward passes run.
    backward_reduction : float
        Share in [0, 1] of the steps that ran none.
    outer_steps : int
        Moves by the momentum of real steps, where there was no jump. Each stands for two
        predicted steps at most.
    secant_steps : int
        Of the full steps, those that evaluated a point of the quasi-Newton descent.
    probes : int
        Forward passes without gradients.
    probe_cost : float
        Time of one such pass in full steps, measured.
    rollbacks : int
        Jumps and leaps that were taken back.
    divergences : int
        Batches left out because loss or gradients were not finite.
    phase_counts : dict of str to int
        Steps by phase name.
    phase_seconds : dict of str to float
        Wall-clock seconds by phase name.
    overhead_seconds : float
        Time that hybridcore itself took: snapshots, decisions, moves.
    cost : float
        Work done, in full steps: full steps, probes and overhead, by their measured times.
    measured_speedup : float
        Full steps that the run stands for, by what it cost.
    measured_speedup_interval : (float, float)
        Interval meant to hold the truth in 9 of 10 runs; open above while it is not known.
    arm_values : dict of str to float
        By extrapolator, how many full steps its last jumps gained, net; under "secant" what the
        last blocks of quasi-Newton steps did.
    snapshots : int
        Snapshots that there is room for: the setting, or fewer where memory ran out.
    confidence : float
        Confidence in [0, 1] at the last decision.
    divergence_level : str
        Name of the :class:`hybridcore.divergence.DivergenceLevel` now. Above NORMAL jumps are
        shortened, above CAUTION there are none.
    divergence_signals : dict of str to float
        By :class:`hybridcore.divergence.Signal`, its severity when last measured, above 1 if
        triggered.
    memory : dict of str to int
        Most bytes that each kind of copies of the weights has taken so far, in one process. Empty
        where the adapter does not measure it.
    """

    steps: int
    full_steps: int
    predicted_steps: int
    backward_passes: int
    backward_reduction: float
    outer_steps: int
    secant_steps: int
    probes: int
    probe_cost: float
    rollbacks: int
    divergences: int
    phase_counts: dict[str, int]
    phase_seconds: dict[str, float]
    overhead_seconds: float
    cost: float
    measured_speedup: float
    measured_speedup_interval: Interval
    arm_values: dict[str, float]
    snapshots: int
    confidence: float
    divergence_level: str
    divergence_signals: dict[str, float]
    memory: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls, counters: Counters, meter: Meter, controller: PhaseController
    ) -> TrainingStatistics:
        """Summarise the running totals of an engine and what its controller knows."""
        speedup, interval = meter.speedup(
            counters.full_steps, counters.probes, counters.outer_steps, counters.secant_steps
        )
        return cls(
            steps=counters.steps,
            full_steps=counters.full_steps,
            predicted_steps=counters.predicted_steps,
            backward_passes=counters.backward_passes,
            backward_reduction=(
                1.0 - counters.backward_passes / counters.steps if counters.steps else 0.0
            ),
            outer_steps=counters.outer_steps,
            secant_steps=counters.secant_steps,
            probes=counters.probes,
            probe_cost=meter.probe_cost,
            rollbacks=counters.rollbacks,
            divergences=counters.divergences,
            phase_counts=dict(counters.phase_steps),
            phase_seconds=dict(counters.phase_seconds),
            overhead_seconds=meter.overhead_seconds,
            cost=meter.cost(counters.full_steps, counters.probes) + meter.overhead,
            measured_speedup=speedup,
            measured_speedup_interval=interval,
            arm_values=dict(controller.arm_values),
            snapshots=controller.snapshots,
            confidence=controller.confidence,
            divergence_level=controller.divergence_level,
            divergence_signals=dict(controller.divergence_signals),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as a plain dictionary, ready for JSON: what is not finite is None."""
        return finite(dataclasses.asdict(self))  # type: ignore[no-any-return]

    def __str__(self) -> str:
        low, high = self.measured_speedup_interval
        speedup = f"{self.measured_speedup:.2f} (90 %: {low:.2f} to {high:.2f})"
        if self.predicted_steps == self.outer_steps == self.secant_steps == 0:
            speedup = "none, nothing was predicted"
        elif not math.isfinite(high) and self.secant_steps:
            # There were no full steps of the optimizer beside them to compare with.
            speedup = f"not known for quasi-Newton steps, at least {low:.2f}: compare runs to know"
        elif not math.isfinite(high):
            speedup = "not known yet"
        elif self.outer_steps:
            speedup += ", without what outer momentum gains: compare runs to know"
        seconds = sum(self.phase_seconds.values())
        phases = ", ".join(
            f"{name.lower()} {spent / seconds:.0%}"
            for name, spent in self.phase_seconds.items()
            if spent > 0.0
        )
        # A bad batch may run no backward pass either, and saves nothing.
        saved = self.predicted_steps / self.steps if self.steps else 0.0
        own = self.overhead_seconds / seconds if seconds > 0.0 else 0.0
        return "\n".join(
            [
                f"{self.steps} steps: {self.full_steps} full, {self.secant_steps} of them "
                f"quasi-Newton, and {self.predicted_steps} predicted "
                f"({saved:.0%} fewer backward passes)",
                f"measured speed-up: {speedup}",
                f"cost:              {self.cost:.0f} full steps, with {self.probes} probes and "
                "hybridcore's own time",
                f"time:              {seconds:.1f} s ({phases or 'none'}), {own:.1%} of it "
                "hybridcore's own",
                f"events:            {self.outer_steps} outer steps, {self.rollbacks} rollbacks, "
                f"{self.divergences} bad batches; divergence level {self.divergence_level}",
            ]
        )


def finite(value: Any) -> Any:
    """Copy of nested containers with NaN and infinities as None, which JSON can hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
