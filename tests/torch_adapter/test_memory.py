"""Copies of the weights in fewer bits, and what all of them take together."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import BRISK, noisy, regression, weights
from torch import nn

from hybridcore import ConfigError, HybridTrainerConfig, Phase
from hybridcore.memory import FEWEST, Room, Size, beside_bytes, plan, snapshots_bytes
from hybridcore_torch import HybridTrainer, codes
from hybridcore_torch.buffers import BufferWatch
from hybridcore_torch.recovery import RecoveryPoint
from hybridcore_torch.snapshots import SnapshotBank

MILLION = 1e6


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 700),
    st.integers(0, 2**31),
    st.floats(-30, 30),
    st.floats(0, 6),
)
def test_what_codes_lose_is_bounded(size, seed, exponent, spread):
    rng = np.random.default_rng(seed)
    values = torch.from_numpy(
        (rng.standard_normal(size) * 10.0 ** (exponent + spread * rng.standard_normal(size))).clip(
            -1e37, 1e37
        )
    ).float()
    for kind in ("int8", "bfloat16"):
        made = codes.empty(codes.padded(size), kind, values.device)
        codes.encode(values.clone(), made)
        lost = (
            codes.decode(made, torch.empty(codes.padded(size)))[:size].double() - values.double()
        ).abs()
        if kind == "bfloat16":
            bound = values.double().abs() / 256
        else:
            blocks = F.pad(values, (0, codes.padded(size) - size)).view(-1, codes.BLOCK)
            largest = blocks.abs().amax(1).double()
            bound = (largest / 254 * (1 + 1e-4)).repeat_interleave(codes.BLOCK)[:size]
        # Of numbers whose 127th part float32 has no reciprocal for, nothing is left.
        assert bool((lost <= bound + 4e-37).all()), kind


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
def test_what_is_not_finite_stays_so_in_codes(kind, bad):
    values = torch.ones(600)
    values[300] = bad
    made = codes.empty(codes.padded(600), kind, values.device)
    codes.encode(values, made)
    assert not codes.decode(made, torch.empty(codes.padded(600)))[:600].isfinite().all()


# Of the larger one an exact bank moves no whole row at a time.
@pytest.mark.parametrize("size", [70_001, 2**20])
@pytest.mark.parametrize("kind", ["exact", "bfloat16", "int8", "host"])
def test_a_bank_of_any_kind_moves_as_numpy_does(kind, size):
    torch.manual_seed(0)
    # Strides that are no one-dimensional memory, and sizes that fill no block.
    square = nn.Parameter(torch.randn(2, 3, 5, 5).to(memory_format=torch.channels_last))
    group, other = [square, nn.Parameter(torch.randn(size))], [nn.Parameter(torch.randn(7))]
    bank = SnapshotBank([group, other], 4, kind=kind)
    flat = lambda: np.concatenate(  # noqa: E731
        [p.detach().double().reshape(-1).numpy() for p in (*group, *other)]
    )
    taken = []
    for step in range(7):
        with torch.no_grad():
            for p in (*group, *other):
                p.add_(torch.randn_like(p), alpha=1e-3)
        bank.take(fresh=step == 0, exact=step == 6)
        taken.append(flat())
    kept = np.array(taken[-4:])
    moved = np.abs(kept - kept[0]).max()
    tolerance = {"int8": moved / 40, "bfloat16": moved / 40}.get(kind, 1e-6)
    gram = bank.gram().sum(axis=0)
    exact = (kept - kept[-1]) @ (kept - kept[-1]).T
    np.testing.assert_allclose(gram, exact, rtol=0.01 if kind in ("int8", "bfloat16") else 1e-4)
    bank.save()
    # The newest one is where the weights are, to the last bit, and so it comes back.
    for there in ([0.0, 0.0, 0.0, 1.0], [0.5, -1.0, 0.25, 1.25]):
        bank.move(np.array([there, there]))
        np.testing.assert_allclose(flat(), np.array(there) @ kept, atol=tolerance)
    # Each group by its own.
    apart = np.array([there, [0.25, 0.5, -1.0, 1.25]])
    bank.move(apart)
    of_group = np.repeat(apart, (150 + size, 7), axis=0)
    np.testing.assert_allclose(flat(), (of_group.T * kept).sum(axis=0), atol=tolerance)
    bank.set_aside()
    away = flat()
    bank.move(np.array([[1.0, 0.0]]))
    bank.put_back()
    assert np.array_equal(flat(), away)
    bank.restore()
    assert np.array_equal(flat(), kept[-1])
    bank.forget()
    # In the place of the oldest, which counts too.
    there = np.array([0.3, -0.4, -0.2, 1.3])
    bank.move(there[None], take=True)
    np.testing.assert_allclose(flat(), there @ kept, atol=tolerance)
    bank.move(np.array([[-1.0, 2.0]]), take=True)
    twice = 2 * (there @ kept) - kept[-1]
    np.testing.assert_allclose(flat(), twice, atol=3 * tolerance)
    state = bank.state_dict()
    again = SnapshotBank([group, other], 4, kind=kind)
    assert again.takes(state)
    again.load_state_dict(state)
    np.testing.assert_array_equal(again.gram(), bank.gram())
    assert not SnapshotBank([group, other], 3, kind=kind).takes(state)
    assert not SnapshotBank([group], 4, kind=kind).takes(state)
    assert not SnapshotBank([[*group, *other]], 4, kind=kind).takes(state)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@settings(max_examples=25, deadline=None)
@given(exact=st.lists(st.booleans(), min_size=40, max_size=40), rows=st.integers(2, 5))
def test_what_a_bank_in_fewer_bits_loses_does_not_add_up(kind, exact, rows):
    # Far from where it began, in the end.
    generator = torch.Generator().manual_seed(0)
    p, taken = nn.Parameter(torch.zeros(600)), []
    bank = SnapshotBank([[p]], rows, kind=kind)
    for step, whole in enumerate(exact):
        with torch.no_grad():
            p.add_(1.0 + 0.1 * torch.randn(600, generator=generator))
        taken.append(p.detach().clone())
        bank.take(fresh=step == 0, exact=whole)
        again = SnapshotBank([[p]], rows, kind=kind)
        again.load_state_dict(bank.state_dict())
        for held in (bank, again):
            kept = taken[-rows:]
            for row, there in enumerate(kept):
                held.move(np.eye(len(kept))[row : row + 1])
                # Of two displacements, across no more than twice the snapshots that are kept.
                assert (p - there).abs().max().item() <= 2 * rows * 1.5 / 128
                if whole and row + 1 == len(kept):
                    assert torch.equal(p, there)
        p.data.copy_(taken[-1])


def test_an_outer_step_that_is_interrupted_leaves_the_newest_snapshot(monkeypatch):
    p = nn.Parameter(torch.zeros(4 * 2**18))
    bank = SnapshotBank([[p]], 4, kind="int8")
    for step in range(4):
        p.data.add_(1.0)
        bank.take(fresh=step == 0, exact=step == 3)
    encode, left = codes.encode, [2, 3, 3]

    def interrupted(*arguments):
        left[-1] -= 1
        if not left[-1]:
            raise KeyboardInterrupt
        encode(*arguments)

    monkeypatch.setattr(codes, "encode", interrupted)
    while left:
        # In the place of the oldest, which is the origin.
        with pytest.raises(KeyboardInterrupt):
            bank.move(np.array([[0.0, 0.0, -1.0, 2.0]]), take=True)
        left.pop()
        bank.return_to_newest()
        assert p.unique().tolist() == [4.0]


def test_what_has_no_values_takes_no_memory():
    p, none = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(0, dtype=torch.float64))
    for kind in ("exact", "int8", "bfloat16"):
        bank = SnapshotBank([[p, none]], 4, kind=kind)
        for step in range(4):
            bank.take(fresh=step == 0, exact=step == 3)
        assert not bank.gram().any()


@pytest.mark.parametrize("size", [3, 2**20])
@pytest.mark.parametrize("kind", ["exact", "int8", "bfloat16"])
def test_a_group_without_values_is_passed_over(kind, size):
    p, none, q = (nn.Parameter(torch.zeros(n)) for n in (size, 0, 3))
    bank = SnapshotBank([[p], [none], [q]], 4, kind=kind)
    for step in range(2):
        bank.take(fresh=step == 0, exact=step == 1)
        p.data.add_(1.0)
        q.data.add_(1.0)
    bank.move(np.array([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]))
    assert p.unique().tolist() == [1.0]
    assert q.unique().tolist() == [0.0]


@pytest.mark.parametrize("kind", ["exact", "int8", "bfloat16"])
def test_a_group_of_two_precisions_is_one(kind):
    torch.manual_seed(0)
    group = [nn.Parameter(torch.randn(600)), nn.Parameter(torch.randn(300, dtype=torch.float64))]
    bank, taken = SnapshotBank([group], 4, kind=kind), []
    for step in range(3):
        for p in group:
            p.data.add_(torch.randn_like(p))
        bank.take(fresh=step == 0, exact=step == 2)
        taken.append(torch.cat([p.detach().double() for p in group]).numpy())
    moved = np.array(taken) - taken[-1]
    np.testing.assert_allclose(bank.gram()[0], moved @ moved.T, rtol=0.02)
    # One of them has left the newest snapshot.
    group[1].data.add_(1.0)
    away = [p.detach().clone() for p in group]
    bank.set_aside()
    bank.move(np.array([[1.0, 0.0, 0.0]]))
    bank.put_back()
    assert all(map(torch.equal, group, away))


def test_states_from_before_there_was_an_origin_are_read():
    p = nn.Parameter(torch.randn(600))
    bank, again = (SnapshotBank([[p]], 4, kind="int8") for _ in range(2))
    for step in range(3):
        p.data.add_(torch.randn(600))
        bank.take(fresh=step == 0)
    state = bank.state_dict()
    del state["rows"][0]["origin"]
    again.load_state_dict(state)
    np.testing.assert_array_equal(again.gram(), bank.gram())


def test_a_recovery_point_outlives_the_snapshot_that_it_is():
    p = nn.Parameter(torch.zeros(4))
    for kind in ("exact", "int8"):
        bank = SnapshotBank([[p]], 4, kind=kind)
        with torch.no_grad():
            for step in range(7):
                p.fill_(float(step))
                bank.take(fresh=step == 0)
                if step == 1:
                    bank.save()
            bank.restore()
            assert p.tolist() == [1.0] * 4
            bank.clear()
            p.fill_(9.0)
            bank.restore()
            assert p.tolist() == [1.0] * 4
            bank.forget()
        assert bank.nbytes == 0


@pytest.mark.parametrize("kind", ["exact", "int8"])
def test_autograd_notices_a_move(kind):
    # So many that an exact bank moves them in place.
    p = nn.Parameter(torch.ones(2**20 + 1))
    bank = SnapshotBank([[p]], 4, kind=kind)
    for taken in range(4):
        with torch.no_grad():
            p.add_(0.1)
        bank.take(fresh=taken == 0, exact=taken == 3)
    loss = p.square().sum()
    bank.move(np.array([[-1.0, 2.0]]))
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


@pytest.mark.parametrize("kind", ["exact", "bfloat16", "int8"])
def test_a_recovery_point_that_is_no_snapshot_any_more_is_saved(kind):
    p = nn.Parameter(torch.zeros(300))
    bank, again = (SnapshotBank([[p]], 4, kind=kind) for _ in range(2))
    with torch.no_grad():
        for value in (1.0, 2.0):
            p.fill_(value)
            bank.take(fresh=value == 1.0, exact=True)
        bank.save()
        p.fill_(3.0)
        bank.take(fresh=True)
    again.load_state_dict(bank.state_dict())
    for _ in range(5):
        again.take(fresh=False)
    again.restore()
    assert p.tolist() == [2.0] * 300


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "host"])
def test_snapshots_in_fewer_bits_predict_too(kind):
    config = dataclasses.replace(BRISK, secant_pairs=0, snapshot_kind=kind)
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, config)
    for step in range(300):
        trainer.step(closure)
        if step == 150:
            # To the last bit, wherever the run is.
            other, other_optimizer, again = regression(seed=3)
            resumed = HybridTrainer(other, other_optimizer, config)
            resumed.load_state_dict(trainer.state_dict())
        if step > 150:
            resumed.step(again)
    assert all(map(torch.equal, weights(model), weights(other)))
    summary = trainer.statistics()
    assert summary.predicted_steps > 50
    assert closure().item() < 0.2


def test_outer_steps_in_8_bits_follow_the_exact_ones():
    losses = []
    for kind in ("exact", "int8"):
        config = HybridTrainerConfig(warmup_steps=20, snapshot_kind=kind)
        trainer, closure, held_out = noisy(config=config, rate=3e-3, steps=800)
        for _ in range(800):
            trainer.step(closure)
        assert trainer.statistics().outer_steps > 10
        losses.append(held_out())
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


@pytest.mark.parametrize("cleared", [False, True])
@pytest.mark.parametrize("kind", ["exact", "int8", "host"])
def test_the_optimizers_state_comes_back(kind, cleared):
    model, optimizer, closure = regression()
    optimizer.zero_grad()
    closure().backward()
    # A count that 8 bits do not hold.
    for _ in range(301):
        optimizer.step()
    before = {k: v.clone() for k, v in optimizer.state[model.weight].items()}
    point = RecoveryPoint(model, optimizer, None, BufferWatch(), kind)
    for _ in range(2):
        # Twice: what was restored must not be what the optimizer trains on.
        for _ in range(3):
            optimizer.step()
        if cleared:
            optimizer.state.clear()
        point.restore(model, optimizer, None)
        for name, value in optimizer.state[model.weight].items():
            assert value.dtype is before[name].dtype
            rounding = 2**-8 if kind == "int8" and value.numel() > 1 else 0.0
            torch.testing.assert_close(value, before[name], rtol=rounding, atol=0.0)


# -- the plan -------------------------------------------------------------------------------------


def adamw(parameters, bytes_each=4, on_gpu=False):
    weights_of = bytes_each * parameters
    return Size(parameters, weights_of, 2 * weights_of, on_gpu)


def total(config, size):
    there = plan(config, size)
    snapshots = snapshots_bytes(there.kind, there.snapshots, size) if there.snapshots else 0
    beside = beside_bytes(there, size) if there.snapshots else there.average * size.average
    return there, snapshots + beside


@settings(max_examples=200, deadline=None)
@given(
    st.floats(1, 1e12),
    st.sampled_from(["1x", "2x", "4x", "9.5x", "300MB", "2GiB"]),
    st.sampled_from([2, 4, 8]),
    st.floats(0, 3),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["auto", "exact", "bfloat16", "int8", "host"]),
)
def test_a_plan_is_within_the_setting(n, memory, each, state, on_gpu, averaging, kind):
    config = HybridTrainerConfig(memory=memory, averaging=averaging, snapshot_kind=kind)
    size = Size(n, each * n, state * each * n, on_gpu)
    there, taken = total(config, size)
    assert taken <= config.memory_limit(4 * n) * (1 + 1e-12)
    assert there.snapshots == 0 or 4 <= there.snapshots <= config.snapshots
    assert averaging or not there.average


def test_small_models_keep_everything_and_large_ones_four_copies():
    config = HybridTrainerConfig()
    there = plan(config, adamw(7 * MILLION))
    assert (there.kind, there.snapshots, there.average) == ("exact", 6, True)
    assert plan(config, adamw(7.4 * MILLION)).snapshots == 6
    assert plan(config, adamw(7.6 * MILLION)).snapshots < 6
    for n, kept in (
        (9.6 * MILLION, 6),
        (12 * MILLION, 6),
        (25 * MILLION, 4),
        (1.1e9, 4),
        (70e9, 4),
    ):
        there, taken = total(config, adamw(n))
        assert (there.kind, there.snapshots, there.average) == ("int8", kept, True)
        assert not there.in_turn
        limit = config.memory_limit(4 * n)
        assert 0.6 * limit < taken <= limit
        if n < 2**24:
            continue
        saver, taken = total(HybridTrainerConfig.memory_saver(), adamw(n))
        assert (saver.snapshots, saver.average) == (0, True)
        assert taken == 4 * n
        saver, taken = total(HybridTrainerConfig.memory_saver(), adamw(n, on_gpu=True))
        assert (saver.kind, saver.snapshots, saver.average) == ("host", 4, False)
        assert taken == 4 * n


def test_memory_that_is_not_there_is_said():
    model = nn.Linear(2**13, 2**12, bias=False)
    tight = HybridTrainerConfig(memory="64MiB", warmup_steps=5, min_full_steps=4)
    trainer = HybridTrainer(model, torch.optim.SGD(model.parameters(), 1e-3), tight)
    with pytest.raises(ConfigError, match=r"memory='64MiB' leaves none"):
        trainer.averaged()
    assert trainer.statistics().snapshots == 0
    x = torch.zeros(1, 2**13)
    for _ in range(12):
        assert trainer.step(lambda: model(x).square().mean() + 1.0).phase is not Phase.PREDICT
    assert trainer.statistics().memory == dict.fromkeys(trainer.statistics().memory, 0)


@pytest.mark.parametrize(
    ("memory", "kind", "told", "advice"),
    [("64MiB", "host", 1, 1), ("9x", "host", 0, 0), ("1x", "auto", 1, 0)],
)
def test_that_there_is_no_room_for_snapshots_is_told_at_once(caplog, memory, kind, told, advice):
    config = HybridTrainerConfig(memory=memory, snapshot_kind=kind)
    p = nn.Parameter(torch.empty(17_000_000))
    HybridTrainer(nn.ParameterList([p]), torch.optim.AdamW([p]), config)
    assert caplog.text.count("no room for 4 snapshots of kind") == told
    assert caplog.text.count("or leave snapshot_kind='auto'") == advice


def test_where_room_is_short_the_average_gives_way_to_what_a_jump_keeps(monkeypatch):
    model, optimizer, closure = regression()
    size = sum(4 * p.numel() for p in model.parameters())
    config = dataclasses.replace(BRISK, secant_pairs=0, memory=f"{3 * size}B")
    trainer = HybridTrainer(model, optimizer, config)
    hands, jumping, resting = trainer._hands, 0, 0
    assert hands.room.plan.in_turn
    made, begin = [], hands.new_average
    # In the step that ends a jump too, where what the jump kept is still there.
    monkeypatch.setattr(hands, "new_average", lambda: made.append(hands.recovery) or begin())
    for _ in range(300):
        trainer.step(closure)
        assert hands.average is None or hands.recovery is None
        jumping += hands.recovery is not None
        resting += hands.average is not None
        raw = weights(model)
        with trainer.averaged():
            there = weights(model)
        if hands.recovery is not None:
            assert all(map(torch.equal, raw, there))
        assert all(map(torch.equal, raw, weights(model)))
    assert jumping > 50
    assert resting > 50
    assert len(made) > 2
    assert made == [None] * len(made)


def test_peaks_are_in_the_statistics():
    trainer, closure, _ = noisy(config=BRISK)
    for _ in range(200):
        trainer.step(closure)
    size = sum(4 * p.numel() for p in trainer.model.parameters())
    memory = trainer.statistics().to_dict()["memory"]
    assert memory["average"] == size
    assert 4 * size <= memory["snapshots"] <= 6 * size
    assert memory["secant pairs"] == 0
    resumed, _, _ = noisy(config=BRISK)
    resumed.load_state_dict(trainer.state_dict(snapshots=False))
    assert resumed.statistics().memory == memory


@pytest.mark.parametrize(("copies", "told"), [("2x", 1), ("3x", 0)])
def test_what_there_is_no_room_for_is_told_at_once(caplog, copies, told):
    config = HybridTrainerConfig(memory=copies)
    p = nn.Parameter(torch.empty(17_000_000))
    trainer = HybridTrainer(nn.ParameterList([p]), torch.optim.SGD([p], 0.1), config)
    assert caplog.text.count("no room for a running average") == told
    if told:
        with pytest.raises(ConfigError, match="needs room"), trainer.averaged():
            pass


def test_what_was_given_up_stays_so_however_often_there_is_a_new_plan():
    size = Size(1e6, 4e6, 8e6, on_gpu=False)
    room = Room(HybridTrainerConfig(), 20)
    room.measure(size)
    room.give_up(20)
    room.give_up(0)
    for _ in range(2):
        room.measure(size)
        assert (room.pairs, room.snapshots, room.average) == (0, 5, True)
    while room.snapshots:
        room.give_up(0)
        room.measure(size)
        assert room.snapshots in (0, FEWEST)
    room.give_up(0)
    room.measure(size)
    assert room.is_bare
    assert not room.average
    # A resumed run goes on without.
    other = Room(HybridTrainerConfig(), 20)
    other.measure(size)
    found = other.restored(room.state_dict(), room.snapshots)
    assert found.is_bare
    assert not found.average
    assert (other.pairs, other.snapshots, other.average) == (20, 6, True)


def test_a_smaller_model_has_room_for_what_a_larger_one_had_not():
    small, large = (Size(n, 4.0 * n, 0.0, on_gpu=False) for n in (3e7, 3e8))
    room = Room(HybridTrainerConfig(memory="2GiB"), 20)
    found = []
    for size in (small, large, small):
        room.measure(size)
        found.append(room.snapshots)
    assert found[0] == found[2] > found[1]
    # What memory had run out with stays given up, in a resumed run too.
    room = Room(HybridTrainerConfig(memory="100x"), 0)
    room.measure(small)
    room.give_up(0)
    for kept in (room, room.restored(room.state_dict(), room.snapshots)):
        kept.measure(small)
        assert kept.snapshots == HybridTrainerConfig().snapshots - 1
