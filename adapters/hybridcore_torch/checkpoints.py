"""The trainer's state: collected, checked, restored, written and read."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hybridcore import CheckpointError
from hybridcore_torch.groups import outside
from hybridcore_torch.recovery import RecoveryPoint
from hybridcore_torch.secants import fits

if TYPE_CHECKING:
    from hybridcore_torch.trainer import HybridTrainer

VERSION = 3
KEYS = {
    "config",
    "engine",
    "bank",
    "secants",
    "average",
    "recovery",
    "steps_since_recovery",
    "model",
    "outside",
    "optimizer_class",
    "optimizer",
    "max_grad_norm",
    "scheduler_class",
    "scheduler",
    "scaler",
}


def collect(trainer: HybridTrainer) -> dict[str, Any]:
    """Return all that `trainer` needs to go on as if it had not been interrupted."""
    hands = trainer._hands
    bank, secants, average, recovery = hands.bank, hands.secants, hands.average, hands.recovery
    scheduler, scaler = trainer.scheduler, trainer.scaler
    return {
        "hybridcore": VERSION,
        "config": trainer.config.to_dict(),
        "engine": to_tensors(trainer.engine.state_dict()),
        "bank": None if bank is None else bank.state_dict(),
        "secants": None if secants is None else secants.state_dict(),
        "average": None if average is None else [v.clone() for v in average.values],
        "recovery": None if recovery is None else to_tensors(recovery.state_dict()),
        "steps_since_recovery": hands.steps_since_recovery,
        "model": trainer.model.state_dict(),
        "outside": [p.detach() for p in outside(trainer.model, trainer.optimizer)],
        "optimizer_class": type(trainer.optimizer).__name__,
        "optimizer": to_tensors(trainer.optimizer.state_dict()),
        "max_grad_norm": trainer.max_grad_norm,
        "scheduler_class": None if scheduler is None else type(scheduler).__name__,
        "scheduler": None if scheduler is None else to_tensors(scheduler.state_dict()),
        "scaler": None if scaler is None else scaler.state_dict(),
    }


def restore(trainer: HybridTrainer, state: dict[str, Any]) -> None:
    """Put `state` into `trainer`, after checking that it fits.

    Raises
    ------
    CheckpointError
        If it does not; nothing has been changed then.
    """
    check(state)
    _check_fits(trainer, state)
    engine = from_tensors(state["engine"])
    trainer.model.load_state_dict(state["model"])
    with torch.no_grad():
        for p, saved in zip(
            outside(trainer.model, trainer.optimizer), state["outside"], strict=True
        ):
            p.copy_(saved)
    # A copy: an optimizer may keep the very tensors that it is given, and train on them.
    trainer.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
    if trainer.scheduler is not None:
        trainer.scheduler.load_state_dict(state["scheduler"])
    if trainer.scaler is not None:
        trainer.scaler.load_state_dict(state["scaler"])
    trainer.engine.load_state_dict(engine)
    hands = trainer._hands
    hands.bank = hands.secants = hands.average = None
    if state["bank"] is not None:
        hands.snapshots.load_state_dict(state["bank"])
    if state["secants"] is not None:
        hands.new_secants().load_state_dict(state["secants"])
    if state["average"] is not None:
        torch._foreach_copy_(hands.new_average().values, state["average"])
    recovery = state["recovery"]
    hands.recovery = None if recovery is None else RecoveryPoint.from_state_dict(recovery)
    hands.steps_since_recovery = state["steps_since_recovery"]


def _check_fits(trainer: HybridTrainer, state: dict[str, Any]) -> None:
    if state["config"] != trainer.config.to_dict():
        raise CheckpointError(
            f"state was saved with settings {state['config']}, this trainer has "
            f"{trainer.config.to_dict()}: build it with HybridTrainerConfig.from_dict(...)"
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
            f"state is of another model: {', '.join(differ[:5])} differ in name or shape"
        )
    optimizer = type(trainer.optimizer).__name__
    if optimizer != state["optimizer_class"]:
        raise CheckpointError(
            f"state was saved with optimizer {state['optimizer_class']}, this trainer has "
            f"{optimizer}: build the same one"
        )
    counts = [len(group["params"]) for group in trainer.optimizer.param_groups]
    if counts != [len(group["params"]) for group in state["optimizer"]["param_groups"]]:
        raise CheckpointError("state is of another optimizer: its parameter groups differ")
    others = outside(trainer.model, trainer.optimizer)
    if [p.shape for p in others] != [p.shape for p in state["outside"]]:
        raise CheckpointError(
            "state is of another optimizer: its parameters outside the model differ"
        )
    if state["bank"] is not None and not trainer._hands.snapshots.takes(state["bank"]):
        raise CheckpointError(
            "state was saved with other layer groups: pass the same layer_groups to the trainer"
        )
    secants = state["secants"]
    if secants is not None and not fits(secants, trainer._parameters, trainer._hands.pairs):
        raise CheckpointError(
            "state was saved with secant pairs of other parameters: freeze them likewise"
        )
    shapes_now = [p.shape for p in trainer._parameters]
    if state["average"] is not None and [v.shape for v in state["average"]] != shapes_now:
        raise CheckpointError(
            "state is of another set of trainable parameters: freeze and order them likewise"
        )


def _shapes(tensors: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(getattr(value, "shape", ())) for name, value in tensors.items()}


def write(state: dict[str, Any], path: str | Path) -> None:
    """Write `state` to `path` in one move: the file is whole, or as it was before."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read(path: str | Path) -> dict[str, Any]:
    """Read what :func:`write` wrote.

    Raises
    ------
    CheckpointError
        If the file is damaged or no checkpoint of hybridcore.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    # What a damaged file makes of itself is anything: the reader's errors are of many kinds.
    except Exception as error:
        raise CheckpointError(
            f"{path} is damaged or no checkpoint: use an earlier one ({error})"
        ) from error
    check(state)
    return state  # type: ignore[no-any-return]


def check(state: object) -> None:
    """Raise :class:`CheckpointError` unless `state` is of this version."""
    if not isinstance(state, dict) or "hybridcore" not in state:
        raise CheckpointError("state is not one of a HybridTrainer: pass what state_dict() gave")
    if state["hybridcore"] != VERSION:
        raise CheckpointError(
            f"state has version {state['hybridcore']!r}, this hybridcore reads {VERSION}: load it "
            "with the version that wrote it"
        )
    missing = sorted(KEYS - state.keys())
    if missing:
        raise CheckpointError(f"state lacks {', '.join(missing)}: pass all that state_dict() gave")


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
    return value
