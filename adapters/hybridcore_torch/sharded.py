"""The state of a trainer whose weights are sharded over ranks, as a folder.

``torch.distributed.checkpoint`` writes the shards, each rank its own, and reads them into other
shards where there are more or fewer ranks. All else, which is the same on all ranks, is a file of
:mod:`hybridcore_torch.files`. It names the folder beside it that the shards are in, and takes the
place of the one before in one move: until then that one and its shards are whole.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from hybridcore import CheckpointError, checkpoint
from hybridcore.checkpoint import as_path
from hybridcore_torch import files
from hybridcore_torch.ranks import reshard

_REST, _SHARDS = "rest.safetensors", "shards-"
Place = tuple[Any, ...]
Result = TypeVar("Result")


def is_folder_of_shards(path: str | Path) -> bool:
    """Whether :func:`write` wrote `path`."""
    return (as_path("path", path) / _REST).is_file()


def write(state: dict[str, Any], path: str | Path) -> None:
    """Write `state` to the folder `path`; every rank has to call it.

    The folder holds the state from before until the new one is whole and on the disk, and none of
    what a process that died in the middle left there.

    Raises
    ------
    CheckpointError
        If `state` holds something that a checkpoint cannot.
    OSError
        On every rank, if any of them cannot write its part; what was there before is untouched.
    """
    path, first = Path(path), dist.get_rank() == 0
    shards = dict(_shards(state, ()))
    name = _SHARDS + secrets.token_hex(8)

    def begin() -> str:
        if first:
            path.mkdir(parents=True, exist_ok=True)
            checkpoint.sync_folder(path.parent)
            _tidy(path)
        return name

    def finish() -> None:
        if first:
            rest = _without(state, ())
            rest["model"] = OrderedDict(rest["model"])
            rest["model"]._metadata = getattr(state["model"], "_metadata", None)
            rest |= {"shards": [list(place) for place in shards], "folder": name}
            files.write(rest, path / _REST)

    # That of the first rank.
    name = _together(path, begin)[0]
    try:
        _together(path, lambda: _save(shards, path / name))
        _together(path, finish)
    finally:
        if first:
            # An error now would be this rank's alone.
            with contextlib.suppress(OSError):
                _tidy(path)


def _save(shards: dict[Place, torch.Tensor], folder: Path) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        save({_name(place): value for place, value in shards.items()}, checkpoint_id=folder)
    except CheckpointException as error:
        failed = [f"rank {r}: {type(e).__name__}: {e}" for r, (e, _) in error.failures.items()]
        raise OSError(f"{folder} could not be written: {'; '.join(failed)}") from error
    checkpoint.sync_folder(folder)


def _tidy(path: Path) -> None:
    """Remove the shards in `path` that do not belong to what is there."""
    try:
        own = files.read(path / _REST).get("folder")
    except FileNotFoundError:
        own = None
    except CheckpointError:
        # Which ones belong to it nobody knows.
        return
    for folder in path.glob(f"{_SHARDS}*"):
        if folder.name != own:
            shutil.rmtree(folder, ignore_errors=True)


def _together(path: Path, work: Callable[[], Result]) -> list[Result]:
    """Do `work` on all ranks and return what each came to; if one fails, all of them do."""
    failure: BaseException | None = None
    result = text = None
    try:
        result = work()
    # The others wait for this rank, whatever has happened here.
    except BaseException as error:
        failure, text = error, f"{type(error).__name__}: {error}"
    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, (result, text))
    if failure is not None:
        raise failure
    for rank, (_, other) in enumerate(seen):
        if other is not None:
            raise OSError(f"{path} could not be written, because rank {rank} failed: {other}")
    return [result for result, _ in seen]


def read(path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Read what :func:`write` wrote, for the shards that `model` has here.

    Raises
    ------
    CheckpointError
        If it is damaged, or not of this model and optimizer.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reshard(model)
    state = files.read(Path(path) / _REST)
    # In the first ones the shards were beside the file.
    folder = Path(path) / state.pop("folder", ".")
    places = [tuple(place) for place in state.pop("shards", [])]
    here = model.state_dict()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        stored = FileSystemReader(folder).read_metadata().state_dict_metadata
        into: dict[str, torch.Tensor] = {}
        for place in places:
            if place[0] == "model" and place[1] not in here:
                raise CheckpointError(
                    f"{path} holds {place[1]}, which the model does not have: it is of another "
                    "model, or of one that was not in the same wrapper"
                )
            like = here[place[1]] if place[0] == "model" else trained[int(place[2])]
            kept: Any = stored[_name(place)]
            if like.shape != kept.size:
                raise CheckpointError(
                    f"{_name(place)} is of another model: it has shape {tuple(kept.size)} and not "
                    f"{tuple(like.shape)}"
                )
            into[_name(place)] = torch.empty_like(like.detach(), dtype=kept.properties.dtype)
        with warnings.catch_warnings():
            # One process may read what several wrote.
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            load(into, checkpoint_id=folder)
    except CheckpointError:
        raise
    # What a damaged folder makes of itself is anything: the reader's errors are of many kinds.
    except Exception as error:
        raise CheckpointError(
            f"{path} is damaged, or of another model or optimizer: use an earlier one ({error})"
        ) from error
    for place in places:
        owner: Any = state
        for key in place[:-1]:
            owner = owner[key]
        owner[place[-1]] = into[_name(place)]
    return state


def _name(place: Place) -> str:
    return ".".join(map(str, place))


def _shards(value: Any, place: Place) -> Iterator[tuple[Place, torch.Tensor]]:
    """Tensors in nested dictionaries that are spread over ranks, and where they are."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _shards(item, (*place, key))
    elif hasattr(value, "placements"):
        yield place, value


def _without(value: Any, place: Place) -> Any:
    """Copy nested dictionaries, with None for the tensors of :func:`_shards`."""
    if type(value) in (dict, OrderedDict):
        return {key: _without(item, (*place, key)) for key, item in value.items()}
    return None if hasattr(value, "placements") else value
