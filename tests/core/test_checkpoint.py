"""The file that a checkpoint is: exact, whole, checked, and never half written."""

import contextlib
import json
import math
import os
import random
import subprocess
import sys
import time
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as stnp

from hybridcore import CheckpointError, checkpoint
from hybridcore.randomness import check_random_states, random_states, restore_random_states
from hybridcore.rotation import Rotation, checkpoints_in, read_newest

FLOATS = [0.1, -0.0, math.pi * 1e-300, 5e-324, 1.7976931348623157e308, math.inf, -math.inf]
STATE = {
    "none": None,
    "flags": [True, False],
    "big": 10**30,
    "floats": FLOATS,
    "tuple": (0.9, 0.999, (1, "two")),
    "milestones": Counter({30: 1, 80: 2}),
    "by index": {0: {"step": 3.0}, 1: {}},
    "ordered": OrderedDict([("z", 1), ("a", b"\x00\xff")]),
    "looks like a tag": {"$array": "no", "$": {"$tuple": [1]}},
    "one of them": {"$tuple": [1, 2]},
    "a.b": np.arange(3, dtype=np.int64),
    "a": {"b": np.float32([[1.5, np.nan]]), "empty": np.zeros((0, 4)), "scalar": np.array(2.5)},
    "strided": np.arange(12.0).reshape(3, 4)[:, ::2],
    "of numpy": np.float64(0.1),
}


def same(one, other):
    if isinstance(one, np.ndarray):
        assert isinstance(other, np.ndarray)
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert one.tobytes() == other.tobytes()
        return
    if isinstance(one, np.generic):
        one = one.item()
    assert type(one) is type(other), (one, other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            same(a, b)
    elif isinstance(one, float):
        assert (math.isnan(one) and math.isnan(other)) or one.hex() == other.hex()
    else:
        assert one == other


def test_a_state_comes_back_exactly(tmp_path):
    path = tmp_path / "state"
    checkpoint.write(path, STATE)
    same(STATE, checkpoint.read(path))
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_the_arrays_are_there_for_any_reader_of_safetensors(tmp_path):
    from safetensors.numpy import load_file

    checkpoint.write(tmp_path / "state", STATE)
    arrays = load_file(tmp_path / "state")
    assert set(arrays) == {"a.b", "a.b_", "a.empty", "a.scalar", "strided"}
    assert np.array_equal(arrays["strided"], STATE["strided"])


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary(max_size=9)
    | stnp.arrays(
        stnp.integer_dtypes(endianness="<") | stnp.floating_dtypes(endianness="<", sizes=(32, 64)),
        stnp.array_shapes(min_dims=0, min_side=0, max_dims=3, max_side=3),
    )
)
KEYS = st.text(max_size=9) | st.integers() | st.sampled_from(["$tuple", "$array", "$", "a.b"])
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.dictionaries(KEYS, inner, max_size=4).map(OrderedDict)
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(KEYS, TREES, max_size=5))
def test_any_state_comes_back_exactly(tmp_path_factory, state):
    path = tmp_path_factory.getbasetemp() / "any"
    checkpoint.write(path, state)
    same(state, checkpoint.read(path))


@pytest.mark.parametrize("value", [{1, 2}, object(), lambda: 0, 1j, random.Random])
def test_what_a_checkpoint_cannot_hold_is_named_and_writes_nothing(tmp_path, value):
    with pytest.raises(CheckpointError, match=r"^a.list.1 is a .*cannot hold"):
        checkpoint.write(tmp_path / "state", {"a": {"list": [0, value]}})
    assert not list(tmp_path.iterdir())


# -- damage ---------------------------------------------------------------------------------------


def test_a_file_cut_at_every_64th_byte_is_refused(tmp_path):
    path, cut = tmp_path / "state", tmp_path / "cut"
    checkpoint.write(path, STATE)
    whole = path.read_bytes()
    for size in range(0, len(whole), 64):
        cut.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="cut is damaged or no checkpoint"):
            checkpoint.read(cut)
    cut.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.read(cut)


