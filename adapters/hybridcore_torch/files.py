"""The trainer's state as a file, and as one that is written every so many steps."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hybridcore import CheckpointError, StepResult, checkpoint
from hybridcore.rotation import Rotation, Saver
from hybridcore_torch.checkpoints import migrated
from hybridcore_torch.checks import are_finite

if TYPE_CHECKING:
    from hybridcore_torch.trainer import HybridTrainer

_ZIP = b"PK\x03\x04"


def write(state: dict[str, Any], path: str | Path) -> None:
    """Write `state` to `path` in one move; see :func:`hybridcore.checkpoint.write`."""
    # The versions of the modules, which load_state_dict looks at, hang on the dictionary.
    versions = getattr(state["model"], "_metadata", None)
    checkpoint.write(path, state | {"model_versions": versions}, _is_tensor, _save_file)


def read(path: str | Path) -> dict[str, Any]:
    """Read what :func:`write` wrote, or ``torch.save`` of a state, as it was done before version 4.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    CheckpointError
        If the file is damaged, no checkpoint of hybridcore, or of a version not known here.
    """
    with open(path, "rb") as file:
        pickled = file.read(len(_ZIP)) == _ZIP
    saved = _unpickled(path) if pickled else checkpoint.read(path, "pt")
    try:
        state = migrated(saved)
        versions = state.pop("model_versions", None)
        if versions is not None:
            state["model"] = OrderedDict(state["model"])
            state["model"]._metadata = versions
        return state
    except CheckpointError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged: use an earlier one ({type(error).__name__}: {error})"
        ) from error


def _unpickled(path: str | Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    # What a damaged file makes of itself is anything: the reader's errors are of many kinds.
    except Exception as error:
        raise CheckpointError(
            f"{path} is damaged or no checkpoint: use an earlier one ({error})"
        ) from error


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def _save_file(tensors: dict[str, Any], path: str, metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    kept: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if hasattr(tensor, "full_tensor"):
            raise CheckpointError(
                f"{name} is sharded over ranks: save state_dict() by torch.distributed.checkpoint"
            )
        if tensor.layout is not torch.strided:
            raise CheckpointError(f"{name} has layout {tensor.layout}: a checkpoint takes strided")
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        # Memory that is shared, by tied weights or views, is written once for each.
        if storage.nbytes() != plain.nbytes or storage.data_ptr() in seen:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        kept[name] = plain
    save_file(kept, path, metadata)


def saver(
    trainer: HybridTrainer, rotation: Rotation, snapshots: bool, before_jumps: bool
) -> Callable[[StepResult], None]:
    """Return a callback that saves `trainer` as :meth:`HybridTrainer.save_every` says."""
    kept = Saver(
        rotation,
        lambda path: trainer.save(path, snapshots=snapshots),
        lambda: are_finite(trainer.model),
        before_jumps,
    )
    kept.begin(trainer.engine)

    def after_step(result: StepResult) -> None:
        kept.count(trainer.engine)
        kept.save(trainer.engine)

    return after_step
