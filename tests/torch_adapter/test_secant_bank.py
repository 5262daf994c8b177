"""The bank of secant pairs against the vectors themselves, in NumPy."""

import copy
import math

import numpy as np
import pytest
import torch
from problems import flat
from torch import nn

from hybridcore_torch import HybridTrainer
from hybridcore_torch.checkpoints import migrated
from hybridcore_torch.secants import SecantBank, affordable


def small(rates=(1e-2, 1e-2), decay=0.0, kind=torch.optim.Adam):
    torch.manual_seed(0)
    layers = nn.Linear(4, 3), nn.Linear(3, 2)
    groups = [
        {"params": list(layer.parameters()), "lr": rate}
        for layer, rate in zip(layers, rates, strict=True)
    ]
    return nn.Sequential(*layers), kind(groups, weight_decay=decay)


def take_pairs(count, capacity, **arguments):
    """A bank after `count` passes, and what it should hold: weights and gradients of each."""
    model, optimizer = small(**arguments)
    parameters = list(model.parameters())
    bank = SecantBank(optimizer, parameters, capacity)
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    points, gradients = [], []
    for _ in range(count):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        points.append(flat(parameters))
        gradients.append(flat(p.grad for p in parameters))
        bank.take()
        optimizer.step()
    return bank, parameters, np.array(points), np.array(gradients)


def metric_of(gradients, rates=(1.0, 1.0)):
    root = np.sqrt((gradients**2).mean(0))
    metric = np.repeat(rates, (15, 8)) / (root + 0.01 * root.mean())
    return metric / metric.mean()


@pytest.mark.parametrize(("count", "capacity"), [(2, 5), (4, 5), (9, 5), (23, 3)])
def test_products_and_points_are_those_of_the_vectors(count, capacity):
    bank, parameters, points, gradients = take_pairs(count, capacity)
    s, y = np.diff(points, axis=0)[-capacity:], np.diff(gradients, axis=0)[-capacity:]
    metric, last = metric_of(gradients), gradients[-1]
    both = np.vstack((y, last))
    secants = bank.products()
    scale = np.abs(s @ both.T).max(), np.abs(both * metric @ both.T).max()
    np.testing.assert_allclose(secants.plain, np.triu(s @ both.T), atol=1e-5 * scale[0])
    np.testing.assert_allclose(secants.scaled, both * metric @ both.T, atol=1e-5 * scale[1])
    coefficients = np.random.default_rng(0).normal(size=2 * len(s) + 1)
    bank.reach(coefficients)
    expected = points[-1] + coefficients @ np.vstack((s, both * metric))
    np.testing.assert_allclose(flat(parameters), expected, rtol=1e-4, atol=1e-5)
    bank.back_to_base()
    np.testing.assert_array_equal(flat(parameters), points[-1])
    bank.reach(np.zeros(2 * len(s) + 1))
    np.testing.assert_array_equal(flat(parameters), points[-1])


def test_products_stay_exact_while_pairs_come_and_go():
    bank, parameters, points, gradients = take_pairs(4, 3)
    metric = metric_of(gradients)
    bank.products()
    random = torch.Generator().manual_seed(2)
    points, gradients = list(points), list(gradients)
    for _ in range(7):
        for p in parameters:
            p.data += 0.1 * torch.randn(p.shape, generator=random)
            p.grad = torch.randn(p.shape, generator=random)
        points.append(flat(parameters))
        gradients.append(flat(p.grad for p in parameters))
        bank.take()
        secants = bank.products()
    s, y = np.diff(points, axis=0)[-3:], np.diff(gradients, axis=0)[-3:]
    both = np.vstack((y, gradients[-1]))
    np.testing.assert_allclose(secants.plain, np.triu(s @ both.T), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(secants.scaled, both * metric @ both.T, rtol=1e-4, atol=1e-3)
    # Emptied, it forgets the metric too.
    bank.clear()
    assert bank.products().plain.shape == (0, 1)


def test_pairs_of_double_precision_lose_nothing_of_it():
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(50, dtype=torch.float64))
    bank, points, gradients = SecantBank(torch.optim.SGD([p], 1e-2), [p], 3), [], []
    for _ in range(4):
        p.data.add_(torch.randn_like(p), alpha=1e-9)
        p.grad = 1.0 + 1e-9 * torch.randn_like(p)
        points.append(flat([p]).copy())
        gradients.append(flat([p.grad]).copy())
        bank.take()
    s, y = np.diff(points, axis=0), np.diff(gradients, axis=0)
    expected = s @ y.T
    scale = np.abs(expected).max()
    found = bank.products().plain[:, :3]
    np.testing.assert_allclose(found, np.triu(expected), atol=1e-5 * scale)


def test_an_abandoned_pair_leaves_the_base_before_it(monkeypatch):
    bank, parameters, points, _ = take_pairs(9, 5)
    bank.products()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(bank, "_multiply", interrupt)
    with pytest.raises(KeyboardInterrupt):
        bank.take()
    bank.back_to_base()
    np.testing.assert_array_equal(flat(parameters), points[-1])


def test_a_saved_bank_does_not_change_with_the_one_that_goes_on():
    bank, *_ = take_pairs(9, 5)
    bank.products()
    state = bank.state_dict()
    kept = copy.deepcopy(state)
    bank.take()
    bank.products()
    other = take_pairs(2, 5)[0]
    other.load_state_dict(state)
    other.take()
    other.products()
    for name in ("rows", "plain", "scaled"):
        assert torch.equal(state[name], kept[name]), name


