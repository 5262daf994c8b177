"""Everything that decides what an engine does next, as numbers, lists and arrays."""

from __future__ import annotations

import dataclasses
from collections import deque
from typing import Any

import numpy as np

from hybridcore.engine import Engine
from hybridcore.errors import ProtocolError
from hybridcore.phases import Phase
from hybridcore.planning import Flight, Jump


def engine_state(engine: Engine) -> dict[str, Any]:
    """Return the state of `engine` between two steps.

    Raises
    ------
    ProtocolError
        In the middle of a step.
    """
    if not engine.step_done:
        raise ProtocolError("engine_state() in the middle of a step: finish the step first")
    engine._read()
    flight, gram = engine._flight, engine._gram
    return {
        "phase": engine.phase.name,
        "confidence": engine.confidence,
        "dynamics": engine.dynamics.state_dict(),
        "meter": engine.meter.state_dict(),
        "counters": engine.counters.state_dict(),
        "pace": engine.pace.state_dict(),
        "flight": None if flight is None else dataclasses.asdict(flight),
        "gram": None if gram is None else gram.copy(),
        "rates": list(engine._rates),
        "taken": engine._taken,
        "regular": engine._regular,
        "lost": engine._lost,
        "bank": engine._bank,
    }


def restore_engine(engine: Engine, state: dict[str, Any]) -> None:
    """Put `state` into an engine with the same settings."""
    engine.abandon()
    engine._unread.clear()
    engine._times.clear()
    engine.phase = Phase[state["phase"]]
    engine.confidence = float(state["confidence"])
    engine.dynamics.load_state_dict(state["dynamics"])
    engine.meter.load_state_dict(state["meter"])
    engine.counters.load_state_dict(state["counters"])
    engine.pace.load_state_dict(state["pace"])
    flight, gram = state["flight"], state["gram"]
    if flight is not None:
        flight = Flight(**{**flight, "jump": Jump(**flight["jump"])})
    engine._flight = flight
    engine._gram = None if gram is None else np.array(gram, dtype=np.float64)
    engine._rates = deque(state["rates"], maxlen=engine._rates.maxlen)
    engine._taken = int(state["taken"])
    engine._bank = int(state["bank"])
    engine._regular = int(state["regular"])
    engine._lost = int(state["lost"])
    engine._quiet = engine._quiet_ahead()
