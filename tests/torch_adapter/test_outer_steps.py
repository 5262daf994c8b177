"""Outer steps on real mini-batches, against the loop that a user would write for them."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from problems import digits, left_by, noisy, weights
from torch import nn

from hybridcore import Action, Directive, HybridTrainerConfig, Phase
from hybridcore.outer import INTERVAL, RATE, REACH, SHARE, newest_weight
from hybridcore_torch import HybridTrainer


class Adam(torch.optim.Adam):
    """Remembers the rates that its steps are taken at."""

    def step(self, closure=None):
        self.taken = [float(group["lr"]) for group in self.param_groups]
        return super().step(closure)


@pytest.fixture
def trusting(monkeypatch):
    """Outer steps that go on being trusted, whatever they do to the loss."""
    monkeypatch.setattr("hybridcore.outer.UNBEARABLE", 1e9)


@pytest.mark.parametrize("averaging", [True, False])
def test_the_weights_move_by_the_outer_step(averaging):
    """At once, or before the next batch where that weighs it."""
    trainer, closure, _ = noisy(config=HybridTrainerConfig(averaging=averaging))
    outer = trainer.engine.controller.outer
    seen, left = [], left_by(trainer.optimizer, trainer.model)

    def watched():
        seen.append(weights(trainer.model))
        return closure()

    start = momentum = None
    number = last = 0
    checked, strengths = [0, 0], set()
    for _ in range(900):
        weighed, held, before = outer.pending, outer._snapshots, weights(trainer.model)
        # All others have been taken in the step before.
        assert outer.to_be_weighed or not weighed
        strength = outer.strength
        count = trainer.statistics().outer_steps
        result = trainer.step(watched)
        if result.was_predicted:
            # No batch: the weights stay where the outer steps have led.
            seen.append(weights(trainer.model))
        moved = trainer.statistics().outer_steps - count
        assert moved or not weighed
        if not weighed:
            assert all(map(torch.equal, seen[-1], before))
        if moved:
            if weighed:
                after = seen[-1]
            else:
                before, after, strength = left[-1], weights(trainer.model), outer.strength
            number += 1
            newest, old = newest_weight(number), newest_weight(number - 1)
            kept = (1.0 - old) * newest / old * min(1.0, strength / last) if last else 0.0
            push, rate = strength * REACH * SHARE * newest, 1.0 + strength * (RATE - 1.0)
            momentum = [
                kept * m + push * (w - s) for m, w, s in zip(momentum, before, start, strict=True)
            ]
            start = [
                s + rate * (w - s) + m for s, w, m in zip(start, before, momentum, strict=True)
            ]
            for found, expected in zip(after, start, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            start, last = after, strength
            strengths.add(strength)
            checked[weighed] += 1
        elif not result.was_predicted:
            assert all(map(torch.equal, left[-1], weights(trainer.model)))
        if outer._snapshots == 1 != held:
            number, last, start = 0, 0.0, weights(trainer.model)
            momentum = [torch.zeros_like(w) for w in before]
    assert sum(checked) > 0.5 * 900 / INTERVAL
    assert min(checked) > 10
    # The loss on the batches says how strong they are.
    assert len(strengths) > 3


def test_an_optimizer_that_averages_by_itself_is_left_to_it(caplog):
    schedulefree = pytest.importorskip("schedulefree", reason="needs the extra [bench]")
    left = []
    for config in (HybridTrainerConfig(), HybridTrainerConfig(enabled=False)):
        trainer, closure, _ = noisy(config=config, optimizer=schedulefree.AdamWScheduleFree)
        trainer.optimizer.train()
        for step in range(600):
            trainer.step(closure)
            if step % 60 == 59:
                # As to evaluate it.
                trainer.optimizer.eval()
                trainer.optimizer.train()
        trainer.optimizer.eval()
        left.append(weights(trainer.model))
        assert trainer.statistics().full_steps == 600
    assert all(map(torch.equal, *left))
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


@pytest.mark.parametrize("tensor", [False, True])
def test_full_steps_pay_by_their_rate_for_predicted_ones(tensor, trusting):
    trainer, closure, _ = noisy(steps=1600, optimizer=Adam)
    (group,) = trainer.optimizer.param_groups
    if tensor:
        group["lr"] = torch.tensor(group["lr"])
    scales, highest = [], 0.0
    for _ in range(1600):
        scheduled, held = float(group["lr"]), group["lr"]
        trainer.optimizer.taken = []
        result = trainer.step(closure)
        taken = trainer.optimizer.taken
        assert not tensor or group["lr"] is held
        assert result.metrics["learning_rate"] == scheduled
        assert len(taken) == (not result.was_predicted)
        highest = max(highest, scheduled)
        if taken and scheduled:
            scales.append(taken[0] / scheduled)
            assert taken[0] <= highest * (1.0 + 1e-6)
    assert group["lr"] == pytest.approx(0.0, abs=1e-9)
    assert min(scales) == pytest.approx(1.0)
    assert 1.2 < max(scales) < 1.4
    statistics = trainer.statistics()
    predicted, paid = statistics.predicted_steps, sum(scales) - len(scales)
    assert paid < predicted < paid + 2 * statistics.outer_steps
    assert predicted > 0.13 * 1600


@pytest.mark.parametrize("alike", [True, False])
def test_no_group_is_taken_beyond_its_highest_rate(alike, trusting):
    """Under warm restarts, where the second group follows the first and where it stays."""
    first = lambda step: 1.0 - 0.9 * (step % 97) / 97  # noqa: E731
    trainer, closure, _ = noisy(
        groups=2,
        schedule=[first, first if alike else lambda step: 1.0],
        rate=2e-2,
        optimizer=Adam,
    )
    optimizer = trainer.optimizer
    highest, scales = [0.0, 0.0], []
    for _ in range(900):
        scheduled = [group["lr"] for group in optimizer.param_groups]
        optimizer.taken = []
        trainer.step(closure)
        highest = [max(pair) for pair in zip(highest, scheduled, strict=True)]
        if optimizer.taken:
            taken = list(zip(optimizer.taken, scheduled, highest, strict=True))
            scales += [rate / own for rate, own, _ in taken]
            assert all(rate <= most * (1.0 + 1e-12) for rate, _, most in taken)
    assert min(scales) == pytest.approx(1.0)
    assert max(scales) > 1.2 if alike else max(scales) == 1.0


@pytest.mark.parametrize("kind", [torch.optim.Adam, Adam])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("relative", [False, True])
def test_a_schedule_that_hooks_step_goes_on(relative, before, kind, trusting):
    """One step of it for each update: two where an optimizer's step calls that of its parent."""
    trainer, closure, _ = noisy(optimizer=kind)
    optimizer = trainer.optimizer
    if relative:
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.999)
    else:
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.999**k)
    (group,) = optimizer.param_groups
    updates = []

    def scheduled(*_):
        schedule.step()
        updates.append(None)

    hook = optimizer.register_step_pre_hook if before else optimizer.register_step_post_hook
    hook(scheduled)
    with warnings.catch_warnings():
        # torch: that a schedule is stepped before its optimizer.
        warnings.simplefilter("ignore")
        for _ in range(900):
            trainer.step(closure)
            # By the last digit, or by a step of it where the factor was as small as that.
            assert group["lr"] == pytest.approx(1e-2 * 0.999 ** len(updates), rel=5e-3)
    assert trainer.engine.controller.outer.allowance.paid > 0.5


