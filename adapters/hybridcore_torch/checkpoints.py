"""The trainer's state: collected, checked and restored."""

from __future__ import annotations

import contextlib
import copy
import logging
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from hybridcore import CheckpointError
from hybridcore.randomness import check_random_states, random_states, restore_random_states
from hybridcore_torch.groups import outside
from hybridcore_torch.ranks import is_sharded
from hybridcore_torch.recovery import state_of

if TYPE_CHECKING:
    from hybridcore_torch.trainer import HybridTrainer

logger = logging.getLogger("hybridcore")

VERSION = 7
DAMAGE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
KEYS = {
    "config",
    "engine",
    "bank",
    "secants",
    "average",
    "recovery",
    "start",
    "layers",
    "model",
    "outside",
    "optimizer_class",
    "optimizer",
    "max_grad_norm",
    "scheduler_class",
    "scheduler",
    "scaler",
    "snapshots",
    "room",
    "random",
}


def collect(trainer: HybridTrainer, snapshots: bool = True) -> dict[str, Any]:
    """Return all that `trainer` needs to go on as if it had not been interrupted.

    Without `snapshots` no copies of the weights are in it, unless a jump may have to be taken back.
    Where weights are sharded there are none, and a jump under way is taken back in the state.
    """
    hands = trainer._hands
    bank, secants, average = hands.bank, hands.secants, hands.average
    recovery, start = hands.recovery, hands.start
    scheduler, scaler = trainer.scheduler, trainer.scaler
    sharded = is_sharded(trainer.model)
    if sharded or (not snapshots and recovery is None):
        bank = secants = average = start = None
        snapshots = False
    else:
        snapshots = True
    model, optimizer = trainer.model.state_dict(), state_of(trainer.optimizer)
    if sharded and recovery is not None:
        model, optimizer, recovery = *hands.before_the_jump(), None
    return {
        "hybridcore": VERSION,
        "config": trainer.config.to_dict(),
        "engine": to_tensors(trainer.engine.state_dict()),
        "snapshots": snapshots,
        "room": hands.room.state_dict() | {"peaks": dict(hands.peaks)},
        "bank": None if bank is None else bank.state_dict(),
        "secants": None if secants is None else secants.state_dict(),
        "average": None if average is None else [v.clone() for v in average.values],
        "recovery": None if recovery is None else to_tensors(recovery.state_dict()),
        "start": None if start is None else to_tensors(start.state_dict()),
        "layers": _layers(trainer),
        "model": model,
        "outside": [p.detach() for p in outside(trainer.model, trainer.optimizer)],
        "optimizer_class": type(trainer.optimizer).__name__,
        "optimizer": to_tensors(optimizer),
        "max_grad_norm": trainer.max_grad_norm,
        "scheduler_class": None if scheduler is None else type(scheduler).__name__,
        "scheduler": None if scheduler is None else to_tensors(scheduler.state_dict()),
        "scaler": None if scaler is None else scaler.state_dict(),
        # Each rank has states of its own, and other ranks may go on.
        "random": None if sharded else to_tensors(random_states()) | _torch_random_states(),
    }


def restore(trainer: HybridTrainer, state: dict[str, Any]) -> None:
    """Put `state` into `trainer`, after checking that it fits.

    Raises
    ------
    CheckpointError
        If it does not; nothing has been changed then.
    """
    hands = trainer._hands
    try:
        state = _rekeyed(migrated(state), trainer)
        _check_fits(trainer, state)
        engine = from_tensors(state["engine"])
        # A new one: what an engine does not take must not be half in the one that is there.
        pairs = hands.pairs_of(int(state["room"]["pairs"]))
        new_engine = trainer._new_engine(pairs)
        new_engine.load_state_dict(engine)
        whole = bool(state["snapshots"])
        if not pairs and state["secants"] is not None:
            # With a hook at the optimizer, or on several ranks, there are none any more.
            state, whole = state | {"secants": None, "start": None}, False
        room = hands.room.restored(state["room"], new_engine.snapshots)
        copies = hands.copies_from(state, room.snapshots, pairs)
        saved_peaks = state["room"].get("peaks", {})
        peaks = {name: int(saved_peaks.get(name, 0)) for name in hands.peaks}
        # The probe could be evaluated before there was a state, unless that is of no step.
        probed, moved = new_engine.counters.steps > 0, bool(new_engine.moved)
        _check_random(state["random"])
        # A copy: an optimizer may keep the very tensors that it is given, and train on them.
        optimizer = copy.deepcopy(state["optimizer"])
        _load(trainer, state, optimizer)
    except (CheckpointError, torch.OutOfMemoryError):
        raise
    except DAMAGE as error:
        raise CheckpointError(
            f"state is damaged: pass what state_dict() gave ({type(error).__name__}: {error})"
        ) from error
    trainer.engine = new_engine
    hands.take_over(copies, room, moved)
    hands.peaks |= peaks
    trainer._probed = probed
    if not whole:
        trainer._start_over()
    _restore_random(state["random"])


