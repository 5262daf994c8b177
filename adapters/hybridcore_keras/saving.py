"""The run's state as plain numbers and arrays: collected, checked and restored."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

from hybridcore import CheckpointError, Engine
from hybridcore_keras.averages import WeightAverage
from hybridcore_keras.ports import build_optimizer, new_engine, recurrent_states, scope_of
from hybridcore_keras.randomness import check_random_states, random_states, restore_random_states
from hybridcore_keras.secants import SecantBank
from hybridcore_keras.snapshots import SnapshotBank, as_numpy

if TYPE_CHECKING:
    from hybridcore.memory import Room
    from hybridcore_keras.callback import HybridCallback
    from hybridcore_keras.hands import Hands

VERSION = 5
DAMAGE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
COPIES = ("bank", "average", "secants", "recovery", "start")
KEYS = {"config", "engine", "beside", "skipped", *COPIES}
KEYS |= {"snapshots", "model", "optimizer", "logs", "epoch", "random"}


def collect(callback: HybridCallback, snapshots: bool = True) -> dict[str, Any]:
    """Return all that the run of `callback` needs to go on as if it had not been interrupted.

    Without `snapshots` no copies of the weights are in it, unless a jump may have to be taken back.
    """
    if callback._loaded is not None:
        return callback._loaded
    state: dict[str, Any] = {
        "hybridcore_keras": VERSION,
        "config": callback.config.to_dict(),
        "engine": callback.engine.state_dict(),
        **dict.fromkeys((*COPIES, "beside", "model", "optimizer")),
        "skipped": 0,
        "snapshots": True,
        "logs": keras.tree.map_structure(_plain, callback._full_logs),
        "epoch": callback.epoch,
        "random": random_states(),
    }
    if callback._trained is not None:
        model, optimizer, _ = callback._trained
        # With JAX a model has no weights of its own while fit runs.
        getattr(model, "jax_state_sync", lambda: None)()
        state["model"] = _values(_variables(model))
        if optimizer.built:
            state["optimizer"] = {"kind": _kind(optimizer), **_values(optimizer.variables)}
    hands = callback._hands
    if hands is None:
        return state
    whole = snapshots or hands.recovery is not None
    if whole:
        for name in ("bank", "average", "secants"):
            copies = getattr(hands, name)
            state[name] = None if copies is None else copies.state_dict()
    else:
        state["snapshots"] = False
    for name in ("recovery", "start") if whole else ():
        kept = getattr(hands, name)
        if kept is not None:
            state[name] = [as_numpy(v[0] if type(v) is tuple else v) for v in kept]
    state["beside"] = {**hands.room.state_dict(), "peaks": dict(hands.peaks)}
    state["skipped"] = hands.port.rates.skipped
    return state


def are_finite(callback: HybridCallback) -> bool:
    """Whether all weights are finite numbers."""
    variables = callback.model.trainable_variables
    return all(bool(ops.all(ops.isfinite(variable.value))) for variable in variables)


def migrated(state: object) -> dict[str, Any]:
    """Return `state` as one of this version.

    Raises
    ------
    CheckpointError
        If it is none of a callback, of a version that is not known here, or not whole.
    """
    if not isinstance(state, dict) or "hybridcore_keras" not in state:
        raise CheckpointError("state is not one of a HybridCallback: pass what state_dict() gave")
    if state["hybridcore_keras"] == 2:
        # Before version 3 it held nothing of model, optimizer and random states.
        new = dict.fromkeys(("model", "optimizer", "random", "epoch"))
        state = {**new, "snapshots": True, "logs": {}, **state, "hybridcore_keras": 3}
    if state["hybridcore_keras"] == 3:
        # Before version 4 nothing was kept of where secant pairs began.
        state = {"start": None, **state, "hybridcore_keras": 4}
    if state["hybridcore_keras"] == 4:
        # Before version 5 secant pairs had no products, which the bank finds.
        state = {**state, "hybridcore_keras": VERSION}
    if state["hybridcore_keras"] != VERSION:
        raise CheckpointError(
            f"state is of version {state['hybridcore_keras']!r}, and 2 to {VERSION} are read here: "
            "go on with the hybridcore that saved it"
        )
    missing = sorted(KEYS - state.keys())
    if missing:
        raise CheckpointError(f"state lacks {', '.join(missing)}: pass all that state_dict() gave")
    return state


def restore(callback: HybridCallback, state: dict[str, Any]) -> None:
    """Have `callback` go on from `state` when ``fit`` begins, after checking that it fits.

    Raises
    ------
    CheckpointError
        If it does not, as far as that can be known before; nothing has been changed then.
    """
    state = migrated(state)
    differ = callback.config.differences(state["config"])
    if differ:
        raise CheckpointError(
            f"state was saved with other settings, {', '.join(differ)}: build the callback with "
            "HybridTrainerConfig.from_dict(state['config'])"
        )
    with _damage():
        # What the engine does not take must not wait for the beginning of fit to be found out.
        Engine(callback.config).load_state_dict(state["engine"])
        if state["random"] is not None:
            check_random_states(state["random"])
        epoch = 0 if state["epoch"] is None else int(state["epoch"])
    if callback._trained is not None:
        fitted(callback, state, callback._trained[0], callback._hands)
    callback._loaded, callback.epoch = state, epoch
    if state["random"] is not None:
        restore_random_states(state["random"])


def fitted(
    callback: HybridCallback, state: dict[str, Any], model: Any, hands: Hands | None
) -> Callable[[], None]:
    """Check `state` against the model, and return what puts it into model, engine and `hands`.

    Raises
    ------
    CheckpointError
        If it is of another model; nothing has been changed then.
    """
    begins = getattr(model, "_initial_epoch", None)
    if begins and state["epoch"] not in (None, begins):
        raise CheckpointError(
            f"state is of epoch {state['epoch']}, and BackupAndRestore begins at {begins}: load "
            "the one that was saved at the same moment, or leave BackupAndRestore out"
        )
    with _damage():
        _check_model(state, model)
        engine = new_engine(callback.config, callback.config.secant_pairs, model)
        copies: dict[str, Any] = {}
        if hands is not None:
            beside = state["beside"] or hands.room.state_dict()
            pairs = hands.pairs_of(hands.room.restored(beside, 0))
            engine = new_engine(callback.config, pairs, model)
            if not pairs and state["secants"] is not None:
                # As it is compiled now there are none any more.
                state = state | {"secants": None, "start": None, "snapshots": False}
        engine.load_state_dict(state["engine"])
        if hands is not None:
            room = hands.room.restored(beside, engine.snapshots)
            peaks = {name: int(beside.get("peaks", {}).get(name, 0)) for name in hands.peaks}
            copies = _copies(state, hands, room, pairs)
        skipped, logs = int(state["skipped"]), dict(state["logs"])

    def put() -> None:
        with scope_of(model):
            if state["model"] is not None:
                _assign(_variables(model, state["model"]), state["model"]["values"])
            if state["optimizer"] is not None:
                _assign(model.optimizer.variables, state["optimizer"]["values"])
        callback.engine, callback._full_logs = engine, logs
        if hands is not None:
            hands.restart()
            hands.room, hands.pairs, hands.peaks = room, pairs, peaks
            for name, kept in copies.items():
                setattr(hands, name, kept)
            hands.port.rates.skipped = skipped
            if not state["snapshots"]:
                engine.regroup(pairs, engine.snapshots)
        # The weights are those that belong to this state.
        callback._loaded = callback._left = None
        callback._restored = state["model"]

    return put


def check_untouched(model: Any, saved: dict[str, Any]) -> None:
    """Raise :class:`hybridcore.CheckpointError` if the weights are not those of the state."""
    for variable, value in zip(_variables(model, saved), saved["values"], strict=True):
        if not variable.trainable:
            continue
        present = ops.convert_to_numpy(variable.value)
        if not np.array_equal(present, np.asarray(value, present.dtype), equal_nan=True):
            raise CheckpointError(
                "another callback put other weights into the model after HybridCallback had put "
                "back its own: leave BackupAndRestore out, or list it before and load the state "
                "that was saved at the same moment"
            )


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except DAMAGE as error:
        raise CheckpointError(
            f"state is damaged: pass what state_dict() gave ({type(error).__name__}: {error})"
        ) from error


# -- the copies ---------------------------------------------------------------------------------


def _copies(state: dict[str, Any], hands: Hands, room: Room, pairs: int) -> dict[str, Any]:
    """Return snapshots, average, pairs and what a rollback needs, made from `state`."""
    made: dict[str, Any] = {}
    kinds: dict[str, Callable[[], SnapshotBank | WeightAverage | SecantBank]] = {
        "bank": lambda: hands.new_bank(room),
        "average": lambda: WeightAverage(hands.port),
        "secants": lambda: SecantBank(hands.port, pairs),
    }
    for name, make in kinds.items():
        if state[name] is not None:
            made[name] = kept = make()
            if not kept.takes(state[name]):
                raise CheckpointError(
                    f"state is of another model or of other layer groups, as its {name} shows: "
                    "build the same model and pass the same layer_groups"
                )
            kept.load_state_dict(state[name])
    others = [tuple(variable.shape) for variable in hands.port.others()]
    weights = (sum(math.prod(variable.shape) for variable in hands.port.variables),)
    for name, present in (("recovery", others), ("start", [weights, *others])):
        if state[name] is None:
            continue
        if [np.shape(value) for value in state[name]] != present:
            raise CheckpointError(
                "state is of another model or optimizer, as what a rollback needs shows: build "
                "and compile the same ones"
            )
        made[name] = [ops.convert_to_tensor(value) for value in state[name]]
    if "recovery" in made and made.get("bank") is None:
        raise CheckpointError("state has a jump under way, and no weights from before it")
    if "start" in made and made.get("secants") is None:
        raise CheckpointError(
            "state has weights from before secant pairs, and no such pairs: pass what state_dict() "
            "gave"
        )
    return made


# -- model and optimizer ------------------------------------------------------------------------


def _variables(model: Any, saved: dict[str, Any] | None = None) -> list[Any]:
    """Variables of `model`, as many as were saved: the first versions left recurrent states out."""
    present = list(model.variables)
    early = saved is not None and len(saved["values"]) == len(present)
    return present if early else [*present, *recurrent_states(model)]


def _values(variables: Sequence[Any]) -> dict[str, Any]:
    return {
        "names": [variable.path for variable in variables],
        "kinds": [_kind_of_values(variable) for variable in variables],
        "trainable": [bool(variable.trainable) for variable in variables],
        "values": [as_numpy(variable.value) for variable in variables],
    }


def _check_model(state: dict[str, Any], model: Any) -> None:
    if state["model"] is not None:
        variables = _variables(model, state["model"])
        _check_variables("model", state["model"], variables)
        flags = zip(variables, state["model"]["trainable"], strict=True)
        differ = [variable.path for variable, was in flags if variable.trainable != was]
        if differ:
            raise CheckpointError(
                f"state was saved while other weights were trainable: {', '.join(differ[:5])} "
                "differ, so freeze the same layers"
            )
    if state["optimizer"] is not None:
        kind, optimizer = state["optimizer"]["kind"], model.optimizer
        if kind != _kind(optimizer):
            raise CheckpointError(
                f"state was saved with optimizer {kind}, and this model has {_kind(optimizer)}: "
                "compile it with the same one"
            )
        build_optimizer(model)
        _check_variables("optimizer", state["optimizer"], optimizer.variables)


def _check_variables(what: str, saved: dict[str, Any], variables: Sequence[Any]) -> None:
    there = [
        (name, f"{kind} {list(np.shape(value))}")
        for name, kind, value in zip(saved["names"], saved["kinds"], saved["values"], strict=True)
    ]
    here = [(v.path, f"{_kind_of_values(v)} {[int(n) for n in v.shape]}") for v in variables]
    # By position: a second model in a process has other names.
    differ = [
        f"{name} is {theirs} there and {ours} here"
        for (name, theirs), (_, ours) in zip(there, here, strict=False)
        if theirs != ours
    ]
    if len(there) != len(here):
        differ.insert(0, f"{len(there)} variables there and {len(here)} here")
    if differ:
        raise CheckpointError(
            f"state is of another {what}: {'; '.join(differ[:5])}. Build the same one, or load "
            "into a new HybridCallback"
        )


def _assign(variables: Sequence[Any], values: Sequence[Any]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(ops.convert_to_tensor(np.asarray(value), variable.dtype))


def _kind(optimizer: Any) -> str:
    inner = getattr(optimizer, "inner_optimizer", None)
    name = type(optimizer).__name__
    return name if inner is None else f"{name}({type(inner).__name__})"


def _kind_of_values(variable: Any) -> str:
    return str(keras.backend.standardize_dtype(variable.dtype))


def _plain(value: Any) -> Any:
    array = np.array(ops.convert_to_numpy(value))
    return array.item() if array.ndim == 0 else array
