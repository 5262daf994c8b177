"""Weights that a loss depends on and somebody else trains, as in a game."""

import copy
import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from problems import BRISK, digits, regression
from torch import nn

from hybridcore import HybridTrainerConfig, Phase, ProtocolError
from hybridcore_torch import HybridTrainer
from hybridcore_torch.others import SELDOM

PLAIN = HybridTrainerConfig(enabled=False)


def mlp(*sizes):
    layers = [(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*[one for pair in layers for one in pair][:-1])


class Game:
    """A generator of pairs of numbers and who tells them from real ones, each with its trainer.

    The critic may be `frozen` while the generator takes its step, and get what is made `without` a
    graph.
    """

    def __init__(self, generates, tells, parts=1, *, frozen=False, without=False):
        self.frozen, self.without = frozen, without
        torch.manual_seed(0)
        self.generator, self.critic, self.parts = mlp(4, 32, 2), mlp(2, 32, 1), parts
        # Of a list each is called by itself.
        both = (self.generator, nn.ModuleList([self.critic]))
        adams = [torch.optim.Adam(net.parameters(), 1e-3, betas=(0.5, 0.9)) for net in both]
        configs = (generates, tells)
        self.generating, self.telling = (
            HybridTrainer(*each) for each in zip(both, adams, configs, strict=True)
        )
        self.noise = torch.Generator().manual_seed(0)

    def play(self, steps):
        for _ in range(steps):
            real = torch.randn(64, 2, generator=self.noise)
            seed = torch.randn(64, 4, generator=self.noise)

            def told(real=real, seed=seed):
                with torch.set_grad_enabled(not self.without):
                    fake = self.generator(seed).detach()
                return F.softplus(-self.critic(real)).mean() + F.softplus(self.critic(fake)).mean()

            def made(seed=seed):
                return F.softplus(-self.critic(self.generator(seed))).mean()

            self.telling.step(told)
            self.critic.requires_grad_(not self.frozen)
            self.generating.step(made if self.parts == 1 else [made] * self.parts)
            self.critic.requires_grad_(True)

    @property
    def weights(self):
        return [
            p.detach().clone() for net in (self.generator, self.critic) for p in net.parameters()
        ]


@pytest.mark.parametrize(
    "of",
    [{}, {"parts": 2}, {"frozen": True}, {"without": True}, {"frozen": True, "without": True}],
    ids=str,
)
def test_a_game_is_played_as_without_trainers(of, caplog):
    plain, ours = (Game(one, one, **of) for one in (PLAIN, HybridTrainerConfig()))
    for game in (plain, ours):
        game.play(400)
    assert all(map(torch.equal, plain.weights, ours.weights))
    told = [r.getMessage() for r in caplog.records if "elsewhere" in r.getMessage()]
    assert len(told) == 1
    assert "parameters (4)" in told[0]
    for trainer in (ours.generating, ours.telling):
        statistics = trainer.statistics()
        assert statistics.full_steps == statistics.steps == 400
        assert statistics.outer_steps == 0


def test_the_other_may_be_trained_by_a_plain_loop():
    plain, ours = Game(PLAIN, PLAIN), Game(HybridTrainerConfig(), PLAIN)
    for game in (plain, ours):
        game.play(300)
    assert all(map(torch.equal, plain.weights, ours.weights))


def test_there_is_an_average_all_the_same():
    game = Game(HybridTrainerConfig(), HybridTrainerConfig())
    game.play(300)
    before = game.weights
    with game.generating.averaged():
        assert not all(map(torch.equal, before, game.weights))
    assert all(map(torch.equal, before, game.weights))


def test_one_that_begins_later_is_noticed():
    x, y = digits()
    torch.manual_seed(0)
    features, head = mlp(64, 32), nn.Linear(32, 10)
    trainer = HybridTrainer(head, torch.optim.Adam(head.parameters(), 1e-2))
    other = torch.optim.Adam(features.parameters(), 1e-2)
    for step in range(700):
        batch = torch.arange(64) + 64 * (step % 28)
        result = trainer.step(
            lambda batch=batch: F.cross_entropy(head(features(x[batch])), y[batch])
        )
        if step == 280:
            # As long as nothing trains them they are no one's, though they get gradients.
            early = trainer.statistics().outer_steps
        if step >= 300:
            other.step()
        other.zero_grad()
        if step > 300 + SELDOM + 2:
            assert not result.was_predicted
    assert early > 0


def test_it_may_be_seen_in_every_second_step_alone():
    torch.manual_seed(0)
    coder, critic = mlp(64, 16, 64), mlp(64, 16, 1)
    x, _ = digits()
    trainer = HybridTrainer(coder, torch.optim.Adam(coder.parameters(), 1e-3))
    other = torch.optim.Adam(critic.parameters(), 1e-3)
    for step in range(60):
        batch = x[torch.randperm(len(x))[:64]]
        if step % 2:
            trainer.step(lambda batch=batch: F.mse_loss(coder(batch), batch))
        else:
            trainer.step(lambda batch=batch: F.softplus(-critic(coder(batch))).mean())
            other.step()
            other.zero_grad()
    assert trainer.engine.snapshots == 0


def test_what_is_written_now_and_then_is_not_trained():
    x, y = digits()
    torch.manual_seed(0)
    features, head = mlp(64, 32), nn.Linear(32, 10)
    trainer = HybridTrainer(head, torch.optim.Adam(head.parameters(), 1e-2))
    state = copy.deepcopy(features.state_dict())
    for step in range(400):
        batch = torch.arange(64) + 64 * (step % 28)
        if step in (4, 20, 90, 91, 250):
            features.load_state_dict(state)
        trainer.step(lambda batch=batch: F.cross_entropy(head(features(x[batch])), y[batch]))
    assert trainer.statistics().predicted_steps > 0


def test_a_state_of_it_goes_on_and_one_from_before_is_looked_at_anew():
    game = Game(HybridTrainerConfig(), HybridTrainerConfig())
    game.play(1)
    early = copy.deepcopy(game.generating.state_dict())
    game.play(10)
    late = copy.deepcopy(game.generating.state_dict())
    for state in (early, late):
        other = Game(HybridTrainerConfig(), HybridTrainerConfig())
        other.generating.load_state_dict(state)
        assert bool(other.generating.engine.snapshots) == (state is early)
        other.play(3)
        assert other.generating.engine.snapshots == other.telling.engine.snapshots == 0


def test_what_is_no_game_is_none():
    x, y = digits()
    torch.manual_seed(0)
    student, alone = mlp(64, 32, 10), mlp(64, 32, 10)
    teacher = copy.deepcopy(student)
    trainers = [HybridTrainer(m, torch.optim.Adam(m.parameters(), 1e-2)) for m in (student, alone)]
    # A tensor that is not a parameter, and is written in each step.
    shift = torch.zeros(64, requires_grad=True)
    for step in range(600):
        batch = torch.arange(64) + 64 * (step % 28)
        with torch.no_grad():
            shift.normal_(std=0.01)
            target = teacher(x[batch]).softmax(1)
        trainers[0].step(
            lambda batch=batch, target=target: (
                F.cross_entropy(student(x[batch] + shift), y[batch])
                + F.cross_entropy(student(x[batch]), target)
            )
        )
        trainers[1].step(lambda batch=batch: F.cross_entropy(alone(x[batch]), y[batch]))
        with torch.no_grad():
            for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
                slow.lerp_(fast, 0.01)
    for trainer in trainers:
        assert trainer.statistics().outer_steps > 10
        assert trainer.statistics().predicted_steps > 10


def test_a_full_batch_with_two_optimizers_has_no_jumps():
    x, y = digits()
    torch.manual_seed(0)
    model = mlp(64, 16, 10)
    first = torch.optim.Adam(model[0].parameters(), 1e-2)
    second = torch.optim.Adam(model[2].parameters(), 1e-2)
    trainer = HybridTrainer(model, first, BRISK)
    for _ in range(150):
        trainer.step(lambda: F.cross_entropy(model(x), y))
        second.step()
        second.zero_grad()
    assert trainer.statistics().full_steps == 150


def test_a_jump_of_the_others_trainer_is_taken_back():
    model, optimizer, closure = regression()
    jumping = HybridTrainer(model, optimizer, dataclasses.replace(BRISK, secant_pairs=0))
    while not (jumping.engine.may_roll_back and jumping.engine.phase is Phase.PREDICT):
        jumping.step(closure)
    before = jumping._hands.before_the_jump()[0]
    assert not torch.equal(before["weight"], model.weight)
    head = nn.Linear(10, 2)
    other = HybridTrainer(head, torch.optim.Adam(head.parameters(), 1e-3))
    x, _ = digits()
    for _ in range(4):
        other.step(lambda: head(model(x)).square().mean())
        with torch.no_grad():
            model.bias.add_(0.0)
    assert jumping.engine.snapshots == other.engine.snapshots == 0
    assert all(map(torch.equal, before.values(), model.state_dict().values()))
    for _ in range(30):
        assert not jumping.step(closure).was_predicted


def test_an_average_that_is_shown_stays_so():
    x, _ = digits()
    model, optimizer, closure = regression()
    averaging = HybridTrainer(model, optimizer)
    for _ in range(60):
        averaging.step(closure)
    own = model.weight.detach().clone()
    head = nn.Linear(10, 2)
    trainer = HybridTrainer(head, torch.optim.Adam(head.parameters(), 1e-3))
    with averaging.averaged():
        for _ in range(6):
            trainer.step(lambda: head(model(x)).square().mean())
            with torch.no_grad():
                model.bias.add_(0.0)
        with pytest.raises(ProtocolError):
            averaging.step(closure)
    assert trainer.engine.snapshots == 0
    assert torch.equal(own, model.weight)


@pytest.mark.parametrize("change", ["unfreeze", "add"])
def test_what_has_just_come_into_the_optimizer_is_the_trainers_own(change):
    x, y = digits()
    torch.manual_seed(0)
    model = mlp(64, 32, 10)
    first = model[0].parameters()
    if change == "unfreeze":
        model[0].requires_grad_(False)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    else:
        optimizer = torch.optim.Adam(model[2].parameters(), 1e-2)
    # Little is copied, so that it is not looked for what is new in most steps.
    config = HybridTrainerConfig(averaging=False, outer_momentum=False, secant_pairs=0)
    trainer = HybridTrainer(model, optimizer, config)
    for step in range(60):
        if step == 5:
            model[0].requires_grad_(True)
            if change == "add":
                optimizer.add_param_group({"params": list(first)})
        batch = torch.arange(64) + 64 * (step % 28)
        trainer.step(lambda batch=batch: F.cross_entropy(model(x[batch]), y[batch]))
    assert trainer.engine.snapshots > 0
