"""What a user's loop relies on: data, rollback, probes, structure, groups, snapshots."""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from problems import BRISK, digits, regression, weights
from torch import nn

from hybridcore import (
    Action,
    ClosureError,
    Directive,
    HybridTrainerConfig,
    Phase,
)
from hybridcore_torch import HybridTrainer
from hybridcore_torch.buckets import inner_products, sums_of_products
from hybridcore_torch.gradients import gradient_norm
from hybridcore_torch.groups import MOST_GROUPS, by_depth
from hybridcore_torch.snapshots import SnapshotBank


class Counting(torch.utils.data.Dataset):
    def __init__(self, length):
        self.x, self.y = digits()
        self.length, self.loaded = length, 0

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.loaded += 1
        return self.x, self.y


def test_predicted_steps_load_no_data_and_passes_keep_their_length():
    model, optimizer, _ = regression()
    data = Counting(120)
    loader = torch.utils.data.DataLoader(data, batch_size=1)
    trainer = HybridTrainer(model, optimizer, BRISK)
    for epoch in range(3):
        for x, y in trainer.batches(loader):
            trainer.step(lambda x=x, y=y: F.cross_entropy(model(x[0]), y[0]))
        assert trainer.statistics().steps == 120 * (epoch + 1)
    statistics = trainer.statistics()
    assert statistics.predicted_steps > 60
    needing = statistics.full_steps + statistics.predicted_steps // BRISK.correction_interval
    assert data.loaded <= needing + 12
    assert data.loaded < 300


def test_no_end_of_an_epoch_is_missed_where_batches_differ():
    """In order, by a loader of which a fixed distance would leave out the same batches for good."""
    x, y = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    trainer = HybridTrainer(model, torch.optim.SGD(model.parameters(), 0.05))
    used = torch.zeros(72)
    for _ in range(60):
        for batch in trainer.batches(range(72)):
            rows = slice(16 * batch, 16 * batch + 16)
            result = trainer.step(lambda rows=rows: F.cross_entropy(model(x[rows]), y[rows]))
            used[batch] += not result.was_predicted
    statistics = trainer.statistics()
    assert statistics.steps == 60 * 72
    assert statistics.predicted_steps > 0.1 * 60 * 72
    assert used.sum() == statistics.full_steps
    assert used.min() > 0.6 * 60


def test_a_loader_without_a_length_works():
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, BRISK)
    used = len([trainer.step(closure) for _ in trainer.batches(iter(range(90)))])
    assert used == 90
    assert trainer.statistics().steps > 90


def test_rollback_restores_all_and_keeps_the_schedule_in_step():
    x, y = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
    trainer = HybridTrainer(model, optimizer, BRISK, scheduler=scheduler)
    closure = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    for _ in range(15):
        trainer.step(closure)
    trainer._hands.carry_out(Directive(Action.FULL, snapshot=True, fresh_bank=True), closure)
    trainer._hands.carry_out(Directive(Action.SAVE), closure)
    before = copy.deepcopy(model.state_dict())
    moments = copy.deepcopy(optimizer.state_dict()["state"])
    for _ in range(7):
        trainer._hands.carry_out(Directive(Action.FULL), closure)
    assert not torch.equal(before["0.weight"], model[0].weight)
    trainer._hands.carry_out(Directive(Action.ROLLBACK), closure)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    after = optimizer.state_dict()["state"]
    for key, state in moments.items():
        for name, value in state.items():
            assert torch.equal(after[key][name], value)
    plain = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(plain, 500)
    for _ in range(23):
        plain.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(plain.param_groups[0]["lr"], rel=1e-12)


def test_probes_leave_no_trace():
    x, y = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 10))
    trainer = HybridTrainer(model, torch.optim.Adam(model.parameters(), 1e-2), BRISK)
    closure = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    for _ in range(2):
        trainer._hands.carry_out(Directive(Action.FULL, snapshot=True), closure)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    far = np.array([[-3.0, 4.0]] * len(trainer._hands.snapshots._buckets))
    losses = [
        trainer._hands.carry_out(Directive(Action.PROBE, coefficients), closure).loss
        for coefficients in (None, far, None)
    ]
    assert losses[0] == losses[2] != losses[1]
    assert torch.equal(random, torch.get_rng_state())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_loss_that_differentiates_inside_can_be_probed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
    points = torch.linspace(-1, 1, 64).unsqueeze(1).requires_grad_(True)

    def closure():
        u = model(points)
        (slope,) = torch.autograd.grad(u.sum(), points, create_graph=True)
        return (slope - torch.cos(3 * points)).square().mean()

    trainer = HybridTrainer(model, torch.optim.Adam(model.parameters(), 3e-3), BRISK)
    for _ in range(300):
        trainer.step(closure)
    assert trainer.statistics().predicted_steps > 30