def test_a_schedule_that_drops_the_rate_in_a_step_at_none_has_dropped_it():
    trainer, closure, _ = noisy()
    optimizer = trainer.optimizer
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.1 if k else 1.0)
    optimizer.register_step_post_hook(lambda *_: schedule.step())
    closure().backward()
    before = weights(trainer.model)
    trainer._hands.stepper.follow()
    assert all(map(torch.equal, weights(trainer.model), before))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)


def test_a_rate_that_the_closure_sets_is_not_gone_beyond_either(trusting):
    trainer, closure, _ = noisy(optimizer=Adam)
    (group,) = trainer.optimizer.param_groups
    scales = []
    for step in range(900):
        rate = 1e-2 * (1.0 - 0.9 * (step % 97) / 97)

        def setting():
            group["lr"] = rate  # noqa: B023
            return closure()

        trainer.optimizer.taken = []
        result = trainer.step(setting)
        if trainer.optimizer.taken:
            (taken,) = trainer.optimizer.taken
            assert result.metrics["learning_rate"] == rate
            assert taken <= 1e-2 * (1.0 + 1e-12)
            scales.append(taken / rate)
    assert max(scales) > 1.1


def test_a_group_that_has_just_been_added_is_taken_at_its_own_rate(trusting):
    trainer, closure, _ = noisy(steps=1000, optimizer=Adam)
    optimizer, late = trainer.optimizer, torch.nn.Parameter(torch.zeros(()))
    for _ in range(600):
        trainer.step(closure)
    while not trainer.engine._quiet or trainer.engine._quiet_step.learning_rate_scale == 1.0:
        trainer.step(closure)
    optimizer.add_param_group({"params": [late], "lr": 1e-3})
    for _ in range(30):
        optimizer.taken, own = [], optimizer.param_groups[1]["lr"]
        trainer.step(lambda: closure() + 0.0 * late)
        assert optimizer.taken[1:] in ([], [own])