def _load(trainer: HybridTrainer, state: dict[str, Any], optimizer: dict[str, Any]) -> None:
    """Load what is the user's, or leave it as it is if any of it does not take its part."""
    with contextlib.ExitStack() as undo:

        def load(owner: Any, saved: Any, before: Any) -> None:
            undo.callback(owner.load_state_dict, before)
            owner.load_state_dict(saved)

        # An optimizer takes new tensors, and does not write into those that it has.
        load(trainer.optimizer, optimizer, state_of(trainer.optimizer))
        # It asks for settings of the groups, any of which may be damaged.
        trainer._hands.pairs_of(0)
        if trainer.scheduler is not None:
            before = copy.deepcopy(trainer.scheduler.state_dict())
            load(trainer.scheduler, copy.deepcopy(state["scheduler"]), before)
        if trainer.scaler is not None:
            load(trainer.scaler, state["scaler"], trainer.scaler.state_dict())
        model = trainer.model.state_dict()
        # Names and shapes have been checked, so only code of the user's own can fail there.
        own = any(map(_loads_by_itself, trainer.model.modules()))
        load(trainer.model, state["model"], copy.deepcopy(model) if own else model)
        with torch.no_grad():
            for p, saved in zip(
                outside(trainer.model, trainer.optimizer), state["outside"], strict=True
            ):
                p.copy_(saved)
        undo.pop_all()


def _loads_by_itself(module: nn.Module) -> bool:
    """Whether code that is not torch's runs while `module` is loaded."""
    kind = type(module)
    methods = (kind.load_state_dict, kind._load_from_state_dict, kind.set_extra_state)
    foreign = any(not method.__module__.startswith("torch.") for method in methods)
    return bool(foreign or module._load_state_dict_pre_hooks or module._load_state_dict_post_hooks)


def _layers(trainer: HybridTrainer) -> list[list[int]]:
    """Trainable parameters by layer group, each as its place in the optimizer."""
    groups = trainer.optimizer.param_groups
    places = {id(p): at for at, p in enumerate(p for group in groups for p in group["params"])}
    return [[places[id(p)] for p in layer] for layer in trainer._structure.layers]


def _rekeyed(state: dict[str, Any], trainer: HybridTrainer) -> dict[str, Any]:
    """Undo what ``torch.distributed.checkpoint`` does to a state.

    It leaves out dictionaries that are empty, and makes strings of all keys of the others.
    """

    def like(value: Any, known: Any) -> Any:
        if isinstance(value, list) and isinstance(known, list) and len(value) == len(known):
            return [like(a, b) for a, b in zip(value, known, strict=True)]
        if isinstance(known, np.ndarray):
            return from_tensors(value)
        if not isinstance(value, dict) or not isinstance(known, dict):
            return value
        if any(isinstance(key, int) for key in known):
            return type(known)({_number(key): item for key, item in value.items()})
        return {key: like(item, known.get(key)) for key, item in value.items()}

    def optimizer(saved: dict[str, Any]) -> dict[str, Any]:
        of_parameters = saved.get("state", {})
        return saved | {"state": {_number(key): item for key, item in of_parameters.items()}}

    state = state | {"optimizer": optimizer(state["optimizer"])}
    known = None if trainer.scheduler is None else trainer.scheduler.state_dict()
    state["scheduler"] = like(state["scheduler"], known)
    for name in ("recovery", "start"):
        if state[name] is not None:
            point = {"buffers": {}, **state[name]}
            state[name] = point | {"optimizer": optimizer(point["optimizer"])}
    return state


def _number(key: Any) -> Any:
    """Return the number that `key` is one of a parameter by, or `key` if it is none."""
    return int(key) if isinstance(key, str) and key.isdigit() else key


def _torch_random_states() -> dict[str, Any]:
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if on_gpu else [],
    }


