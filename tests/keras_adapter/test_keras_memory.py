"""What copies of the weights take, and what is given up where memory runs out."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from keras_problems import (
    BRISK,
    CURVED,
    Watch,
    digits,
    perceptron,
    regression,
    same,
    train,
    weights,
)

from hybridcore import ConfigError, HybridTrainerConfig, Phase
from hybridcore.memory import SCALED
from hybridcore_keras import HybridCallback
from hybridcore_keras.averages import WeightAverage
from hybridcore_keras.codes import decode, encode
from hybridcore_keras.memory import is_out_of_memory, size_of
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

    def refused(bank, *, fresh, exact=False):
        # A full bank holds one more for a moment.
        if not fresh and bank.count >= most:
            raise short()
        take(bank, fresh=fresh, exact=exact)

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
    monkeypatch.setattr(SnapshotBank, "take", lambda bank, **_: (_ for _ in ()).throw(short()))
    while hybrid.engine.phase is Phase.CORRECT:
        train(model, 1, hybrid)
    assert same(before, weights(model))


@pytest.mark.parametrize("kind", ["exact", "int8"])
@pytest.mark.parametrize("number", [3, 20])
def test_an_outer_step_that_finds_no_room_leaves_the_weights_where_they_were(
    kind, number, monkeypatch, caplog
):
    """Weighed ones, which go on with a full step, and those at the end of one."""
    x, y = digits()
    model, hybrid = perceptron(), HybridCallback(HybridTrainerConfig(snapshot_kind=kind))
    move, moves, kept = SnapshotBank.move, [], []
    part = "_moved_on" if kind == "exact" else "_add"

    def moved(bank, coefficients, *, take=False):
        moves.append(take)
        if sum(moves) != number or kept:
            move(bank, coefficients, take=take)
            return
        kept.append(weights(model))
        whole = getattr(bank, part)

        def short_of_room(*arguments, **named):
            if kind == "exact":
                # It has moved the weights by then.
                whole(*arguments)
                assert not same(kept[0], weights(model))
            raise short()

        monkeypatch.setattr(bank, part, short_of_room)
        try:
            move(bank, coefficients, take=take)
        except tf.errors.ResourceExhaustedError:
            kept.append(weights(model))
            raise
        finally:
            monkeypatch.setattr(bank, part, whole)

    monkeypatch.setattr(SnapshotBank, "move", moved)
    model.fit(x, y, batch_size=32, epochs=8, verbose=0, callbacks=[hybrid])
    before, after = kept
    assert same(before, after)
    assert caplog.text.count("memory has run out") == 1
    assert hybrid.statistics().steps == 8 * 57
    assert int(model.optimizer.iterations) == hybrid.statistics().full_steps


def test_other_errors_and_the_step_s_own_memory_are_none_of_this(monkeypatch):
    model, hybrid = regression(), HybridCallback(BRISK)

    def failing(bank, *, fresh, exact=False):
        raise ValueError("of another kind")

    monkeypatch.setattr(SnapshotBank, "take", failing)
    with pytest.raises(ValueError, match="of another kind"):
        train(model, 100, hybrid)
    assert hybrid.statistics().snapshots == 6

    def full(port, *rates, forgetting):
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


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 700), st.integers(0, 2**31), st.floats(-30, 30), st.floats(0, 6))
def test_what_codes_lose_is_bounded(size, seed, exponent, spread):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(size) * 10.0 ** (exponent + spread * rng.standard_normal(size))
    values = values.clip(-1e37, 1e37).astype(np.float32)
    blocks = np.pad(np.abs(values), (0, -size % SCALED)).reshape(-1, SCALED)
    largest = np.repeat(blocks.max(axis=1).astype(np.float64), SCALED)[:size]
    for kind, bound in (("int8", largest / 254 * (1 + 1e-4)), ("bfloat16", abs(values) / 256)):
        back = np.array(decode(encode(tf.constant(values), kind), size), np.float64)
        # Of numbers whose 127th part float32 has no reciprocal for, nothing is left.
        assert (abs(back - values) <= bound + 4e-37).all(), kind


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
def test_what_is_not_finite_stays_so_in_codes(kind, bad):
    values = np.ones(600, np.float32)
    values[300] = bad
    assert not np.isfinite(decode(encode(tf.constant(values), kind), 600)).all()


@pytest.mark.parametrize("kind", ["exact", "bfloat16", "int8"])
def test_a_bank_of_any_kind_moves_as_numpy_does(kind):
    model = perceptron()
    model.build((None, 64))
    port = TensorFlowPort(model)
    bank = SnapshotBank([[0, 1], [2, 3]], 4, port, kind)
    rng = np.random.default_rng(0)
    flat = lambda: np.concatenate([w.astype(np.float64).ravel() for w in weights(model)])  # noqa: E731

    put = port.writer(lambda values: (values, None))

    def wander():
        put([v + 1e-3 * rng.standard_normal(v.shape, np.float32) for v in port.variables])

    taken = []
    for step in range(7):
        wander()
        bank.take(fresh=step == 0, exact=step == 6)
        taken.append(flat())
    kept = np.array(taken[-4:])
    coded = kind != "exact"
    tolerance = np.abs(kept - kept[0]).max() / 40 if coded else 1e-6
    moved = kept - kept[-1]
    rtol = 0.01 if coded else 1e-4
    np.testing.assert_allclose(bank.gram().sum(axis=0), moved @ moved.T, rtol=rtol)
    size = 4 * port.model.count_params()
    assert bank.nbytes <= (4 if kind == "exact" else 1 + 3 * 0.6) * size
    bank.save()
    # The newest one is where the weights are: it takes no memory, and comes back to the last bit.
    assert bank.nbytes <= (4 if kind == "exact" else 1 + 3 * 0.6) * size
    for there in ([0.0, 0.0, 0.0, 1.0], [0.5, -1.0, 0.25, 1.25]):
        bank.move(np.array([there, there]))
        np.testing.assert_allclose(flat(), np.array(there) @ kept, atol=tolerance)
    for number in range(4):
        bank.move(np.eye(4)[[number]])
        exact = number == 3 or not coded
        np.testing.assert_allclose(flat(), kept[number], rtol=0.0, atol=0.0 if exact else tolerance)
    # Settling, with a point to come back to.
    wander()
    settled = flat()
    bank.take(fresh=False)
    np.testing.assert_allclose(flat(), settled, atol=tolerance)
    away = flat()
    bank.set_aside()
    bank.move(np.array([[1.0, 0.0]]))
    np.testing.assert_allclose(flat(), kept[-1], atol=tolerance)
    bank.put_back()
    assert np.array_equal(flat(), away)
    bank.restore()
    assert np.array_equal(flat(), kept[-1])
    # Outer steps: each moves on from the newest snapshot, and is one.
    bank.forget()
    last = settled
    for step in range(6):
        wander()
        bank.take(fresh=step == 0)
        now = flat()
        if step:
            bank.move(np.array([[0.0, -1.0, 2.0][-min(step + 1, 3) :]]), take=True)
            np.testing.assert_allclose(flat(), 2 * now - last, atol=tolerance)
        last = flat()
    state = bank.state_dict()
    again = SnapshotBank([[0, 1], [2, 3]], 4, port, kind)
    assert again.takes(state)
    again.load_state_dict(state)
    np.testing.assert_array_equal(again.gram(), bank.gram())
    assert not SnapshotBank([[0, 1], [2, 3]], 3, port, kind).takes(state)
    assert not SnapshotBank([[0, 1], [2]], 4, port, kind).takes(state)
    other = "int8" if kind == "exact" else "exact"
    assert not SnapshotBank([[0, 1], [2, 3]], 4, port, other).takes(state)


@pytest.mark.parametrize(
    ("copies", "momentum", "average", "in_turn"),
    [(3.4, 0.9, True, False), (3.0, 0.9, True, True), (2.0, 0.0, False, False)],
)
def test_all_copies_stay_within_the_setting_and_predict(
    monkeypatch, copies, momentum, average, in_turn
):
    model = regression(keras.optimizers.SGD(0.5, momentum))
    model.optimizer.build(model.trainable_variables)
    weights_bytes = 4 * model.count_params()
    config = dataclasses.replace(BRISK, memory=f"{round(copies * weights_bytes)}B")
    hybrid = HybridCallback(config)
    made = []

    def begin(port):
        made.append(hybrid.hands.recovery)
        return WeightAverage(port)

    monkeypatch.setattr("hybridcore_keras.hands.WeightAverage", begin)
    train(model, 300, hybrid)
    summary = hybrid.statistics()
    assert len(made) > 1 if in_turn else len(made) == average
    assert made == [None] * len(made)
    assert hybrid.hands.room.plan.kind == "int8"
    assert summary.snapshots == 4
    assert summary.predicted_steps > 20
    assert model.evaluate(*digits(), verbose=0) < 0.3
    memory, both = summary.memory, (summary.memory["average"], summary.memory["recovery"])
    assert hybrid.hands.room.plan.in_turn == in_turn
    taken = memory["snapshots"] + (max(both) if in_turn else sum(both))
    # A last block of 256 values and the model's own state are beside what is planned.
    assert 0.7 * copies < taken / weights_bytes < copies + 0.4
    assert (memory["average"] > 0) == average
    if not average:
        with pytest.raises(ConfigError, match="leaves none"):
            hybrid.averaged()


def test_a_run_in_fewer_bits_goes_on_to_the_last_bit():
    config = dataclasses.replace(BRISK, snapshot_kind="int8")
    whole, hybrid = perceptron(), HybridCallback(config)
    train(whole, 150, hybrid)
    assert hybrid.statistics().predicted_steps > 20
    stop = 60
    model, first, second = perceptron(), HybridCallback(config), HybridCallback(config)
    train(model, stop, first)
    second.load_state_dict(first.state_dict())
    train(model, 150 - stop, second)
    assert same(weights(model), weights(whole))


def test_pairs_take_no_more_than_there_is():
    model = regression()
    weights_bytes = 4 * model.count_params()
    hybrid = HybridCallback(dataclasses.replace(CURVED, memory=f"{17 * weights_bytes}B"))
    train(model, 80, hybrid)
    assert hybrid.hands.pairs == 3
    statistics = hybrid.statistics()
    assert statistics.secant_steps > 0
    # With weights and moments from before them, and those of a trial of the optimizer beside.
    assert 4 < statistics.memory["secant pairs"] / weights_bytes <= 12
    assert sum(statistics.memory.values()) <= 17 * weights_bytes


def test_the_size_of_a_model_is_its_weights_and_its_optimizers_state():
    model = regression(keras.optimizers.SGD(0.1, momentum=0.9))
    size = size_of(model)
    assert size.weights == 4 * size.parameters == 4 * model.count_params()
    assert size.state == 2 * size.weights
    model.optimizer.build(model.trainable_variables)
    assert size_of(model).state == size.weights