@pytest.mark.parametrize("kind", ["exact", "bfloat16", "int8"])
def test_they_are_weighed_where_they_lead_without_a_copy(kind):
    trainer, closure, _ = noisy(config=HybridTrainerConfig(snapshot_kind=kind))
    seen, held = [], []

    def watched():
        seen.append(weights(trainer.model))
        snapshots = trainer._hands.snapshots
        held.append(None if snapshots is None else snapshots.nbytes)
        return closure()

    weighed = 0
    for _ in range(500):
        count = trainer.statistics().outer_steps
        seen.clear()
        held.clear()
        trainer.step(watched)
        if trainer.statistics().outer_steps > count and len(seen) == 3:
            here, there, taken = seen
            weighed += 1
            assert not all(map(torch.equal, here, there))
            assert all(map(torch.equal, there, taken))
            assert held[1] == held[0]
    assert weighed >= 8


@pytest.mark.parametrize(
    ("kind", "weighed"),
    [("exact", True), ("exact", False), ("bfloat16", True), ("int8", True)],
)
def test_one_that_leads_to_no_number_is_taken_back_to_the_last_bit(kind, weighed):
    trainer, closure, _ = noisy(config=HybridTrainerConfig(snapshot_kind=kind))
    outer, bad = trainer.engine.controller.outer, [math.nan, math.inf]
    left = left_by(trainer.optimizer, trainer.model)
    walled, passes, returns = False, [], 0

    def loss():
        """From a step on there is none but where the loop's own steps left the weights."""
        passes.append(not walled or all(map(torch.equal, weights(trainer.model), left[-1])))
        return closure() if passes[-1] else closure() * bad[returns % 2]

    for step in range(900):
        walled = step > 300
        # One that has been weighed often, and not for long, is not weighed.
        state = {"weighed": [0, 0] if weighed else [10, 1]} if walled else {}
        outer.load_state_dict(outer.state_dict() | state)
        passes.clear()
        result = trainer.step(loss)
        if "outer step taken back" in {event["event"] for event in result.events}:
            returns += 1
            assert passes == ([True, False, True] if weighed else [True])
            assert not outer.active
    assert returns >= 3
    assert trainer.statistics().divergences == (0 if weighed else 2 * returns)