def test_any_flipped_bit_is_found(tmp_path):
    path = tmp_path / "state"
    checkpoint.write(path, STATE)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    # All of the digest, and as many places elsewhere as make 500.
    at = whole.index(b'"sha256":"') + 10
    places = [*range(8 * at, 8 * (at + 64), 4), *rng.integers(0, 8 * len(whole), 372)]
    assert len(places) == 500
    for place in places:
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            checkpoint.read(path)


def signed(tmp_path, tree):
    """A file with a valid checksum around JSON that `write` would not have made."""
    from safetensors.numpy import save_file

    path = tmp_path / "state"
    metadata = {"hybridcore": checkpoint.LAYOUT, "state": tree, "sha256": "0" * 64}
    save_file({"x": np.zeros(2)}, path, metadata)
    checkpoint._sign(path)
    return path


@pytest.mark.parametrize(
    "tree",
    [
        "",
        "[1, 2]",
        "3",
        '{"a": {"$array": "gone"}}',
        '{"a": {"$array": 7}}',
        '{"a": {"$array": ["x"]}}',
        '{"a": {"$tuple": 5}}',
        '{"a": {"$float": "ten"}}',
        '{"a": {"$dict": [[[], 1]]}}',
        '{"a": {"$dict": [1]}}',
        '{"a": {"$Counter": 1}}',
        '{"a": {"$bytes": "*"}}',
        '{"a": {"$bytes": null}}',
        '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}",
    ],
)
def test_what_only_looks_like_a_state_is_refused(tmp_path, tree):
    with pytest.raises(CheckpointError, match="damaged or no checkpoint"):
        checkpoint.read(signed(tmp_path, tree))


def test_another_layout_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "LAYOUT", "2")
    checkpoint.write(tmp_path / "state", STATE)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="layout '2', this hybridcore reads '1': load it"):
        checkpoint.read(tmp_path / "state")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from([*checkpoint._BY_TAG, "$array", "a"]), inner, min_size=1, max_size=2
        )
    ),
    max_leaves=12,
)


# What starts with a length, as a file of safetensors does, gets further.
BYTES = st.binary(max_size=300) | st.tuples(st.integers(0, 2**20), st.binary(max_size=300))


@settings(max_examples=200, deadline=None)
@given(BYTES)
def test_bytes_that_are_no_checkpoint(tmp_path_factory, content):
    if isinstance(content, tuple):
        content = content[0].to_bytes(8, "little") + content[1]
    path = tmp_path_factory.getbasetemp() / "bytes"
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        checkpoint.read(path)


@settings(max_examples=150, deadline=None)
@given(JSON)
def test_any_json_is_a_state_or_refused(tmp_path_factory, tree):
    path = signed(tmp_path_factory.getbasetemp(), json.dumps(tree))
    with contextlib.suppress(CheckpointError):
        assert isinstance(checkpoint.read(path), dict)


# -- writing --------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "state"
    checkpoint.write(path, STATE)
    before = path.read_bytes()

    def full(arrays, file, metadata):
        with open(file, "wb") as half:
            half.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        checkpoint.write(path, {"a": 1}, save_file=full)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
    with pytest.raises(FileNotFoundError, match="no is no folder: make it first"):
        checkpoint.write(tmp_path / "no" / "state", STATE)
    with pytest.raises(IsADirectoryError, match="is a folder: name a file in it"):
        checkpoint.write(tmp_path, STATE)


DIE = """
import os, signal, sys
from hybridcore import checkpoint
def die(arrays, file, metadata):
    open(file, "wb").write(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
checkpoint.write(sys.argv[1], {"a": 1}, save_file=die)
"""


@pytest.mark.skipif(os.name == "nt", reason="leftovers are told by file locks of POSIX")
def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_are_not(tmp_path):
    path = tmp_path / "state"
    subprocess.run([sys.executable, "-c", DIE, str(path)], check=False)
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".part")
    (tmp_path / "mine.part").mkdir()
    with checkpoint._workshop(tmp_path / "other") as living:
        checkpoint.write(path, STATE)
        assert {p.name for p in tmp_path.iterdir()} == {"state", "mine.part", living.name}
    assert {p.name for p in tmp_path.iterdir()} == {"state", "mine.part"}
    # Going on from the folder is enough.
    subprocess.run([sys.executable, "-c", DIE, str(path)], check=False)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        read_newest(tmp_path, checkpoint.read)
    assert {p.name for p in tmp_path.iterdir()} == {"state", "mine.part"}


