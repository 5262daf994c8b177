"""What each extrapolator is worth alone: cost-to-target where the others are never tried.

    python benchmarks/arms.py

trains the SIREN and the PINN plain and by jumps of one extrapolator, from the same seeds as
benchmarks/ablation.py, and records in benchmarks/results/arms.json the cost to plain's lowest loss
as a share of plain's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.ablation import JUMPS, record, unchanged
from hybridcore.controller import Controller
from hybridcore.planning import ARMS

RESULTS = Path(__file__).parent / "results" / "arms.json"


def alone(arm: str) -> Callable[[Controller], None]:
    """Return what leaves only one arm to try."""

    def alter(controller: Controller) -> None:
        rule = controller.rule
        choose = rule.choose

        def only(gram: Any, path: Mapping[str, float], *others: Any) -> Any:
            confident = {name: value * (name == arm) for name, value in path.items()}
            return choose(gram, confident, *others)

        rule.choose = only  # type: ignore[method-assign]

    return alter


if __name__ == "__main__":
    # All together is the default of benchmarks/ablation.py, measured again beside them.
    variants = {"together": (JUMPS, unchanged)} | {arm: (JUMPS, alone(arm)) for arm in ARMS}
    record(variants, RESULTS)