@pytest.mark.parametrize(("momentum", "most"), [(0.01, 0.1), (0.05, 0.1), (0.1, 0.1), (0.3, 0.3)])
def test_averages_of_many_batches_forget_faster_behind_them(momentum, most, trusting):
    x, y = digits()
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(64, momentum=momentum)
    model = nn.Sequential(norm, nn.Linear(64, 10))
    trainer = HybridTrainer(model, torch.optim.Adam(model.parameters(), 1e-2))
    shares = []
    for _ in range(260):
        batch, full_steps = torch.randint(0, 1200, (16,)), trainer.statistics().full_steps
        before = norm.running_mean.clone()
        trainer.step(lambda batch=batch: F.cross_entropy(model(x[batch]), y[batch]))
        if trainer.statistics().full_steps > full_steps:
            away, moved = x[batch].mean(0) - before, norm.running_mean - before
            share = float(moved @ away / (away @ away))
            torch.testing.assert_close(moved, share * away, rtol=1e-3, atol=1e-6)
            # The first one is weighed, and so taken where a step begins.
            shares.append((trainer.statistics().outer_steps > 0, share))
    assert sum(pushed for pushed, _ in shares) > 40
    assert all(share == pytest.approx(momentum, rel=1e-3) for pushed, share in shares if not pushed)
    faster = sorted(share for pushed, share in shares if pushed)
    assert faster[len(faster) // 2] == pytest.approx(most, rel=1e-3) == faster[-1]


@pytest.mark.parametrize("momentum", [0.01, 0.05])
def test_they_hasten_averages_of_parts_no_further_than_to_the_batches(momentum, trusting):
    x, y = digits()
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(64, momentum=momentum)
    model = nn.Sequential(norm, nn.Linear(64, 10))
    trainer = HybridTrainer(model, torch.optim.Adam(model.parameters(), 1e-2))
    for _ in range(260):
        parts = torch.randint(0, 1200, (24, 8))
        trainer.step([lambda p=p: F.cross_entropy(model(x[p]), y[p]) for p in parts])
    assert trainer.statistics().outer_steps > 5
    assert (norm.running_var >= 0.0).all()
    torch.testing.assert_close(norm.running_mean, x[:1200].mean(0), rtol=0.0, atol=0.2)


def test_a_falling_rate_is_passed_faster():
    """On five seeds: lower held-out loss than the plain loop's under the same linear schedule.

    And that in fewer backward passes.
    """
    ahead = saved = 0
    for seed in range(5):
        ends = []
        for wanted in (True, False):
            config = HybridTrainerConfig(outer_momentum=wanted)
            trainer, closure, held_out = noisy(seed, config, rate=1e-3, steps=800)
            for _ in range(800):
                trainer.step(closure)
            ends.append(held_out())
            assert (trainer.statistics().outer_steps > 0) == wanted
            predicted = trainer.statistics().predicted_steps
            assert predicted < 0.2 * 800 if wanted else predicted == 0
            saved += predicted
        ahead += ends[0] < ends[1]
    assert ahead >= 4
    assert saved > 0


@pytest.mark.parametrize("weighed", [False, True])
def test_one_that_is_interrupted_at_its_end_is_not_taken_twice(weighed, monkeypatch, trusting):
    trainer, closure, _ = noisy()
    engine, hands, seen = trainer.engine, trainer._hands, []
    outer, observe = engine.controller.outer, engine.observe

    def watched():
        seen.append(weights(trainer.model))
        return closure()

    def interrupted(observation):
        if hands._moving and outer.to_be_weighed == weighed:
            raise KeyboardInterrupt
        observe(observation)

    monkeypatch.setattr(engine, "observe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        [trainer.step(watched) for _ in range(500)]
    moved = weights(trainer.model)
    # Its batch, or the newest before it, has seen other weights.
    assert not all(map(torch.equal, seen[-1], moved))
    monkeypatch.setattr(engine, "observe", observe)
    trainer.step(watched)
    assert all(map(torch.equal, seen[-1], moved))


def held(stays, steps):
    """A network on batches of digits each of which stays for so many steps; the trainer."""
    x, y = digits()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    trainer = HybridTrainer(model, torch.optim.Adam(model.parameters(), 1e-3))
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        if step % stays == 0:
            batch = torch.randint(0, 1200, (64,), generator=generator)
        trainer.step(lambda b=batch: torch.nn.functional.cross_entropy(model(x[b]), y[b]))
    return trainer


@pytest.mark.parametrize("stays", [1, 20, 60])
def test_there_are_none_where_a_batch_stays_for_several_steps(stays):
    statistics = held(stays, 500).statistics()
    assert (statistics.outer_steps > 0) == (stays == 1)
    assert statistics.secant_steps == 0


def test_they_end_where_batches_begin_to_stay():
    trainer = held(1, 400)
    assert trainer.engine.controller.outer.active
    x, y = digits()
    for step in range(1000):
        batch = slice(64 * (step // 40 % 16), 64 * (step // 40 % 16) + 64)
        trainer.step(
            lambda batch=batch: torch.nn.functional.cross_entropy(trainer.model(x[batch]), y[batch])
        )
        controller = trainer.engine.controller
        assert not (controller.secant.repeats and controller.outer.active)
    # It is seen by the next look, within 800 steps.
    assert controller.secant.repeats


@pytest.mark.parametrize("in_passes", [False, True])
def test_an_outer_step_to_where_the_loss_raises_is_taken_back(in_passes, trusting):
    """Where a probe would have shown it, and where only a pass with its gradients does."""
    trainer, closure, _ = noisy()
    left = left_by(trainer.optimizer, trainer.model)
    raised, beyond = 0, False

    def fragile():
        nonlocal raised
        here = weights(trainer.model)[0]
        # Looks for repeated batches go a few steps back.
        moved = beyond and not any(torch.equal(here, w[0]) for w in left[-50:])
        if moved and (torch.is_grad_enabled() or not in_passes):
            raised += 1
            raise ValueError("scale must be positive")
        return closure()

    while trainer.statistics().outer_steps < 15:
        trainer.step(fragile)
    beyond = True
    for _ in range(300):
        trainer.step(fragile)
    assert raised > 5
    assert trainer.statistics().outer_steps > 20
    assert all(map(torch.equal, weights(trainer.model), left[-1]))


def test_what_the_optimizer_raises_is_the_users_to_see(trusting):
    trainer, closure, _ = noisy()
    while trainer.statistics().outer_steps < 5 or not trainer._hands.moved:
        trainer.step(closure)

    raised = []

    def raises(*_):
        raised.append(1)
        raise RuntimeError("of the optimizer")

    trainer.optimizer.register_step_pre_hook(raises)

    def go_on():
        for _ in range(20):
            trainer.step(closure)

    with pytest.raises(RuntimeError, match="of the optimizer"):
        go_on()
    assert len(raised) == 1


def on_three_tasks(seed, config):
    """Digits whose pixels are permuted anew: losses early in two tasks, and at the end."""
    x, y = digits()
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    trainer = HybridTrainer(model, torch.optim.Adam(model.parameters(), 2e-3), config)
    generator, found = torch.Generator().manual_seed(seed), []
    for task in range(3):
        order = torch.randperm(64, generator=torch.Generator().manual_seed(task))
        inputs = x[:, order]

        def closure():
            return F.cross_entropy(model(inputs[batch]), y[batch])  # noqa: B023

        for step in range(600):
            batch = torch.randint(0, len(x), (64,), generator=generator)
            trainer.step(closure)
            if (task and step == 99) or (task == 2 and step == 599):
                with torch.no_grad():
                    found.append(float(F.cross_entropy(model(inputs), y)))
    return found, trainer.statistics().outer_steps


def test_other_data_are_learned_as_fast_as_by_the_plain_loop():
    both = []
    for config in (HybridTrainerConfig(enabled=False), HybridTrainerConfig()):
        runs = [on_three_tasks(seed, config) for seed in range(4)]
        both.append(torch.tensor([losses for losses, _ in runs]).T)
    assert all(outer_steps > 60 for _, outer_steps in runs)
    plain, ours = both
    assert ours[:2].mean() < 1.15 * plain[:2].mean()
    assert ours[2].mean() < 0.85 * plain[2].mean()
    assert (ours[2] < 1.1 * plain[2]).all()


def just_moved(trainer, closure):
    """Train until an outer step has led to where the weights are."""
    while trainer.statistics().outer_steps < 5 or not trainer._hands.moved:
        trainer.step(closure)
    return weights(trainer.model)


def test_a_resumed_run_gives_up_where_an_outer_step_has_led_too(trusting):
    first, closure, _ = noisy()
    there = just_moved(first, closure)

    def fragile():
        if all(map(torch.equal, weights(other.model), there)):
            raise ValueError("scale must be positive")
        return own()

    other, own, _ = noisy()
    other.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in range(20):
        other.step(fragile)
    assert other.statistics().divergences > 0
    assert not all(map(torch.equal, weights(other.model), there))
    # Once a good batch has followed, what raises is no fault of the outer step.
    just_moved(first, closure)
    for _ in range(20):
        if first._hands.moved:
            first.step(closure)
    assert not first._hands.moved
    there = weights(first.model)
    other, own, _ = noisy()
    other.load_state_dict(copy.deepcopy(first.state_dict()))
    with pytest.raises(ValueError, match="scale must be positive"):
        [other.step(fragile) for _ in range(20)]


def test_a_state_with_outer_steps_of_an_optimizer_that_averages_loads_without(monkeypatch):
    schedulefree = pytest.importorskip("schedulefree", reason="needs the extra [bench]")
    with monkeypatch.context() as patch:
        patch.setattr("hybridcore_torch.trainer.averages", lambda optimizer: False)
        before, closure, _ = noisy(optimizer=schedulefree.AdamWScheduleFree)
        before.optimizer.train()
        while before.engine.phase is not Phase.PREDICT:
            before.step(closure)
    trainer, closure, _ = noisy(optimizer=schedulefree.AdamWScheduleFree)
    trainer.load_state_dict(copy.deepcopy(before.state_dict()))
    trainer.optimizer.train()
    predicted, moved = trainer.statistics().predicted_steps, trainer.statistics().outer_steps
    for _ in range(300):
        trainer.step(closure)
    assert trainer.statistics().predicted_steps == predicted
    assert trainer.statistics().outer_steps == moved


def test_what_accelerate_has_prepared_does_not_average_for_that():
    accelerate = pytest.importorskip("accelerate", reason="needs the extra [huggingface]")
    trainer, closure, _ = noisy()
    optimizer = accelerate.Accelerator(cpu=True).prepare(trainer.optimizer)
    trainer = HybridTrainer(trainer.model, optimizer, callbacks=trainer.callbacks)
    for _ in range(400):
        trainer.step(closure)
    assert trainer.statistics().outer_steps > 10


def test_weights_that_were_set_aside_come_back_where_the_mark_raises(trusting):
    trainer, closure, _ = noisy()
    mark = just_moved(trainer, closure)
    hands = trainer._hands
    hands.snapshots.save()
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(1.0)
    away = weights(trainer.model)

    def fragile():
        if all(map(torch.equal, weights(trainer.model), mark)):
            raise ValueError("scale must be positive")
        return closure()

    with pytest.raises(ValueError, match="scale must be positive"):
        hands.carry_out(Directive(Action.PROBE, own_batch=True, at_mark=True), fragile)
    assert all(map(torch.equal, weights(trainer.model), away))
