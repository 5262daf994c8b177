"""What ``History`` and the ``logs`` of an epoch tell of a run."""

from __future__ import annotations

from typing import Any

from hybridcore import Phase, TrainingStatistics

PHASES = list(Phase)


def report(
    summary: TrainingStatistics,
    phase: Phase,
    logs: dict[str, Any] | None,
    history: dict[str, list[Any]],
) -> None:
    """Add three figures to `logs`, from where Keras takes them, and the others to `history`."""
    shown = {
        "hybrid_phase": float(PHASES.index(phase)),
        "hybrid_measured_speedup": float(summary.measured_speedup),
        "hybrid_backward_reduction": float(summary.backward_reduction),
    }
    if logs is not None:
        logs.update(shown)
    for name, value in summary.to_dict().items():
        if f"hybrid_{name}" not in shown and not isinstance(value, dict | list):
            history.setdefault(f"hybrid_{name}", []).append(value)