def _check_random(random: dict[str, Any] | None) -> None:
    if random is not None:
        check_random_states(from_tensors(random))
        torch.Generator().set_state(random["torch"])
        tensors = all(isinstance(saved, torch.Tensor) for saved in random["cuda"])
        if type(random["cuda"]) is not list or not tensors:
            raise TypeError("random states of GPUs are a list of tensors")


def _restore_random(random: dict[str, Any] | None) -> None:
    if random is None:
        return
    restore_random_states(from_tensors(random))
    torch.set_rng_state(random["torch"])
    present = torch.cuda.device_count() if random["cuda"] else 0
    for device, saved in enumerate(random["cuda"][:present]):
        torch.cuda.set_rng_state(saved, device)


def _check_fits(trainer: HybridTrainer, state: dict[str, Any]) -> None:
    differ = trainer.config.differences(state["config"])
    if differ:
        raise CheckpointError(
            f"state was saved with other settings, {', '.join(differ)}: build the trainer with "
            "HybridTrainerConfig.from_dict(state['config'])"
        )
    for name in ("scheduler", "scaler"):
        if (getattr(trainer, name) is None) != (state[name] is None):
            has = "without" if state[name] is None else "with"
            raise CheckpointError(f"state was saved {has} a {name}: build the trainer likewise")
    if state["max_grad_norm"] != trainer.max_grad_norm:
        raise CheckpointError(
            f"state was saved with max_grad_norm={state['max_grad_norm']}, this trainer has "
            f"{trainer.max_grad_norm}: pass the same one"
        )
    scheduler = None if trainer.scheduler is None else type(trainer.scheduler).__name__
    if scheduler != state["scheduler_class"]:
        raise CheckpointError(
            f"state was saved with scheduler {state['scheduler_class']}, this trainer has "
            f"{scheduler}: build the same one"
        )
    shapes, saved = _shapes(trainer.model.state_dict()), _shapes(state["model"])
    if shapes != saved:
        differ = sorted(n for n in shapes.keys() | saved if shapes.get(n) != saved.get(n))
        raise CheckpointError(
            f"state is of another model: {', '.join(differ[:5])} differ in name, shape or dtype; "
            "build the model as for the run that was saved"
        )
    optimizer = type(trainer.optimizer).__name__
    if optimizer != state["optimizer_class"]:
        raise CheckpointError(
            f"state was saved with optimizer {state['optimizer_class']}, this trainer has "
            f"{optimizer}: build the same one"
        )
    counts = [len(group["params"]) for group in trainer.optimizer.param_groups]
    saved_counts = [len(group["params"]) for group in state["optimizer"]["param_groups"]]
    if counts != saved_counts:
        raise CheckpointError(
            f"state is of another optimizer: its parameter groups are of {saved_counts} "
            f"parameters, and those of this one of {counts}"
        )
    for name in ("optimizer", "scheduler", "scaler"):
        present = getattr(trainer, name)
        # Not all keys: what a later torch added to a scheduler is no reason to refuse an old state.
        if present is not None and not isinstance(state[name], dict):
            raise CheckpointError(f"state is damaged: it holds no {name}")
    if trainer.scaler is not None and state["scaler"].keys() != trainer.scaler.state_dict().keys():
        was, now = ("on", "off") if state["scaler"] else ("off", "on")
        raise CheckpointError(
            f"state was saved with a scaler that was {was}, and here it is {now}: build the same"
        )
    others = outside(trainer.model, trainer.optimizer)
    if [p.shape for p in others] != [p.shape for p in state["outside"]]:
        raise CheckpointError(
            "state is of another optimizer: its parameters outside the model differ"
        )
    copies = any(state[name] is not None for name in ("bank", "secants", "average", "recovery"))
    layers = _layers(trainer)
    saved_layers = layers if state["layers"] is None else state["layers"]
    shapes_now = [p.shape for p in trainer._structure.parameters]
    others_then = state["average"] is not None and [v.shape for v in state["average"]] != shapes_now
    if others_then or (copies and sorted(chain(*saved_layers)) != sorted(chain(*layers))):
        raise CheckpointError(
            "state is of another set of trainable parameters: freeze and order them likewise"
        )
    if copies and saved_layers != layers:
        raise CheckpointError(
            "state was saved with other layer groups: pass the same layer_groups to the trainer"
        )


def _shapes(values: dict[str, Any]) -> dict[str, tuple[object, ...] | None]:
    """Return shape and dtype of each tensor, and None for what is none."""
    return {
        name: (*value.shape, value.dtype) if isinstance(value, torch.Tensor) else None
        for name, value in values.items()
    }