@pytest.mark.parametrize("at", [10, 30, 46, 60, 75, 90, 105])
def test_structure_may_change_at_any_time(at):
    x, y = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    trainer = HybridTrainer(model, optimizer, BRISK)
    closure = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    for _ in range(at):
        trainer.step(closure)
    model[0].weight.requires_grad_(False)
    frozen = model[0].weight.detach().clone()
    for _ in range(60):
        trainer.step(closure)
        assert torch.equal(frozen, model[0].weight)
    model[2] = nn.Linear(16, 10)
    optimizer.add_param_group({"params": list(model[2].parameters())})
    for _ in range(120):
        trainer.step(closure)
    assert trainer.statistics().steps == at + 180
    assert closure().item() < 2.0


def test_what_is_left_when_a_layer_is_frozen_is_predicted():
    x, y = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    groups = [list(model[0].parameters()), list(model[2].parameters())]
    trainer = HybridTrainer(
        model, torch.optim.Adam(model.parameters(), 3e-3), BRISK, layer_groups=groups
    )
    for step in range(200):
        if step == 30:
            model[0].requires_grad_(False)
        trainer.step(lambda: F.cross_entropy(model(x), y))
    assert trainer.statistics().predicted_steps > 30


def test_tied_and_unused_parameters():
    x, y = digits()
    torch.manual_seed(0)

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
            self.second.weight = self.first.weight
            self.unused, self.head = nn.Linear(5, 5), nn.Linear(64, 10)

        def forward(self, x):
            return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))

    model = Tied()
    unused = model.unused.weight.detach().clone()
    trainer = HybridTrainer(model, torch.optim.Adam(model.parameters(), 1e-3), BRISK)
    for _ in range(300):
        trainer.step(lambda: F.cross_entropy(model(x), y))
    assert trainer.statistics().predicted_steps > 30
    assert model.second.weight is model.first.weight
    assert torch.equal(unused, model.unused.weight)


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=40))
def test_groups_are_contiguous_and_hold_each_parameter_once(sizes):
    parameters = [nn.Parameter(torch.empty(size)) for size in sizes]
    groups = by_depth(parameters)
    assert 1 <= len(groups) <= MOST_GROUPS
    assert all(groups)
    assert [id(p) for group in groups for p in group] == [id(p) for p in parameters]


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float32, 1e-5),
        (torch.float64, 1e-12),
        (torch.bfloat16, 1e-5),
        (torch.float16, 1e-5),
    ],
)
@pytest.mark.parametrize("size", [3, 4096, 140_001, 2**20])
def test_gram_and_move_equal_numpy(dtype, tolerance, size):
    torch.manual_seed(0)
    group = [nn.Parameter(torch.randn(size).to(dtype)), nn.Parameter(torch.randn(2, 3).to(dtype))]
    other = [nn.Parameter(torch.randn(7))]
    bank = SnapshotBank([group, other], 4)
    taken = []
    for step in range(6):
        with torch.no_grad():
            for p in (*group, *other):
                p.add_(torch.randn_like(p))
        bank.take(fresh=step == 0)
        taken.append(torch.cat([p.detach().double().reshape(-1) for p in group]).numpy())
    kept = np.array(taken[-4:])
    moved = kept - kept[-1]
    gram = bank.gram()
    assert gram.shape == (2, 4, 4)
    np.testing.assert_allclose(gram[0], moved @ moved.T, rtol=tolerance, atol=tolerance * size)
    coefficients = np.array([[0.5, -1.0, 0.25, 1.25]] * 2)
    bank.move(coefficients)
    got = torch.cat([p.detach().double().reshape(-1) for p in group]).numpy()
    rounding = 2e-2 if dtype.itemsize == 2 else tolerance
    np.testing.assert_allclose(got, coefficients[0] @ kept, rtol=rounding, atol=rounding)
    bank.move(np.array([[0.0, 0.0, 0.0, 1.0]] * 2))
    got = torch.cat([p.detach().double().reshape(-1) for p in group]).numpy()
    assert np.array_equal(got, kept[-1])
    # Taken into the row of the oldest, which is one of those that it is made of, or none of them.
    for newest in ([0.5, -1.0, 0.25, 1.25], [-1.0, 2.0]):
        expected = np.array(newest) @ kept[-len(newest) :]
        bank.move(np.array([newest]), take=True)
        got = torch.cat([p.detach().double().reshape(-1) for p in group]).numpy()
        np.testing.assert_allclose(got, expected, rtol=rounding, atol=rounding)
        kept = np.array([*kept[1:], got])
        moved = kept - kept[-1]
        gram = bank.gram()[0]
        np.testing.assert_allclose(gram, moved @ moved.T, rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize("kind", ["exact", "int8", "bfloat16"])
def test_a_single_snapshot_has_no_displacements(kind):
    bank = SnapshotBank([[nn.Parameter(torch.ones(5000))]], 4, kind=kind)
    bank.take(fresh=True)
    assert bank.gram().tolist() == [[[0.0]]]


@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
def test_small_displacements_far_from_the_origin_are_as_exact_as_their_codes(kind):
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(100_001))
    bank, kept = SnapshotBank([[p]], 4, kind=kind), []
    for size in (0.0, 1.0, 1e-5, 1e-5):
        with torch.no_grad():
            p.add_(size * torch.randn_like(p))
        bank.take(fresh=not bank.count)
    for row in np.eye(4):
        bank.move(row[None])
        kept.append(p.detach().double().numpy())
    moved = np.array(kept) - kept[-1]
    np.testing.assert_allclose(bank.gram()[0][1:, 1:], (moved @ moved.T)[1:, 1:], rtol=1e-3)


