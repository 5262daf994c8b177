"""What is saved, refused and put back, and what bad batches leave alone."""

import dataclasses
from time import perf_counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from problems import BRISK, digits, regression, weights
from torch import nn

from hybridcore import (
    Action,
    CheckpointError,
    ConfigError,
    Directive,
    ModelError,
    Phase,
)
from hybridcore_torch import HybridTrainer


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(tmp_path):
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, BRISK)
    trainer.step(closure)
    path = tmp_path / "run.pt"
    trainer.save(path)
    other = nn.Linear(3, 2)
    before = weights(other)
    with pytest.raises(CheckpointError, match="another model"):
        HybridTrainer.load(path, other, torch.optim.Adam(other.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(before, weights(other), strict=True))
    with pytest.raises(ConfigError, match="leave config= out"):
        HybridTrainer.load(path, *regression()[:2], config=BRISK)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(CheckpointError, match="damaged"):
        HybridTrainer.load(path, *regression()[:2])
    with pytest.raises(CheckpointError, match="not one of a HybridTrainer"):
        trainer.load_state_dict({})
    state = trainer.state_dict() | {"hybridcore": 99}
    with pytest.raises(CheckpointError, match="version 99"):
        trainer.load_state_dict(state)


def test_a_state_of_another_precision_or_of_other_groups_says_so():
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, BRISK)
    trainer.step(closure)
    state = trainer.state_dict()
    half = regression()[0].to(torch.bfloat16)
    other = HybridTrainer(half, torch.optim.Adam(half.parameters(), 1e-2), BRISK)
    before = weights(half)
    with pytest.raises(CheckpointError, match="differ in name, shape or dtype"):
        other.load_state_dict(state)
    assert all(map(torch.equal, before, weights(half)))
    split, _, _ = regression()
    groups = [{"params": [p]} for p in split.parameters()]
    with pytest.raises(CheckpointError, match=r"groups are of \[2\] .* of this one of \[1, 1\]"):
        HybridTrainer(split, torch.optim.Adam(groups), BRISK).load_state_dict(state)
    settings = dataclasses.replace(BRISK, horizon=99)
    with pytest.raises(CheckpointError, match=r"horizon is \d+ there and 99 here: build"):
        HybridTrainer(*regression()[:2], settings).load_state_dict(state)


def test_a_scheduler_or_scaler_that_is_none_is_refused_at_once():
    model, optimizer, _ = regression()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR
    with pytest.raises(ModelError, match=r"scheduler must .* got the class CosineAnnealingLR"):
        HybridTrainer(model, optimizer, scheduler=schedule)
    for bad in (True, torch.amp.GradScaler):
        with pytest.raises(ModelError, match=r"scaler must be a torch\.amp.GradScaler, got"):
            HybridTrainer(model, optimizer, scaler=bad)


def test_a_bad_batch_leaves_running_statistics_alone():
    x, y = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 10))
    trainer = HybridTrainer(model, torch.optim.Adam(model.parameters(), 1e-2), BRISK)
    trainer.step(lambda: F.cross_entropy(model(x), y))
    before = model[1].running_mean.clone()
    trainer.step(lambda: F.cross_entropy(model(x * float("nan")), y))
    assert torch.equal(before, model[1].running_mean)


def test_a_bad_batch_makes_neither_snapshot_nor_average():
    model, optimizer, closure = regression()
    hands = HybridTrainer(model, optimizer, BRISK)._hands
    hands.carry_out(Directive(Action.FULL, snapshot=True, average=1.0), lambda: closure() * np.nan)
    assert hands.bank is None
    assert hands.average is None