def _from_2(state: dict[str, Any]) -> dict[str, Any]:
    """Before version 3 the bank held a matrix for each layer group, and not for all of them."""
    bank = state["bank"]
    if bank is not None and len({rows.dtype for rows in bank["rows"]}) == 1:
        ends = np.cumsum([0, *(rows.shape[1] for rows in bank["rows"])]).tolist()
        spans = [(group, *ends[group : group + 2]) for group in range(len(bank["rows"]))]
        bank = bank | {"rows": [torch.cat(bank["rows"], dim=1)], "spans": [spans]}
    elif bank is not None:
        # Which of them are of one group is not known any more.
        logger.warning("this state is of an earlier version: snapshots and trend start over")
        bank = None
        state = state | {"snapshots": False, "secants": None, "average": None, "recovery": None}
    return state | {"hybridcore": 3, "bank": bank}


def _from_3(state: dict[str, Any]) -> dict[str, Any]:
    """Before version 4 there were no random states, and always all copies of the weights."""
    room = {"pairs": state["config"]["secant_pairs"], "average": True}
    if state["scaler"] is not None:
        room["pairs"] = 0
    return {"snapshots": True, "room": room, "random": None} | state | {"hybridcore": 4}


def _from_4(state: dict[str, Any]) -> dict[str, Any]:
    """Before version 5 it was not kept which parameters are in which layer group."""
    return {"layers": None} | state | {"hybridcore": 5}


def _from_5(state: dict[str, Any]) -> dict[str, Any]:
    """Before version 6 secant pairs had their changes without the metric, and all products."""
    old = state["secants"]
    if old is None:
        return state | {"hybridcore": 6}
    rows, (has_base, squares, is_metric) = old["rows"], old["counts"]
    (base, gradient), _ = old["base"]
    pairs = (len(rows) - 5) // 2
    new = rows.new_zeros(6 + 2 * pairs, rows.shape[1])
    new[0], new[2], new[4:-1], new[-1] = rows[gradient], rows[base], rows[4:], rows[gradient]
    if is_metric:
        new[5 + pairs :] *= rows[4]
    plain, scaled = (torch.nn.functional.pad(one, (0, 1)) for one in old["products"])
    secants = {
        "rows": new,
        "order": old["order"],
        "counts": [0, has_base, squares, is_metric],
        "plain": plain,
        # Those with the gradient are found anew before they are needed.
        "scaled": torch.nn.functional.pad(scaled, (0, 0, 0, 1)),
        "decay": old["decay"],
    }
    return state | {"hybridcore": 6, "secants": secants}


def _from_6(state: dict[str, Any]) -> dict[str, Any]:
    """Before version 7 nothing was kept of where secant pairs began."""
    return {"start": None} | state | {"hybridcore": 7}


MIGRATIONS = {2: _from_2, 3: _from_3, 4: _from_4, 5: _from_5, 6: _from_6}


def migrated(state: object) -> dict[str, Any]:
    """Return `state` as one of this version.

    Raises
    ------
    CheckpointError
        If it is none of a trainer, of a version that is not known here, or not whole.
    """
    if not isinstance(state, dict) or "hybridcore" not in state:
        raise CheckpointError(
            "state is not one of a HybridTrainer: pass what its state_dict() gave, or to load() a "
            "file of its save()"
        )
    while state["hybridcore"] != VERSION:
        migrate = MIGRATIONS.get(state["hybridcore"])
        if migrate is None:
            raise CheckpointError(
                f"state has version {state['hybridcore']!r}, this hybridcore reads "
                f"{min(MIGRATIONS)} to {VERSION}: load it with the version that wrote it"
            )
        state = migrate(state)
    missing = sorted(KEYS - state.keys())
    if missing:
        raise CheckpointError(f"state lacks {', '.join(missing)}: pass all that state_dict() gave")
    return state


def to_tensors(value: Any) -> Any:
    """Copy nested containers with NumPy arrays turned to tensors, which are safe to load."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, np.generic):
        return value.item()
    # A dict of another kind, as the Counter of MultiStepLR, has to stay of its kind.
    if type(value) is dict:
        return {key: to_tensors(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [to_tensors(item) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    return value


def from_tensors(value: Any) -> Any:
    """Undo :func:`to_tensors`."""
    if isinstance(value, torch.Tensor):
        return value.cpu().numpy()
    if isinstance(value, dict):
        return {key: from_tensors(item) for key, item in value.items()}
    if type(value) is list:
        return [from_tensors(item) for item in value]
    return value