def test_the_newest_that_can_be_read_is_read(tmp_path):
    for step in (5, 10, 15):
        checkpoint.write(tmp_path / f"step-{step:09d}.safetensors", {"step": step})
    newest = checkpoints_in(tmp_path)[0]
    assert read_newest(tmp_path, checkpoint.read) == {"step": 15}
    newest.write_bytes(newest.read_bytes()[:-1])
    assert read_newest(tmp_path, checkpoint.read) == {"step": 10}
    for path in checkpoints_in(tmp_path):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of the 3 checkpoints"):
        read_newest(tmp_path, checkpoint.read)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        read_newest(tmp_path / "empty", checkpoint.read)


def test_the_checkpoints_of_another_run_are_left_alone(tmp_path, caplog):
    def save(rotation, *steps):
        for step in steps:
            rotation.save(step, lambda path: path.write_text(path.name))
        return sorted(int(path.stem[5:]) for path in checkpoints_in(tmp_path))

    first = Rotation(100, tmp_path, 2)
    first.begin(0)
    assert save(first, 700, 800, 900) == [800, 900]
    # Another one that forgot to load them, and a third that went on from the first of the two.
    second = Rotation(100, tmp_path, 2)
    assert "later steps" not in caplog.text
    second.begin(0)
    assert "holds 2 checkpoints of later steps than 0" in caplog.text
    assert save(second, 100, 200, 300) == [200, 300, 800, 900]
    third = Rotation(100, tmp_path, 2)
    third.begin(300)
    assert save(third, 400, 500) == [400, 500, 800, 900]
    # Those that it writes itself are its own.
    assert save(third, 800, 900) == [800, 900]
    assert save(third, 1000) == [900, 1000]


def test_what_cannot_be_saved_is_logged_whatever_it_raises(tmp_path, caplog):
    def write(path):
        raise KeyError(140)

    Rotation(1, tmp_path, 1).save(1, write)
    assert "no checkpoint of step 1, training goes on: KeyError: 140" in caplog.text


def test_a_clock_that_was_set_back_takes_no_new_checkpoint_for_an_old_one(tmp_path):
    ahead = time.time() + 3600.0
    for step in (10, 20):
        path = tmp_path / f"step-{step:09d}.safetensors"
        path.write_text(path.name)
        os.utime(path, (ahead + step, ahead + step))
    rotation = Rotation(10, tmp_path, 2)
    # One of the old names too, as where a run went back.
    for step in (30, 40, 20, 50):
        rotation.save(step, lambda path: path.write_text(path.name))
        assert read_newest(tmp_path, Path.read_text) == f"step-{step:09d}.safetensors"
        assert len(checkpoints_in(tmp_path)) == 2
    assert checkpoints_in(tmp_path)[1].name == "step-000000020.safetensors"


def test_random_states_come_back(tmp_path):
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    random.gauss(0, 1)
    np.random.normal()  # noqa: NPY002
    draw = lambda: [random.gauss(0, 1), random.random(), *np.random.normal(size=3)]  # noqa: E731, NPY002
    checkpoint.write(tmp_path / "state", random_states())
    expected = draw()
    state = checkpoint.read(tmp_path / "state")
    check_random_states(state)
    restore_random_states(state)
    assert draw() == expected
    with pytest.raises(ValueError, match="state"):
        check_random_states({**state, "python": [3, state["python"][1][:9], None]})


def test_what_was_just_written_is_the_newest_whatever_others_are_called(tmp_path):
    def write(path):
        path.write_text(path.name)
        # Filesystems may tell less than two writes apart.
        now = len(written)
        os.utime(path, (now, now))
        written.append(path.name)

    written = []
    for step in (800, 900, 1000):
        Rotation(100, tmp_path, 3).save(step, write)
    # A run that went back, or another one that was begun in the same folder.
    rotation = Rotation(100, tmp_path, 3)
    for step in (100, 200):
        rotation.save(step, write)
        assert read_newest(tmp_path, Path.read_text) == f"step-{step:09d}.safetensors"
    assert [path.name for path in checkpoints_in(tmp_path)] == written[:-4:-1]