def test_a_bank_that_is_loaded_decays_as_the_one_that_was_saved():
    bank, *_ = take_pairs(6, 5, decay=0.1, kind=torch.optim.AdamW)
    # Now that the optimizer has moments.
    bank.clear()
    bank.take()
    model, optimizer = small(decay=0.1, kind=torch.optim.AdamW)
    other = SecantBank(optimizer, list(model.parameters()), 5)
    assert other.objective(1.0) == 1.0
    other.load_state_dict(bank.state_dict())
    bank.back_to_base()
    other.back_to_base()
    assert other.objective(1.0) == bank.objective(1.0) > 1.0


def test_what_is_left_from_before_counts_for_nothing():
    bank, parameters, *_ = take_pairs(6, 5)
    # As where all learning rates were zero.
    bank._metric.fill_(math.nan)
    bank._is_metric = True
    for slot in range(5):
        bank._multiply(slot, 1)
    bank.clear()
    for scale in (1.0, 2.0, 4.0):
        for p in parameters:
            p.data.mul_(1.1)
            p.grad = scale * torch.ones_like(p)
        bank.take()
    base = flat(parameters)
    bank.products()
    bank.reach(np.full(5, 1e-3))
    assert np.isfinite(flat(parameters)).all()
    assert (flat(parameters) != base).all()


@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize("is_metric", [False, True])
def test_a_bank_of_version_5_is_the_same_one(turn, is_metric):
    size, pairs = 23, 3
    rows = torch.randn(5 + 2 * pairs, size, generator=torch.Generator().manual_seed(0))
    metric = rows[4].abs_()
    places = [[0, 1], [2, 3]]
    products = torch.stack((torch.eye(pairs), 2.0 * torch.eye(pairs))).double()
    state = HybridTrainer(*small()).state_dict() | {
        "hybridcore": 5,
        "secants": {
            "rows": rows,
            "order": [2, 0, 1],
            "base": places[::-1] if turn else places,
            "counts": [True, 7, is_metric],
            "products": products,
            "decay": [0.0] * 4,
        },
    }
    model, optimizer = small()
    parameters = list(model.parameters())
    bank = SecantBank(optimizer, parameters, pairs)
    bank.load_state_dict(migrated(state)["secants"])
    base, gradient = (rows[row].double().numpy() for row in places[turn])
    bank.back_to_base()
    np.testing.assert_array_equal(flat(parameters), base)
    if is_metric:
        np.testing.assert_array_equal(bank._plain[:, :pairs], np.eye(pairs))
        np.testing.assert_array_equal(bank._scaled[:pairs, :pairs], 2.0 * np.eye(pairs))
        shares = np.random.default_rng(0).normal(size=2 * pairs + 1)
        bank.reach(shares)
        order = [2, 0, 1]
        moved, changed = rows[5 : 5 + pairs][order], rows[5 + pairs :][order] * metric
        vectors = np.vstack((moved, changed, torch.from_numpy(gradient) * metric))
        np.testing.assert_allclose(flat(parameters), base + shares @ vectors, atol=1e-5)
    else:
        torch.testing.assert_close(torch.stack(bank._changed), rows[5 + pairs :])


def test_autocast_around_the_step_makes_no_products_coarser():
    outside = take_pairs(9, 5)[0].products()
    bank, *_ = take_pairs(9, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert (bank._moved[0][None] @ bank._moved[0][:, None]).dtype is torch.bfloat16
        inside = bank.products()
    for name in ("plain", "scaled"):
        np.testing.assert_array_equal(getattr(inside, name), getattr(outside, name))


def test_what_trains_more_slowly_moves_less():
    bank, parameters, points, gradients = take_pairs(6, 5, rates=(1e-2, 0.0))
    coefficients = np.zeros(11)
    coefficients[-1] = -1.0
    bank.products()
    bank.reach(coefficients)
    moved = flat(parameters) - points[-1]
    assert np.abs(moved[:15]).min() > 0.0
    assert not moved[15:].any()
    expected = -metric_of(gradients, (1e-2, 0.0)) * gradients[-1]
    np.testing.assert_allclose(moved, expected, rtol=1e-3, atol=1e-6)


def test_room_for_pairs():
    model, optimizer = small()
    parameters = list(model.parameters())
    assert affordable(optimizer, parameters, 20, 2**28) == 20
    assert affordable(optimizer, [torch.empty(30_000_000, device="meta")], 20, 2**31) == 5
    assert affordable(optimizer, [torch.empty(10**9, device="meta")], 20, 2**31) == 0
    assert affordable(optimizer, [*parameters, torch.zeros(2).double()], 20, 2**28) == 0
    maximizing = torch.optim.Adam(parameters, maximize=True)
    for other in (maximizing, torch.optim.ASGD(parameters), torch.optim.Rprop(parameters)):
        assert affordable(other, parameters, 20, 2**28) == 0
    # What its decay adds to the loss is not known, so it may have none.
    for decay, pairs in ((0.0, 20), (0.1, 0)):
        own = torch.optim.Adafactor(parameters, weight_decay=decay)
        assert affordable(own, parameters, 20, 2**28) == pairs
    # A process that is alone in its group has no other to part from.
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        assert HybridTrainer(model, optimizer).engine.pairs == 20
    finally:
        torch.distributed.destroy_process_group()
    scaler = torch.amp.GradScaler("cpu")
    assert HybridTrainer(model, optimizer, scaler=scaler).engine.pairs == 0
    assert HybridTrainer(model, optimizer).engine.pairs == 20