def test_a_pass_that_raises_leaves_running_statistics_alone():
    x, y = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 10))
    trainer = HybridTrainer(model, torch.optim.Adam(model.parameters(), 1e-2), BRISK)
    for _ in range(3):
        trainer.step(lambda: F.cross_entropy(model(x), y))
    before = [buffer.clone() for buffer in model.buffers()]
    with pytest.raises(ZeroDivisionError):
        trainer.step(lambda: F.cross_entropy(model(x + 1.0), y) / (1 // 0))
    assert all(map(torch.equal, before, model.buffers()))


def test_bad_batches_in_a_row_while_settling_end_in_a_rollback():
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, BRISK)
    while trainer.engine.phase is not Phase.CORRECT:
        trainer.step(closure)
    for _ in range(3):
        trainer.step(lambda: closure() * float("nan"))
    assert trainer.engine.phase is Phase.FULL
    assert trainer.statistics().rollbacks == 1


@pytest.mark.parametrize("schedule", [None, "StepLR", "LambdaLR"])
def test_a_rollback_keeps_what_the_user_set(schedule):
    model, optimizer, closure = regression()
    scheduler = None
    if schedule == "StepLR":
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10_000)
    elif schedule == "LambdaLR":
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.99**step)
    trainer = HybridTrainer(model, optimizer, BRISK, scheduler=scheduler)
    while trainer.engine.phase is not Phase.CORRECT:
        trainer.step(closure)
    optimizer.param_groups[0] |= {"lr": 1e-4, "weight_decay": 0.1}
    for _ in range(3):
        trainer.step(lambda: closure() * float("nan"))
    summary = trainer.statistics()
    assert summary.rollbacks == 1
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    # A schedule that computes the rate from the step takes it back itself, and has lost no step.
    rate = 1e-2 * 0.99**summary.steps if schedule == "LambdaLR" else 1e-4
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-12)


def test_freezing_within_a_jump_under_batches():
    x, y = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    trainer = HybridTrainer(model, torch.optim.Adam(model.parameters(), 3e-3), BRISK)
    for _ in trainer.batches(range(400)):
        trainer.step(lambda: F.cross_entropy(model(x), y))
        if trainer.engine.phase is Phase.PREDICT:
            model[0].weight.requires_grad_(False)
    assert trainer.statistics().steps == 400


def learned_loss(margin=0.0):
    """Regression whose loss has a parameter of its own, outside the model."""
    model, _, _ = regression()
    x, y = digits()
    temperature = nn.Parameter(torch.tensor([margin]))
    optimizer = torch.optim.Adam([*model.parameters(), temperature], 1e-2)
    return model, optimizer, temperature, lambda: F.cross_entropy(model(x) * temperature.exp(), y)


def test_parameters_outside_the_model_are_saved_and_clipped(tmp_path):
    model, optimizer, temperature, closure = learned_loss()
    trainer = HybridTrainer(model, optimizer, BRISK, max_grad_norm=1e-9)
    trainer.step(closure)
    assert 0.0 < temperature.grad.abs().item() <= 1e-9
    trainer.save(tmp_path / "run.pt")
    model, optimizer, other, _ = learned_loss(margin=5.0)
    HybridTrainer.load(tmp_path / "run.pt", model, optimizer, max_grad_norm=1e-9)
    assert torch.equal(other, temperature)


def test_parameters_outside_the_model_have_to_be_as_many():
    model, optimizer, _, closure = learned_loss()
    trainer = HybridTrainer(model, optimizer, BRISK)
    trainer.step(closure)
    other, _, _ = regression(seed=1)
    wide = [*other.parameters(), nn.Parameter(torch.zeros(2))]
    before = weights(other)
    with pytest.raises(CheckpointError, match="outside the model differ"):
        HybridTrainer(other, torch.optim.Adam(wide), BRISK).load_state_dict(trainer.state_dict())
    assert all(map(torch.equal, before, weights(other)))


def test_a_frozen_parameter_outside_the_model_may_be_of_any_kind():
    model, _, closure = regression()
    counts = nn.Parameter(torch.arange(3), requires_grad=False)
    optimizer = torch.optim.Adam([*model.parameters(), counts], 1e-2)
    trainer = HybridTrainer(model, optimizer, BRISK)
    for _ in range(100):
        trainer.step(closure)
    assert trainer.statistics().predicted_steps > 0
    assert counts.tolist() == [0, 1, 2]


def test_a_loss_scale_comes_back(tmp_path):
    def scaled(seed, scale):
        model, optimizer, closure = regression(seed)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
        return model, optimizer, closure, scaler

    model, optimizer, closure, scaler = scaled(0, 2.0**10)
    trainer = HybridTrainer(model, optimizer, BRISK, scaler=scaler)
    for _ in range(7):
        trainer.step(closure)
    trainer.save(tmp_path / "run")
    other, fresh, again, other_scaler = scaled(1, 2.0)
    resumed = HybridTrainer.load(tmp_path / "run", other, fresh, scaler=other_scaler)
    assert other_scaler.get_scale() == 2.0**12
    # One step on: the next growth is two steps off.
    for _ in range(2):
        trainer.step(closure)
        resumed.step(again)
    assert other_scaler.get_scale() == scaler.get_scale() == 2.0**13
    assert all(map(torch.equal, weights(model), weights(other)))
    off = HybridTrainer(other, fresh, BRISK, scaler=torch.amp.GradScaler("cpu", enabled=False))
    with pytest.raises(CheckpointError, match="scaler that was off"):
        trainer.load_state_dict(off.state_dict())


