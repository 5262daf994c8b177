"""What the callback knows, as plain numbers and arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from keras import ops

from hybridcore import CheckpointError, Engine
from hybridcore_keras.averages import WeightAverage
from hybridcore_keras.secants import SecantBank
from hybridcore_keras.snapshots import SnapshotBank, as_numpy

if TYPE_CHECKING:
    from hybridcore_keras.callback import HybridCallback

VERSION = 2
COPIES = ("bank", "average", "secants", "recovery")
KEYS = {"config", "engine", "beside", "skipped", *COPIES}


def collect(callback: HybridCallback) -> dict[str, Any]:
    """Return the state of `callback`; weights and optimizer are not part of it."""
    if callback._loaded is not None:
        return callback._loaded
    state: dict[str, Any] = {
        "hybridcore_keras": VERSION,
        "config": callback.config.to_dict(),
        "engine": callback.engine.state_dict(),
        **dict.fromkeys(COPIES),
        "beside": None,
        "skipped": 0,
    }
    hands = callback._hands
    if hands is None:
        return state
    for name in ("bank", "average", "secants"):
        copies = getattr(hands, name)
        state[name] = None if copies is None else copies.state_dict()
    if hands.recovery is not None:
        state["recovery"] = [as_numpy(v[0] if type(v) is tuple else v) for v in hands.recovery]
    state["beside"] = hands.room.state_dict()
    state["skipped"] = hands.port.skipped
    return state


def restore(callback: HybridCallback, state: dict[str, Any]) -> None:
    """Put `state` into `callback`, after checking that it fits.

    Raises
    ------
    CheckpointError
        If it does not; nothing has been changed then.
    """
    if not isinstance(state, dict) or "hybridcore_keras" not in state:
        raise CheckpointError("state is not one of a HybridCallback: pass what state_dict() gave")
    if state["hybridcore_keras"] != VERSION:
        raise CheckpointError(
            f"state is of version {state['hybridcore_keras']!r}, and {VERSION} is read here: go on "
            "with the hybridcore that saved it"
        )
    missing = sorted(KEYS - state.keys())
    if missing:
        raise CheckpointError(f"state lacks {', '.join(missing)}: pass all that state_dict() gave")
    if not callback.config.is_that_of(state["config"]):
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
    hands = callback.hands
    beside = state["beside"] or hands.room.state_dict()
    pairs = hands.pairs_of(hands.room.restored(beside, 0))
    engine = Engine(callback.config, pairs)
    engine.load_state_dict(state["engine"])
    room = hands.room.restored(beside, engine.snapshots)
    copies: dict[str, SnapshotBank | WeightAverage | SecantBank] = {
        "bank": hands.new_bank(room),
        "average": WeightAverage(hands.port),
        "secants": SecantBank(hands.port, pairs),
    }
    for name, kept in copies.items():
        if state[name] is not None:
            if not kept.takes(state[name]):
                raise CheckpointError(
                    "state is of another model or of other layer groups: build the same ones"
                )
            kept.load_state_dict(state[name])
    callback.engine = engine
    hands.restart()
    hands.room, hands.pairs = room, pairs
    for name, kept in copies.items():
        setattr(hands, name, None if state[name] is None else kept)
    if state["recovery"] is not None:
        hands.recovery = [ops.convert_to_tensor(value) for value in state["recovery"]]
    hands.port.skipped = int(state["skipped"])
    # The weights are those that belong to this state.
    callback._loaded = callback._left = None