@pytest.mark.parametrize("size", [5, 4096, 4097, 300_001])
def test_inner_products_lose_nothing_by_their_number(size):
    torch.manual_seed(0)
    # Terms of one sign and of few bits, whose rounding goes the same way again and again.
    rows = (0.5 + torch.rand(3, size)).bfloat16().float()
    expected = rows.double() @ rows.double().T
    found = inner_products(rows)
    assert found.dtype is torch.float64
    torch.testing.assert_close(found, expected, rtol=5e-6, atol=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(inner_products(rows), found)
    torch.testing.assert_close(sums_of_products(rows), expected, rtol=5e-6, atol=0.0)


def test_gradient_norm():
    parameters = [nn.Parameter(torch.empty(40, 30)), nn.Parameter(torch.empty(7))]
    assert gradient_norm(parameters) == 0.0
    torch.manual_seed(0)
    for scale in (1.0, 1e-12, 1e-30, 1e25):
        for p in parameters:
            p.grad = scale * torch.randn_like(p)
        expected = torch.cat([p.grad.double().reshape(-1) for p in parameters]).norm().item()
        assert gradient_norm(parameters) == pytest.approx(expected, rel=1e-5)
    parameters[0].grad = torch.randn(30, 40).T
    expected = torch.cat([p.grad.double().reshape(-1) for p in parameters]).norm().item()
    assert gradient_norm(parameters) == pytest.approx(expected, rel=1e-5)


def test_a_loss_scaler_takes_part():
    x, y = digits()
    torch.manual_seed(0)
    model = nn.Linear(64, 10)
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    trainer = HybridTrainer(model, optimizer, BRISK, scaler=scaler)

    def closure():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.cross_entropy(model(x).float(), y)

    for _ in range(120):
        trainer.step(closure)
    assert closure().item() < 1.0


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("enabled", [True, False])
def test_scaled_clipped_and_in_parts_it_is_the_loop_by_hand(enabled, clip):
    """To the last bit, in warm-up and switched off, where the scale grows until it overflows."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 16, 4, generator=generator) for _ in range(90)]
    ends = []
    for by_hand in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        groups = [{"params": model[0].parameters(), "lr": 1e-3}, {"params": model[2].parameters()}]
        optimizer = torch.optim.SGD(groups, 3e-3, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 90)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**122, growth_interval=4)
        trainer = HybridTrainer(
            *(model, optimizer, HybridTrainerConfig(enabled=enabled)),
            scheduler=schedule,
            scaler=scaler,
            max_grad_norm=clip,
        )
        scales = []
        for batch in batches:
            losses = [
                lambda p=part, m=model: 30.0 * F.mse_loss(m(p[:, :3]), p[:, 3:]) for part in batch
            ]
            scales.append(scaler.get_scale())
            if not by_hand:
                trainer.step(losses)
                continue
            optimizer.zero_grad()
            for loss in losses:
                scaler.scale(loss() / 2).backward()
            if clip is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
        assert any(after < before for before, after in itertools.pairwise(scales))
        ends.append([*weights(model), torch.tensor(scales)])
    assert all(map(torch.equal, *ends))


class OwnZeroGrad(torch.optim.SGD):
    """An optimizer that does something of its own where gradients are dropped."""

    calls = 0

    def zero_grad(self, set_to_none=True):
        self.calls += 1
        super().zero_grad(set_to_none)


@pytest.mark.parametrize("patched", [True, False])
def test_a_zero_grad_of_the_users_own_is_called(patched):
    model, _, closure = regression()
    optimizer, calls = OwnZeroGrad(model.parameters(), 0.1), []
    if patched:
        optimizer.zero_grad = lambda: calls.append(1) or OwnZeroGrad.zero_grad(optimizer)
    trainer = HybridTrainer(model, optimizer, BRISK)
    for _ in range(10):
        trainer.step(closure)
    assert optimizer.calls == 10
    assert len(calls) == (10 if patched else 0)


def test_the_memory_saver_trains_too():
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, HybridTrainerConfig.memory_saver())
    phases = {trainer.step(closure).phase for _ in range(500)}
    assert phases == set(Phase)


def accumulate_by_hand(model, optimizer, halves, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        for x, y in halves:
            (F.mse_loss(model(x), y) / len(halves)).backward()
        optimizer.step()


@pytest.mark.parametrize("enabled", [True, False])
def test_parts_of_a_batch_are_accumulated_as_by_hand(enabled):
    x, y = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(64, 1)
    halves = [(x[:32], y[:32]), (x[32:], y[32:])]
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        models.append(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)))
    plain, model = models
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    trainer = HybridTrainer(model, optimizer, HybridTrainerConfig(enabled=enabled, secant_pairs=0))
    accumulate_by_hand(plain, torch.optim.Adam(plain.parameters(), 1e-2), halves, 50)
    for _ in range(50):
        result = trainer.step([lambda a=a, b=b: F.mse_loss(model(a), b) for a, b in halves])
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    before = sum(F.mse_loss(model(a), b).item() for a, b in halves) / 2
    again = trainer.step([lambda a=a, b=b: F.mse_loss(model(a), b) for a, b in halves])
    assert again.loss == pytest.approx(before, rel=1e-6)
    assert result.loss > again.loss
    assert trainer.statistics().backward_passes == 51


def test_parts_are_predicted_with_and_a_bad_one_costs_the_batch():
    x = torch.linspace(-1, 1, 64).unsqueeze(1)
    y = torch.sin(3 * x)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
    trainer = HybridTrainer(model, torch.optim.Adam(model.parameters(), 3e-3))
    losses = []
    for step in range(500):

        def half(rows, factor):
            return lambda: F.mse_loss(model(x[rows]), y[rows]) * factor

        bad = float("nan") if step == 60 else 1.0
        losses.append(trainer.step([half(slice(0, 32), 1.0), half(slice(32, 64), bad)]).loss)
    summary = trainer.statistics()
    assert summary.divergences == 1
    assert summary.predicted_steps > 50
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize(
    ("closure", "message"),
    [
        ([], "empty list"),
        ([lambda: torch.zeros(()), 3], "must be callable, got int"),
        ((c for c in [lambda: torch.zeros(())]), "got generator, .* make a list of it"),
        ("loss", "must be callable, got str"),
    ],
)
def test_what_is_no_list_of_closures_is_refused(closure, message):
    model = nn.Linear(2, 1)
    trainer = HybridTrainer(model, torch.optim.Adam(model.parameters()))
    with pytest.raises(ClosureError, match=message):
        trainer.step(closure)


def test_a_part_that_returns_no_loss_leaves_no_gradients_of_the_others():
    model = nn.Linear(2, 1)
    trainer = HybridTrainer(model, torch.optim.Adam(model.parameters()))
    with pytest.raises(ClosureError, match="NoneType, not a loss"):
        trainer.step([lambda: model(torch.ones(2)).sum(), lambda: None])
    assert all(p.grad is None for p in model.parameters())