class Versioned(nn.Linear):
    """A layer whose parameters are told apart by the version that they were saved by."""

    _version = 7
    found = None

    def _load_from_state_dict(self, state, prefix, local_metadata, *rest):
        self.found = local_metadata.get("version")
        super()._load_from_state_dict(state, prefix, local_metadata, *rest)


def test_a_layer_is_told_the_version_that_its_parameters_are_of(tmp_path):
    model = nn.Sequential(Versioned(4, 2))
    trainer = HybridTrainer(model, torch.optim.Adam(model.parameters()), BRISK)
    trainer.save(tmp_path / "run")
    HybridTrainer.load(tmp_path / "run", model, trainer.optimizer)
    assert model[0].found == 7


def test_numbers_of_numpy_in_an_optimizer_survive_a_checkpoint(tmp_path):
    model, _, closure = regression()
    optimizer = torch.optim.Adam(model.parameters(), np.float64(1e-2))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10, gamma=np.float32(0.5))
    trainer = HybridTrainer(model, optimizer, BRISK, scheduler=scheduler)
    trainer.step(closure)
    trainer.save(tmp_path / "run.pt")
    model, optimizer, _ = regression()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    again = HybridTrainer.load(tmp_path / "run.pt", model, optimizer, scheduler=scheduler)
    assert again.optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    assert again.scheduler.gamma == 0.5


def test_states_of_other_builds_are_refused_before_anything_changes():
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, BRISK)
    while trainer.engine.phase is not Phase.PREDICT:
        trainer.step(closure)
    state = trainer.state_dict()
    other, adam, _ = regression(seed=1)
    before = weights(other)
    whole = [[other.weight, other.bias]]
    with pytest.raises(CheckpointError, match="layer_groups"):
        HybridTrainer(other, adam, BRISK, layer_groups=whole).load_state_dict(state)
    sgd = torch.optim.SGD(other.parameters(), 0.1)
    with pytest.raises(CheckpointError, match="optimizer Adam"):
        HybridTrainer(other, sgd, BRISK).load_state_dict(state)
    for key in state.keys() - {"hybridcore"}:
        short = {name: value for name, value in state.items() if name != key}
        with pytest.raises(CheckpointError, match=key):
            HybridTrainer(other, adam, BRISK).load_state_dict(short)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(other), strict=True))


def test_sparse_gradients_are_refused_at_once():
    model = nn.Sequential(nn.Embedding(10, 3, sparse=True), nn.Linear(3, 2))
    with pytest.raises(ModelError, match="sparse=False"):
        HybridTrainer(model, torch.optim.SGD(model.parameters(), 0.1))


def test_a_buffer_that_the_model_replaces_is_put_back_after_a_probe():
    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(64, 10)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls = self.calls + 1.0
            return super().forward(x)

    x, y = digits()
    torch.manual_seed(0)
    model = Counting()
    # A quasi-Newton step that is taken back is not counted.
    config = dataclasses.replace(BRISK, secant_pairs=0)
    trainer = HybridTrainer(model, torch.optim.Adam(model.parameters(), 1e-2), config)
    for _ in range(150):
        trainer.step(lambda: F.cross_entropy(model(x), y))
    statistics = trainer.statistics()
    assert statistics.probes > 0
    assert model.calls.item() == statistics.full_steps


def test_watching_counts_as_overhead():
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, BRISK)
    start = perf_counter()
    spent = sum(trainer.step(closure).step_time_ms for _ in range(60)) / 1e3
    assert spent <= perf_counter() - start
    statistics = trainer.statistics()
    assert 0.0 < statistics.overhead_seconds < spent
    assert statistics.cost > statistics.full_steps
    assert sum(statistics.phase_seconds.values()) == pytest.approx(spent)
