"""Weights that somebody else writes, and is it told."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from problems import digits
from torch import nn

from hybridcore_torch import HybridTrainer
from hybridcore_torch.writes import Writes

KINDS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def replace(p):
    p.data = torch.randn_like(p)


def no_number(p):
    p.data.fill_(torch.nan)


def in_the_middle(p):
    p.data.view(-1)[p.numel() // 2] += 1.0


WRITES = {
    "data": replace,
    "data in place": lambda p: p.data.normal_(),
    "no_grad": lambda p: torch.no_grad()(p.normal_)(),
    "NaN": no_number,
    "an element": in_the_middle,
}


def parameters(kind):
    torch.manual_seed(0)
    shapes = (8, 4), (1,), (), (0,), (3, 5, 2)
    found = [nn.Parameter(torch.randn(shape).to(kind)) for shape in shapes]
    # In another order than it lies in memory.
    return [*found, nn.Parameter(torch.randn(6, 4).to(kind).T)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", WRITES)
def test_what_is_written_is_found_once(how, kind):
    all_of_them = parameters(kind)
    writes = Writes(all_of_them)
    assert not writes.found
    writes.note()
    assert not writes.found
    WRITES[how](all_of_them[0])
    assert writes.found
    writes.note()
    # Numbers that are none do not differ from themselves.
    assert not writes.found
    replace(all_of_them[0])
    assert writes.found


@pytest.mark.parametrize("which", [1, 2, 4, 5])
def test_it_is_found_in_each_of_them(which):
    all_of_them = parameters(torch.float32)
    writes = Writes(all_of_them)
    writes.note()
    all_of_them[which].data.normal_()
    assert writes.found


@pytest.mark.parametrize(
    "moves",
    [
        lambda m: m.double().float(),
        lambda m: m.share_memory(),
        lambda m: [setattr(p, "data", p.data.clone()) for p in m.parameters()],
        # In a new place, where there is room for more.
        lambda m: [p.data.resize_(200, 50) for p in m.parameters()],
    ],
)
def test_weights_that_are_the_same_in_another_place_are_not_written(moves):
    model = nn.Linear(8, 4)
    writes = Writes(list(model.parameters()))
    writes.note()
    moves(model)
    assert not writes.found
    model.weight.data.normal_()
    assert writes.found


def test_where_there_are_many_some_are_looked_at_from_all_over():
    many = [nn.Parameter(torch.randn(3)) for _ in range(100)]
    writes = Writes(many)
    writes.note()
    noticed = []
    for p in many:
        before = p.data.clone()
        p.data.normal_()
        noticed.append(writes.found)
        p.data.copy_(before)
    assert not writes.found
    assert 8 < sum(noticed) <= 16
    assert any(noticed[:10])
    assert any(noticed[-10:])


def test_one_whose_memory_cannot_be_had_is_left_out():
    z = torch.randn(4, dtype=torch.complex64)
    negated = nn.Parameter(z.conj().imag)
    assert negated.is_neg()
    writes = Writes([negated, nn.Parameter(torch.randn(3, dtype=torch.complex128))])
    writes.note()
    assert not writes.found


def test_a_pickled_one_holds_no_second_copy_of_the_weights():
    parameters = [nn.Parameter(torch.randn(10_000))]
    writes = Writes(parameters)
    bare = len(pickle.dumps(writes))
    writes.note()
    assert len(pickle.dumps(writes)) < bare + 1000


def test_nothing_is_found_where_nothing_is_to_be_held_against():
    all_of_them = parameters(torch.float32)
    writes = Writes(all_of_them)
    writes.note()
    writes.forget()
    all_of_them[0].data.normal_()
    assert not writes.found
    assert not writes.noted


def test_a_copy_looks_at_weights_of_its_own():
    model = nn.Linear(4, 4)
    both = model, Writes(list(model.parameters()))
    both[1].note()
    other, writes = copy.deepcopy(both)
    writes.note()
    model.weight.data.normal_()
    assert not writes.found
    other.weight.data.normal_()
    assert writes.found


@pytest.mark.parametrize("how", ["data", "data in place", "no_grad"])
def test_each_fold_of_a_cross_validation_begins_anew(how):
    """One that went back to the weights of another fold would have seen what it is tested on."""
    x, y = digits()
    ends = {}
    for kind in ("one", "new"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
        first = copy.deepcopy(model.state_dict())
        trainer = HybridTrainer(model, torch.optim.Adam(model.parameters(), 1e-2))
        for fold in range(3):
            rows = torch.arange(len(x)) % 3 != fold
            closure = lambda m=model, r=rows: F.cross_entropy(m(x[r]), y[r])  # noqa: E731
            for name, p in model.named_parameters():
                fresh = first[name]
                if how == "data":
                    p.data = fresh.clone()
                elif how == "data in place":
                    p.data.copy_(fresh)
                else:
                    with torch.no_grad():
                        p.copy_(fresh)
            if kind == "new":
                trainer = HybridTrainer(model, torch.optim.Adam(model.parameters(), 1e-2))
            begun = trainer.step(closure).loss
            # The loss of ten classes by chance.
            assert 2.2 < begun < 2.5
            for _ in range(199):
                trainer.step(closure)
            trainer.finish(closure)
            with torch.no_grad():
                held = F.cross_entropy(model(x[~rows]), y[~rows]).item()
            ends.setdefault(fold, []).append(held)
    assert all(min(pair) > 0.05 for pair in ends.values())
