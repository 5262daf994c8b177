"""What people's loops do beside the obvious, and what a run must make of it."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from problems import BRISK, digits, regression, weights
from torch import nn
from torch.optim.lr_scheduler import LinearLR, MultiStepLR, SequentialLR

from hybridcore import CheckpointError, ClosureError, ConfigError, HybridTrainerConfig, ModelError
from hybridcore import Phase as PhaseOfCore
from hybridcore_torch import HybridTrainer, Phase


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("retain", [True, False])
def test_a_closure_that_calls_backward_is_an_error_and_changes_nothing(enabled, retain):
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, HybridTrainerConfig(enabled=enabled))
    trainer.step(closure)
    before = weights(model)

    def eager():
        loss = closure()
        loss.backward(retain_graph=retain)
        return loss

    with pytest.raises(ClosureError, match="leave backward"):
        trainer.step(eager)
    assert all(map(torch.equal, before, weights(model)))
    assert all(p.grad is None for p in model.parameters())
    trainer.step(closure)


def test_batches_are_there_in_every_epoch():
    x, y = digits()
    model, optimizer, _ = regression()
    trainer = HybridTrainer(model, optimizer, BRISK)
    loader = trainer.batches([(x, y)] * 40)
    assert len(loader) == 40
    for _ in range(6):
        for inputs, targets in loader:
            trainer.step(lambda i=inputs, t=targets: F.cross_entropy(model(i), t))
    assert trainer.statistics().steps == 240
    assert trainer.statistics().predicted_steps > 0


@pytest.mark.parametrize("enabled", [True, False])
def test_a_layer_that_is_added_is_clipped_in_its_first_step(enabled):
    x, y = digits()
    model, optimizer, closure = regression()
    config = HybridTrainerConfig(enabled=enabled, averaging=False)
    trainer = HybridTrainer(model, optimizer, config, max_grad_norm=1e-3)
    for _ in range(10):
        trainer.step(closure)
    model.added = nn.Linear(10, 10)
    optimizer.add_param_group({"params": model.added.parameters()})
    trainer.step(lambda: 1e3 * F.cross_entropy(model.added(model(x)), y))
    norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)


def test_a_bad_gradient_of_a_frozen_optimizer_s_neighbour_does_not_stay():
    x, y = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    optimizer = torch.optim.SGD(model[2].parameters(), 0.1)
    trainer = HybridTrainer(model, optimizer, max_grad_norm=1.0)
    trainer.step(lambda: F.cross_entropy(model(x), y))
    # Finite loss, gradients that are not: the root of nothing.
    bad = nn.Parameter(torch.zeros(()))
    trainer.step(lambda: F.cross_entropy(model(x), y) + (bad * model[0].weight.sum() * 0).sqrt())
    for _ in range(20):
        assert np.isfinite(trainer.step(lambda: F.cross_entropy(model(x), y)).loss)
    assert trainer.statistics().divergences <= 1


def test_a_bad_loss_stays_with_no_neighbour_of_a_frozen_optimizer():
    x, y = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    trainer = HybridTrainer(model, torch.optim.SGD(model[2].parameters(), 0.1), max_grad_norm=1.0)
    for step in range(20):
        factor = np.nan if step == 3 else 1.0
        trainer.step(lambda f=factor: f * F.cross_entropy(model(x), y))
    assert trainer.statistics().divergences == 1


class Cached(nn.Module):
    """A linear model with a cache that grows, and a buffer whose rows share one memory."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 10)
        self.register_buffer("cache", torch.zeros(1), persistent=False)
        self.register_buffer("shared", torch.ones(1, 10).expand(3, 10))

    def forward(self, x):
        self.register_buffer("cache", torch.zeros(len(self.cache) + 1), persistent=False)
        return self.linear(x) * self.shared[0]


def test_buffers_may_grow_and_share_memory_even_across_a_rollback():
    x, y = digits()
    torch.manual_seed(0)
    model = Cached()
    trainer = HybridTrainer(model, torch.optim.Adam(model.parameters(), 1e-2), BRISK)

    def loss():
        worse = 1e3 if trainer.engine.phase is Phase.CORRECT else 1.0
        return worse * F.cross_entropy(model(x), y)

    for _ in range(200):
        trainer.step(loss)
    assert trainer.statistics().rollbacks > 0


def test_a_probe_of_another_scale_is_no_reason_to_give_up_jumps():
    runs = []
    for scale in (1.0, 0.1):
        model, optimizer, closure = regression()
        trainer = HybridTrainer(
            model,
            optimizer,
            dataclasses.replace(BRISK, secant_pairs=0),
            probe=lambda c=closure, s=scale: s * c(),
        )
        for _ in range(400):
            trainer.step(closure)
        runs.append(trainer.statistics())
    assert runs[0].rollbacks == runs[1].rollbacks == 0
    assert runs[1].predicted_steps == pytest.approx(runs[0].predicted_steps, rel=0.2)


