"""What the callback knows, as plain numbers and arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from keras import ops

from hybridcore import CheckpointError, Engine
from hybridcore_keras.averages import WeightAverage

if TYPE_CHECKING:
    from hybridcore_keras.callback import HybridCallback

VERSION = 1
KEYS = {"config", "engine", "bank", "average", "recovery", "skipped"}


def collect(callback: HybridCallback) -> dict[str, Any]:
    """Return the state of `callback`; weights and optimizer are not part of it."""
    if callback._loaded is not None:
        return callback._loaded
    bank, recovery, port = callback._bank, callback._recovery, callback._port
    kept = None if recovery is None else [np.array(ops.convert_to_numpy(v)) for v in recovery]
    return {
        "hybridcore_keras": VERSION,
        "config": callback.config.to_dict(),
        "engine": callback.engine.state_dict(),
        "bank": None if bank is None else bank.state_dict(),
        "average": None if callback._average is None else callback._average.state_dict(),
        "recovery": kept,
        "skipped": 0 if port is None else port.skipped,
    }


def restore(callback: HybridCallback, state: dict[str, Any]) -> None:
    """Put `state` into `callback`, after checking that it fits.

    Raises
    ------
    CheckpointError
        If it does not; nothing has been changed then.
    """
    if not isinstance(state, dict) or state.get("hybridcore_keras") != VERSION:
        raise CheckpointError("state is not one of a HybridCallback: pass what state_dict() gave")
    missing = sorted(KEYS - state.keys())
    if missing:
        raise CheckpointError(f"state lacks {', '.join(missing)}: pass all that state_dict() gave")
    if state["config"] != callback.config.to_dict():
        raise CheckpointError(
            f"state was saved with settings {state['config']}, this callback has "
            f"{callback.config.to_dict()}: build it with HybridTrainerConfig.from_dict(...)"
        )
    try:
        # What the engine does not take must not wait for the beginning of fit to be found out.
        Engine(callback.config).load_state_dict(state["engine"])
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"state is damaged: pass what state_dict() gave ({type(error).__name__}: {error})"
        ) from error
    callback._loaded = state


def apply_loaded(callback: HybridCallback) -> None:
    """Put the state that waits into engine, bank and port, once the model is known.

    Raises
    ------
    CheckpointError
        If it is of another model; nothing has been changed then.
    """
    state = callback._loaded
    if state is None:
        return
    assert callback._port is not None
    if state["average"] is not None and not WeightAverage(callback._port).takes(state["average"]):
        raise CheckpointError("state is of another model: build the one that it was saved with")
    if state["bank"] is not None:
        if not callback._snapshots.takes(state["bank"]):
            callback._bank = None
            raise CheckpointError(
                "state is of another model or of other layer groups: build the same ones"
            )
        callback._snapshots.load_state_dict(state["bank"])
    callback._average = None
    if state["average"] is not None:
        callback._average = WeightAverage(callback._port)
        callback._average.load_state_dict(state["average"])
    callback.engine.load_state_dict(state["engine"])
    if callback._bank is not None:
        callback._bank.capacity = callback.engine.snapshots
    recovery = state["recovery"]
    callback._recovery = (
        None if recovery is None else [ops.convert_to_tensor(value) for value in recovery]
    )
    callback._port.skipped = int(state["skipped"])
    callback._loaded = None
