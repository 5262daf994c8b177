"""Where memory runs out, copies of the weights are given up, and fit goes on."""

import numpy as np
import pytest
import tensorflow as tf
from keras_problems import BRISK, Watch, digits, regression, same, train, weights

from hybridcore import Phase
from hybridcore_keras import HybridCallback
from hybridcore_keras.averages import WeightAverage
from hybridcore_keras.memory import is_out_of_memory
from hybridcore_keras.on_tensorflow import TensorFlowPort
from hybridcore_keras.snapshots import SnapshotBank

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def short():
    return tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")


@pytest.mark.parametrize(("most", "room"), [(6, 5), (4, 0)])
def test_an_allocator_that_refuses_gets_fewer_snapshots_and_then_none(
    most, room, monkeypatch, caplog, tmp_path
):
    take = SnapshotBank.take

    def refused(bank, *, fresh):
        # A full bank holds one more for a moment.
        if not fresh and bank.count >= most:
            raise short()
        take(bank, fresh=fresh)

    monkeypatch.setattr(SnapshotBank, "take", refused)
    model, hybrid = regression(), HybridCallback(BRISK)
    history = train(model, 160, hybrid)
    summary = hybrid.statistics()
    assert summary.steps == 160
    assert summary.snapshots == hybrid.engine.snapshots == room
    assert history["hybrid_snapshots"][0] == 6
    assert history["hybrid_snapshots"][-1] == room
    # Those of a jump that was taken back, where there was no room to validate it.
    predicted = dict(
        zip(history["hybrid_snapshots"], history["hybrid_predicted_steps"], strict=True)
    )
    assert predicted[room] > 0
    assert room or predicted[0] == predicted[4]
    assert caplog.text.count("memory has run out") == {5: 1, 0: 3}[room]
    assert ("no snapshots and no jumps" in caplog.text) == (room == 0)
    assert model.evaluate(*digits(), verbose=0) < 0.3
    # What was given up stays so in a run that goes on.
    again = HybridCallback(BRISK)
    again.load_state_dict(hybrid.state_dict())
    train(model, 1, again)
    assert again.statistics().snapshots == room
    assert again.hands.bank is None or again.hands.bank.capacity == room


@pytest.mark.parametrize(
    ("owner", "name", "call", "before"),
    [
        (SnapshotBank, "move", 2, True),
        (SnapshotBank, "put_back", 2, True),
        (TensorFlowPort, "probe", 2, False),
        (TensorFlowPort, "keep", 1, False),
        (WeightAverage, "add", 2, False),
    ],
)
def test_memory_that_runs_out_in_any_call_costs_no_step(
    owner, name, call, before, monkeypatch, caplog
):
    plain, calls = getattr(owner, name), 0

    def once(self, *arguments, **named):
        nonlocal calls
        calls += 1
        if calls == call and before:
            raise short()
        result = plain(self, *arguments, **named)
        if calls == call:
            raise short()
        return result

    monkeypatch.setattr(owner, name, once)
    model, hybrid = regression(), HybridCallback(BRISK)
    watch = Watch(hybrid)
    train(model, 110, hybrid, watch)
    summary = hybrid.statistics()
    assert summary.steps == 110
    assert summary.snapshots == 5
    assert caplog.text.count("memory has run out") == 1
    assert set(watch.phases) == set(Phase)
    assert all(np.isfinite(w).all() for w in weights(model))
    assert model.evaluate(*digits(), verbose=0) < 0.5


def test_a_jump_that_cannot_be_validated_is_taken_back(monkeypatch):
    model, hybrid = regression(), HybridCallback(BRISK)
    before = []
    plain = SnapshotBank.save

    def save(bank):
        before[:] = weights(model)
        plain(bank)

    monkeypatch.setattr(SnapshotBank, "save", save)
    while hybrid.engine.phase is not Phase.CORRECT:
        train(model, 1, hybrid)
    assert not same(before, weights(model))
    monkeypatch.setattr(SnapshotBank, "take", lambda bank, fresh: (_ for _ in ()).throw(short()))
    while hybrid.engine.phase is Phase.CORRECT:
        train(model, 1, hybrid)
    assert same(before, weights(model))


def test_other_errors_and_the_step_s_own_memory_are_none_of_this(monkeypatch):
    model, hybrid = regression(), HybridCallback(BRISK)

    def failing(bank, *, fresh):
        raise ValueError("of another kind")

    monkeypatch.setattr(SnapshotBank, "take", failing)
    with pytest.raises(ValueError, match="of another kind"):
        train(model, 100, hybrid)
    assert hybrid.statistics().snapshots == 6

    def full(port, scale):
        raise short()

    monkeypatch.setattr(TensorFlowPort, "full", full)
    with pytest.raises(tf.errors.ResourceExhaustedError):
        train(regression(), 3, HybridCallback(BRISK))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("shapes do not fit"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_says_that_memory_has_run_out(error, expected):
    assert is_out_of_memory(error) == expected