def test_schedulers_inside_schedulers_resume(tmp_path):
    def build():
        model, optimizer, closure = regression()
        parts = [LinearLR(optimizer), MultiStepLR(optimizer, [5, 9])]
        return model, optimizer, closure, SequentialLR(optimizer, parts, [10])

    model, optimizer, closure, scheduler = build()
    trainer = HybridTrainer(model, optimizer, BRISK, scheduler=scheduler)
    for _ in range(7):
        trainer.step(closure)
    trainer.save(tmp_path / "run.pt")
    other, other_optimizer, again, schedule = build()
    resumed = HybridTrainer.load(tmp_path / "run.pt", other, other_optimizer, scheduler=schedule)
    for _ in range(40):
        trainer.step(closure)
        resumed.step(again)
    assert all(map(torch.equal, weights(model), weights(other)))
    assert schedule.get_last_lr() == scheduler.get_last_lr() != [1e-2]


def test_what_a_checkpoint_was_saved_with_is_asked_for(tmp_path):
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, BRISK, max_grad_norm=0.5)
    trainer.step(closure)
    trainer.save(tmp_path / "run.pt")
    other, other_optimizer, _ = regression()
    with pytest.raises(CheckpointError, match=r"max_grad_norm=0.5, this trainer has None"):
        HybridTrainer.load(tmp_path / "run.pt", other, other_optimizer)
    scheduler = MultiStepLR(optimizer, [5])
    trainer = HybridTrainer(model, optimizer, BRISK, scheduler=scheduler)
    state = trainer.state_dict()
    other_scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    trainer = HybridTrainer(model, optimizer, BRISK, scheduler=other_scheduler)
    with pytest.raises(CheckpointError, match="scheduler MultiStepLR, this trainer has StepLR"):
        trainer.load_state_dict(state)


def test_a_file_that_was_cut_anywhere_is_a_damaged_checkpoint(tmp_path):
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, BRISK)
    trainer.step(closure)
    path = tmp_path / "run.pt"
    trainer.save(path)
    whole = path.read_bytes()
    assert not list(tmp_path.glob(".*"))
    for share in np.linspace(0.0, 0.999, 40):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(CheckpointError, match="damaged or no checkpoint"):
            HybridTrainer.load(path, *regression()[:2])
    with pytest.raises(FileNotFoundError):
        HybridTrainer.load(tmp_path / "none.pt", *regression()[:2])


def test_a_state_saved_right_after_freezing_loads(tmp_path):
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, BRISK)
    for _ in range(103):
        trainer.step(closure)
    model.bias.requires_grad_(False)
    trainer.save(tmp_path / "run.pt")
    other, other_optimizer, again = regression(seed=1)
    other.bias.requires_grad_(False)
    resumed = HybridTrainer.load(tmp_path / "run.pt", other, other_optimizer)
    for _ in range(60):
        trainer.step(closure)
        resumed.step(again)
    assert all(map(torch.equal, weights(model), weights(other)))


def test_loading_leaves_the_state_to_its_owner():
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, BRISK)
    trainer.step(closure)
    state = trainer.state_dict()
    other, other_optimizer, again = regression(seed=1)
    twin = HybridTrainer(other, other_optimizer, BRISK)
    kept = state["optimizer"]["state"][0]["exp_avg"].clone()
    twin.load_state_dict(state)
    for _ in range(5):
        twin.step(again)
    assert torch.equal(kept, state["optimizer"]["state"][0]["exp_avg"])


def test_after_a_jump_no_copy_of_the_optimizer_is_kept():
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, BRISK)
    phases = {trainer.step(closure).phase for _ in range(200)}
    while trainer.engine.may_roll_back:
        trainer.step(closure)
    assert Phase.CORRECT in phases
    assert trainer.state_dict()["recovery"] is None


def test_a_switched_off_run_does_not_grow():
    model, optimizer, closure = regression()
    trainer = HybridTrainer(model, optimizer, HybridTrainerConfig(enabled=False))
    for _ in range(50):
        trainer.step(closure)
    assert len(trainer.engine._times) <= 1


def test_arguments_in_the_wrong_place_are_told_their_place():
    model, optimizer, _ = regression()
    with pytest.raises(ConfigError, match="pass it as scheduler="):
        HybridTrainer(model, optimizer, MultiStepLR(optimizer, [5]))
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(ModelError, match="learning rate None"):
        HybridTrainer(model, optimizer)
    assert Phase is PhaseOfCore


def test_a_sparse_embedding_of_another_optimizer_is_none_of_ours():
    model = nn.ModuleDict({"words": nn.Embedding(5, 4, sparse=True), "head": nn.Linear(4, 2)})
    words = torch.optim.SparseAdam(model["words"].parameters())
    trainer = HybridTrainer(model, torch.optim.Adam(model["head"].parameters()))
    trainer.step(lambda: model["head"](model["words"](torch.tensor([1, 2]))).square().sum())
    words.step()
    with pytest.raises(ModelError, match="sparse=False"):
        HybridTrainer(model, torch.optim.SGD(model.parameters(), 0.1))
