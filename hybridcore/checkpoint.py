"""One file for nested containers of numbers, strings and arrays: whole and checked, or refused.

The file is one of safetensors, which any of its readers opens: the arrays as they are, and in the
header's metadata the containers around them as JSON, the version of this layout, and the SHA-256 of
the whole file with 64 zeros in the place of the digest. Nothing in it is code, as in a pickle.

JSON holds None, bool, int, finite float, str, list and dict of str as they are. What it does not
know is a dict of one key that begins with ``$``: ``$array`` (name), ``$tuple``, ``$float`` (inf and
nan), ``$bytes``, and ``$dict``, ``$OrderedDict`` and ``$Counter`` (pairs of key and value).
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hybridcore.errors import CheckpointError, ConfigError

logger = logging.getLogger("hybridcore")

LAYOUT = "1"
_MAPPINGS: dict[type, str] = {dict: "$dict", OrderedDict: "$OrderedDict", Counter: "$Counter"}
_BY_TAG: dict[str, Callable[[Any], Any]] = {
    "$tuple": tuple,
    "$float": float,
    "$bytes": functools.partial(base64.b64decode, validate=True),
    **{tag: kind for kind, tag in _MAPPINGS.items()},
}
_DIGEST = re.compile(rb'"sha256":"([0-9a-f]{64})"')
_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{16}\.part")
_LOCK = ".lock"
_DAMAGE = (ArithmeticError, LookupError, RecursionError, TypeError, ValueError)
_CHUNK = 1 << 20

SaveFile = Callable[[dict[str, Any], str, dict[str, str]], object]


def _save_numpy(arrays: dict[str, Any], path: str, metadata: dict[str, str]) -> None:
    from safetensors.numpy import save_file

    # It takes the memory as it lies, whatever the strides say.
    save_file({name: np.asarray(a, order="C") for name, a in arrays.items()}, path, metadata)


def as_path(name: str, value: object) -> Path:
    """Return the argument `name` as a path; :class:`ConfigError` where it is none."""
    if not isinstance(value, str | os.PathLike):
        raise ConfigError(f"{name} must be a path, got {value!r}: pass a str or a pathlib.Path")
    return Path(value)


def write(
    path: str | Path,
    state: Mapping[str, Any],
    is_array: Callable[[object], bool] = lambda value: isinstance(value, np.ndarray),
    save_file: SaveFile = _save_numpy,
) -> None:
    """Write `state` to `path` in one move: the file is whole and on the disk, or as it was before.

    It is written beside `path`, flushed to the disk, and then renamed. What a process that died in
    the middle of that left in the folder is removed.

    Parameters
    ----------
    path : str or Path
        Where to; the folder has to be there.
    state : mapping
        Nested containers of None, bool, int, float, str, bytes and arrays.
    is_array : callable
        Whether a value is an array that `save_file` takes.
    save_file : callable
        Of the framework whose arrays these are, as ``safetensors.numpy.save_file``.

    Raises
    ------
    CheckpointError
        If `state` holds something that a checkpoint cannot.
    ConfigError
        If `path` is none.
    OSError
        If the file cannot be written; one that was there before is untouched.
    """
    path = as_path("path", path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file in it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is no folder: make it first, or name another one")
    arrays: dict[str, Any] = {}
    tree = _packed(dict(state), "", arrays, is_array)
    metadata = {"hybridcore": LAYOUT, "state": json.dumps(tree, allow_nan=False)}
    metadata["sha256"] = "0" * 64
    remove_leftovers(path.parent)
    with _workshop(path) as folder:
        file = folder / path.name
        try:
            save_file(arrays, str(file), metadata)
        except Exception as error:
            if isinstance(error, OSError | MemoryError):
                raise
            # The library has its own error for a full disk.
            raise OSError(f"{path} could not be written: {error}") from error
        _sign(file)
        os.replace(file, path)
    sync_folder(path.parent)


def read(path: str | Path, framework: str = "np") -> dict[str, Any]:
    """Read what :func:`write` wrote, arrays as those of `framework` of ``safetensors.safe_open``.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    CheckpointError
        If it is no such file, or not every bit of it is as it was written.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with open(path, "rb") as file:
            at, digest = _stamp(file)
            if _digest(file, at) != digest:
                raise ValueError("its checksum does not fit its content")
        with safe_open(str(path), framework=framework) as stored:
            metadata = stored.metadata()
            if metadata["hybridcore"] != LAYOUT:
                raise CheckpointError(
                    f"{path} has layout {metadata['hybridcore']!r}, this hybridcore reads "
                    f"{LAYOUT!r}: load it with the version that wrote it"
                )
            state = _unpacked(json.loads(metadata["state"]), stored.get_tensor)
        if not isinstance(state, dict):
            raise ValueError("it does not hold a state")
        return state
    except (OSError, CheckpointError):
        raise
    except (SafetensorError, *_DAMAGE) as error:
        raise CheckpointError(
            f"{path} is damaged or no checkpoint: use an earlier one ({error})"
        ) from error


