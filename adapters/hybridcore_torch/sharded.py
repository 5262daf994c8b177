"""The state of a trainer whose weights are sharded over ranks, as a folder.

``torch.distributed.checkpoint`` writes the shards, each rank its own, and reads them into other
shards where there are more or fewer ranks. All else, which is the same on all ranks, is a file of
:mod:`hybridcore_torch.files` beside them.
"""

from __future__ import annotations

import shutil
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hybridcore import CheckpointError
from hybridcore_torch import files
from hybridcore_torch.ranks import reshard

_REST = "rest.safetensors"
Place = tuple[Any, ...]


def is_folder_of_shards(path: str | Path) -> bool:
    """Whether :func:`write` wrote `path`."""
    return (Path(path) / _REST).is_file()


def write(state: dict[str, Any], path: str | Path) -> None:
    """Write `state` to the folder `path`; every rank has to call it.

    It is written beside `path` and then renamed, so that what was there is whole until then.
    """
    from torch.distributed.checkpoint.state_dict_saver import save

    path = Path(path)
    beside, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    shards = dict(_shards(state, ()))
    first = dist.get_rank() == 0
    if first:
        for left_over in (beside, old):
            shutil.rmtree(left_over, ignore_errors=True)
    dist.barrier()
    save({_name(place): value for place, value in shards.items()}, checkpoint_id=beside)
    if first:
        rest = _without(state, ())
        rest["model"] = OrderedDict(rest["model"])
        rest["model"]._metadata = getattr(state["model"], "_metadata", None)
        files.write(rest | {"shards": [list(place) for place in shards]}, beside / _REST)
        if path.exists():
            path.rename(old)
        beside.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    dist.barrier()


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
    places = [tuple(place) for place in state.pop("shards", [])]
    here = model.state_dict()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        stored = FileSystemReader(Path(path)).read_metadata().state_dict_metadata
        into: dict[str, torch.Tensor] = {}
        for place in places:
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
            load(into, checkpoint_id=Path(path))
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