# -- the containers -----------------------------------------------------------------------------


def _packed(
    value: Any, name: str, arrays: dict[str, Any], is_array: Callable[[object], bool]
) -> Any:
    """Return `value` as JSON can hold it, with its arrays moved to `arrays` by name."""

    def inner(item: Any, key: object) -> Any:
        return _packed(item, f"{name}.{key}" if name else str(key), arrays, is_array)

    if is_array(value):
        while name in arrays:
            name += "_"
        arrays[name] = value
        return {"$array": name}
    if isinstance(value, np.generic):
        value = value.item()
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"$float": str(value)}
    if kind is bytes:
        return {"$bytes": base64.b64encode(value).decode()}
    if kind is list:
        return [inner(item, index) for index, item in enumerate(value)]
    if isinstance(value, tuple):
        return {"$tuple": [inner(item, index) for index, item in enumerate(value)]}
    if kind in _MAPPINGS:
        ours = len(value) == 1 and next(iter(value), "").__class__ is str
        ours = ours and next(iter(value)).startswith("$")
        if kind is dict and not ours and all(type(key) is str for key in value):
            return {key: inner(item, key) for key, item in value.items()}
        pairs = [[inner(key, "key"), inner(item, key)] for key, item in value.items()]
        return {_MAPPINGS[kind]: pairs}
    raise CheckpointError(
        f"{name} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot hold: it "
        "takes None, numbers, strings, bytes, lists, tuples, dictionaries and arrays"
    )


def _unpacked(value: Any, array: Callable[[str], Any]) -> Any:
    """Undo :func:`_packed`."""
    if isinstance(value, list):
        return [_unpacked(item, array) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((tag, content),) = value.items()
        if tag == "$array":
            return array(content)
        if tag in _BY_TAG:
            content = _unpacked(content, array)
            if tag == "$Counter":
                content = dict(content)
            return _BY_TAG[tag](content)
    return {key: _unpacked(item, array) for key, item in value.items()}


# -- the file -----------------------------------------------------------------------------------


def _stamp(file: BinaryIO) -> tuple[int, str]:
    """Return where the digest stands in the file, and what it is."""
    file.seek(0, os.SEEK_END)
    size = file.tell()
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        raise ValueError("it ends too early")
    found = _DIGEST.findall(header := file.read(length))
    if len(found) != 1:
        raise ValueError("it has no checksum")
    return 8 + header.index(b'"sha256":"') + 10, found[0].decode()


def _digest(file: BinaryIO, at: int) -> str:
    """Return the SHA-256 of the file with zeros in the place of the 64 digits at `at`."""
    file.seek(0)
    digest = hashlib.sha256(file.read(at))
    digest.update(b"0" * len(file.read(64)))
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def _sign(path: Path) -> None:
    """Put the digest into the file, and bring it to the disk."""
    with path.open("r+b") as file:
        at, _ = _stamp(file)
        digest = _digest(file, at)
        file.seek(at)
        file.write(digest.encode())
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _workshop(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`, locked for as long as this process lives.

    A folder, because safetensors writes to a temporary file of its own beside the one it is given.
    """
    folder = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    folder.mkdir()
    try:
        with (folder / _LOCK).open("xb") as lock:
            # Without locks, as on some shared disks, leftovers stay.
            with contextlib.suppress(OSError):
                _hold(lock)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that died while they wrote a checkpoint left in `folder`."""
    for left in folder.iterdir():
        if _LEFTOVER.fullmatch(left.name):
            # One that is in use, or that somebody else removes, stays.
            with contextlib.suppress(OSError):
                try:
                    lock = (left / _LOCK).open("r+b")
                except FileNotFoundError:
                    left.rmdir()
                    continue
                with lock:
                    _hold(lock)
                    shutil.rmtree(left)
                logger.info("removed %s, which a process that died left", left)


def _hold(file: BinaryIO) -> None:
    """Lock `file` until it is closed; ``OSError`` if somebody holds it, or nobody can."""
    try:
        import fcntl
    except ImportError as error:
        raise OSError("this system has no file locks") from error
    fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)


def sync_folder(folder: Path) -> None:
    """Bring a renaming to the disk, where the system lets folders be opened for that."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
